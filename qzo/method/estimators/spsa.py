"""Two-sided SPSA: ``d = (L(v + epsilon z) - L(v - epsilon z)) / (2 epsilon)``.

On quantization scales it is the Q-SPSA of the QZO paper. The clip bounds ``|L+ - L-|``:
``C = max_loss_difference / (2 epsilon)``.

With the loss ``L0`` at ``v`` it also measures the curvature along the direction,
``c = (L+ + L- - 2 L0) / epsilon^2``.

Source: QZO, arXiv 2505.13430, eq. 4 (Q-SPSA), algorithm 1; SPSA: Spall, IEEE TAC 1992.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qzo.method.estimators.settings import Settings, check_losses
from qzo.method.estimators.slopes import directions, slope
from qzo.method.probes import DirectionalDerivative, Probe


@dataclass(frozen=True)
class SPSA(Settings):
    """Two-sided SPSA along directions that the whole batch shares.

    Attributes:
        measures_curvature: Whether to evaluate ``L0`` too and fill in the curvatures.
    """

    measures_curvature: bool = False

    def ask(self, step: int) -> list[Probe]:
        """Return ``+epsilon`` for every direction, then ``-epsilon``; with ``L0``, that first."""
        count = self.num_directions
        center = directions(self, step, 0.0, 1) if self.measures_curvature else []
        plus = directions(self, step, self.epsilon, count)
        return center + plus + directions(self, step, -self.epsilon, count)

    def tell(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[DirectionalDerivative]:
        """Return the clipped derivative of every direction; NaN where a loss is not finite."""
        check_losses(probes, losses)
        if not self.measures_curvature:
            return two_sided_slopes(self, probes, losses)
        slopes = two_sided_slopes(self, probes[1:], losses[1:])
        pairs = zip(slopes, losses[1 : 1 + len(slopes)], losses[1 + len(slopes) :], strict=True)
        return [
            _with_curvature(d, (plus + minus - 2 * losses[0]) / self.epsilon / self.epsilon)
            for d, plus, minus in pairs
        ]


def two_sided_slopes(
    settings: Settings, probes: Sequence[Probe], losses: Sequence[float]
) -> list[DirectionalDerivative]:
    """Return ``(L+ - L-) / (2 epsilon)``, clipped, from all ``L+`` followed by all ``L-``."""
    half = len(probes) // 2
    return [
        slope(probe, plus - minus, 2 * settings.epsilon, settings.max_loss_difference)
        for probe, plus, minus in zip(probes[:half], losses[:half], losses[half:], strict=True)
    ]


def _with_curvature(derivative: DirectionalDerivative, curvature: float) -> DirectionalDerivative:
    """Fill in the curvature; where it is not finite there is no derivative either."""
    if math.isfinite(curvature):
        return replace(derivative, curvature=curvature)
    nan = math.nan
    return replace(derivative, value=nan, raw=nan, is_clipped=False, curvature=nan)
