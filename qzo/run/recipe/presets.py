"""What a recipe holds where it does not say: presets, and defaults that follow from other keys.

A preset is a dictionary of values under those of the recipe: a key of the recipe replaces the
preset's value for that key, and nothing else. A value of the preset that the other keys leave
without effect (``sides`` with another estimator) is dropped; one of the recipe is refused.

- ``paper``: QZO as published (arXiv 2505.13430, section 4.1).
- ``default``: what did best at equal forwards, recipes/BENCHMARKS.md.
- ``none``: no values; every key has the default of its own.
"""

from collections.abc import Mapping
from typing import Any

from qzo.errors import ConfigError
from qzo.run.recipe.compatibility import without_effect
from qzo.run.recipe.keys import Recipe, ZOConfig

# What an estimator takes if the recipe names no learning rate: their steps differ in length.
# per_example, normalised or not, and lora with spsa: recipes/LOG.md, BENCHMARKS.md; absolute: the
# QZO paper; prefix: MeZO, arXiv 2305.17333, its grid for OPT; the others were not tuned.
_SPSA_RATES = {
    **{"row": 3e-3, "column": 1e-2, "rank_one": 3e-3, "relative": 1e-3, "absolute": 1e-7},
    **{"lora": 3e-3, "prefix": 1e-3},
}
_LEARNING_RATES = {
    ("leave_one_out", "row"): 3e-1,
    ("leave_one_out", "column"): 1e-1,
    ("leave_one_out", "rank_one"): 1e-1,
    ("leave_one_out", "lora"): 1e-2,
    ("leave_one_out", "prefix"): 1e-2,
    ("per_example", "row"): 5e-2,
    ("per_example", "column"): 5e-2,
    ("per_example", "rank_one"): 5e-2,
    ("per_example", "lora"): 1e-2,
    ("per_example", "prefix"): 1e-2,
    ("per_example, as measured", "row"): 1e-2,
    ("per_example, as measured", "column"): 3e-2,
    ("per_example, as measured", "rank_one"): 1e-2,
    ("per_example, as measured", "lora"): 1e-2,
    ("per_example, as measured", "prefix"): 3e-3,
    ("fzoo", "row"): 5e-4,  # its derivatives are about 1 / epsilon
    ("fzoo", "column"): 5e-4,
    ("fzoo", "rank_one"): 5e-4,
    ("fzoo", "relative"): 2e-4,
    ("fzoo", "absolute"): 1e-8,
    ("fzoo", "lora"): 1e-4,
    ("fzoo", "prefix"): 1e-3,
    **{
        (name, place): rate
        for name in ("spsa", "one_sided", "rloo", "spsa_1_5", "forward_gradient")
        for place, rate in _SPSA_RATES.items()
    },
}

_EPSILONS = {"prefix": 1e-1}  # MeZO, as above

PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "zo": {
            # Two examples of a stratified batch differ in class, and what their gradients have in
            # common but for its sign cancels.
            "estimator": "per_example",
            "sides": "leave_one_out",
            "num_directions": 8,
            "examples_per_direction": 2,  # 1 where a step has an odd number of examples
            # Values and outputs of the attention by the names of the common architectures, behind
            # the first decoder layers, where the gradients of examples agree least. Chosen by
            # trial: recipes/LOG.md.
            "modules": [
                *("v_proj", "o_proj", "out_proj", "value", "attn.c_proj"),
                *("attention.dense", "self_attention.dense", "self_attn.dense"),
            ],
            "depth": [0.33, 1.0],
        },
    },
    "paper": {  # its learning rate, 1e-7, is that of absolute scales in the table above
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
    "none": {},
}


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """Put the values of the preset under those of a recipe.

    Raises:
        ConfigError: There is no such preset, or ``zo`` holds no keys.
    """
    preset = values.get("preset", "default")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"preset: expected one of {sorted(PRESETS)}, got {preset!r}")
    zo = values.get("zo", {})
    if not isinstance(zo, Mapping) or not all(isinstance(key, str) for key in zo):
        raise ConfigError(f"zo: expected keys and values, got {type(zo).__name__}")
    under = PRESETS[preset]
    return {**under, **values, "zo": {**under.get("zo", {}), **zo}}


def settled(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Give the keys that a recipe leaves out what goes with those that it names.

    Args:
        recipe: With the values of its preset.
        values: What was written.
    """
    given = values.get("zo", {})
    preset = PRESETS[recipe.preset].get("zo", {})
    dropped = [key for key in preset if key not in given and key in without_effect(recipe.zo)]
    changes = {key: ZOConfig.model_fields[key].default for key in dropped}
    if "examples_per_direction" in preset.keys() - given.keys() and recipe.examples_per_step % 2:
        changes["examples_per_direction"] = 1
    if "epsilon" not in preset and "epsilon" not in given:
        changes["epsilon"] = _EPSILONS.get(recipe.zo.tuned, recipe.zo.epsilon)
    zo = recipe.zo.model_copy(update=changes)
    rate = recipe.learning_rate if "learning_rate" in values else learning_rate_of(zo)
    return recipe.model_copy(update={"zo": zo, "learning_rate": rate})


def learning_rate_of(zo: ZOConfig) -> float:
    """Return the learning rate of an estimator and of what it trains."""
    place = zo.coordinates if zo.tuned == "scales" else zo.tuned
    estimator: str = zo.estimator
    if estimator == "per_example" and not zo.normalize:
        estimator = "per_example, as measured"
    elif zo.sides == "leave_one_out":
        estimator = "leave_one_out"
    return _LEARNING_RATES.get((estimator, place), 5e-2)  # 5e-2 of what is refused later
