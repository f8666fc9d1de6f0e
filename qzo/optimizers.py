"""Update rules on (seed, directional derivative) pairs.

With ``g = mean_i d_i z_i``:

- ``sgd``: ``v <- max(v - learning_rate * g, 0)``.
- ``momentum``: ``m <- momentum * m + g``, ``v <- max(v - learning_rate * m, 0)``.

What an optimizer remembers is a function of the steps so far, so that a journal gives it back.

Source: QZO, arXiv 2505.13430, eq. 5 and algorithm 1; momentum: Polyak, 1964, as in torch.optim.SGD.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from qzo.errors import CheckpointError
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
    """Steps against the gradient estimate; remembers nothing."""

    def step(
        self,
        scales: Scales,
        derivatives: Sequence[DirectionalDerivative],
        learning_rate: float,
    ) -> None:
        """Move the scales; no derivatives, no move."""
        if not derivatives:
            return
        for start, stop in scales.chunks():
            slope = scales.mean_slope(derivatives, start, stop)
            scales.move(start, stop, slope * -learning_rate)

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over nothing."""


class Momentum:
    """Steps against a decaying sum of gradient estimates, one fp32 value for each trained one.

    Args:
        momentum: How much of the sum a step keeps.
    """

    def __init__(self, momentum: float = 0.9) -> None:
        self.momentum = momentum
        self._velocity: Float[Tensor, " size"] | None = None

    def step(
        self,
        scales: Scales,
        derivatives: Sequence[DirectionalDerivative],
        learning_rate: float,
    ) -> None:
        """Move the scales; no derivatives, no move."""
        if not derivatives:
            return
        if self._velocity is None:
            self._velocity = torch.zeros_like(scales.values)
        for start, stop in scales.chunks():
            velocity = self._velocity[start:stop]
            velocity.mul_(self.momentum).add_(scales.mean_slope(derivatives, start, stop))
            scales.move(start, stop, velocity * -learning_rate)

    def state(self) -> dict[str, Tensor]:
        """Return the sum."""
        return {} if self._velocity is None else {"velocity": self._velocity}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over the sum."""
        velocity = state.get("velocity")
        self._velocity = None if velocity is None else velocity.clone()


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"sgd": SGD, "momentum": Momentum}


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
    if not all(isinstance(v, float) and math.isfinite(v) for v in settings.values()):
        raise CheckpointError(f"optimizer_settings: expected finite numbers, got {settings!r}")
    try:
        return OPTIMIZERS[name](**settings)
    except TypeError as error:
        raise CheckpointError(f"optimizer_settings: {name}: {error}") from error
