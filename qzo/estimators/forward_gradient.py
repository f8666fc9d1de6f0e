"""Forward gradient: the exact slope along each direction, the reference without probe error.

``d_i = z_i . grad L(v)``. The probes ask for slopes, and what comes in the place of losses is
slopes. Nothing reads epsilon, and there is no loss difference to clip.

Source: Baydin et al., "Gradients without backpropagation", arXiv 2202.08587, definition 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qzo.estimators.settings import Settings, check_losses
from qzo.estimators.slopes import clipped, directions
from qzo.probes import DirectionalDerivative, Probe


@dataclass(frozen=True)
class ForwardGradient(Settings):
    """Exact slopes along directions that the whole batch shares."""

    def ask(self, step: int) -> list[Probe]:
        """Return a tangent probe at the trained vector for every direction."""
        probes = directions(self, step, 0.0, self.num_directions)
        return [replace(probe, is_tangent=True) for probe in probes]

    def tell(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[DirectionalDerivative]:
        """Return the slopes; NaN where one is not finite."""
        check_losses(probes, losses)
        return [clipped(probe, s, None) for probe, s in zip(probes, losses, strict=True)]
