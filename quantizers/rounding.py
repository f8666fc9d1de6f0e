"""Groups of weights on an integer grid, and the plain choice of the nearest point.

``W[o, i] = scales[o, g] * (codes[o, i] - zeros[o, g])`` with ``g`` the group of input ``i``. The
range of a group, ``[min(0, lowest weight), max(0, highest weight)]``, is divided into
``2 ** bits - 1`` steps; a symmetric grid takes ``[-a, a]`` with ``a`` the largest magnitude.

Scales are rounded to fp16 before any weight is rounded with them, so that a file of fp16 scales
means exactly what was computed.

Source: AutoGPTQ 9f7d370, ``auto_gptq/quantization/quantizer.py``, but for the rounding to fp16.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from quantizers.errors import FormatError

_FP16_MAX = 65504.0
_FP16_TINY = 2.0**-24  # smallest positive fp16


@dataclass(frozen=True)
class Grid:
    """The integers that the weights of a group are rounded to.

    Attributes:
        bits: Width of a code: codes are ``0 .. 2 ** bits - 1``.
        group_size: Input columns sharing one scale; -1 for all of them. The last group may be
            shorter.
        is_symmetric: All zero points are ``2 ** (bits - 1)``.
    """

    bits: int
    group_size: int
    is_symmetric: bool = True

    @property
    def max_code(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    def columns_per_group(self, in_features: int) -> int:
        """Return the group size with -1 resolved."""
        return in_features if self.group_size == -1 else self.group_size

    def num_groups(self, in_features: int) -> int:
        """Return the number of groups of a row, counting a shorter last one."""
        return -(-in_features // self.columns_per_group(in_features))


@dataclass(frozen=True)
class RoundedWeight:
    """A quantized layer: ``W[o, i] = scales[o, g_idx[i]] * (codes[o, i] - zeros[o, g_idx[i]])``.

    Attributes:
        codes: Integers ``0 .. 2 ** bits - 1``; a transposed view, contiguous as ``(in, out)``.
        scales: Positive fp32 numbers that fp16 holds exactly.
        zeros: Zero points, ``0 .. 2 ** bits - 1``.
        g_idx: The group of each input column.
    """

    codes: UInt8[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]
    zeros: Int[Tensor, "out groups"]
    g_idx: Int[Tensor, " in"]

    def dequantize(self) -> Float[Tensor, "out in"]:
        """Return the dense matrix, in fp32."""
        return self.scales[:, self.g_idx] * (self.codes - self.zeros[:, self.g_idx])


def round_to_nearest(weight: Float[Tensor, "out in"], grid: Grid) -> RoundedWeight:
    """Quantize a layer by rounding each weight to the nearest point of its group's grid.

    Args:
        weight: The layer's matrix; not modified.
        grid: Bits, group size and symmetry.

    Returns:
        Codes and scales of consecutive groups. A scale beyond fp16 is a FormatError.
    """
    columns = weight.T.float()
    in_features, out_features = columns.shape
    size = grid.columns_per_group(in_features)
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
    scales = columns.new_empty(out_features, grid.num_groups(in_features))
    zeros = torch.empty_like(scales)
    for group, start in enumerate(range(0, in_features, size)):
        members = columns[start : start + size]
        scales[:, group], zeros[:, group] = fit_scales(members, grid)
        codes[start : start + size], _ = nearest(members, scales[:, group], zeros[:, group], grid)
    g_idx = torch.arange(in_features, device=weight.device) // size
    return rounded_weight(codes, scales, zeros, g_idx)


def rounded_weight(
    codes: UInt8[Tensor, "in out"],
    scales: Float[Tensor, "out groups"],
    zeros: Float[Tensor, "out groups"],
    g_idx: Int[Tensor, " in"],
) -> RoundedWeight:
    """Check the scales and give all parts their final dtypes.

    Raises:
        FormatError: A scale is not finite or does not fit fp16.
    """
    largest = scales.max().item()
    if not largest <= _FP16_MAX:  # also true for NaN
        raise FormatError(
            f"scales: expected finite values up to {_FP16_MAX:g}, got {largest}; the float weights "
            "are not finite, or too large for a file of fp16 scales"
        )
    return RoundedWeight(codes.T, scales.float(), zeros.int(), g_idx.int())


def fit_scales(
    members: Float[Tensor, "columns out"], grid: Grid
) -> tuple[Float[Tensor, " out"], Float[Tensor, " out"]]:
    """Find scale and zero point of one group in every output row.

    Args:
        members: Weights of the group, its columns along the first axis; not modified.
        grid: Bits and symmetry.

    Returns:
        Scales that fp16 holds exactly, and integral zero points, in the dtype of ``members``.
    """
    lowest, highest = members.amin(dim=0).clamp(max=0), members.amax(dim=0).clamp(min=0)
    if grid.is_symmetric:
        highest = torch.maximum(-lowest, highest)
        lowest = -highest
    scales = ((highest - lowest) / grid.max_code).to(torch.float16).to(lowest.dtype)
    scales.clamp_(min=_FP16_TINY)  # never zero, also for a group of zeros
    if grid.is_symmetric:
        return scales, torch.full_like(scales, 2 ** (grid.bits - 1))
    return scales, (-lowest / scales).round_().clamp_(0, grid.max_code)


def nearest(
    values: Float[Tensor, "*columns out"],
    scales: Float[Tensor, " out"],
    zeros: Float[Tensor, " out"],
    grid: Grid,
) -> tuple[Float[Tensor, "*columns out"], Float[Tensor, "*columns out"]]:
    """Return the nearest codes, as floats, and the weights that they stand for."""
    codes = (values / scales).round_().add_(zeros).clamp_(0, grid.max_code)
    return codes, scales * (codes - zeros)
