"""Adam: ``u`` of the averages of gradient estimates and of their squares; see ``moments``.

Source: arXiv 1412.6980, algorithm 1, on the estimate as in MeZO, arXiv 2305.17333, appendix B.2.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from qzo.method.optimizers.moments import Moments
from qzo.method.optimizers.optimizer import descend
from qzo.method.probes import DirectionalDerivative
from qzo.method.trained_vector import Scales


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
        self._moments = Moments(adam_beta1, adam_beta2, adam_epsilon)

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
        self._moments.begin_step(len(scales), scales.values.device)
        descend(scales, derivatives, learning_rate, self._moments.direction)

    def state(self) -> dict[str, Tensor]:
        """Return both averages and the number of steps."""
        return self._moments.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over both averages and the number of steps."""
        self._moments.restore(state)
