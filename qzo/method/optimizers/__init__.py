"""Update rules on (seed, directional derivative) pairs, one per file.

With ``g = mean_i d_i z_i``, most rules make a direction ``u`` of it and move ``v <- max(v -
learning_rate * u, 0)``. ``conservative`` is SGD on a derivative that was chosen before it went into
the journal; see ``estimators.conservative``.

What an optimizer remembers is a function of the steps so far, so that a journal gives it back.
"""

from collections.abc import Callable, Mapping
from typing import Any

from qzo.errors import CheckpointError
from qzo.method.optimizers.adam import Adam
from qzo.method.optimizers.conmezo import ConMeZO
from qzo.method.optimizers.hizoo import HiZOO
from qzo.method.optimizers.lozo_momentum import LOZOMomentum
from qzo.method.optimizers.meazo import MEAZO
from qzo.method.optimizers.momentum import Momentum
from qzo.method.optimizers.optimizer import Optimizer
from qzo.method.optimizers.sgd import SGD
from qzo.method.optimizers.sign import Sign

__all__ = ["OPTIMIZERS", "REMEMBERED", "RULES", "Optimizer", "make_optimizer"]

RULES = 2  # goes into the journal: steps that are rounded in another way need another number

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": SGD,
    "sign": Sign,
    "momentum": Momentum,
    "adam": Adam,
    "meazo": MEAZO,
    "hizoo": HiZOO,
    "conmezo": ConMeZO,
    "conservative": SGD,
    "lozo_momentum": LOZOMomentum,
}

# Numbers that an optimizer remembers for every trained value, at most; the others none.
REMEMBERED = {"momentum": 1, "adam": 2, "hizoo": 1, "conmezo": 1, "lozo_momentum": 1}


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
    fractions = [value for key, value in settings.items() if key != "conmezo_angle"]
    if not all(isinstance(value, float) and 0 <= value < 1 for value in fractions):
        raise CheckpointError(
            f"optimizer_settings: expected numbers from 0 to below 1, got {settings!r}"
        )
    try:
        return OPTIMIZERS[name](**settings)
    except TypeError as error:
        raise CheckpointError(f"optimizer_settings: {name}: {error}") from error
