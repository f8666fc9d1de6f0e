"""SGD: a step against the gradient estimate, ``v <- v - learning_rate g``.

Source: QZO, arXiv 2505.13430, eq. 5 and algorithm 1; MeZO, arXiv 2305.17333, algorithm 1.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from qzo.method.optimizers.optimizer import descend
from qzo.method.probes import DirectionalDerivative
from qzo.method.trained_vector import Scales


class SGD:
    """Steps against the gradient estimate; remembers nothing."""

    def aim(self, scales: Scales) -> None:
        """Draw directions as they are."""

    def step(
        self,
        scales: Scales,
        derivatives: Sequence[DirectionalDerivative],
        learning_rate: float,
    ) -> None:
        """Move the scales; no derivatives, no move."""
        if derivatives:
            descend(scales, derivatives, learning_rate)

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over nothing."""
