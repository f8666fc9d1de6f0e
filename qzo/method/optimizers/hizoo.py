"""HiZOO: a diagonal of curvatures ``H`` shapes the probes and the steps.

Probes move along ``z / sqrt(H)``, and ``H`` starts at ones. With ``c`` the second derivative along
that direction, ``c = (L+ + L- - 2 L0) / epsilon^2``, a step does

    ``H <- (1 - alpha) H + alpha mean_i |c_i| / 2 * H z_i^2``
    ``v <- v - learning_rate mean_i d_i z_i / sqrt(H)``

with the new ``H`` in the second line. In the paper's letters ``H`` is the inverse of ``Sigma``.

Source: Zhao et al., "Second-Order Fine-Tuning without Pain for LLMs", ICLR 2025, arXiv 2402.15173,
in the form of its code, which has ``alpha = 1e-8``. The mean over directions and the floor of ``H``
are ours.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qzo.errors import CheckpointError
from qzo.method.directions.philox import combine
from qzo.method.probes import DirectionalDerivative
from qzo.method.trained_vector import Scales

_FLOOR = 1e-8  # of H: where no curvature is seen, it decays


class HiZOO:
    """Shorter probes and steps where the loss is curved; two fp32 values for each trained one.

    Args:
        hizoo_alpha: How much of ``H`` a step replaces.
    """

    def __init__(self, hizoo_alpha: float = 1e-8) -> None:
        self.alpha = hizoo_alpha
        self._curvature: Float[Tensor, " size"] | None = None  # H

    def aim(self, scales: Scales) -> None:
        """Let directions be ``z / sqrt(H)``."""
        h = torch.ones_like(scales.values) if self._curvature is None else self._curvature
        scales.directions.optimizer_stretch = h.sqrt().reciprocal_()

    def step(
        self,
        scales: Scales,
        derivatives: Sequence[DirectionalDerivative],
        learning_rate: float,
    ) -> None:
        """Renew ``H`` and move the scales; no derivatives, no move."""
        if not derivatives:
            return
        halves = [_curvature_of(d) / 2 / len(derivatives) for d in derivatives]
        weights = [derivative.value / len(derivatives) for derivative in derivatives]
        if self._curvature is None:
            self._curvature = torch.ones_like(scales.values)
        for start, stop in scales.chunks():
            z = scales.directions.unstretched(derivatives, start, stop)
            h = self._curvature[start:stop]
            seen = combine(z * z, halves) * h
            h.mul_(1 - self.alpha).add_(seen * self.alpha).clamp_(min=_FLOOR)
            slope = scales.directions.shaped_step(combine(z, weights), start, stop) / h.sqrt()
            scales.move(start, stop, slope * -learning_rate)

    def state(self) -> dict[str, Tensor]:
        """Return ``H``."""
        return {} if self._curvature is None else {"curvature": self._curvature}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over ``H``."""
        curvature = state.get("curvature")
        self._curvature = None if curvature is None else curvature.clone()


def _curvature_of(derivative: DirectionalDerivative) -> float:
    if derivative.curvature is None:
        raise CheckpointError(
            "optimizer: expected a curvature with every derivative for 'hizoo', got none; use an "
            "estimator that measures it"
        )
    return abs(derivative.curvature)
