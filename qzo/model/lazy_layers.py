"""Embeddings and linear layers whose weights stay as they lie in the file.

A checkpoint stores what it does not quantize in 16 bits; a CPU computes in float32. Converting the
embeddings and the head of a 13B model takes 1.3 GB. Here the weight stays a view of the mapped
file, and becomes float32 on use: an embedding gathers rows first, a linear layer converts one tile
of output rows at a time into the buffer that all layers share.

The weight is a buffer of the module, so the parameters of the model all have its dtype.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qzo.model.autograd import frozen_product, is_differentiated
from qzo.model.linear import Live

TILE_ELEMENTS = 2**20  # that are converted at one time; 4 MiB stay in cache until the product


class MappedEmbedding(nn.Embedding):
    """An embedding that converts rows after it gathered them; the same numbers bit for bit.

    Args:
        embedding: Takes its place; the weight is set later.
        dtype: Of the result.
    """

    weight: Tensor  # a buffer, no parameter

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        sizes = embedding.num_embeddings, embedding.embedding_dim
        super().__init__(*sizes, embedding.padding_idx, device="meta")
        _make_buffer(self)
        self.dtype = dtype

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch features"]:
        """Return the rows of some ids."""
        return nn.functional.embedding(input, self.weight).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MappedEmbedding":
        self.dtype = _apply_to_weight(self, fn)
        return self


class MappedLinear(nn.Linear):
    """``y = x W^T + bias``, tile by tile over the rows of ``W``.

    Args:
        linear: Takes its place; the weight is set later.
        dtype: Of the model.
        live: Holds the shared buffer.
    """

    weight: Tensor  # a buffer, no parameter

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, live: Live) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        _make_buffer(self)
        self.bias = linear.bias
        self.dtype = dtype
        self.live = live

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the product."""
        x = input.reshape(-1, self.in_features)
        is_exact = is_differentiated(x)
        y = frozen_product(x, self._values, self._dense_tiles) if is_exact else self._values(x)
        bias: Tensor | None = self.bias  # torch's stubs say that there always is one
        return (y if bias is None else y.add_(bias)).view(*input.shape[:-1], -1)

    def _values(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        y = x.new_empty(len(x), self.out_features)
        for rows, dense in self._dense_tiles(x):
            torch.mm(x, dense.T.to(x.dtype), out=y[:, rows])
        return y

    def _dense_tiles(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the converted matrix, some rows at a time, in a buffer near ``x``."""
        for rows in self._tiles():
            stored = self.weight[rows]
            buffer = self.live.buffer("decoded", stored.numel(), x.device)[: stored.numel()]
            yield rows, buffer.view_as(stored).copy_(stored)

    def _tiles(self) -> Iterator[slice]:
        step = max(TILE_ELEMENTS // self.in_features, 1)
        for start in range(0, self.out_features, step):
            yield slice(start, min(start + step, self.out_features))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MappedLinear":
        self.dtype = _apply_to_weight(self, fn)
        bias: Tensor | None = self.bias
        if bias is not None:
            bias.data = fn(bias.data)
        return self


def _make_buffer(module: nn.Embedding | nn.Linear) -> None:
    weight = module.weight.detach()
    del module.weight
    module.register_buffer("weight", weight)


def _apply_to_weight(module: MappedEmbedding | MappedLinear, fn: Any) -> torch.dtype:
    """Move the weight to another device as it is; return the dtype that the model has now.

    The tensor object stays the same, so what is tied stays tied.
    """
    weight = module.weight
    device = fn(torch.empty(0, dtype=torch.uint8, device=weight.device)).device
    if device != weight.device:
        weight.data = weight.data.to(device)
    dtype: torch.dtype = fn(torch.empty(0, dtype=module.dtype, device=device)).dtype
    return dtype


def keep_stored(
    model: nn.Module, stored: Mapping[str, Tensor], dtype: torch.dtype, live: Live
) -> list[str]:
    """Make room for matrices in the dtype of the file where the model computes in another one.

    A matrix is kept if all modules that hold it (tied ones share it) are plain embeddings or
    linear layers: a class of the model's own may compute with it in other ways.

    Args:
        model: Without weights; its modules are replaced.
        stored: What the file has, by the names of the model.
        dtype: Of the model.
        live: Shared by its layers.

    Returns:
        Names of the tensors to load without converting them.
    """
    kept = []
    for names in _holders(model).values():
        modules = [model.get_submodule(name) for name in names]
        keys = [f"{name}.weight" for name in names if f"{name}.weight" in stored]
        is_plain = all(type(module) in (nn.Embedding, nn.Linear) for module in modules)
        if not is_plain or not any(_is_other_float(stored[key], dtype) for key in keys):
            continue
        for name, module in zip(names, modules, strict=True):
            model.set_submodule(name, _mapped(module, dtype, live))
        kept += keys
    return kept


def _mapped(module: nn.Module, dtype: torch.dtype, live: Live) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return MappedEmbedding(module, dtype)
    assert isinstance(module, nn.Linear)
    return MappedLinear(module, dtype, live)


def _is_other_float(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_floating_point() and tensor.dtype != dtype


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of the modules that hold each matrix."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 2:
            holders.setdefault(id(weight), []).append(name)
    return holders
