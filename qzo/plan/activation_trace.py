"""What a forward or a backward keeps alive, traced on the meta device: no weights, no device.

It is traced, not guessed from config keys: the model runs on meta tensors under a dispatch mode
that adds up the storages alive at once. A quantized layer drops padding, so a linear layer also
counts a copy of its input and its product before the padding is back. For a Llama layer in fp32 the
trace of a forward gives ``4 (5 hidden + 3 intermediate)`` bytes a token: embeddings, layer input,
residual, normed input and its copy; activated gate, up, and up once more. Attention counts by its
output (no ``T x T`` scores) where the model uses SDPA.

Before a backward each block that is trained keeps its part of the graph. What a quantized layer
adds to it is said in ``autograd``: its output where rows have multipliers, its input otherwise.
"""

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from qzo.errors import ConfigError
from qzo.plan.shapes import first_line

_NEEDS_VALUES = (RuntimeError, ValueError, TypeError, NotImplementedError)


def activation_bytes_per_row(model: PreTrainedModel, seq_len: int) -> int:
    """Trace what one more row of the batch keeps alive at the peak of a forward.

    ``peak(2 rows) - peak(1 row)``, without cache, attention mask and head. Tables shared by all
    rows (rotary angles, causal masks) cancel out.

    Args:
        model: A skeleton on the meta device; not modified.
        seq_len: Tokens a row.

    Raises:
        ConfigError: The model's forward needs values, which meta tensors do not have.
    """
    try:
        return _forward_peak(model, 2, seq_len) - _forward_peak(model, 1, seq_len)
    except _NEEDS_VALUES as error:
        raise ConfigError(_untraceable(model, error)) from error


def backward_bytes_per_row(
    model: PreTrainedModel, seq_len: int, layers: Collection[str], coordinates: str
) -> int:
    """Trace what one more row of the batch keeps alive at the peak of a forward and its backward.

    Args:
        model: A skeleton on the meta device; not modified.
        seq_len: Tokens a row.
        layers: Linear layers whose scales get gradients.
        coordinates: How they are trained.

    Raises:
        ConfigError: As above.
    """
    try:
        with _trained(model, layers, coordinates):
            return _backward_peak(model, 2, seq_len) - _backward_peak(model, 1, seq_len)
    except _NEEDS_VALUES as error:
        raise ConfigError(_untraceable(model, error)) from error


def _untraceable(model: PreTrainedModel, error: Exception) -> str:
    return (
        "config.json: expected a model whose forward can be traced without weights, got model_type "
        f"{model.config.model_type!r}; {first_line(error)}"
    )


def _forward_peak(model: PreTrainedModel, num_rows: int, seq_len: int) -> int:
    trace, tokens = _LiveBytes(), _tokens(num_rows, seq_len)
    with torch.inference_mode(), trace:
        model.base_model(input_ids=tokens, use_cache=False)
    return trace.peak


def _backward_peak(model: PreTrainedModel, num_rows: int, seq_len: int) -> int:
    trace, tokens = _LiveBytes(), _tokens(num_rows, seq_len)
    with torch.enable_grad(), trace, _FusedAttention():
        output = model.base_model(input_ids=tokens, use_cache=False)
        output.last_hidden_state.sum().backward()
    return trace.peak


def _tokens(num_rows: int, seq_len: int) -> Tensor:
    return torch.zeros(num_rows, seq_len, dtype=torch.long, device="meta")


@contextmanager
def _trained(model: PreTrainedModel, layers: Collection[str], coordinates: str) -> Iterator[None]:
    """Let layers keep what they keep for a backward: factors stand for what is trained."""

    def factors(size: int, like: Tensor) -> Tensor:
        return torch.ones(size, device="meta", dtype=like.dtype, requires_grad=True)

    def on_input(layer: nn.Linear, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0] * factors(layer.in_features, inputs[0])

    def on_output(layer: nn.Linear, _: object, output: Tensor) -> Tensor:
        return output * factors(layer.out_features, output)

    needs_grad = {name: x.requires_grad for name, x in model.named_parameters()}
    model.requires_grad_(False)
    handles = []
    for name in layers:
        layer: Any = model.get_submodule(name)
        if coordinates != "row":
            handles.append(layer.register_forward_pre_hook(on_input))
        if coordinates in ("row", "rank_one"):
            handles.append(layer.register_forward_hook(on_output))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(needs_grad[name])


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels differentiate it, here a CPU's, of which all keep the same.

    On meta tensors torch takes its formula in parts instead, which keeps ``T x T`` scores.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, 0.0, is_causal=True)[0]


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations create and that are still referenced."""

    peak: int

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch: untyped
        self.live = 0
        self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # "Is nothing padded, is nothing packed?" asks for a value: yes, as in a batch without mask.
        if func is torch.ops.aten.is_nonzero.default:
            return True
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return True
        result = func(*args, **(kwargs or {}))
        known = [
            x.untyped_storage()._cdata
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        ]
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in known:
                self._watch(leaf.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = int(storage._cdata), storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, partial(self._forget, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int, _: object) -> None:
        self.live -= size
        del self._storages[key]
