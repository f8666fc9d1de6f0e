"""The seam of the optimizers, and what most of them share: a walk over the parts of the vector."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from qzo.method.probes import DirectionalDerivative
from qzo.method.trained_vector import Scales


@runtime_checkable
class Optimizer(Protocol):
    """``aim(scales)``, ``step(scales, derivatives, learning_rate)``, and what it remembers."""

    def aim(self, scales: Scales) -> None:
        """Say how directions are drawn: before the probes of a step, and before its replay."""
        ...

    def step(
        self,
        scales: Scales,
        derivatives: Sequence[DirectionalDerivative],
        learning_rate: float,
    ) -> None:
        """Move the scales. The directions are drawn again from their seeds."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what it remembers, for a snapshot."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned; nothing: start again."""
        ...


Rule = Callable[[Tensor, int, int], Tensor]  # g and its bounds -> u


def descend(
    scales: Scales,
    derivatives: Sequence[DirectionalDerivative],
    learning_rate: float,
    rule: Rule | None = None,
) -> None:
    """Move ``v <- max(v - learning_rate u, 0)``, part by part.

    Args:
        scales: The vector ``v``.
        derivatives: What gives ``g = mean_i d_i z_i``.
        learning_rate: Length of the step.
        rule: Makes ``u`` of ``g``; ``u = g`` unless given.
    """
    for start, stop in scales.chunks():
        slope = scales.directions.mean_slope(derivatives, start, stop)
        direction = slope if rule is None else rule(slope, start, stop)
        scales.move(start, stop, direction * -learning_rate)
