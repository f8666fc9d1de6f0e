"""MEAZO: SGD whose step is divided by the size that directional derivatives have had.

``w <- beta w + (1 - beta) mean_i d_i^2`` and ``v <- v - learning_rate g / (sqrt(w_hat) + eps)``
with ``w_hat = w / (1 - beta^t)`` after t steps. Two numbers are all that it remembers.

The paper squares the mean of the ``d_i``. That is the same with one direction; with several, whose
signs are arbitrary, the mean of the squares is the size of a derivative and their mean is not.

Source: Dbouk, Gazagnadou, Reisser, Louizos, "On Adaptivity in Zeroth-Order Optimization", arXiv
2605.03869. Its values of ``beta`` and ``eps`` were not at hand; the defaults are ours.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qzo.method.optimizers.optimizer import descend
from qzo.method.probes import DirectionalDerivative
from qzo.method.trained_vector import Scales


class MEAZO:
    """Steps of a length that does not depend on the size of the loss.

    Args:
        meazo_beta: How much of the second moment a step keeps.
        meazo_epsilon: Added to its root.
    """

    def __init__(self, meazo_beta: float = 0.99, meazo_epsilon: float = 1e-8) -> None:
        self.beta, self.epsilon = meazo_beta, meazo_epsilon
        self._second_moment, self._num_steps = 0.0, 0

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
        square = math.fsum(d.value * d.value for d in derivatives) / len(derivatives)
        self._second_moment = self.beta * self._second_moment + (1 - self.beta) * square
        self._num_steps += 1
        size = math.sqrt(self._second_moment / (1 - self.beta**self._num_steps)) + self.epsilon
        if size > 0:
            descend(scales, derivatives, learning_rate / size)

    def state(self) -> dict[str, Tensor]:
        """Return the second moment and the number of steps."""
        moment = torch.tensor(self._second_moment, dtype=torch.float64)
        return {"second_moment": moment, "num_steps": torch.tensor(self._num_steps)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over the second moment and the number of steps."""
        self._second_moment = float(state.get("second_moment", 0.0))
        self._num_steps = int(state.get("num_steps", 0))
