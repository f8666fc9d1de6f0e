"""Learning rate schedules: a factor as a function of the step. Names as in transformers."""

import math
from collections.abc import Callable
from typing import Literal

ScheduleName = Literal["constant", "constant_with_warmup", "linear", "cosine"]


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[ScheduleName, Callable[[float], float]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
}


def learning_rate(
    name: ScheduleName, base: float, step: int, max_steps: int, warmup_steps: int = 0
) -> float:
    """Return the learning rate of a step: a linear warm-up, then the schedule down to 0.

    As in transformers ``constant`` has no warm-up. The first step of a warm-up has the learning
    rate ``base / warmup_steps``, not 0 as there.
    """
    if name == "constant":
        return base
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(max_steps - warmup_steps, 1)
    return base * SCHEDULES[name](progress)
