"""Seconds of a QZO step by part, timed from outside.

While ``timed`` is active, the methods at the seams report to a stopwatch: those of the quantized
weights (``dequantize``), the quantized layers without them (``product``: the product itself, the
multipliers of rows, what is gathered for it), and the scales (``directions``). A part does not
contain the parts that run inside it.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch

from quantizers.weight import QuantizedWeight
from qzo.bench.clock import wait_for
from qzo.method.trained_vector import Scales
from qzo.model.linear import QuantLinear

PARTS = ("dequantize", "product", "directions", "update", "journal", "other")


class Stopwatch:
    """Adds up the seconds of nested parts.

    Args:
        device: Where the parts compute; it is waited for at every border.

    Attributes:
        seconds: Of each part, without those inside it.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device
        self._inside = [0.0]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block for this part."""
        wait_for(self._device)
        start = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            wait_for(self._device)
            elapsed = time.perf_counter() - start
            self.seconds[name] += elapsed - self._inside.pop()
            self._inside[-1] += elapsed

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time counted for this part."""

        @wraps(function)
        def timed_function(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*arguments, **named)

        return timed_function


@contextmanager
def timed(layers: Sequence[QuantLinear], watch: Stopwatch) -> Iterator[None]:
    """Let the seams of these layers report while the block runs.

    The methods are replaced on the classes, so that a layer that asks for the type of its weight
    still gets its answer.
    """
    kinds = {type(layer.quantized) for layer in layers}
    methods = [name for name, value in vars(QuantizedWeight).items() if _is_method(name, value)]
    with ExitStack() as stack:
        for kind in kinds:
            for name in methods:
                stack.enter_context(_replaced(kind, name, "dequantize", watch))
        stack.enter_context(_replaced(QuantLinear, "forward", "product", watch))
        stack.enter_context(_replaced(Scales, "effective", "directions", watch))
        yield


def _is_method(name: str, value: object) -> bool:
    return callable(value) and not name.startswith("_") and name != "to"


@contextmanager
def _replaced(kind: type, method: str, part: str, watch: Stopwatch) -> Iterator[None]:
    original = getattr(kind, method)
    setattr(kind, method, watch.wrap(part, original))
    try:
        yield
    finally:
        setattr(kind, method, original)
