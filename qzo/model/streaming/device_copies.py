"""Decoder blocks whose codes are copied to the device ahead of use.

Two buffers on the device take turns, each filled from page-locked memory of its own. Three waits
keep them apart; nobody else waits:

======================  =====================================================
who                     waits for
======================  =====================================================
the CPU, to stage       ``is_filled``: the copy before has read the staging memory
the stream that copies  ``is_free``: the unit before was computed from this buffer
the one that computes   ``is_filled``: the codes of this unit are there
======================  =====================================================

Not yet run on a GPU; tested from CPU to CPU, and with streams that run as late as they may.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from quantizers.weight import QuantizedWeight
from qzo.background import in_background
from qzo.model.linear import QuantLinear

_ALIGNMENT = 256  # bytes, of a layer's codes in a buffer


@runtime_checkable
class Streams(Protocol):
    """The two queues of a device; each runs in its order, and neither knows of the other."""

    @property
    def copying(self) -> Any:
        """The stream that copies."""

    @property
    def computing(self) -> Any:
        """The stream that the model runs on."""

    def event(self) -> Any:
        """Return a new event; what waits for one that was not recorded does not wait."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy on the stream that copies."""


class CudaStreams:
    """Those of a CUDA device; the model runs on the current one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.copying = torch.cuda.Stream(device)

    @property
    def computing(self) -> torch.cuda.Stream:
        """The current stream."""
        return torch.cuda.current_stream(self._device)

    def event(self) -> torch.cuda.Event:
        """Return a new event."""
        return torch.cuda.Event()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy from page-locked memory."""
        with torch.cuda.stream(self.copying):
            target.copy_(source, non_blocking=True)


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
        streams: Those of the device unless given; without any, copies are done when they return.
    """

    def __init__(
        self,
        units: Sequence[nn.Module],
        model: nn.Module,
        device: torch.device,
        streams: Streams | None = None,
    ) -> None:
        self._device, self._is_cuda = device, device.type == "cuda"
        self._streams = CudaStreams(device) if streams is None and self._is_cuda else streams
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
        if self._streams is not None:
            self._streams.computing.wait_event(slot.is_filled)
        start = 0
        for codes in self._units[unit]:
            stored = codes.stored
            part = slot.buffer[start : start + stored.nbytes]
            codes.put(part.view(stored.dtype).view(stored.shape))
            start += codes.size

    def leave(self, unit: int) -> None:
        """Let the layers forget the copy; its slot is free when the device is done with it."""
        slot = self._slots[unit % 2]
        if self._streams is not None:
            slot.is_free.record(self._streams.computing)
        for codes in self._units[unit]:
            codes.put(codes.stored)

    def _slot(self, size: int) -> _Slot:
        staging = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_cuda)
        buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        if self._streams is None:
            return _Slot(staging, buffer)
        return _Slot(staging, buffer, self._streams.event(), self._streams.event())

    def _fill(self, unit: Sequence[_Codes], slot: _Slot) -> None:
        streams = self._streams
        if streams is None:
            size = _stage(unit, slot.staging)
            slot.buffer[:size] = slot.staging[:size]
            return
        slot.is_filled.synchronize()
        size = _stage(unit, slot.staging)
        streams.copying.wait_event(slot.is_free)
        streams.copy(slot.buffer[:size], slot.staging[:size])
        slot.is_filled.record(streams.copying)


def _stage(unit: Sequence[_Codes], staging: Tensor) -> int:
    """Write the codes of a unit one behind the other; return where they end."""
    start = 0
    for codes in unit:
        flat = codes.stored.contiguous().view(-1).view(torch.uint8)
        staging[start : start + len(flat)] = flat
        start += codes.size
    return start


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
