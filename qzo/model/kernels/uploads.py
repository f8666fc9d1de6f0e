"""Small tensors that go to a device without making the host wait for it."""

import torch
from torch import Tensor


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the host does not wait where that is a GPU.

    A copy from ordinary memory waits until the GPU has done all its work; from pinned memory it is
    one more item of that work.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
