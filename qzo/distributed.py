"""The processes of a run: who computes what, and the few bytes that they exchange.

``torchrun`` starts a process for each device; torch.distributed carries the bytes (gloo on CPUs,
NCCL on GPUs). Items of work, such as the micro-batches of a step, are dealt out in turn. Their
results go to the first process, which combines them in the order of the items and sends the outcome
to all. So the outcome depends neither on how many processes there are nor on who is first to end,
and every process goes on with the same numbers.
"""

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from qzo.errors import QZOError

T = TypeVar("T")
Combine = Callable[[Sequence[Sequence[float]]], Sequence[float]]


def joined(results: Sequence[Sequence[float]]) -> list[float]:
    """Return all results in one list."""
    return list(chain.from_iterable(results))


class Wish(IntEnum):
    """What somebody asks of a run; the larger one counts."""

    GO_ON = 0
    FINISH = 1
    """End as if all steps were done."""
    STOP = 2
    """End now, to be continued."""


class LostProcessError(QZOError):
    """Another process of the run ended, or cannot be reached."""


class Ranks:
    """One process among those of a run.

    Attributes:
        rank: Its number; the process of rank 0 writes the files.
        size: The number of processes.
        wish: What a process was asked for; all of them learn it in the same ``share``.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size = rank, size
        self.wish = Wish.GO_ON
        self._own_wish = Wish.GO_ON
        self._device = device or torch.device("cpu")

    @classmethod
    def join(cls, device: torch.device) -> "Ranks":
        """Join the processes that ``torchrun`` started; alone without it.

        Args:
            device: Where this process computes: a CUDA device takes NCCL, a CPU gloo.

        Raises:
            LostProcessError: They cannot be reached.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized():
            return cls()
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            try:
                store, rank, size = next(rendezvous("env://"))
                # torchrun keeps its store when it restarts processes, with the old addresses in it
                store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
                dist.init_process_group(backend, store=store, rank=rank, world_size=size)
            except (RuntimeError, ValueError) as error:
                raise LostProcessError(f"processes: cannot meet: {_first_line(error)}") from error
        is_nccl = dist.get_backend() == "nccl"
        return cls(dist.get_rank(), dist.get_world_size(), device if is_nccl else None)

    @property
    def is_first(self) -> bool:
        """Tell whether this process writes the files."""
        return self.rank == 0

    def leave(self) -> None:
        """Close the connections, if there are any."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def begin(self) -> None:
        """Forget what an earlier run was asked for."""
        self.wish = self._own_wish = Wish.GO_ON

    def ask(self, wish: "Wish") -> None:
        """Let all processes know with the next ``share``; at once where there is only one."""
        self._own_wish = max(self._own_wish, wish)
        if self.size == 1:
            self.wish = self._own_wish

    def share(
        self,
        sizes: Sequence[int],
        compute: Callable[[int], Sequence[float]],
        combine: Combine = joined,
        num_results: int | None = None,
    ) -> list[float]:
        """Compute items of work, each in one process, and give all processes the outcome.

        Args:
            sizes: How many numbers each item gives.
            compute: Computes an item by its place.
            combine: Makes the outcome of the results of all items, in order.
            num_results: How many numbers the outcome has; as many as the items give unless told.
        """
        num_results = sum(sizes) if num_results is None else num_results
        own = [tuple(compute(item)) for item in self._items(self.rank, len(sizes))]
        if self.size == 1:
            return list(combine(own))
        counts = [sum(sizes[i] for i in self._items(r, len(sizes))) for r in range(self.size)]
        flat = [number for result in own for number in result]
        data = _pack(flat, max(counts), self._own_wish)
        chunks = self._gather(data)
        outcome = b""
        if chunks:
            results: list[Sequence[float]] = [()] * len(sizes)
            for rank, chunk in enumerate(chunks):
                numbers = iter(_unpack(chunk))
                for item in self._items(rank, len(sizes)):
                    results[item] = [next(numbers) for _ in range(sizes[item])]
            outcome = _pack(combine(results), num_results, max(chunk[-1] for chunk in chunks))
        outcome = self._send(outcome, 8 * num_results + 1)
        self.wish = Wish(outcome[-1])
        return _unpack(outcome)

    def from_first(self, data: bytes) -> bytes:
        """Return what the first process has; the others' argument does not count."""
        if self.size == 1:
            return data
        (length,) = struct.unpack("<q", self._send(struct.pack("<q", len(data)), 8))
        return self._send(data, length) if length else b""

    def agree(self, value: bool) -> bool:
        """Return what the first process decided."""
        return self.from_first(b"\1" if value else b"\0") == b"\1"

    def in_turn(self, work: Callable[[], T]) -> T:
        """Do something in one process after the other, in the order of their ranks."""
        for rank in range(self.size):
            if rank == self.rank:
                result = work()
            if self.size > 1:
                self._gather(b"\0")
                self._send(b"\0", 1)
        return result

    def differing(self, digest: str) -> list[int]:
        """Return to the first process which others have another digest; others get nothing."""
        chunks = self._gather(bytes.fromhex(digest)) if self.size > 1 else []
        return [rank for rank, chunk in enumerate(chunks) if chunk.hex() != digest]

    def _items(self, rank: int, count: int) -> range:
        return range(rank, count, self.size)

    def _gather(self, data: bytes) -> list[bytes]:
        """Return the data of all, of equal length, to the first process."""
        own = self._tensor(data)
        chunks = [torch.empty_like(own) for _ in range(self.size)] if self.is_first else None
        with _reaching_others():
            dist.gather(own, chunks, dst=0)
        return [_bytes(chunk) for chunk in chunks or ()]

    def _send(self, data: bytes, length: int) -> bytes:
        """Send data of the first process to all."""
        tensor = self._tensor(data if self.is_first else bytes(length))
        with _reaching_others():
            dist.broadcast(tensor, src=0)
        return _bytes(tensor)

    def _tensor(self, data: bytes) -> Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)


def _pack(numbers: Sequence[float], length: int, wish: int) -> bytes:
    padded = [*numbers, *[0.0] * (length - len(numbers))]
    return struct.pack(f"<{length}dB", *padded, wish)


def _unpack(data: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(data) // 8}dB", data)[:-1])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


@contextmanager
def _reaching_others() -> Iterator[None]:
    """Say in words that a process is gone.

    Raises:
        LostProcessError: The block could not reach it.
    """
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(
            f"processes: lost one of this run ({_first_line(error)}). What is in the journal is "
            "safe: start again with resume_from_checkpoint=true, with any number of processes"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
