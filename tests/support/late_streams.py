"""The streams of a device that does its work as late as it may, on the CPU.

They keep what CUDA promises and nothing more: a stream runs its work in order; an event stands for
what its stream had to do when it was recorded, and one that was not recorded holds nobody up. Which
of two streams gets on first is not promised: here the eager one runs at once as far as its waits
allow, and the lazy one only when somebody cannot go on without it. Work is real: copies copy.
"""

from collections import deque
from collections.abc import Callable
from threading import RLock
from typing import Literal

from torch import Tensor

Job = Callable[[], bool]  # False: it has to wait


class LateStream:
    """A queue of work."""

    def __init__(self, device: "LateStreams") -> None:
        self.jobs: deque[Job] = deque()
        self._device = device

    def wait_event(self, event: "LateEvent") -> None:
        """Queue a wait for what the event stands for now."""
        mark = event.mark
        self.do(lambda: mark is None or mark.is_done)

    def do(self, job: Job) -> None:
        """Queue a job."""
        with self._device.lock:
            self.jobs.append(job)
            self._device.advance()

    def run_one(self) -> bool:
        """Run the next job unless it has to wait; return whether it ran."""
        if not self.jobs or not self.jobs[0]():
            return False
        self.jobs.popleft()
        return True


class _Mark:
    is_done = False

    def reach(self) -> bool:
        self.is_done = True
        return True


class LateEvent:
    """A place in the work of a stream."""

    def __init__(self, device: "LateStreams") -> None:
        self.mark: _Mark | None = None
        self._device = device

    def record(self, stream: LateStream) -> None:
        """Stand for all that the stream has to do up to now."""
        self.mark = mark = _Mark()
        stream.do(mark.reach)

    def synchronize(self) -> None:
        """Wait, on the CPU."""
        with self._device.lock:
            while self.mark is not None and not self.mark.is_done:
                self._device.force()


class LateStreams:
    """Two streams.

    Args:
        lazy: The one that waits to be waited for.
    """

    def __init__(self, lazy: Literal["copying", "computing"]) -> None:
        self.lock = RLock()
        self.copying, self.computing = LateStream(self), LateStream(self)
        streams = (self.copying, self.computing)
        self._lazy, self._eager = streams if lazy == "copying" else streams[::-1]

    def event(self) -> LateEvent:
        """Return a new event."""
        return LateEvent(self)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy."""
        self.copying.do(lambda: target.copy_(source) is not None)

    def advance(self) -> None:
        """Let the eager stream get on."""
        while self._eager.run_one():
            pass

    def force(self) -> None:
        """Let the lazy stream take a step, because somebody waits."""
        assert self._lazy.run_one(), "both streams wait for each other"
        self.advance()

    def finish(self) -> None:
        """Run everything."""
        with self.lock:
            self.advance()
            while self._lazy.jobs:
                self.force()
