"""Models larger than memory: decoder blocks stream from their files, one ahead of use.

Codes and scales of the files never change, so nothing is ever written back. All probes of a step
pass through a block before the next one is read. A pass reads the blocks in a circle, and of a
circle that is too long the blocks used last are the wrong ones to keep: they are needed last. So
the first blocks stay, as many as fit, and the others pass through what is left.

On a CPU a block is computed with where it lies, in the mapped file: "streaming" is reading its
pages ahead and letting them go. On CUDA its codes are copied to one of two buffers on the device;
the scales, which are small, are there all the time. The copying path has not yet run on a GPU.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from quantizers.weight import QuantizedWeight
from qzo.background import in_background
from qzo.errors import ConfigError
from qzo.linear import QuantLinear
from qzo.mapped import MappedEmbedding, MappedLinear
from qzo.pages import PageRange, file_maps, page_ranges, whole_maps

_ALIGNMENT = 256  # bytes, of a layer's codes in a buffer


@dataclass(frozen=True)
class Budget:
    """Memory for a run.

    Attributes:
        limit_bytes: For everything.
        other_bytes: What everything but the file's pages needs.
        is_given: A limit that the user gave is kept or refused; otherwise it is a wish.
    """

    limit_bytes: int
    other_bytes: int
    is_given: bool = True


@runtime_checkable
class Source(Protocol):
    """Where units (decoder blocks, and a mapped head) come from.

    Attributes:
        sizes: Bytes of each unit, in order of use.
    """

    sizes: list[int]

    def keep(self, count: int) -> None:
        """Let the first so many units stay."""
        ...

    def fetch(self, unit: int) -> None:
        """Start to bring a unit, in the background."""
        ...

    def enter(self, unit: int) -> None:
        """Have a unit ready: it computes next."""
        ...

    def leave(self, unit: int) -> None:
        """Let go of a unit."""
        ...


def stream(model: Any, blocks: Sequence[nn.Module], device: torch.device, budget: Budget) -> int:
    """Let a model that lies in its mapped files stream its blocks; moves it to the device.

    Args:
        model: A transformers model, on a CPU.
        blocks: Its decoder blocks, in order of use.
        device: Where it computes.
        budget: What is there.

    Returns:
        How many blocks stay in memory.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    units = [*blocks, head] if isinstance(head, MappedLinear | QuantLinear) else list(blocks)
    source: Source
    if device.type == "cpu":
        source = MappedPages(units, embeddings)
    else:
        source = DeviceCopies(units, model, device)
    count = _num_kept(source.sizes, budget)
    source.keep(count)
    attach(units, source, count, embeddings)
    return min(count, len(blocks))


def attach(units: Sequence[nn.Module], source: Source, first: int, embeddings: nn.Module) -> None:
    """Fetch every unit from ``first`` on one ahead of use, and let go of it after use."""
    last = len(units) - 1

    def ahead(unit: int) -> None:
        if first <= unit <= last:
            source.fetch(unit)

    def before(unit: int) -> None:
        if unit >= first:
            source.enter(unit)
        ahead(unit + 1)

    def after(unit: int) -> None:
        if unit >= first:
            source.leave(unit)

    if first > last:
        return
    embeddings.register_forward_pre_hook(lambda *_: ahead(0))
    for number, unit in enumerate(units):
        unit.register_forward_pre_hook(lambda *_, number=number: before(number))
        unit.register_forward_hook(lambda *_, number=number: after(number))


def _num_kept(sizes: Sequence[int], budget: Budget) -> int:
    """Return how many units can stay, beside the two largest neighbours of the others.

    Raises:
        ConfigError: Not even two units fit.
    """
    space = budget.limit_bytes - budget.other_bytes
    if sum(sizes) <= space:
        return len(sizes)
    for count in range(len(sizes) - 1, -1, -1):
        if sum(sizes[:count]) + _passing(sizes[count:]) <= space:
            return count
    if not budget.is_given:
        return 0
    needed = (budget.other_bytes + _passing(sizes)) / 2**30
    raise ConfigError(
        f"memory_limit: expected at least {needed + 0.005:.2f}GiB for this run, got "
        f"{budget.limit_bytes / 2**30:.2f}GiB; raise it, or lower per_device_train_batch_size, "
        "per_device_eval_batch_size or max_length"
    )


def _passing(sizes: Sequence[int]) -> int:
    """Return the bytes of the unit in use and the one ahead of it, where they are the most."""
    return max((a + b for a, b in pairwise(sizes)), default=max(sizes, default=0))


class MappedPages:
    """Units that are computed with where they lie: pages of mapped files.

    Args:
        units: Modules over tensors in mapped files.
        embeddings: Its pages are let go after every use, if it lies in a file.
    """

    def __init__(self, units: Sequence[nn.Module], embeddings: nn.Module) -> None:
        self._maps = file_maps()
        self._ranges = [page_ranges(_tensors(unit), self._maps) for unit in units]
        self.sizes = [sum(pages.num_bytes for pages in ranges) for ranges in self._ranges]
        self._drops_cache = False
        self._embeddings = embeddings

    def keep(self, count: int) -> None:
        """Let go of what loading has read; the first units come back with their first use."""
        if count < len(self.sizes):
            rows = page_ranges(_tensors(self._embeddings), self._maps)
            self._embeddings.register_forward_hook(lambda *_: _release(rows))
        files = whole_maps((pages for unit in self._ranges for pages in unit), self._maps)
        available = available_bytes(torch.device("cpu"))
        total = sum(pages.num_bytes for pages in files)
        self._drops_cache = available is not None and total > available
        _release(files)

    def fetch(self, unit: int) -> None:
        """Ask the system to read the pages."""
        ranges = self._ranges[unit]
        in_background(lambda: _read_ahead(ranges))

    def enter(self, unit: int) -> None:
        """Do nothing: pages that are not there yet are waited for when they are touched."""

    def leave(self, unit: int) -> None:
        """Let go of the pages; also from the cache, where the files do not fit into it.

        The system would otherwise keep what was used last and drop the blocks that stay.
        """
        _release(self._ranges[unit])
        if self._drops_cache:
            for pages in self._ranges[unit]:
                pages.drop_from_cache()


def _read_ahead(ranges: Sequence[PageRange]) -> None:
    for pages in ranges:
        pages.read_ahead()


def _release(ranges: Sequence[PageRange]) -> None:
    for pages in ranges:
        pages.release()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of quantized and mapped layers."""
    for part in module.modules():
        if isinstance(part, QuantLinear):
            yield from (value for value in vars(part.quantized).values() if _is_tensor(value))
        elif isinstance(part, MappedEmbedding | MappedLinear):
            yield part.weight


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


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
    stream of its own. Not yet run on a GPU; tested from CPU to CPU.

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
    tensors = {name: value for name, value in vars(weight).items() if _is_tensor(value)}
    name = max(tensors, key=lambda key: tensors[key].nbytes)
    moved = {key: tensor.to(device) for key, tensor in tensors.items() if key != name}
    return _Codes(layer, replace(weight, **moved), name)  # type: ignore[type-var]  # a dataclass


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
