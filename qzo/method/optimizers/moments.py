"""Adam's averages: ``u = (m / (1 - b1^t)) / (sqrt(w / (1 - b2^t)) + eps)`` after t steps.

``m <- b1 m + (1 - b1) g`` and ``w <- b2 w + (1 - b2) g^2``.

Source: arXiv 1412.6980, algorithm 1.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor


class Moments:
    """The averages of gradients and of their squares; two fp32 values for each.

    Args:
        beta1: How much of the average of gradients a step keeps.
        beta2: How much of the average of their squares a step keeps.
        epsilon: Added to the size.
    """

    def __init__(self, beta1: float, beta2: float, epsilon: float) -> None:
        self._betas, self._epsilon = (beta1, beta2), epsilon
        self._moments: Float[Tensor, "2 size"] | None = None
        self._num_steps = 0

    def begin_step(self, size: int, device: torch.device) -> None:
        """Count a step over a vector of a size."""
        if self._moments is None:
            self._moments = torch.zeros(2, size, device=device)
        self._num_steps += 1

    def direction(
        self, slope: Float[Tensor, " length"], start: int, stop: int
    ) -> Float[Tensor, " length"]:
        """Take in a part of the gradient; return that part of ``u``."""
        assert self._moments is not None
        averages = []
        for moment, beta, term in zip(self._moments, self._betas, (slope, slope**2), strict=True):
            part = moment[start:stop].mul_(beta).add_(term * (1 - beta))
            # times the reciprocal: a quotient by a number is not rounded alike on all devices
            averages.append(part * (1 / (1 - beta**self._num_steps)))
        mean, square = averages
        return torch.div(mean, square.sqrt() + self._epsilon)

    def state(self) -> dict[str, Tensor]:
        """Return both averages and the number of steps."""
        if self._moments is None:
            return {}
        return {"moments": self._moments, "num_steps": torch.tensor(self._num_steps)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned; nothing: start again."""
        moments = state.get("moments")
        self._moments = None if moments is None else moments.clone()
        self._num_steps = int(state["num_steps"]) if "num_steps" in state else 0
