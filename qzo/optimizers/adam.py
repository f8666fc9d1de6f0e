"""Adam: ``u = (m / (1 - b1^t)) / (sqrt(w / (1 - b2^t)) + eps)`` after t steps.

``m <- b1 m + (1 - b1) g`` and ``w <- b2 w + (1 - b2) g^2``.

Source: arXiv 1412.6980, algorithm 1, on the estimate as in MeZO, arXiv 2305.17333, appendix B.2.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qzo.optimizers.optimizer import descend
from qzo.probes import DirectionalDerivative
from qzo.scales import Scales


class Adam:
    """Steps against the average of gradient estimates over their size; two fp32 values for each.

    Args:
        adam_beta1: How much of the average of estimates a step keeps.
        adam_beta2: How much of the average of their squares a step keeps.
        adam_epsilon: Added to the size.
    """

    def __init__(
        self, adam_beta1: float = 0.9, adam_beta2: float = 0.999, adam_epsilon: float = 1e-8
    ) -> None:
        self.betas, self.epsilon = (adam_beta1, adam_beta2), adam_epsilon
        self._moments: Float[Tensor, "2 size"] | None = None
        self._num_steps = 0

    def aim(self, scales: Scales) -> None:
        """Draw directions as they are."""

    def step(
        self,
        scales: Scales,
        derivatives: Sequence[DirectionalDerivative],
        learning_rate: float,
    ) -> None:
        """Move the scales; no derivatives, no move."""
        if not derivatives:
            return
        if self._moments is None:
            self._moments = torch.zeros(2, *scales.values.shape, device=scales.values.device)
        self._num_steps += 1
        descend(scales, derivatives, learning_rate, self._direction)

    def state(self) -> dict[str, Tensor]:
        """Return both averages and the number of steps."""
        if self._moments is None:
            return {}
        return {"moments": self._moments, "num_steps": torch.tensor(self._num_steps)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over both averages and the number of steps."""
        moments = state.get("moments")
        self._moments = None if moments is None else moments.clone()
        self._num_steps = int(state["num_steps"]) if "num_steps" in state else 0

    def _direction(self, slope: Tensor, start: int, stop: int) -> Tensor:
        assert self._moments is not None
        averages = []
        for moment, beta, term in zip(self._moments, self.betas, (slope, slope**2), strict=True):
            part = moment[start:stop].mul_(beta).add_(term * (1 - beta))
            averages.append(part / (1 - beta**self._num_steps))
        mean, square = averages
        return torch.div(mean, square.sqrt() + self.epsilon)
