"""The computer and the versions that a measurement was made with."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from qzo.console.checks import installed_version
from qzo.console.doctor import num_cores
from qzo.version import __version__

_PACKAGES = ("torch", "transformers", "bitsandbytes", "numpy", "safetensors")


def hardware(device: torch.device) -> dict[str, Any]:
    """Describe the computer.

    Args:
        device: Where the measurement ran.
    """
    known = {
        "device": str(device),
        "processor": _processor(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        known["gpu"] = torch.cuda.get_device_name(device)
    return known


def versions() -> dict[str, str]:
    """Return the versions of Python, qzo and what it computes with."""
    installed = {name: installed_version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "qzo": __version__, **installed}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
