"""Estimators ask for losses at probes and tell directional derivatives. Floats only."""

from collections.abc import Callable, Mapping
from typing import Any

from qzo.errors import ConfigError
from qzo.method.estimators.estimator import Estimator, evaluations_per_example
from qzo.method.estimators.forward_gradient import ForwardGradient
from qzo.method.estimators.fzoo import FZOO
from qzo.method.estimators.one_sided import OneSided
from qzo.method.estimators.per_example import PerExampleSPSA
from qzo.method.estimators.rloo import RLOO
from qzo.method.estimators.spsa import SPSA
from qzo.method.estimators.spsa_1_5 import OneAndAHalfSPSA

__all__ = [
    "ESTIMATORS",
    "FZOO",
    "RLOO",
    "SPSA",
    "Estimator",
    "ForwardGradient",
    "OneAndAHalfSPSA",
    "OneSided",
    "PerExampleSPSA",
    "evaluations_per_example",
    "make_estimator",
]

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "spsa": SPSA,
    "one_sided": OneSided,
    "fzoo": FZOO,
    "rloo": RLOO,
    "per_example": PerExampleSPSA,
    "spsa_1_5": OneAndAHalfSPSA,
    "forward_gradient": ForwardGradient,
}


def make_estimator(name: str, settings: Mapping[str, Any]) -> Estimator:
    """Return an estimator.

    Args:
        name: A key of ``ESTIMATORS``.
        settings: Its arguments, as ``Recipe.estimator_settings`` has them.

    Raises:
        ConfigError: There is no such estimator; its own checks raise the same.
    """
    if name not in ESTIMATORS:
        raise ConfigError(f"zo.estimator: expected one of {sorted(ESTIMATORS)}, got {name!r}")
    return ESTIMATORS[name](**settings)
