"""Tensors that go to a device: without making the host wait for it, or once for all forwards."""

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


class Resident:
    """A tensor that stays where it was last asked for, so that a forward does not copy it again.

    Args:
        tensor: Its values; never modified.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = self._last = tensor

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor on a device, in its own dtype unless another is named."""
        dtype = dtype or self._tensor.dtype
        if (self._last.device, self._last.dtype) != (device, dtype):
            with torch.inference_mode(False):  # it may outlive the mode
                self._last = self._tensor.to(device=device, dtype=dtype)
        return self._last
