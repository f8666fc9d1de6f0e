"""NF4 and FP4 codes of a layer, made by bitsandbytes.

Every block of ``block_size`` neighbouring weights of the flattened matrix is divided by its
largest magnitude (absmax), and each quotient becomes the code of the nearest of 16 values. Double
quantization stores absmax itself as 8-bit codes in blocks of 256.

Source: Dettmers et al., "QLoRA", arXiv 2305.14314; bitsandbytes 95f9af3,
``bitsandbytes/functional.py`` (``quantize_4bit``, ``QuantState.as_dict``).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from quantizers.errors import FormatError

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def quantize_4bit(
    weight: Float[Tensor, "out in"],
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
) -> dict[str, Tensor]:
    """Quantize a layer with bitsandbytes; what it cannot do is a FormatError.

    Args:
        weight: The layer's matrix in fp16, bf16 or fp32, which becomes the dtype that readers
            dequantize to; not modified.
        quant_type: ``nf4`` or ``fp4``.
        block_size: Weights sharing one absmax.
        double_quant: Store absmax in 8 bits.

    Returns:
        The stored tensors, keyed as in a checkpoint without the layer's name: ``weight``,
        ``weight.absmax``, ``weight.quant_map``, ``weight.quant_state.bitsandbytes__<quant_type>``
        and, under double quantization, ``weight.nested_absmax`` and ``weight.nested_quant_map``.
    """
    _check(weight, quant_type, block_size)
    from bitsandbytes import functional  # here only: importing it takes seconds

    packed, state = functional.quantize_4bit(
        weight.contiguous(),
        blocksize=block_size,
        compress_statistics=double_quant,
        quant_type=quant_type,
    )
    parts = state.as_dict(packed=True)
    return {"weight": packed, **{f"weight.{name}": tensor for name, tensor in parts.items()}}


def _check(weight: Float[Tensor, "out in"], quant_type: str, block_size: int) -> None:
    """Refuse what bitsandbytes has no codes for.

    Raises:
        FormatError: The dtype, type or block size is none of those it knows, the matrix has an odd
            number of weights, or a weight is not finite.
    """
    if quant_type not in {"nf4", "fp4"}:
        raise FormatError(f"quant_type: expected 'nf4' or 'fp4', got {quant_type!r}")
    if block_size not in BLOCK_SIZES:
        raise FormatError(f"block_size: expected one of {BLOCK_SIZES}, got {block_size}")
    if weight.dtype not in _DTYPES:
        got = str(weight.dtype).removeprefix("torch.")
        raise FormatError(f"weight: expected float16, bfloat16 or float32, got {got}")
    if weight.numel() % 2:
        raise FormatError(
            f"weight: expected an even number of weights, got {tuple(weight.shape)}; two codes "
            "share a byte"
        )
    if not torch.isfinite(weight).all():
        raise FormatError("weight: expected finite values, got NaN or infinity")
