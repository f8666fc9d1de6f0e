"""1.5-SPSA: two-sided SPSA that weighs a direction by its curvature.

``c_i = (L+ - 2 L0 + L-) / epsilon^2``, ``w_i = 1 / max(1, |c_i|^0.1)``,
``d_i = w_i (L+ - L-) / (2 epsilon)``. The clip bounds ``|L+ - L-|``, before the weight.

Source: Chaubard, Kochenderfer, Ré, "Probe-Space Preconditioning" (1.5-SPSA).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qzo.method.estimators.settings import Settings
from qzo.method.estimators.spsa import SPSA
from qzo.method.probes import DirectionalDerivative, Probe

_POWER = 0.1


@dataclass(frozen=True)
class OneAndAHalfSPSA(Settings):
    """1.5-SPSA along directions that the whole batch shares."""

    def ask(self, step: int) -> list[Probe]:
        """Return ``L0``, then ``+epsilon`` for every direction, then ``-epsilon``."""
        return self._unweighted().ask(step)

    def tell(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[DirectionalDerivative]:
        """Return weighted derivatives with their curvatures; ``raw`` has no weight."""
        return [_weighted(d) for d in self._unweighted().tell(probes, losses)]

    def _unweighted(self) -> SPSA:
        return SPSA(
            self.epsilon,
            self.seed,
            num_directions=self.num_directions,
            max_loss_difference=self.max_loss_difference,
            basis_steps=self.basis_steps,
            measures_curvature=True,
        )


def _weighted(derivative: DirectionalDerivative) -> DirectionalDerivative:
    assert derivative.curvature is not None
    weight = 1 / max(1.0, abs(derivative.curvature) ** _POWER)
    return replace(derivative, value=weight * derivative.value)
