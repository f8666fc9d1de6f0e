"""What the machine is, for the report."""

import importlib.metadata
import os
import platform
from typing import Any

PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "safetensors", "bitsandbytes", "accelerate"),
    *("pydantic", "datasets", "peft", "humming-kernels", "gemlite", "pytest"),
)


def describe() -> dict[str, Any]:
    """Return the processor, the card and the versions."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "cards": [],
    }
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        found["cards"].append(
            {
                "name": card.name,
                "memory_bytes": card.total_memory,
                "capability": f"{card.major}.{card.minor}",
                "multiprocessors": card.multi_processor_count,
            }
        )
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
