"""Momentum: ``u <- momentum * u + g``.

Source: Polyak, 1964, as in torch.optim.SGD; on the estimate as in MeZO, arXiv 2305.17333,
appendix B.2.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qzo.method.optimizers.optimizer import descend
from qzo.method.probes import DirectionalDerivative
from qzo.method.trained_vector import Scales


class Momentum:
    """Steps against a decaying sum of gradient estimates, one fp32 value for each trained one.

    Args:
        momentum: How much of the sum a step keeps.
    """

    def __init__(self, momentum: float = 0.9) -> None:
        self.momentum = momentum
        self._velocity: Float[Tensor, " size"] | None = None

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
        velocity = torch.zeros_like(scales.values) if self._velocity is None else self._velocity
        self._velocity = velocity

        def rule(slope: Tensor, start: int, stop: int) -> Tensor:
            return velocity[start:stop].mul_(self.momentum).add_(slope)

        descend(scales, derivatives, learning_rate, rule)

    def state(self) -> dict[str, Tensor]:
        """Return the sum."""
        return {} if self._velocity is None else {"velocity": self._velocity}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over the sum."""
        velocity = state.get("velocity")
        self._velocity = None if velocity is None else velocity.clone()
