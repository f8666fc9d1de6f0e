"""How much memory a device has left."""

from pathlib import Path

import torch


def _available_cuda_bytes(device: torch.device) -> int:
    """Return what is free, or what is left of the share that this process was limited to."""
    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(cuda_index(device))
    return min(free, int(share * total) - torch.cuda.memory_reserved(device))


def cuda_index(device: torch.device) -> int:
    """Return the number of a CUDA device; some of torch's functions do not take plain ``cuda``."""
    index: int | None = getattr(device, "index", None)  # torch's types leave None out
    return torch.cuda.current_device() if index is None else index


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device, or None where the system does not tell.

    Files in the page cache count as free, as Linux counts them (``MemAvailable``); the limit of a
    container counts where it is smaller.
    """
    if device.type == "cuda":
        return _available_cuda_bytes(device)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    available = sizes["MemAvailable"] * 1024
    container = _container_limit()
    return available if container is None else min(available, container)


def _container_limit() -> int | None:
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
