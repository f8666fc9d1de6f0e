"""Update rules on (seed, directional derivative) pairs.

SGD: ``v <- max(v - learning_rate * mean_i d_i z_i, 0)``.

Source: QZO, arXiv 2505.13430, eq. 5 and algorithm 1.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from qzo.probes import DirectionalDerivative
from qzo.scales import Scales


@runtime_checkable
class Optimizer(Protocol):
    """The seam: ``step(scales, derivatives, learning_rate)``; a function of its arguments."""

    def step(
        self,
        scales: Scales,
        derivatives: Sequence[DirectionalDerivative],
        learning_rate: float,
    ) -> None:
        """Move the scales. The directions are drawn again from their seeds."""
        ...


class SGD:
    """Steps against the gradient estimate."""

    def step(
        self,
        scales: Scales,
        derivatives: Sequence[DirectionalDerivative],
        learning_rate: float,
    ) -> None:
        """Move the scales; no derivatives, no move."""
        if not derivatives:
            return
        for start, stop in scales.chunks():
            slope = scales.mean_slope(derivatives, start, stop)
            scales.move(start, stop, slope * -learning_rate)


OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD}
