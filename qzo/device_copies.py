"""Decoder blocks whose codes are copied to the device ahead of use.

Two buffers on the device take turns. Not yet run on a GPU; tested from CPU to CPU.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.weight import QuantizedWeight
from qzo.background import in_background
from qzo.linear import QuantLinear

_ALIGNMENT = 256  # bytes, of a layer's codes in a buffer


@dataclass
class _Slot:
    """A buffer on the device, and the page-locked memory that it is filled from.

    Attributes:
        staging: On the CPU.
        buffer: On the device.
        is_filled: Event after the copy; None on a CPU.
        is_free: Event after the unit's last use; None on a CPU.
    """

    staging: Tensor
    buffer: Tensor
    is_filled: Any = None
    is_free: Any = None


@dataclass
class _Codes:
    """The codes of one layer in its file, and everything else of it on the device."""

    layer: QuantLinear
    weight: Any
    name: str
    stored: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.stored = getattr(self.weight, self.name)

    @property
    def size(self) -> int:
        """Bytes in a buffer."""
        return -(-self.stored.nbytes // _ALIGNMENT) * _ALIGNMENT

    def put(self, codes: Tensor) -> None:
        """Let the layer compute with these codes."""
        self.layer.quantized = replace(self.weight, **{self.name: codes})


class DeviceCopies:
    """Units whose codes are copied to the device ahead of use; the rest of the model is there.

    Two slots take turns: while a unit computes from one, the next is copied into the other, on a
    stream of its own.

    Args:
        units: Modules with quantized layers.
        model: What they belong to; moved to the device without their codes.
        device: Where it computes.
    """

    def __init__(self, units: Sequence[nn.Module], model: nn.Module, device: torch.device) -> None:
        self._device, self._is_cuda = device, device.type == "cuda"
        layers = [[m for m in unit.modules() if isinstance(m, QuantLinear)] for unit in units]
        weights = {layer: layer.quantized for unit in layers for layer in unit}
        for layer in weights:
            layer.quantized = _Absent()  # type: ignore[assignment]  # while the model moves
        nn.Module.to(model, device)
        self._units = [[_codes(layer, weights[layer], device) for layer in unit] for unit in layers]
        self.sizes = [sum(codes.size for codes in unit) for unit in self._units]
        self._coming: dict[int, tuple[int, Future[None]]] = {}  # by slot
        for codes in (codes for unit in self._units for codes in unit):
            codes.put(codes.stored)

    def keep(self, count: int) -> None:
        """Copy the first units for good, and make the slots for the others."""
        for codes in (codes for unit in self._units[:count] for codes in unit):
            codes.put(codes.stored.to(self._device))
        largest = max(self.sizes[count:], default=0)
        self._slots = [self._slot(largest) for _ in range(2 if largest else 0)]
        self._stream = torch.cuda.Stream(self._device) if self._is_cuda else None

    def fetch(self, unit: int) -> None:
        """Start to copy a unit into the slot that the unit before it does not use."""
        before = self._coming.get(unit % 2)
        if before is not None and before[0] == unit:
            return

        def fill() -> None:
            if before is not None:
                before[1].exception()  # waits: after an error in a pass it may still be copying
            self._fill(self._units[unit], self._slots[unit % 2])

        self._coming[unit % 2] = unit, in_background(fill)

    def enter(self, unit: int) -> None:
        """Wait for the copy, on the device, and let the layers compute with it."""
        self.fetch(unit)
        self._coming[unit % 2][1].result()
        slot = self._slots[unit % 2]
        if slot.is_filled is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.is_filled)
        start = 0
        for codes in self._units[unit]:
            stored = codes.stored
            part = slot.buffer[start : start + stored.nbytes]
            codes.put(part.view(stored.dtype).view(stored.shape))
            start += codes.size

    def leave(self, unit: int) -> None:
        """Let the layers forget the copy; its slot is free when the device is done with it."""
        slot = self._slots[unit % 2]
        if slot.is_free is not None:
            slot.is_free.record(torch.cuda.current_stream(self._device))
        for codes in self._units[unit]:
            codes.put(codes.stored)

    def _slot(self, size: int) -> _Slot:
        staging = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_cuda)
        buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        if not self._is_cuda:
            return _Slot(staging, buffer)
        return _Slot(staging, buffer, torch.cuda.Event(), torch.cuda.Event())

    def _fill(self, unit: Sequence[_Codes], slot: _Slot) -> None:
        if slot.is_filled is not None:
            slot.is_filled.synchronize()  # the copy before has read the staging memory
        start = 0
        for codes in unit:
            flat = codes.stored.contiguous().view(-1).view(torch.uint8)
            slot.staging[start : start + len(flat)] = flat
            start += codes.size
        if self._stream is None:
            slot.buffer[:start] = slot.staging[:start]
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.is_free)
            slot.buffer[:start].copy_(slot.staging[:start], non_blocking=True)
            slot.is_filled.record(self._stream)


class _Absent:
    """Stands for a weight that a move of its model must not touch."""

    def to(self, device: torch.device) -> "_Absent":
        """Stay."""
        return self


def _codes(layer: QuantLinear, weight: QuantizedWeight, device: torch.device) -> _Codes:
    """Move everything but the codes, the largest tensor of a weight, to the device."""
    tensors = {name: value for name, value in vars(weight).items() if isinstance(value, Tensor)}
    name = max(tensors, key=lambda key: tensors[key].nbytes)
    moved = {key: tensor.to(device) for key, tensor in tensors.items() if key != name}
    return _Codes(layer, replace(weight, **moved), name)  # type: ignore[type-var]  # a dataclass
