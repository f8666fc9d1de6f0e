"""Directions of their own for every example of the batch, or every few examples in a row.

The forwards of a batch give as many derivatives as it has groups of examples; in row coordinates
that costs nothing more, since a perturbation is a vector on a layer's output.

- ``two`` sides: every group is evaluated at ``+epsilon`` and ``-epsilon`` along each of its
  ``num_directions`` directions: two-sided SPSA (``spsa``).
- ``leave_one_out``: every group is evaluated at ``+epsilon`` along each of its directions, and a
  loss is compared with the others of its group (``rloo``). N evaluations of an example say what
  N - 1 differences do, where two sides have N / 2.

The clip bounds the loss difference of a group as there. Normalised, derivatives are divided by
their root mean square, so that the learning rate alone sets the length of a step:
``d_i <- d_i / sqrt(mean_j d_j^2)``, over all of a step, or over those of a group, so that
no group weighs more than another.

Source: GRZO, arXiv 2606.02857, which normalises by the standard deviation.
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

from qzo.errors import ConfigError
from qzo.method.estimators.averages import mean
from qzo.method.estimators.rloo import leave_one_out_slopes
from qzo.method.estimators.settings import (
    Settings,
    check_comparable,
    check_losses,
    check_positive,
    check_seeds,
)
from qzo.method.estimators.slopes import directions
from qzo.method.estimators.spsa import two_sided_slopes
from qzo.method.probes import DirectionalDerivative, Probe

Sides = Literal["two", "leave_one_out"]
Scope = Literal["step", "group"]


@dataclass(frozen=True)
class PerExampleSPSA(Settings):
    """Directions of their own for every few examples; ``num_directions`` counts those of a group.

    Attributes:
        num_examples: Examples of a step.
        examples_per_direction: Consecutive examples that share their directions.
        sides: Where a group is evaluated.
        normalized_over: What the derivatives are normalised over; as they are if None.
    """

    _: KW_ONLY
    num_examples: int
    examples_per_direction: int = 1
    sides: Sides = "two"
    normalized_over: Scope | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("zo.examples_per_direction", self.examples_per_direction)
        if self.num_examples % self.examples_per_direction:
            raise ConfigError(
                "zo.examples_per_direction: expected a number that divides the "
                f"{self.num_examples} examples of a step, got {self.examples_per_direction}"
            )
        if self.sides == "leave_one_out":
            check_comparable(self.num_directions, self.sides)
        check_seeds(self._num_all)

    @property
    def _num_all(self) -> int:
        return self.num_examples // self.examples_per_direction * self.num_directions

    def ask(self, step: int) -> list[Probe]:
        """Return ``+epsilon`` for every direction, group by group, then ``-epsilon`` if asked."""
        signs = (1, -1) if self.sides == "two" else (1,)
        return [
            replace(probe, examples=self._examples(number))
            for sign in signs
            for number, probe in enumerate(
                directions(self, step, sign * self.epsilon, self._num_all)
            )
        ]

    def tell(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[DirectionalDerivative]:
        """Return the derivative of every direction, clipped and normalised."""
        slopes = self._slopes(probes, losses)
        if self.normalized_over is None:
            return slopes
        size = len(slopes) if self.normalized_over == "step" else self.num_directions
        groups = [slopes[start : start + size] for start in range(0, len(slopes), size)]
        return [d for group in groups for d in normalized(group)]

    def _examples(self, number: int) -> tuple[int, int]:
        """Return which examples direction ``number`` covers."""
        size = self.examples_per_direction
        first = number // self.num_directions * size
        return first, first + size

    def _slopes(
        self, probes: Sequence[Probe], losses: Sequence[float]
    ) -> list[DirectionalDerivative]:
        check_losses(probes, losses)
        if self.sides == "two":
            return two_sided_slopes(self, probes, losses)
        size = self.num_directions
        starts = range(0, len(probes), size)
        groups = [slice(start, start + size) for start in starts]
        return [d for g in groups for d in leave_one_out_slopes(self, probes[g], losses[g])]


def normalized(derivatives: Sequence[DirectionalDerivative]) -> list[DirectionalDerivative]:
    """Divide by the root mean square of those that are finite; zeros stay."""
    squares = [d.value * d.value for d in derivatives if math.isfinite(d.value)]
    if not any(squares):
        return list(derivatives)
    size = math.sqrt(mean(squares))
    return [replace(d, value=d.value / size) for d in derivatives]
