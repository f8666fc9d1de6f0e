"""Update rules on (seed, directional derivative) pairs.

With ``g = mean_i d_i z_i``, every rule makes a direction ``u`` and moves ``v <- max(v -
learning_rate * u, 0)``:

- ``sgd``: ``u = g``.
- ``sign``: ``u = mean_i sign(d_i) z_i``; only the scalar is signed, as in ZO-LLM.
- ``momentum``: ``u <- momentum * u + g``.
- ``adam``: ``m <- b1 m + (1 - b1) g``, ``w <- b2 w + (1 - b2) g^2``,
  ``u = (m / (1 - b1^t)) / (sqrt(w / (1 - b2^t)) + eps)`` after t steps.

What an optimizer remembers is a function of the steps so far, so that a journal gives it back.

Source: QZO, arXiv 2505.13430, eq. 5 and algorithm 1; momentum: Polyak, 1964, as in torch.optim.SGD;
Adam: arXiv 1412.6980, algorithm 1, on the estimate as in MeZO, arXiv 2305.17333, appendix B.2;
sign: ZO-LLM, arXiv 2402.11592.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from qzo.errors import CheckpointError
from qzo.lozo_momentum import LOZOMomentum
from qzo.probes import DirectionalDerivative
from qzo.scales import Scales


@runtime_checkable
class Optimizer(Protocol):
    """The seam: ``step(scales, derivatives, learning_rate)``, and what it remembers."""

    def step(
        self,
        scales: Scales,
        derivatives: Sequence[DirectionalDerivative],
        learning_rate: float,
    ) -> None:
        """Move the scales. The directions are drawn again from their seeds."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what it remembers, for a snapshot."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned; nothing: start again."""
        ...


class SGD:
    """Steps against the gradient estimate; remembers nothing. The other rules change one part."""

    def step(
        self,
        scales: Scales,
        derivatives: Sequence[DirectionalDerivative],
        learning_rate: float,
    ) -> None:
        """Move the scales; no derivatives, no move."""
        if not derivatives:
            return
        self._begin(scales)
        for start, stop in scales.chunks():
            slope = scales.mean_slope(derivatives, start, stop)
            scales.move(start, stop, self._direction(slope, start, stop) * -learning_rate)

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over nothing."""

    def _begin(self, scales: Scales) -> None:
        """Get ready for a step."""

    def _direction(self, slope: Tensor, start: int, stop: int) -> Tensor:
        """Return ``u`` for ``v[start:stop]``, given ``g`` there."""
        del start, stop
        return slope


class Sign(SGD):
    """Steps as if every directional derivative were 1, -1 or 0."""

    def step(
        self,
        scales: Scales,
        derivatives: Sequence[DirectionalDerivative],
        learning_rate: float,
    ) -> None:
        """Move the scales; no derivatives, no move."""
        signs = [replace(d, value=float((d.value > 0) - (d.value < 0))) for d in derivatives]
        super().step(scales, signs, learning_rate)


class Momentum(SGD):
    """Steps against a decaying sum of gradient estimates, one fp32 value for each trained one.

    Args:
        momentum: How much of the sum a step keeps.
    """

    def __init__(self, momentum: float = 0.9) -> None:
        self.momentum = momentum
        self._velocity: Float[Tensor, " size"] | None = None

    def state(self) -> dict[str, Tensor]:
        """Return the sum."""
        return {} if self._velocity is None else {"velocity": self._velocity}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over the sum."""
        velocity = state.get("velocity")
        self._velocity = None if velocity is None else velocity.clone()

    def _begin(self, scales: Scales) -> None:
        if self._velocity is None:
            self._velocity = torch.zeros_like(scales.values)

    def _direction(self, slope: Tensor, start: int, stop: int) -> Tensor:
        assert self._velocity is not None
        return self._velocity[start:stop].mul_(self.momentum).add_(slope)


class Adam(SGD):
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

    def _begin(self, scales: Scales) -> None:
        if self._moments is None:
            self._moments = torch.zeros(2, *scales.values.shape, device=scales.values.device)
        self._num_steps += 1

    def _direction(self, slope: Tensor, start: int, stop: int) -> Tensor:
        assert self._moments is not None
        averages = []
        for moment, beta, term in zip(self._moments, self.betas, (slope, slope**2), strict=True):
            part = moment[start:stop].mul_(beta).add_(term * (1 - beta))
            averages.append(part / (1 - beta**self._num_steps))
        mean, square = averages
        return torch.div(mean, square.sqrt() + self.epsilon)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    **{"sgd": SGD, "sign": Sign, "momentum": Momentum, "adam": Adam},
    "lozo_momentum": LOZOMomentum,
}


def make_optimizer(name: str, settings: Mapping[str, Any]) -> Optimizer:
    """Return a new optimizer.

    Args:
        name: A key of ``OPTIMIZERS``.
        settings: Its arguments, as a recipe or a journal's header has them.

    Raises:
        CheckpointError: There is no such optimizer, or it has no such argument.
    """
    if name not in OPTIMIZERS:
        raise CheckpointError(f"optimizer: expected one of {sorted(OPTIMIZERS)}, got {name!r}")
    if not all(isinstance(value, float) and 0 <= value < 1 for value in settings.values()):
        raise CheckpointError(
            f"optimizer_settings: expected numbers from 0 to below 1, got {settings!r}"
        )
    try:
        return OPTIMIZERS[name](**settings)
    except TypeError as error:
        raise CheckpointError(f"optimizer_settings: {name}: {error}") from error
