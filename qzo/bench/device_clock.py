"""Timing short calls on a GPU.

Calls are timed by CUDA events, as replays of a CUDA graph where they can be captured: so the time
between launches, which is Python's, does not count. The same calls made one by one are timed too.
Each contender is called on several copies of its operands in turn, together larger than the cache,
so that none is read from there. On a CPU a clock is read around the calls.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from qzo.bench.clock import wait_for

Call = Callable[[], object]

CACHE_TIMES = 2  # the copies are so many times as large as the cache
COPIES_MAX = 8
_CACHE_BYTES = 64 * 2**20  # where torch does not tell


@dataclass(frozen=True)
class CallSeconds:
    """Seconds of one call.

    Attributes:
        median: Of the rounds.
        lowest: Of the rounds.
        highest: Of the rounds.
        eager: Median of calls that Python makes one by one.
        is_graph: The first three are those of a CUDA graph.
    """

    median: float
    lowest: float
    highest: float
    eager: float
    is_graph: bool


def num_copies(num_bytes: int, device: torch.device) -> int:
    """Return how many copies of operands of this size are larger than the cache."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    cache = getattr(properties, "L2_cache_size", 0) or _CACHE_BYTES
    return min(max(-(-CACHE_TIMES * cache // num_bytes), 1), COPIES_MAX)


def call_seconds(calls: Sequence[Call], repeats: int, device: torch.device) -> CallSeconds:
    """Time calls that do the same on other copies of their operands.

    Args:
        calls: One for each copy.
        repeats: Rounds; each makes all calls once.
        device: Where they compute.
    """
    for _ in range(2):  # compiles, chooses algorithms, allocates
        for call in calls:
            call()
    wait_for(device)

    def all_calls() -> None:
        for call in calls:
            call()

    eager = [_seconds(all_calls, device) for _ in range(repeats)]
    replay = _captured(all_calls, device) if device.type == "cuda" else None
    rounds = eager
    if replay is not None:
        replay()
        rounds = [_seconds(replay, device) for _ in range(repeats)]
    each = [seconds / len(calls) for seconds in rounds]
    return CallSeconds(
        median(each), min(each), max(each), median(eager) / len(calls), replay is not None
    )


def _seconds(run: Call, device: torch.device) -> float:
    wait_for(device)
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        before.record()
        run()
        after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def _captured(run: Call, device: torch.device) -> Call | None:
    """Return the replay of a graph of these calls; None where they cannot be captured."""
    stream = torch.cuda.current_stream(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph):
            run()
    except RuntimeError:  # a call waits for the device, or copies from the CPU
        torch.cuda.set_stream(stream)  # a capture that fails to end leaves its own
        torch.cuda.synchronize(device)
        return None
    return graph.replay
