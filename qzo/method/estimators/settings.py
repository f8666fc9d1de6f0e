"""What all estimators are told, checked."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from qzo.errors import ConfigError
from qzo.method.probes import BASIS_NUMBER, Probe


@dataclass(frozen=True)
class Settings:
    """What all estimators are told.

    Attributes:
        epsilon: Probe radius, in units of the trained vector.
        seed: Seed of the run.
        num_directions: Directions of a step; their estimates are averaged.
        max_loss_difference: Clip of a loss difference in nats; None for no clip. Each estimator
            says which difference.
        basis_steps: Steps in a row whose directions share a basis; None where there is none.
    """

    epsilon: float
    seed: int
    _: KW_ONLY
    num_directions: int = 1
    max_loss_difference: float | None = None
    basis_steps: int | None = None

    def __post_init__(self) -> None:
        check_positive("zo.epsilon", self.epsilon)
        check_positive("zo.num_directions", self.num_directions)
        check_seeds(self.num_directions)
        if self.max_loss_difference is not None:
            check_positive("zo.max_loss_difference", self.max_loss_difference)
        if self.basis_steps is not None:
            check_positive("zo.basis_steps", self.basis_steps)


def check_positive(key: str, value: float) -> None:
    """Refuse a number that is not finite and above 0.

    Raises:
        ConfigError: The value is not a positive number.
    """
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{key}: expected a number above 0, got {value}")


def check_seeds(num_directions: int) -> None:
    """Refuse more directions in a step than there are seeds for.

    Raises:
        ConfigError: There are too many.
    """
    if num_directions >= BASIS_NUMBER:
        raise ConfigError(
            f"zo.num_directions: expected fewer than {BASIS_NUMBER} directions in a step, got "
            f"{num_directions}"
        )


def check_comparable(num_directions: int, name: str) -> None:
    """Refuse a single direction where losses are compared with each other.

    Raises:
        ConfigError: There is but one.
    """
    if num_directions < 2:
        raise ConfigError(
            f"zo.num_directions: expected at least 2 with {name!r}, which compares the losses of "
            f"directions, got {num_directions}"
        )


def check_losses(probes: Sequence[Probe], losses: Sequence[float]) -> None:
    """Refuse other than one loss per probe.

    Raises:
        ValueError: There are more or fewer.
    """
    if len(losses) != len(probes):
        raise ValueError(f"losses: expected one per probe, {len(probes)}, got {len(losses)}")
