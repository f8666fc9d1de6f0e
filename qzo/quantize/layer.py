"""The stored tensors of one quantized layer."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quantizers import gptq as gptq_format
from quantizers import packing
from quantizers.gptq_algorithm import gptq
from quantizers.nf4_algorithm import quantize_4bit
from quantizers.rounding import RoundedWeight, round_to_nearest
from qzo.errors import CheckpointError
from qzo.quantize.settings import QuantizeSettings


def check_sizes(settings: QuantizeSettings, layer: str, linear: nn.Linear) -> None:
    """Refuse a layer whose codes or zero points do not fill whole words of the file.

    Raises:
        CheckpointError: An input or output size of a GPTQ layer cannot be packed.
    """
    if settings.format != "gptq":
        return
    run, sizes = packing.run_length(settings.bits), (linear.in_features, linear.out_features)
    if any(size % run for size in sizes):
        others = [
            bits for bits in packing.BITS if not any(s % packing.run_length(bits) for s in sizes)
        ]
        advice = " or ".join(["--format nf4", *(f"--bits {bits}" for bits in others)])
        raise CheckpointError(
            f"{layer}: expected multiples of {run} for GPTQ with {settings.bits} bits, got "
            f"{sizes[0]} inputs and {sizes[1]} outputs; use {advice}"
        )


def quantize_layer(
    weight: Float[Tensor, "out in"],
    settings: QuantizeSettings,
    hessian: Float[Tensor, "in in"] | None,
) -> tuple[dict[str, Tensor], Float[Tensor, "out in"] | None]:
    """Quantize one layer.

    Args:
        weight: Its matrix; not modified.
        settings: With the group size decided.
        hessian: Of its inputs, for the method ``gptq``.

    Returns:
        Its stored tensors, keyed without the layer's name, and what they stand for, in fp32 (None
        for bitsandbytes, where nothing needs it).
    """
    assert settings.group_size is not None
    if settings.format != "gptq":
        return quantize_4bit(
            weight,
            quant_type=settings.format,
            block_size=settings.group_size,
            double_quant=settings.double_quant,
        ), None
    if hessian is None:
        rounded = round_to_nearest(weight, settings.grid())
    else:
        rounded = gptq(
            weight,
            hessian,
            grid=settings.grid(),
            act_order=settings.act_order,
            damp_percent=settings.damp_percent,
        )
    return _gptq_tensors(rounded, settings), rounded.dequantize()


def _gptq_tensors(rounded: RoundedWeight, settings: QuantizeSettings) -> dict[str, Tensor]:
    spec = gptq_format.GPTQSpec(
        settings.bits,
        settings.grid().group_size,
        settings.is_symmetric,
        settings.checkpoint_format,
        "auto_gptq",
    )
    return {
        "qweight": gptq_format.pack_codes(rounded.codes.T.int(), settings.bits),
        "qzeros": gptq_format.pack_zeros(rounded.zeros.T, spec),
        "scales": rounded.scales.T.to(torch.float16).contiguous(),
        "g_idx": rounded.g_idx,
    }
