"""How much memory a device has left."""

from pathlib import Path

import torch


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device, or None where the system does not tell.

    Files in the page cache count as free, as Linux counts them (``MemAvailable``); the limit of a
    container counts where it is smaller.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
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
