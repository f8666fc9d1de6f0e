"""Models larger than memory: decoder blocks stream from their files, one ahead of use.

Codes and scales of the files never change, so nothing is ever written back. All probes of a step
pass through a block before the next one is read. A pass reads the blocks in a circle, and of a
circle that is too long the blocks used last are the wrong ones to keep: they are needed last. So
the first blocks stay, as many as fit, and the others pass through what is left.

On a CPU a block is computed with where it lies, in the mapped file: "streaming" is reading its
pages ahead and letting them go. On CUDA its codes are copied to one of two buffers on the device;
the scales, which are small, are there all the time (``device_copies``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from qzo.background import in_background
from qzo.errors import ConfigError
from qzo.model.lazy_layers import MappedEmbedding, MappedLinear
from qzo.model.linear import QuantLinear
from qzo.model.streaming.device_copies import DeviceCopies
from qzo.model.streaming.free_memory import available_bytes
from qzo.model.streaming.mapped_pages import PageRange, file_maps, page_ranges, whole_maps


@dataclass(frozen=True)
class Budget:
    """Memory for a run.

    Attributes:
        limit_bytes: For everything.
        other_bytes: What everything but the file's pages needs.
        is_given: A limit that the user gave is kept or refused; otherwise it is a wish.
        lower: What to lower where it is too small: keys or flags.
        generated_tokens: Of prompts and answers that are generated together, their keys and values
            being among the other bytes; 0 where nothing is generated.
    """

    limit_bytes: int
    other_bytes: int
    is_given: bool = True
    lower: str = "per_device_train_batch_size, per_device_eval_batch_size or max_length"
    generated_tokens: int = 0


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
        f"{budget.limit_bytes / 2**30:.2f}GiB; raise it, or lower {budget.lower}"
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
            yield from (
                value for value in vars(part.quantized).values() if isinstance(value, Tensor)
            )
        elif isinstance(part, MappedEmbedding | MappedLinear):
            yield part.weight
