"""Where a model computes, in which dtype, and within how much memory.

The three settings mean the same in every command that loads a model: the keys ``device``, ``dtype``
and ``memory_limit`` of a recipe are the flags ``--device``, ``--dtype`` and ``--memory-limit``.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qzo.checkpoint.checkpoint import dtype_name
from qzo.errors import ConfigError
from qzo.model.memory import parse_memory

# Families that overflow in float16: huggingface/transformers issue 36822 for Gemma 3, and the
# models that vLLM refuses to run in it (``vllm/config/model.py``).
_BEYOND_FLOAT16 = ("gemma", "glm4", "plamo2")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Placement:
    """Where and how a model computes.

    Attributes:
        device: Where it computes.
        dtype: Of activations and unquantized tensors; None: see ``default_dtype``.
        memory_limit: Bytes that everything has to fit into; None: what the device has.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    memory_limit: int | None = None


def placement(
    device: str | None = None, dtype: str | None = None, memory_limit: str | None = None
) -> Placement:
    """Read the three settings as a user writes them.

    Args:
        device: See ``device_of``.
        dtype: ``float32``, ``float16`` or ``bfloat16``; None: see ``default_dtype``.
        memory_limit: Such as ``4GiB``.

    Raises:
        ConfigError: One of them cannot be used.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    return Placement(
        device_of(device),
        None if dtype is None else DTYPES[dtype],
        None if memory_limit is None else parse_memory(memory_limit, "memory_limit"),
    )


def device_of(name: str | None) -> torch.device:
    """Return the device of a name; a CUDA device where there is one unless named.

    Under ``torchrun`` every process of a computer takes a CUDA device of its own.

    Raises:
        ConfigError: There is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    kind, colon, number = name.partition(":")
    if kind not in {"cpu", "cuda"} or bool(colon) is not (kind == "cuda" and number.isdecimal()):
        raise ConfigError(f"device: expected 'cpu' or 'cuda', got {name!r}")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: expected a device that exists, got {name!r}; use 'cpu'")
    return torch.device(name)


def default_dtype(config: Mapping[str, Any], device: str) -> str:
    """Return the dtype that a model computes in unless told otherwise.

    On CUDA that is float16, also for models that were trained in bfloat16: in float16 a directional
    derivative is several times its rounding error, in bfloat16 about as large (measured:
    recipes/BENCHMARKS.md). float32 stays, and so does bfloat16 of families that overflow in
    float16.

    Args:
        config: The content of ``config.json``.
        device: ``cpu``, which computes in float32, or ``cuda``.
    """
    if device == "cpu":
        return "float32"
    stored = dtype_name(config)
    family = str(config.get("model_type", ""))
    if stored != "bfloat16" or any(name in family for name in _BEYOND_FLOAT16):
        return stored
    return "float16"
