"""The product of one quantized layer on CUDA, chosen by format.

- NF4 and FP4: bitsandbytes' operator, which takes absmax as an argument; once per set of scales.
- GPTQ of 2, 4 and 8 bits: Triton kernels that read the codes once for all sets.
- Anything else: no kernel, and the caller computes tile by tile in plain torch.

Torch's ``_weight_int4pack_mm`` is not among them: it wants a second, rearranged copy of the codes,
reads it once for every set of scales, and takes these in bf16 only; see recipes/LOG.md.

Not yet timed on a GPU.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from quantizers.gptq import GPTQWeight
from quantizers.nf4 import NF4Weight
from quantizers.weight import QuantizedWeight
from qzo.model.by_probe import RowFactors
from qzo.model.kernels.settings import has_triton

_BNB_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_BF16_CAPABILITY = (8, 0)


def cuda_product(
    weight: QuantizedWeight,
    x: Float[Tensor, "tokens in"],
    bounds: Sequence[int],
    scales: Sequence[Float[Tensor, "scale_rows groups"]],
    rows: RowFactors | None = None,
) -> Float[Tensor, "tokens out"] | None:
    """Return ``x W^T`` where tokens ``bounds[p]`` to ``bounds[p + 1]`` see ``scales[p]``.

    Args:
        weight: Codes, on the device of ``x``.
        x: Inputs, without padding.
        bounds: One more than there are sets of scales; from 0 to the number of tokens.
        scales: One set for all tokens, or one per probe.
        rows: What the product is multiplied by.

    Returns:
        The product in the dtype of ``x``, without bias; None where no kernel fits the layer.
    """
    if isinstance(weight, NF4Weight) and _fits_bitsandbytes(weight):
        y = bitsandbytes_product(weight, x, bounds, scales)
        return y if rows is None else rows.multiply(y)
    if isinstance(weight, GPTQWeight) and _has_triton(x.device, x.dtype):
        from qzo.model.kernels import triton_product  # here only: not every platform has Triton

        if triton_product.fits(weight, x.dtype):
            return triton_product.product(weight, x, bounds, scales, rows)
    return None


def cuda_dense_tiles(
    weight: QuantizedWeight, dtype: torch.dtype
) -> Iterator[tuple[slice, Float[Tensor, "rows in"]]] | None:
    """Yield the matrix of the file, some rows at a time; None where no kernel fits the layer."""
    if isinstance(weight, GPTQWeight) and _has_triton(weight.qweight.device, dtype):
        from qzo.model.kernels import triton_product  # here only: not every platform has Triton

        if triton_product.fits(weight, dtype):
            tiles = triton_product.dense_tiles(weight, weight.scales, dtype)
            return ((rows, dense.T) for rows, dense in tiles)
    return None


def bitsandbytes_product(
    weight: NF4Weight,
    x: Float[Tensor, "tokens in"],
    bounds: Sequence[int],
    scales: Sequence[Float[Tensor, "scale_rows groups"]],
) -> Float[Tensor, "tokens out"]:
    """Return the product by bitsandbytes' operators; see ``cuda_product`` above."""
    parts = [
        _bitsandbytes_matmul(weight, x[start:stop], absmax)
        for absmax, (start, stop) in zip(scales, pairwise(bounds), strict=True)
        if start < stop
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else x.new_empty(0, weight.out_features)


def _bitsandbytes_matmul(
    weight: NF4Weight,
    x: Float[Tensor, "tokens in"],
    scales: Float[Tensor, "scale_rows groups"],
) -> Float[Tensor, "tokens out"]:
    import bitsandbytes  # noqa: F401  # registers the operators; here only, as it takes seconds

    assert weight.quant_type is not None
    operators = torch.ops.bitsandbytes
    absmax = scales.reshape(-1).to(torch.float32).contiguous()
    shape = (weight.out_features, weight.in_features)
    # gemm_4bit came with 0.50, and warns about blocks that cross rows at every call
    if weight.blocks_cross_rows or not hasattr(operators, "gemm_4bit"):
        dense: Tensor = operators.dequantize_4bit(
            weight.packed, absmax, weight.blocksize, weight.quant_type, shape, x.dtype
        )
        return x @ dense.T
    product: Tensor = operators.gemm_4bit(
        x.contiguous(), weight.packed, shape, absmax, weight.blocksize, weight.quant_type
    )
    return product


def _fits_bitsandbytes(weight: NF4Weight) -> bool:
    return weight.quant_type is not None and weight.blocksize in _BNB_BLOCKSIZES


def _has_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether Triton is installed and knows the device and the dtype."""
    if not has_triton(device):
        return False
    if device.type != "cuda" or dtype != torch.bfloat16:
        return True
    return torch.cuda.get_device_capability(device) >= _BF16_CAPABILITY
