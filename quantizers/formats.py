"""The formats that can be read and trained, and the refusal of all others by name."""

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from quantizers import gptq, nf4
from quantizers.errors import FormatError

FORMATS: dict[str, ModuleType] = {gptq.QUANT_METHOD: gptq, nf4.QUANT_METHOD: nf4}


def detect(config: Mapping[str, Any] | None, keys: Iterable[str]) -> ModuleType:
    """Return the module of a checkpoint's format.

    Args:
        config: Its quantization config, or None if there is none.
        keys: The names of its tensors.

    Raises:
        FormatError: The checkpoint is not quantized, or in a format that is not supported.
    """
    if config is None:
        raise FormatError(
            "quantization_config: expected one in config.json, found none; this is a float "
            "checkpoint: make a 4-bit one with `qzo quantize`"
        )
    method = config.get("quant_method")
    if method is None:  # old AutoGPTQ files lack the field
        method = gptq.QUANT_METHOD if gptq.layer_names(keys) else "none"
    if not isinstance(method, str) or method not in FORMATS:
        raise FormatError(
            f"quant_method: expected one of {sorted(FORMATS)}, got {str(method)!r}; quantize the "
            "float model with `qzo quantize` instead"
        )
    return FORMATS[method]
