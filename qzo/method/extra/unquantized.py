"""Training what is not quantized: norms, biases of quantized layers, the head.

Modules stay as they are. A hook changes what they return, for the tokens of each probe as its
values say: with ``b`` the bias of a norm or a head, ``y <- (y - b) m + b``, computed in fp32 and
rounded once.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from qzo.errors import CheckpointError, ConfigError
from qzo.method.extra.section import Section
from qzo.model.kernels.uploads import Resident
from qzo.model.linear import Live, QuantLinear, token_bounds
from qzo.model.load import decoder_blocks, quant_linears
from qzo.model.pretrained import stored_key


def unquantized_sections(
    model: PreTrainedModel,
    layers: Sequence[QuantLinear],
    kinds: Sequence[str],
    factor: float,
) -> dict[Section, nn.Module]:
    """Return the sections of a model's unquantized tensors, and the module of each.

    Args:
        model: What is trained of it has been chosen.
        layers: Those whose scales are trained; their biases are.
        kinds: Some of ``norms``, ``biases`` and ``head``.
        factor: Of all these sections.
    """
    found: dict[Section, nn.Module] = {}
    if "norms" in kinds:
        found |= _norm_sections(model, layers[0].live, factor)
    if "biases" in kinds:
        found |= _bias_sections(model, layers, factor)
    if "head" in kinds:
        found |= _head_section(model, factor)
    return found


def _norm_sections(model: PreTrainedModel, live: Live, factor: float) -> dict[Section, nn.Module]:
    trained = {part for block in live.trained for part in block.modules()}
    inside = {part for block in decoder_blocks(model) for part in block.modules()}
    norms = {name: module for name, module in model.named_modules() if _is_norm(module)}
    if len(live.trained) == len(live.forked):  # up to the last block, so what follows it is too
        outside = [module for module in norms.values() if module not in inside]
        trained |= set(outside) - _in_front(model, outside)
    return {
        Section(
            stored_key(model, f"{name}.weight"),
            "norm",
            tuple(norm.weight.shape),
            factor=factor,
            offset=_offset(name, norm),
        ): norm
        for name, norm in norms.items()
        if norm in trained
    }


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("Norm") and weight is not None and weight.dim() == 1


class _Reached(Exception):  # noqa: N818  # no error: ends a forward pass
    """The first decoder block is about to run."""


def _in_front(model: PreTrainedModel, modules: Sequence[nn.Module]) -> set[nn.Module]:
    """Return the modules that run before the decoder blocks, found by a forward pass up to them."""
    seen: set[nn.Module] = set()

    def stop(*_: Any) -> None:
        raise _Reached

    hooks = [decoder_blocks(model)[0].register_forward_pre_hook(stop, prepend=True)]
    hooks += [module.register_forward_pre_hook(lambda m, _: seen.add(m)) for module in modules]
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _offset(name: str, norm: nn.Module) -> float:
    """Return what a norm adds to its weight before it multiplies: 0, or 1 as in Gemma.

    Raises:
        ConfigError: It does something else with its weight.
    """
    size = norm.get_parameter("weight").numel()
    x = torch.arange(1.0, size + 1)[None]
    try:
        at_zero, at_one = (_with_weight(norm, x, torch.full((size,), w)) for w in (0.0, 1.0))
    except (TypeError, AttributeError, RuntimeError):
        at_zero = at_one = x  # neither
    if not at_zero.any() and at_one.any():
        return 0.0
    if torch.allclose(2 * at_zero, at_one):
        return 1.0
    raise ConfigError(
        f"zo.unquantized: expected norms that multiply by their weight, or by 1 plus it, found "
        f"{name}, a {type(norm).__name__}; leave 'norms' out"
    )


def _with_weight(
    norm: nn.Module, x: Float[Tensor, "1 size"], weight: Float[Tensor, " size"]
) -> Float[Tensor, "1 size"]:
    """Return what a norm would return with another weight and no bias."""
    twin = copy.copy(norm)
    zeros = {key: torch.zeros_like(weight) for key, p in norm._parameters.items() if p is not None}
    values = {key: nn.Parameter(tensor) for key, tensor in (zeros | {"weight": weight}).items()}
    twin._parameters = {**norm._parameters, **values}
    result: Tensor = twin.forward(x)  # without hooks
    return result.detach()


def _bias_sections(
    model: PreTrainedModel, layers: Sequence[QuantLinear], factor: float
) -> dict[Section, nn.Module]:
    checkpoint = getattr(model, "qzo_checkpoint", None)
    found: dict[Section, nn.Module] = {}
    for layer in layers:
        if layer.bias is not None:
            key, shape = f"{layer.name}.bias", tuple(layer.bias.shape)
            bias = layer.bias if checkpoint is None else checkpoint.tensors[key]
            unit = float(bias.double().cpu().square().mean().sqrt()) or 1.0  # whatever the dtype
            found[Section(key, "bias", shape, unit=unit, factor=factor)] = layer
    if not found:
        raise ConfigError(
            "zo.unquantized: expected quantized layers with biases, found none; leave 'biases' out"
        )
    return found


def _head_section(model: PreTrainedModel, factor: float) -> dict[Section, nn.Module]:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, QuantLinear):
        raise ConfigError(
            "zo.unquantized: expected an unquantized head, found a quantized one, whose scales are "
            "trained with the others; leave 'head' out"
        )
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"zo.unquantized: expected a linear layer as head, found {type(head).__name__}; leave "
            "'head' out"
        )
    shared = embedding.weight
    assert isinstance(shared, Tensor)
    if head.weight is shared or head.weight.data_ptr() == shared.data_ptr():
        raise ConfigError(
            "zo.unquantized: expected a head with a matrix of its own, found one that shares it "
            "with the embeddings, which would change too; leave 'head' out"
        )
    name = next(name for name, module in model.named_modules() if module is head)
    key = stored_key(model, f"{name}.weight")
    return {Section(key, "head", (head.out_features,), factor=factor): head}


def seeing_sections(
    live: Live, modules: Mapping[Section, nn.Module], first: int = 0
) -> list[RemovableHandle]:
    """Let modules see the values of their sections, which begin with number ``first``."""
    return [
        module.register_forward_hook(
            partial(_add if section.kind == "bias" else _multiply, live, number, section.name)
        )
        for number, (section, module) in enumerate(modules.items(), start=first)
    ]


def _multiply(
    live: Live, number: int, name: str, module: nn.Module, _: Any, y: Float[Tensor, "*batch size"]
) -> Float[Tensor, "*batch size"]:
    if live.sections is None:
        return y
    factors = live.sections(number)
    bias = getattr(module, "bias", None)
    for of_probe, part in zip(factors, _by_probe(name, live, y, len(factors)), strict=True):
        if bias is None:
            part.mul_(of_probe)
        else:
            part.copy_(part.float().sub_(bias).mul_(of_probe).add_(bias))
    return y


def _add(
    live: Live, number: int, name: str, _module: nn.Module, _: Any, y: Float[Tensor, "*batch size"]
) -> Float[Tensor, "*batch size"]:
    if live.sections is None:
        return y
    offsets = live.sections(number)
    for of_probe, part in zip(offsets, _by_probe(name, live, y, len(offsets)), strict=True):
        part.add_(of_probe)
    return y


def _by_probe(
    name: str, live: Live, y: Float[Tensor, "*batch size"], num_probes: int
) -> list[Float[Tensor, "..."]]:
    """Return the tokens of each probe as views.

    A norm of queries or keys sees ``(rows, width, heads, size)``, or in some models ``(rows, heads,
    width, size)``.

    Raises:
        CheckpointError: The two cannot be told from each other.
    """
    if num_probes == 1:
        return [y]
    num_tokens = live.bounds[-1] if live.bounds else 0
    by_width = y.shape[:-1].numel() if y.dim() < 4 else y.shape[0] * y.shape[1]
    is_transposed = y.dim() == 4 and y.shape[0] * y.shape[2] == num_tokens
    if is_transposed and by_width == num_tokens:
        raise CheckpointError(
            f"{name}: expected a number of tokens that is not the number of heads, got "
            f"{num_tokens}; change per_device_train_batch_size"
        )
    if is_transposed:
        y, by_width = y.transpose(1, 2), num_tokens
    bounds = token_bounds(name, live, by_width, num_probes)
    if y.dim() > 2 and y.shape[0] == 1:
        return [y[0, start:stop] for start, stop in pairwise(bounds)]
    width = y.shape[1] if y.dim() > 2 else 1
    return [y[start // width : stop // width] for start, stop in pairwise(bounds)]


def replacing_tensors(
    model: PreTrainedModel, live: Live, tensors: Mapping[str, Tensor]
) -> list[RemovableHandle]:
    """Let modules compute with other tensors than their own, except while training looks.

    Args:
        model: Its own tensors stay as they are.
        live: What its layers see.
        tensors: By their keys in the files.

    Raises:
        CheckpointError: The model has no such tensor.
    """
    hooks: list[RemovableHandle] = []
    layers = {layer.name: layer for layer in quant_linears(model)}
    modules = dict(model.named_modules())
    for key, tensor in tensors.items():
        name, _, role = key.rpartition(".")
        module = layers.get(name) or modules.get(name)
        module = module or modules.get(f"{model.base_model_prefix}.{name}")
        own = getattr(module, role, None)
        if module is None or not isinstance(own, Tensor) or own.shape != tensor.shape:
            raise CheckpointError(
                f"{key}: expected a tensor of this shape in the model, {tuple(tensor.shape)}, "
                "found none; the adapter belongs to another base"
            )
        hooks += _swap(live, module, role, tensor)
    return hooks


def _swap(live: Live, module: nn.Module, role: str, tensor: Tensor) -> list[RemovableHandle]:
    own: list[Tensor] = []
    tuned = Resident(tensor)

    def before(_: nn.Module, _inputs: Any) -> None:
        if live.effective is None:
            held = getattr(module, role)
            own.append(held.data)
            held.data = tuned.on(held.device, held.dtype)

    def after(_: nn.Module, _inputs: Any, _output: Any) -> None:
        if own:
            getattr(module, role).data = own.pop()

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]
