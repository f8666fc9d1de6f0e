"""Exact derivatives of products with quantized weights, for torch's autograd in both directions.

With ``W = scales * decoded`` and ``y = x W^T``, for a slope ``g`` of the loss by ``y``:

- ``dx = g W``,
- ``dW = g^T x``; the slope of a scale is the sum of ``dW * decoded`` over its weights,
- along tangents of ``x`` and the scales, ``dy = dx W^T + x (dscales * decoded)^T``.

The forward is the usual product, bit for bit. The derivatives decode the codes again, tile by tile,
so no dense copy of the weights is ever kept. What a backward keeps for each layer from the forward
to the backward: where the scales are trained, its input; where they are not, nothing; where rows
have multipliers, its output before they were applied. A tile costs its buffer, and another of its
size for ``dW``. Sums are in fp32; slopes of activations have the dtype of the activations.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from quantizers.weight import QuantizedWeight

Values = Callable[[Tensor], Tensor]
Tiles = Callable[[Tensor], Iterator[tuple[slice, Tensor]]]


@contextmanager
def tangents() -> Iterator[None]:
    """Let tensors carry tangents while the block runs, as ``forward_ad.dual_level`` does.

    Without the warning that torch gives about its own code at the first tangent.
    """
    with ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            stack.enter_context(forward_ad.dual_level())
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
        yield


def is_differentiated(*tensors: Tensor) -> bool:
    """Tell whether somebody asks how a result depends on one of the tensors."""
    if torch.is_inference_mode_enabled():
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def frozen_product(
    x: Float[Tensor, "tokens in"], values: Values, tiles: Tiles
) -> Float[Tensor, "tokens out"]:
    """Return ``values(x)``, the product with a matrix that is not trained.

    Args:
        x: What may be differentiated.
        values: Gives the product.
        tiles: Gives the matrix for such inputs, some rows at a time, each until the next.
    """
    result: Tensor = _FrozenProduct.apply(x, values, tiles)  # type: ignore[no-untyped-call]
    return result


class _FrozenProduct(torch.autograd.Function):
    """Linear in ``x``, so a tangent goes the way of the values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Values, tiles: Tiles) -> Tensor:
        ctx.values, ctx.tiles, ctx.dtype = values, tiles, x.dtype
        return values(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = slopes
        return _times_rows(slope, ctx.tiles(slope)).to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        assert tangents[0] is not None
        result: Tensor = ctx.values(tangents[0])
        return result


def _times_rows(
    slope: Float[Tensor, "tokens out"], tiles: Iterator[tuple[slice, Tensor]]
) -> Float[Tensor, "tokens in"]:
    """Return ``g W`` in fp32."""
    total: Tensor | None = None
    for rows, dense in tiles:
        part = (slope[:, rows] @ dense.to(slope.dtype)).float()
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


@dataclass(frozen=True)
class ScaledProduct:
    """A product with one set of scales per probe.

    Attributes:
        values: Gives the product of some inputs.
        weight: The codes.
        tiles: Output rows that are decoded at one time.
        bounds: Tokens of probe ``p`` are ``bounds[p]`` to ``bounds[p + 1]``.
        buffer: Gives room by name, for a tile of some rows, on the device of a tensor.
    """

    values: Values
    weight: QuantizedWeight
    tiles: Sequence[slice]
    bounds: Sequence[int]
    buffer: Callable[[str, slice, Tensor], Tensor]

    def __call__(
        self, x: Float[Tensor, "tokens in"], scales: Sequence[Float[Tensor, "scale_rows groups"]]
    ) -> Float[Tensor, "tokens out"]:
        """Return the product, to be differentiated by ``x`` and the scales."""
        result: Tensor = _ScaledProduct.apply(self, x, *scales)  # type: ignore[no-untyped-call]
        return result

    def slopes(
        self,
        slope: Float[Tensor, "tokens out"],
        x: Float[Tensor, "tokens in"] | None,
        scales: Sequence[Float[Tensor, "scale_rows groups"]],
        *,
        has_input: bool,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the slopes of the loss by the inputs, if asked for, and by the scales given ``x``.

        Args:
            slope: By the outputs.
            x: The inputs, or None where no scale is trained.
            scales: Of every probe.
            has_input: Whether the slope by the inputs is asked for.
        """
        of_input = None
        if has_input:
            of_input = slope.new_zeros(len(slope), self.weight.in_features, dtype=torch.float32)
        of_scales = (
            None if x is None else [torch.zeros_like(s, dtype=torch.float32) for s in scales]
        )
        for rows, decoded in self._decoded(slope):
            for probe, (start, stop) in enumerate(pairwise(self.bounds)):
                part = slope[start:stop, rows]
                if of_input is not None:
                    dense = self._dense(decoded, scales[probe], rows, slope)
                    of_input[start:stop] += part @ dense.to(slope.dtype)
                if of_scales is not None and x is not None:
                    by_weight = part.T.float() @ x[start:stop].float()
                    self.weight.add_by_scale(by_weight.mul_(decoded), rows, of_scales[probe])
        none: list[Tensor | None] = [None] * len(scales)
        return of_input, none if of_scales is None else list(of_scales)

    def tangent(
        self,
        x: Float[Tensor, "tokens in"],
        of_input: Tensor | None,
        scales: Sequence[Float[Tensor, "scale_rows groups"]],
        of_scales: Sequence[Tensor | None],
    ) -> Float[Tensor, "tokens out"]:
        """Return how the outputs move where the inputs and the scales do."""
        moved = x.new_zeros(len(x), self.weight.out_features)
        for rows, decoded in self._decoded(x):
            for probe, (start, stop) in enumerate(pairwise(self.bounds)):
                pairs = ((of_input, scales[probe]), (x, of_scales[probe]))
                for left, right in pairs:
                    if left is not None and right is not None:
                        dense = self._dense(decoded, right, rows, x)
                        moved[start:stop, rows] += left[start:stop] @ dense.T.to(x.dtype)
        return moved

    def _decoded(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for rows in self.tiles:
            yield rows, self.weight.decode(rows, self.buffer("decoded", rows, like))

    def _dense(self, decoded: Tensor, scales: Tensor, rows: slice, like: Tensor) -> Tensor:
        buffer = self.buffer("scaled", rows, like)
        return self.weight.apply_scales(decoded, scales, rows, buffer)


class _ScaledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: ScaledProduct, x: Tensor, *scales: Tensor) -> Tensor:
        ctx.product, ctx.dtype = product, x.dtype
        are_trained = any(ctx.needs_input_grad[2:])
        ctx.save_for_backward(x if are_trained else None, *scales)
        ctx.save_for_forward(x, *scales)
        return product.values(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        x, *scales = ctx.saved_tensors
        of_input, of_scales = ctx.product.slopes(
            slopes[0], x, scales, has_input=ctx.needs_input_grad[1]
        )
        return None, None if of_input is None else of_input.to(ctx.dtype), *of_scales

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        x, *scales = ctx.saved_tensors
        moved: Tensor = ctx.product.tangent(x, tangents[1], scales, tangents[2:])
        return moved
