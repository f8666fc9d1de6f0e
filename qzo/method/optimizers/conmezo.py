"""ConMeZO: directions lie in a cone around the momentum ``m`` of the estimates.

With ``S`` values that directions move and the angle ``theta``, probes and steps use

    ``z' = sqrt(S) cos(theta) m / |m| + sin(theta) z``

and a step does ``v <- v - learning_rate g`` and ``m <- beta m + (1 - beta) g`` with ``g = mean_i
d_i z'_i``. At ``theta = pi / 2`` the cone is the whole space and ``z' = z``, as it is before there
is any momentum. What else shapes directions (sections, stretch) does so after the cone: ``m`` is in
the units of ``z``.

Source: Behric, Zhang, Li, Thekumparampil, "ConMeZO", arXiv 2511.02757, in the form of its code,
which has ``theta = 1.35`` and ``beta = 0.99``. The warm-up of both is left out.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qzo.errors import CheckpointError
from qzo.method.directions.philox import combine
from qzo.method.directions.shaping import Tilt
from qzo.method.exact_sums import norm
from qzo.method.probes import DirectionalDerivative
from qzo.method.trained_vector import Scales


class ConMeZO:
    """Looks where earlier steps went; one fp32 value for each trained one.

    Args:
        conmezo_angle: Between directions and the momentum, in radians, from 0 to ``pi / 2``.
        conmezo_beta: How much of the momentum a step keeps.

    Raises:
        CheckpointError: The angle is another one.
    """

    def __init__(self, conmezo_angle: float = 1.35, conmezo_beta: float = 0.99) -> None:
        if not 0 <= conmezo_angle <= math.pi / 2:
            raise CheckpointError(
                "optimizer_settings: expected a conmezo_angle from 0 to pi / 2, got "
                f"{conmezo_angle}"
            )
        self.angle, self.beta = conmezo_angle, conmezo_beta
        self._momentum: Float[Tensor, " size"] | None = None

    def aim(self, scales: Scales) -> None:
        """Tilt directions to the momentum."""
        size = 0.0 if self._momentum is None else norm(self._momentum)
        if self._momentum is None or size == 0:
            scales.directions.tilt = None
            return
        num_still = sum(stop - start for start, stop in scales.directions.still)
        along = math.sqrt(len(scales) - num_still) * math.cos(self.angle) / size
        scales.directions.tilt = Tilt(self._momentum, along, math.sin(self.angle))

    def step(
        self,
        scales: Scales,
        derivatives: Sequence[DirectionalDerivative],
        learning_rate: float,
    ) -> None:
        """Move the scales, then the momentum; no derivatives, no move."""
        if not derivatives:
            return
        weights = [derivative.value / len(derivatives) for derivative in derivatives]
        if self._momentum is None:
            self._momentum = torch.zeros_like(scales.values)
        for start, stop in scales.chunks():
            slope = combine(scales.directions.unstretched(derivatives, start, stop), weights)
            self._momentum[start:stop].mul_(self.beta).add_(slope * (1 - self.beta))
            step = scales.directions.shaped_step(slope, start, stop)
            scales.move(start, stop, step * -learning_rate)

    def state(self) -> dict[str, Tensor]:
        """Return the momentum."""
        return {} if self._momentum is None else {"momentum": self._momentum}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over the momentum."""
        momentum = state.get("momentum")
        self._momentum = None if momentum is None else momentum.clone()
