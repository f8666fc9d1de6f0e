"""The current CUDA device: Triton launches its kernels there, wherever the tensors are."""

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Make a CUDA device the current one while the block runs; afterwards it is what it was.

    Args:
        device: Any; nothing happens for a CPU.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
