"""Leave-one-out: each loss is compared with the mean of the others, so that there is no ``L0``.

``d_i = N / (N - 1) (l_i - mean l) / epsilon``, ``l_i = L(v + epsilon z_i)``, which is ``l_i`` less
the mean of the other losses; ``mean_i d_i z_i = 1 / ((N - 1) epsilon) sum_i (l_i - mean l) z_i``.
The clip bounds that difference: ``C = max_loss_difference / epsilon``.

Source: LOREN, arXiv 2511.07971; the AIM-ZO study takes the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qzo.method.estimators.averages import mean
from qzo.method.estimators.settings import Settings, check_comparable, check_losses
from qzo.method.estimators.slopes import directions, slope
from qzo.method.probes import DirectionalDerivative, Probe


@dataclass(frozen=True)
class RLOO(Settings):
    """Leave-one-out along directions that the whole batch shares; at least two."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_comparable(self.num_directions, "rloo")

    def ask(self, step: int) -> list[Probe]:
        """Return ``+epsilon`` for every direction."""
        return directions(self, step, self.epsilon, self.num_directions)

    def tell(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[DirectionalDerivative]:
        """Return the clipped derivative of every direction; NaN where its loss is not finite."""
        return leave_one_out_slopes(self, probes, losses)


def leave_one_out_slopes(
    settings: Settings, probes: Sequence[Probe], losses: Sequence[float]
) -> list[DirectionalDerivative]:
    """Return the leave-one-out derivatives, clipped.

    A loss that is not finite does not count for the others; a single finite one has nothing to be
    compared with.
    """
    check_losses(probes, losses)
    finite = [loss for loss in losses if math.isfinite(loss)]
    center, num = mean(finite), len(finite)
    factor = num / (num - 1) if num > 1 else math.nan
    return [
        slope(probe, factor * (loss - center), settings.epsilon, settings.max_loss_difference)
        for probe, loss in zip(probes, losses, strict=True)
    ]
