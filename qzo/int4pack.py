"""The product of a GPTQ layer by torch's ``_weight_int4pack_mm``, from rearranged codes.

The operator computes ``W = scale * (code - 8) + offset`` with scales and offsets as an argument,
so a zero point other than 8 goes into ``offset = scale * (8 - zero)``. It wants them in the dtype
of the inputs, bf16, which rounds by up to 0.4 %, and a probe changes a scale by 1 % or less. So
they are split in two bf16 terms, and the product is the sum of two.

``qzo.cuda_product`` does not choose it: the rearranged codes are a second copy, and it reads them
twice for every set of scales, where the Triton kernel reads the codes of the file once for all. It
stands here to be timed against that kernel; neither is timed on a GPU yet.

Source of the layout: torch 2.13, ``torch/testing/_internal/common_quantization.py``.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import BFloat16, Float, Int, UInt8
from torch import Tensor

from quantizers import packing
from quantizers.gptq import GPTQWeight

_GROUP_SIZES = (32, 64, 128, 256)
_OUT_MULTIPLE = 16
_IN_TILE = 16
_IN_TILES = (8, 4, 2)  # of 16 inputs that one thread reads at once: as many as divide the layer


def fits(weight: GPTQWeight, x: Float[Tensor, "tokens in"]) -> bool:
    """Return whether the operator computes this layer with these inputs."""
    return (
        weight.bits == 4
        and weight.group_index is None
        and _group_size(weight) in _GROUP_SIZES
        and weight.out_features % _OUT_MULTIPLE == 0
        and x.dtype == torch.bfloat16
    )


def repack(weight: GPTQWeight) -> Tensor:
    """Return a copy of the codes as the operator of their device wants them."""
    decoded = weight.qweight.new_empty(weight.in_features, weight.out_features, dtype=torch.float32)
    packing.unpack_into(weight.qweight, weight.bits, decoded)
    codes = decoded.T.to(torch.int32).contiguous()
    if codes.device.type == "cpu":
        return torch._convert_weight_to_int4pack_for_cpu(codes, _IN_TILES[0])
    tiles = next(t for t in _IN_TILES if weight.in_features % (t * _IN_TILE) == 0)
    return torch._convert_weight_to_int4pack(two_codes_a_byte(codes), tiles)


def two_codes_a_byte(codes: Int[Tensor, "out in"]) -> UInt8[Tensor, "out half_in"]:
    """Return codes of 4 bits as bytes, the first of two in the high half."""
    return (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)


def product(
    weight: GPTQWeight,
    packed: Tensor,
    x: BFloat16[Tensor, "tokens in"],
    bounds: Sequence[int],
    scales: Sequence[Float[Tensor, "out groups"]],
) -> BFloat16[Tensor, "tokens out"]:
    """Return ``x W^T`` where tokens ``bounds[p]`` to ``bounds[p + 1]`` see ``scales[p]``.

    Args:
        weight: The layer, for its zero points and sizes.
        packed: What ``repack`` made of its codes.
        x: Inputs.
        bounds: One more than there are sets of scales.
        scales: One set per probe.
    """
    is_cpu = x.device.type == "cpu"
    multiply = torch._weight_int4pack_mm_for_cpu if is_cpu else torch._weight_int4pack_mm
    group_size, results = _group_size(weight), [x.new_empty(0, weight.out_features)]
    for own, (start, stop) in zip(scales, pairwise(bounds), strict=True):
        if start < stop:
            rows, terms = x[start:stop].contiguous(), bf16_terms(scales_and_offsets(weight, own))
            first, second = (multiply(rows, packed, group_size, term) for term in terms)
            results.append(first + second)
    return torch.cat(results)


def scales_and_offsets(
    weight: GPTQWeight, scales: Float[Tensor, "out groups"]
) -> Float[Tensor, "groups out 2"]:
    """Return scales and ``scale * (8 - zero)`` side by side, in fp32."""
    by_group = scales.float().T
    zeros = weight.zeros if isinstance(weight.zeros, int) else weight.zeros.float()
    return torch.stack((by_group, by_group * (8 - zeros)), dim=-1)


def bf16_terms(
    values: Float[Tensor, "groups out 2"],
) -> tuple[BFloat16[Tensor, "groups out 2"], BFloat16[Tensor, "groups out 2"]]:
    """Return two bf16 terms whose sum is the fp32 value to 2**-16 of it."""
    first = values.to(torch.bfloat16)
    return first, (values - first.float()).to(torch.bfloat16)


def _group_size(weight: GPTQWeight) -> int:
    return weight.in_features // weight.file_scales.shape[0]
