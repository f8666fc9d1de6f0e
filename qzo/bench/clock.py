"""Timing contenders side by side.

In every round each contender runs once, and the order rotates by one from round to round, so that
a slow phase of the computer meets all of them. A ratio is that of the medians; its spread is the
smallest and the largest ratio of a single round.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

Contender = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """One contender's time over another's.

    Attributes:
        value: Ratio of the medians.
        lowest: Of the ratios within one round.
        highest: Of the ratios within one round.
    """

    value: float
    lowest: float
    highest: float


def interleaved(
    contenders: Mapping[str, Contender], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of every round, for every contender, after a round that does not count.

    Args:
        contenders: What to time, by name.
        repeats: Rounds.
        device: Where they compute; it is waited for.
    """
    for run in contenders.values():
        run()
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_seconds(contenders[name], device))
    return seconds


def _seconds(run: Contender, device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Compare the rounds of one contender with those of another."""
    rounds = [mine / other for mine, other in zip(seconds, reference, strict=True)]
    return Ratio(median(seconds) / median(reference), min(rounds), max(rounds))
