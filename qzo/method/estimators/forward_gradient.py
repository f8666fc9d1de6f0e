"""Forward gradient: the exact slope along each direction, the reference without probe error.

``d_i = z_i . grad L(v)``. The probes ask for slopes, and what comes in the place of losses is
slopes. The clip is that of two-sided SPSA: ``C = max_loss_difference / (2 epsilon)``, what a loss
difference of that size over ``2 epsilon`` would measure. Nothing else reads epsilon.

Source: Baydin et al., "Gradients without backpropagation", arXiv 2202.08587, definition 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qzo.method.estimators.settings import Settings, check_losses
from qzo.method.estimators.slopes import clipped, directions
from qzo.method.probes import DirectionalDerivative, Probe


@dataclass(frozen=True)
class ForwardGradient(Settings):
    """Exact slopes along directions that the whole batch shares."""

    def ask(self, step: int) -> list[Probe]:
        """Return a tangent probe at the trained vector for every direction."""
        probes = directions(self, step, 0.0, self.num_directions)
        return [replace(probe, is_tangent=True) for probe in probes]

    def tell(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[DirectionalDerivative]:
        """Return the slopes, clipped; NaN where one is not finite."""
        check_losses(probes, losses)
        limit = self.max_loss_difference
        bound = None if limit is None else limit / (2 * self.epsilon)
        return [clipped(probe, s, bound) for probe, s in zip(probes, losses, strict=True)]
