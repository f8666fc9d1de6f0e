"""Bytes of a quantized layer in its file, from its shape and the quantization config alone.

=========== ============================================== =========================================
            GPTQ                                           bitsandbytes NF4 and FP4
=========== ============================================== =========================================
codes       ``ceil(in * bits / 32) * out`` words           ``ceil(out * in / 2)`` bytes
zeros       ``groups * ceil(out * bits / 32)`` words       none
scales      ``groups * out`` fp16, ``groups = ceil(in/g)`` ``ceil(out * in / b)`` fp32, or nested
g_idx       ``in`` int32                                   none
=========== ============================================== =========================================

Nested (double quantized) scales are one byte each and one fp32 for each 256 of them.
Source: the module docstrings of ``quantizers/gptq.py`` and ``quantizers/nf4.py``.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantizers import gptq, nf4
from quantizers.formats import detect
from quantizers.group_size import usual_group_size
from quantizers.nf4_algorithm import BLOCK_SIZES
from qzo.checkpoint.tensors import TensorFiles
from qzo.errors import CheckpointError, ConfigError
from qzo.plan.shapes import LinearShape

USUAL = 0  # a group size that is decided by the layers, as ``qzo quantize`` does
_TRANSFORMERS_BLOCK = 64  # of bitsandbytes; transformers offers no other
_NESTED_BLOCK = 256
_WORD_BYTES = 4


@dataclass(frozen=True)
class Quantization:
    """What a config says about the codes and scales of every layer.

    Attributes:
        format: ``gptq``, ``nf4`` or ``fp4``.
        bits: Width of a code.
        group_size: Input columns sharing one scale; -1 for one group a row. Of bitsandbytes the
            block: weights sharing a scale, on from row to row. ``USUAL`` before layers are known.
        is_symmetric: GPTQ zero points are all equal, so none is unpacked.
        is_nested: bitsandbytes' double quantization.
        is_assumed: The config said nothing; these are defaults or arguments.
        kept: Patterns of layers that stay in floating point.
        only: Name endings of the layers in a block that are quantized; empty for all.
        has_quantized_head: The output head holds codes too.
    """

    format: str = "gptq"
    bits: int = 4
    group_size: int = 128
    is_symmetric: bool = True
    is_nested: bool = False
    is_assumed: bool = False
    kept: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    has_quantized_head: bool = False


def assumed_quantization(
    format_name: str = "gptq", bits: int | None = None, group_size: int | None = None
) -> Quantization:
    """Describe the quantization of a float model that has none yet.

    Args:
        format_name: ``gptq``, ``nf4`` or ``fp4``.
        bits: Width of a code; 4 if None, and always 4 outside GPTQ.
        group_size: ``USUAL`` if None.

    Raises:
        ConfigError: The three do not go together.
    """
    if format_name not in {"gptq", "nf4", "fp4"}:
        raise ConfigError(f"format: expected 'gptq', 'nf4' or 'fp4', got {format_name!r}")
    bits = 4 if bits is None else bits
    allowed = (2, 3, 4, 8) if format_name == "gptq" else (4,)
    if bits not in allowed:
        raise ConfigError(f"bits: expected one of {allowed} for {format_name}, got {bits}")
    if group_size is None:
        return Quantization(format_name, bits, USUAL, is_assumed=True)
    if format_name != "gptq" and group_size not in BLOCK_SIZES:
        raise ConfigError(
            f"group_size: expected one of {BLOCK_SIZES} for {format_name}, got {group_size}"
        )
    if group_size < 1 and group_size != -1:
        raise ConfigError(f"group_size: expected a number above 0, got {group_size}")
    return Quantization(format_name, bits, group_size, is_assumed=True)


def with_group_size(quantization: Quantization, layers: Sequence[LinearShape]) -> Quantization:
    """Decide a group size that is ``USUAL``."""
    if quantization.group_size != USUAL:
        return quantization
    sizes = [layer.in_features for layer in layers]
    return replace(quantization, group_size=usual_group_size(quantization.format, sizes))


def block_size(folder: Path) -> int:
    """Return the block size of a bitsandbytes checkpoint; 64 where its files are not there."""
    with suppress(CheckpointError):
        tensors = TensorFiles(folder)
        layer = next(iter(nf4.layer_names(tensors.files)), None)
        keys = (f"{layer}.weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
        for key in keys:
            if key in tensors.files:
                size: int = nf4.read_quant_state(tensors[key], str(layer))["blocksize"]
                return size
    return _TRANSFORMERS_BLOCK


def read_quantization(config: Mapping[str, Any], block: int = _TRANSFORMERS_BLOCK) -> Quantization:
    """Read a ``quantization_config``; what cannot be trained is refused by its format.

    Args:
        config: The config.
        block: Weights sharing a scale where it is of bitsandbytes, whose config does not say so.
    """
    old_auto_gptq = ["layer.qweight"] if "bits" in config else []  # those files name no method
    if detect(config, old_auto_gptq) is gptq:
        return _read_gptq(config)
    spec = nf4.spec(config)
    return Quantization(
        spec.quant_type,
        group_size=block,
        is_nested=bool(config.get("bnb_4bit_use_double_quant")),
        kept=tuple(config.get("llm_int8_skip_modules") or ()),
    )


def _read_gptq(config: Mapping[str, Any]) -> Quantization:
    spec = gptq.spec(config)
    rules = [rule for rule in config.get("dynamic") or {} if rule.startswith("-:")]
    blocks = config.get("modules_in_block_to_quantize") or ()
    return Quantization(
        "gptq",
        spec.bits,
        spec.group_size,
        is_symmetric=spec.is_symmetric,
        kept=tuple(rule.removeprefix("-:") for rule in rules),
        only=tuple(name for names in blocks for name in names),
        has_quantized_head=bool(config.get("lm_head")),
    )


def holds_codes(quantization: Quantization, name: str, head: str) -> bool:
    """Return whether the linear layer of this name is quantized.

    Args:
        quantization: What the config says.
        name: Dotted name of a linear layer.
        head: Dotted name of the output head.
    """
    if quantization.format != "gptq":
        kept = quantization.kept or (re.escape(head),)
        end = r"(?:(?<=\.)|(?=\.|$))"  # as transformers' should_convert_module matches them
        return not any(re.match(f"(?:{key}){end}", name) or name.endswith(key) for key in kept)
    if name == head:
        return quantization.has_quantized_head
    is_listed = not quantization.only or name.endswith(tuple(f".{s}" for s in quantization.only))
    is_kept = any(re.match(pattern, name) for pattern in quantization.kept)
    return bool(re.search(r"\.\d+\.", name)) and is_listed and not is_kept  # inside a block


def codes_bytes(layer: LinearShape, quantization: Quantization) -> int:
    """Return the bytes of the packed codes."""
    if quantization.format != "gptq":
        return _ceil(layer.out_features * layer.in_features, 2)
    return _ceil(layer.in_features * quantization.bits, 32) * layer.out_features * _WORD_BYTES


def zeros_bytes(layer: LinearShape, quantization: Quantization) -> int:
    """Return the bytes of the packed zero points."""
    if quantization.format != "gptq":
        return 0
    words = _ceil(layer.out_features * quantization.bits, 32)
    return _groups(layer, quantization) * words * _WORD_BYTES


def group_index_bytes(layer: LinearShape, quantization: Quantization) -> int:
    """Return the bytes of ``g_idx``."""
    return layer.in_features * _WORD_BYTES if quantization.format == "gptq" else 0


def num_scales(layer: LinearShape, quantization: Quantization) -> int:
    """Return how many scales the layer has."""
    if quantization.format != "gptq":
        return _ceil(layer.out_features * layer.in_features, quantization.group_size)
    return _groups(layer, quantization) * layer.out_features


def scales_bytes(layer: LinearShape, quantization: Quantization) -> int:
    """Return the bytes of the scales as stored: fp16, fp32, or nested."""
    count = num_scales(layer, quantization)
    if quantization.format == "gptq":
        return 2 * count
    return count + 4 * _ceil(count, _NESTED_BLOCK) if quantization.is_nested else 4 * count


def _groups(layer: LinearShape, quantization: Quantization) -> int:
    size = quantization.group_size
    return 1 if size == -1 else _ceil(layer.in_features, size)


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
