"""What every 4-bit format comes down to: ``W = scales * (codebook[codes] - zeros)``.

A format unpacks the tensors of one layer into an object of this shape. The codes stay where they
lie, usually in the pages of a memory-mapped file; they become numbers only a block of output rows
at a time, in a buffer that the caller owns.

Shapes: ``out`` and ``in`` are the sizes of the linear layer, ``groups`` the scales of one row.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class QuantizedWeight(Protocol):
    """A quantized matrix of shape ``(out, in)`` whose scales are given from outside."""

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        ...

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        ...

    @property
    def scales(self) -> Float[Tensor, "out groups"]:
        """Scales of the file, ``(out, groups)``; ``(1, blocks)`` where blocks cross rows."""
        ...

    @property
    def blocks_cross_rows(self) -> bool:
        """Whether a scale may belong to two rows, so that row coordinates are not exact.

        So it is in bitsandbytes files with an input size that is no multiple of the block.
        """
        ...

    @property
    def input_groups(self) -> Int[Tensor, " in"]:
        """The group of every input, where no block crosses rows."""
        ...

    def decode(self, rows: slice, buffer: Float[Tensor, " n"]) -> Float[Tensor, "rows in"]:
        """Return ``codebook[codes] - zeros`` of some rows, in fp32.

        The result is the caller's. It may lie in the buffer, which has room for it, and its strides
        follow the layout of the format.
        """
        ...

    def dequantize(self, rows: slice, buffer: Float[Tensor, " n"]) -> Float[Tensor, "rows in"]:
        """Return some rows with the scales of the file, in fp32.

        Bitwise what ``decode`` and ``apply_scales`` give, in one pass where the format has one.
        """
        ...

    def apply_scales(
        self,
        decoded: Float[Tensor, "rows in"],
        scales: Float[Tensor, "out groups"],
        rows: slice,
        buffer: Float[Tensor, " n"] | None,
    ) -> Float[Tensor, "rows in"]:
        """Multiply decoded rows by their scales, in place if the buffer is None."""
        ...

    def add_by_scale(
        self,
        values: Float[Tensor, "rows in"],
        rows: slice,
        total: Float[Tensor, "out groups"],
    ) -> None:
        """Add what belongs to the weights of some rows to the total of their scales, in place.

        The transpose of ``apply_scales`` on ones.
        """
        ...

    def to(self, device: torch.device) -> "QuantizedWeight":
        """Return the same weight with its tensors on another device."""
        ...


def dequantize(
    weight: QuantizedWeight, scales: Float[Tensor, "scale_rows groups"] | None = None
) -> Float[Tensor, "out in"]:
    """Return the dense fp32 matrix, with the scales of the file unless others are given."""
    rows = slice(0, weight.out_features)
    buffer = weight.scales.new_empty(weight.out_features * weight.in_features, dtype=torch.float32)
    if scales is None:
        return weight.dequantize(rows, buffer)
    return weight.apply_scales(weight.decode(rows, buffer), scales, rows, None)
