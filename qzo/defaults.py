"""What a recipe holds where it does not say: by its preset, its estimator and what is trained.

- ``paper``: QZO as published (arXiv 2505.13430, section 4.1).
- ``default``: multipliers on the rows of values and attention outputs behind the first third of the
  blocks; for every two examples eight directions of their own, each loss against the others. What
  a recipe names itself is left alone, be it with the value it would have had: where
  ``zo.estimator`` is named, the estimator's part of this does not apply; where coordinates, blocks,
  modules or ``tuned`` are, the layers' part does not, and all layers are trained unless it says
  which ones.
"""

from collections.abc import Mapping
from typing import Any

from qzo.coordinates import BY_FACTORS
from qzo.errors import ConfigError

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

# Measured: recipes/BENCHMARKS.md. Two examples of a stratified batch differ in class, and what
# their gradients have in common but for its sign cancels.
_DEFAULT_ESTIMATOR = {"estimator": "per_example", "sides": "leave_one_out", "num_directions": 8}
# Values and outputs of the attention by the names of the common architectures, behind the first
# blocks, where the gradients of examples agree least. Chosen by trial: recipes/LOG.md.
_DEFAULT_LAYERS = {
    "modules": ["v_proj", "o_proj", "out_proj", "value", "attention.dense", "attn.c_proj"],
    "depth": [0.33, 1.0],
}
_EXAMPLES = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
_CHOICES_OF_LAYERS = {
    *("coordinates", "modules", "depth", "num_blocks", "tuned", "unquantized"),
    *("first_order_blocks", "first_order_layers"),
}

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},  # see ``_default_zo``
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
    zo = {**(_default_zo(values, zo) if preset == "default" else defaults["zo"]), **zo}
    tuned = zo.get("tuned", "scales")
    place = zo.get("coordinates", "row") if tuned == "scales" else tuned
    estimator = zo.get("estimator", "per_example")
    if estimator == "per_example" and zo.get("normalize") is False:
        estimator = "per_example, as measured"
    elif zo.get("sides") == "leave_one_out":
        estimator = "leave_one_out"
    rates = (r for key, r in _LEARNING_RATES.items() if key == (estimator, place))
    rate = next(rates, 5e-2)  # of names that are refused later
    zo = {**({"epsilon": _EPSILONS[place]} if place in _EPSILONS else {}), **zo}
    return {"learning_rate": rate, **defaults, **values, "zo": zo}


def _default_zo(values: Mapping[str, Any], zo: Mapping[str, Any]) -> dict[str, Any]:
    """Return what preset ``default`` adds to the choices of a recipe."""
    result: dict[str, Any] = {}
    if "estimator" not in zo and zo.get("coordinates", "row") in BY_FACTORS:
        sizes = [values.get(key, size) for key, size in _EXAMPLES.items()]
        is_even = any(type(size) is int and size % 2 == 0 for size in sizes)
        result |= {**_DEFAULT_ESTIMATOR, "examples_per_direction": 2 if is_even else 1}
    if not _CHOICES_OF_LAYERS & set(zo):
        result |= _DEFAULT_LAYERS
    return result
