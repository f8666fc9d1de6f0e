"""What `qzo quantize` is asked to make, and the config that tells other tools what it made.

Which zero points a GPTQ file stores: ``gptq`` (v1) for symmetric grids, which every reader takes;
``gptq_v2`` for asymmetric ones, which GPTQModel refuses as v1 unless it wrote them itself, and for
3 bits, where AutoGPTQ and GPTQModel disagree about v1.
"""

from dataclasses import dataclass
from typing import Any

import torch

from quantizers import packing
from quantizers.nf4_algorithm import BLOCK_SIZES
from quantizers.rounding import Grid
from qzo.errors import ConfigError

_FORMATS = ("gptq", "nf4", "fp4")
_METHODS = ("gptq", "rtn")
_ROW = -1  # group_size of one group per row


@dataclass(frozen=True)
class QuantizeSettings:
    """What kind of checkpoint to make, and how.

    Attributes:
        format: ``gptq``, or ``nf4`` or ``fp4`` of bitsandbytes.
        bits: Width of a code; other than 4 only for gptq.
        group_size: Weights sharing a scale; -1 for a whole row (gptq). None: the largest usual one
            that divides the input size of every layer, of 128, 64 and 32 for gptq, of 64 and 32
            for bitsandbytes, whose blocks cross rows otherwise.
        is_symmetric: One zero point for all groups (gptq).
        act_order: Quantize the inputs with the largest activations first (gptq).
        method: ``gptq``, or ``rtn`` to round to nearest without calibration (gptq format).
        num_samples: Token sequences to calibrate on.
        seq_len: Tokens of each; fewer if the model or the text has fewer.
        double_quant: Store scales in 8 bits (bitsandbytes). Training un-nests them.
        damp_percent: Part of the mean of the Hessian's diagonal that is added to it (gptq).
        seed: Of the samples drawn from the model where no text is given.
        device: Where blocks are computed, one at a time; the model itself stays in CPU memory.
    """

    format: str
    bits: int = 4
    group_size: int | None = None
    is_symmetric: bool = True
    act_order: bool = False
    method: str = "gptq"
    num_samples: int = 32
    seq_len: int = 256
    double_quant: bool = False
    damp_percent: float = 0.01
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        _expect("format", self.format, self.format in _FORMATS, f"one of {_FORMATS}")
        _expect("method", self.method, self.method in _METHODS, f"one of {_METHODS}")
        widths = packing.BITS if self.format == "gptq" else (4,)
        _expect("bits", self.bits, self.bits in widths, f"one of {widths} for {self.format}")
        self._check_group_size()
        for name in ("num_samples", "seq_len"):
            _expect(name, getattr(self, name), getattr(self, name) > 1, "a number above 1")
        _expect("damp_percent", self.damp_percent, self.damp_percent > 0, "a number above 0")
        _expect("device", self.device, _is_device(self.device), "a device of torch")

    def _check_group_size(self) -> None:
        size = self.group_size
        if size is None:
            return
        if self.format == "gptq":
            _expect("group_size", size, size == _ROW or size > 0, "a number or -1 for gptq")
        else:
            _expect("group_size", size, size in BLOCK_SIZES, f"one of {BLOCK_SIZES}")

    @property
    def needs_calibration(self) -> bool:
        """Whether the model has to run over calibration tokens."""
        return self.format == "gptq" and self.method == "gptq"

    @property
    def checkpoint_format(self) -> str:
        """How a GPTQ file stores zero points; see the module."""
        return "gptq" if self.is_symmetric and self.bits != 3 else "gptq_v2"

    def grid(self) -> Grid:
        """Return the grid of a GPTQ layer; the group size must be decided."""
        assert self.group_size is not None
        return Grid(self.bits, self.group_size, self.is_symmetric)


def gptq_config(settings: QuantizeSettings) -> dict[str, Any]:
    """Return the ``quantization_config`` of a GPTQ checkpoint.

    ``checkpoint_format`` is AutoGPTQ's name for what GPTQModel and transformers call ``format``.
    """
    return {
        "quant_method": "gptq",
        "bits": settings.bits,
        "group_size": settings.group_size,
        "desc_act": settings.act_order,
        "sym": settings.is_symmetric,
        "checkpoint_format": settings.checkpoint_format,
        "format": settings.checkpoint_format,
        "pack_dtype": "int32",
        "lm_head": False,
        "damp_percent": settings.damp_percent,
        "static_groups": False,
        "true_sequential": False,
    }


def bitsandbytes_config(
    settings: QuantizeSettings, dtype: torch.dtype, skipped: list[str]
) -> dict[str, Any]:
    """Return the ``quantization_config`` of a bitsandbytes checkpoint.

    Args:
        settings: Format and double quantization.
        dtype: What the model computes in.
        skipped: Linear layers outside of the decoder blocks; transformers leaves the output head
            alone by itself and has to be told of any other.
    """
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": settings.format,
        "bnb_4bit_use_double_quant": settings.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if skipped in ([], ["lm_head"]) else skipped,
        "llm_int8_threshold": 6.0,
    }


def _expect(name: str, value: object, is_valid: bool, expected: str) -> None:
    if not is_valid:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def _is_device(name: str) -> bool:
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True
