"""What a recipe holds where it does not say: by its preset, its estimator and what is trained.

- ``paper``: QZO as published (arXiv 2505.13430, section 4.1).
- ``default``: row coordinates with a direction per example.
"""

from collections.abc import Mapping
from typing import Any

from qzo.errors import ConfigError

# What an estimator takes if the recipe names no learning rate: their steps differ in length.
# per_example, normalised: recipes/LOG.md; absolute: the QZO paper; the others were not tuned.
_SPSA_RATES = {"row": 3e-3, "column": 1e-2, "rank_one": 3e-3, "relative": 1e-3, "absolute": 1e-7}
_LEARNING_RATES = {
    ("per_example", "row"): 5e-2,
    ("per_example", "column"): 5e-2,
    ("per_example", "rank_one"): 5e-2,
    ("fzoo", "row"): 5e-4,  # its derivatives are about 1 / epsilon
    ("fzoo", "relative"): 2e-4,
    ("fzoo", "absolute"): 1e-8,
    **{
        (name, coordinates): rate
        for name in ("spsa", "one_sided", "rloo", "spsa_1_5", "forward_gradient")
        for coordinates, rate in _SPSA_RATES.items()
    },
    ("per_example", "lora"): 1e-2,
    ("spsa", "lora"): 1e-4,  # MeZO, arXiv 2305.17333, its grid for OPT
    ("per_example", "prefix"): 1e-2,
    ("spsa", "prefix"): 1e-3,  # as above, with this epsilon
}

_EPSILONS = {"prefix": 1e-1}  # MeZO, as above

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "learning_rate": 1e-7,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 16,
        "stratified_batches": False,
        "zo": {
            "estimator": "spsa",
            "coordinates": "absolute",
            "direction": "gaussian",
            "epsilon": 1e-3,
            "max_loss_difference": 0.2,  # C = 100: 2 * epsilon * C
        },
    },
}


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what the preset says, and what goes with the estimator and what is trained.

    Raises:
        ConfigError: There is no such preset, or ``zo`` holds no keys.
    """
    preset = values.get("preset", "default")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"preset: expected one of {sorted(PRESETS)}, got {preset!r}")
    zo = values.get("zo", {})
    if not isinstance(zo, Mapping) or not all(isinstance(key, str) for key in zo):
        raise ConfigError(f"zo: expected keys and values, got {type(zo).__name__}")
    defaults = PRESETS[preset]
    zo = {**defaults.get("zo", {}), **zo}
    tuned = zo.get("tuned", "scales")
    place = zo.get("coordinates", "row") if tuned == "scales" else tuned
    kind = (zo.get("estimator", "per_example"), place)
    rate = next((rate for key, rate in _LEARNING_RATES.items() if key == kind), 5e-2)
    zo = {**({"epsilon": _EPSILONS[place]} if place in _EPSILONS else {}), **zo}
    return {"learning_rate": rate, **defaults, **values, "zo": zo}
