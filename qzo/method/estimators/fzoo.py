"""FZOO: one-sided differences, divided by the spread of the losses.

``d_i = (l_i - l_0) / (epsilon sigma)``, ``l_0 = L(v)``, ``l_i = L(v + epsilon z_i)``, ``sigma`` the
standard deviation of ``l_1 .. l_N`` over ``N - 1``. The learning rate alone sets the length of a
step, which is about ``learning_rate / epsilon`` per direction. The clip bounds ``|l_i - l_0|``,
before the division; ``sigma`` is that of the losses as measured.

Source: FZOO, arXiv 2506.09034. Its released code leaves out ``1 / epsilon``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qzo.method.estimators.averages import deviation
from qzo.method.estimators.one_sided import one_sided_probes, one_sided_slopes
from qzo.method.estimators.settings import Settings, check_comparable
from qzo.method.probes import DirectionalDerivative, Probe


@dataclass(frozen=True)
class FZOO(Settings):
    """FZOO along directions that the whole batch shares; at least two."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_comparable(self.num_directions, "fzoo")

    def ask(self, step: int) -> list[Probe]:
        """Return ``L0``, then ``+epsilon`` for every direction."""
        return one_sided_probes(self, step)

    def tell(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[DirectionalDerivative]:
        """Return clipped and normalised derivatives; ``raw`` is not normalised.

        Losses that are all equal say nothing: zeros. So does a single finite one: NaN.
        """
        slopes = one_sided_slopes(self, probes, losses)
        sigma = deviation([loss for loss in losses[1:] if math.isfinite(loss)])
        if sigma == 0:
            return [replace(d, value=0.0) if math.isfinite(d.value) else d for d in slopes]
        return [replace(d, value=d.value / sigma) for d in slopes]
