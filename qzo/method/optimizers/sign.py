"""Sign: ``u = mean_i sign(d_i) z_i``; only the scalar is signed.

Source: ZO-LLM, arXiv 2402.11592, ZO-SGD-Sign as in its code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from qzo.method.optimizers.optimizer import descend
from qzo.method.probes import DirectionalDerivative
from qzo.method.trained_vector import Scales


class Sign:
    """Steps as if every directional derivative were 1, -1 or 0; remembers nothing."""

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
            signs = [replace(d, value=float((d.value > 0) - (d.value < 0))) for d in derivatives]
            descend(scales, signs, learning_rate)

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over nothing."""
