"""One-sided differences: ``d_i = (L(v + epsilon z_i) - L0) / epsilon``, ``L0 = L(v)``.

N directions take N + 1 evaluations, where two sides take 2 N. The clip bounds ``|L_i - L0|``:
``C = max_loss_difference / epsilon``.

Source: Nesterov, Spokoiny, "Random gradient-free minimization of convex functions", FoCM 2017.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qzo.method.estimators.settings import Settings, check_losses
from qzo.method.estimators.slopes import directions, slope
from qzo.method.probes import DirectionalDerivative, Probe


@dataclass(frozen=True)
class OneSided(Settings):
    """One-sided differences along directions that the whole batch shares."""

    def ask(self, step: int) -> list[Probe]:
        """Return ``L0``, then ``+epsilon`` for every direction."""
        return one_sided_probes(self, step)

    def tell(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[DirectionalDerivative]:
        """Return the clipped derivative of every direction; NaN where a loss is not finite."""
        return one_sided_slopes(self, probes, losses)


def one_sided_probes(settings: Settings, step: int) -> list[Probe]:
    """Return a probe at the trained vector, then one at ``+epsilon`` for every direction."""
    plus = directions(settings, step, settings.epsilon, settings.num_directions)
    return directions(settings, step, 0.0, 1) + plus


def one_sided_slopes(
    settings: Settings, probes: Sequence[Probe], losses: Sequence[float]
) -> list[DirectionalDerivative]:
    """Return ``(L_i - L0) / epsilon``, clipped, from ``L0`` followed by all ``L_i``."""
    check_losses(probes, losses)
    return [
        slope(probe, loss - losses[0], settings.epsilon, settings.max_loss_difference)
        for probe, loss in zip(probes[1:], losses[1:], strict=True)
    ]
