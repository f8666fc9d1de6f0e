"""What one key of a recipe says of another: combinations that are refused, in words."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from qzo.config import Recipe, ZOConfig
from qzo.coordinates import BY_FACTORS
from qzo.direction_settings import problem_of
from qzo.errors import ConfigError
from qzo.estimators import make_estimator
from qzo.memory import parse_memory


def check_together(values: Recipe) -> None:
    """Refuse keys that do not go together.

    Raises:
        ConfigError: There are such keys.
    """
    if values.reward is not None and values.objective != "reward":
        raise ConfigError(
            f"reward: expected none with objective {values.objective!r}, got {values.reward!r}; "
            "set objective: reward"
        )
    if values.memory_limit is not None:
        parse_memory(values.memory_limit, "memory_limit")
    if values.prompt == "none" and values.task is None:
        raise ConfigError(
            "prompt: expected a task whose template is left out, got 'none' without a task; "
            "own data has the prompts that it holds"
        )
    if values.task is not None and values.labelling.is_given:
        key, got = next((k, v) for k, v in asdict(values.labelling).items() if v is not None)
        raise ConfigError(
            f"{key}: {got!r} cannot be combined with task {values.task!r}: a task has its own "
            f"prompts and answers; leave out {key}, or the task"
        )
    zo = values.zo
    problem = problem_of(zo.direction, zo.coordinates, zo.direction_settings)
    if problem is not None:
        raise ConfigError(f"zo.{problem}")
    if zo.optimizer == "lozo_momentum" and zo.direction != "lozo":
        raise ConfigError(
            f"zo.optimizer: expected 'lozo_momentum' with zo.direction 'lozo' only, got "
            f"{zo.direction!r}; use 'momentum'"
        )
    if values.zo.estimator == "per_example" and values.zo.coordinates not in BY_FACTORS:
        raise ConfigError(
            f"zo.estimator: expected 'spsa' in {values.zo.coordinates!r} coordinates, got "
            f"'per_example', which needs one of {', '.join(BY_FACTORS)}"
        )
    _check_unread(values.zo)
    _check_estimator(values)
    _check_optimizer(values.zo)
    _check_exact(values)
    _check_depth(values.zo)
    _check_layer_scaling(values.zo)
    _check_tuned(values.zo)


# Keys that another one decides about: with which of its values they are read.
_READ_WITH: dict[str, tuple[str, tuple[object, ...]]] = {
    **dict.fromkeys(
        ("examples_per_direction", "sides", "normalize", "normalize_over"),
        ("estimator", ("per_example",)),
    ),
    "momentum": ("optimizer", ("momentum", "lozo_momentum")),
    "meazo_beta": ("optimizer", ("meazo",)),
    "meazo_epsilon": ("optimizer", ("meazo",)),
    "hizoo_alpha": ("optimizer", ("hizoo",)),
    "conmezo_angle": ("optimizer", ("conmezo",)),
    "conmezo_beta": ("optimizer", ("conmezo",)),
    "layer_scaling_rule": ("layer_scaling", ("param_norm", "grad_norm")),
    "first_order_share": ("first_order_layers", ("profile",)),
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_modules"), ("tuned", ("lora",))),
    "prefix_tokens": ("tuned", ("prefix",)),
}


def _check_unread(zo: ZOConfig) -> None:
    """Refuse keys that say something where nothing reads them.

    Raises:
        ConfigError: There is such a key.
    """
    for key, why in _unread(zo).items():
        default, got = ZOConfig.model_fields[key].default, getattr(zo, key)
        raise ConfigError(f"zo.{key}: expected {default!r} {why.format(got=repr(got))}")


def without_unread(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``zo`` block of an older run with the defaults of the keys that nothing reads."""
    unread = _unread(ZOConfig(**values))
    return {**values, **{key: ZOConfig.model_fields[key].default for key in unread}}


def _unread(zo: ZOConfig) -> dict[str, str]:
    """Return the keys that are set and not read, each with the end of its message."""
    found = {}
    for key, (decider, with_values) in _READ_WITH.items():
        chosen = getattr(zo, decider)
        if chosen not in with_values and _is_set(zo, key):
            readers = " or ".join(repr(value) for value in with_values)
            found[key] = f"with {chosen!r}, got {{got}}; only {readers} reads it"
    of_adam = zo.optimizer == "adam" or (zo.has_first_order and zo.first_order_optimizer == "adam")
    others = {
        **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), (of_adam, "adam")),
        **dict.fromkeys(
            ("first_order_optimizer", "first_order_learning_rate"),
            (zo.has_first_order, "first-order blocks"),
        ),
        "unquantized_factor": (bool(zo.unquantized), "zo.unquantized"),
        "normalize_over": (zo.normalize, "zo.normalize"),
    }
    for key, (is_read, reader) in others.items():
        if not is_read and key not in found and _is_set(zo, key):
            found[key] = f"without {reader}, which reads it, got {{got}}"
    return found


def _is_set(zo: ZOConfig, key: str) -> bool:
    return bool(getattr(zo, key) != ZOConfig.model_fields[key].default)


def _check_estimator(values: Recipe) -> None:
    zo = values.zo
    make_estimator(zo.estimator, values.estimator_settings)  # checks them


# The estimators that an optimizer works with, where it needs one, and why.
_ESTIMATORS = {
    "hizoo": (("spsa", "spsa_1_5"), "which measures the curvature along a direction"),
    "conmezo": (("spsa",), "two-sided probes along directions that the whole batch shares"),
    "conservative": (("spsa", "one_sided"), "whose directions the whole batch shares"),
}


def _check_optimizer(zo: ZOConfig) -> None:
    allowed, reason = _ESTIMATORS.get(zo.optimizer, ((zo.estimator,), ""))
    if zo.estimator not in allowed:
        raise ConfigError(
            f"zo.estimator: expected {' or '.join(map(repr, allowed))} with the optimizer "
            f"{zo.optimizer!r}, {reason}, got {zo.estimator!r}"
        )
    for key in ("sparsity", "blocks_per_step"):
        if zo.optimizer == "conmezo" and getattr(zo, key) is not None:
            raise ConfigError(
                f"zo.{key}: expected none with the optimizer 'conmezo', whose momentum moves every "
                f"value in every step, got {getattr(zo, key)}"
            )
    if zo.optimizer == "conservative" and zo.num_directions != 1:
        raise ConfigError(
            "zo.num_directions: expected 1 with the optimizer 'conservative', which tries a step "
            f"along one direction, got {zo.num_directions}"
        )
    if zo.optimizer == "conservative" and zo.layer_scaling != "none":
        raise ConfigError(
            "zo.layer_scaling: expected 'none' with the optimizer 'conservative', whose steps go "
            f"where probes went, got {zo.layer_scaling!r}"
        )


def _check_exact(values: Recipe) -> None:
    """Refuse what exact derivatives cannot go with.

    Raises:
        ConfigError: There is such a thing.
    """
    zo = values.zo
    is_forward = zo.estimator == "forward_gradient"
    if values.objective != "loss" and (is_forward or zo.has_first_order):
        raise ConfigError(
            f"objective: expected 'loss' with exact derivatives, got {values.objective!r}, which "
            "has none"
        )
    if is_forward and zo.max_loss_difference is not None:
        raise ConfigError(
            "zo.max_loss_difference: expected none with 'forward_gradient', which measures slopes "
            f"and no loss differences, got {zo.max_loss_difference}"
        )
    if values.memory_limit is not None and (is_forward or zo.has_first_order):
        raise ConfigError(
            "memory_limit: expected none with exact derivatives, which need more memory than "
            f"forward passes, got {values.memory_limit!r}; leave it out, or choose another "
            "zo.estimator and no first-order blocks"
        )
    if zo.has_first_order and zo.blocks_per_step is not None:
        raise ConfigError(
            "zo.blocks_per_step: expected none with exact gradients, whose blocks would be among "
            f"those that are chosen, got {zo.blocks_per_step}"
        )
    if zo.first_order_layers == "profile" and zo.first_order_blocks:
        raise ConfigError(
            "zo.first_order_blocks: expected 0 with zo.first_order_layers 'profile', which finds "
            f"the number, got {zo.first_order_blocks}"
        )
    if zo.num_blocks is not None and zo.first_order_blocks > zo.num_blocks:
        raise ConfigError(
            f"zo.first_order_blocks: expected at most zo.num_blocks, {zo.num_blocks}, got "
            f"{zo.first_order_blocks}"
        )
    needs_rate = zo.has_first_order and zo.first_order_optimizer == "sgd"
    if needs_rate and zo.first_order_learning_rate is None:
        raise ConfigError(
            "zo.first_order_learning_rate: expected a number with zo.first_order_optimizer 'sgd', "
            "got none"
        )
    if (is_forward or zo.has_first_order) and (zo.tuned != "scales" or zo.unquantized):
        key, got = ("tuned", zo.tuned) if zo.tuned != "scales" else ("unquantized", zo.unquantized)
        raise ConfigError(
            f"zo.{key}: expected scales alone with exact derivatives, got {got!r}; leave it out"
        )


def _check_depth(zo: ZOConfig) -> None:
    if zo.depth is None:
        return
    first, stop = zo.depth
    if zo.num_blocks is not None:
        raise ConfigError(
            f"zo.num_blocks: expected none with zo.depth {[first, stop]}, got {zo.num_blocks}"
        )
    if first >= stop:
        raise ConfigError(
            f"zo.depth: expected two parts of the depth, the smaller one first, got {[first, stop]}"
        )


def _check_layer_scaling(zo: ZOConfig) -> None:
    """Refuse to measure layers that directions leave alone.

    Raises:
        ConfigError: The recipe asks for it.
    """
    if zo.layer_scaling != "grad_norm":
        return
    left_alone = {
        "zo.blocks_per_step": zo.blocks_per_step is not None,
        "zo.sparsity": zo.sparsity is not None,
        "zo.first_order_blocks": zo.has_first_order,
    }
    for key, is_set in left_alone.items():
        if is_set:
            raise ConfigError(
                f"zo.layer_scaling: expected 'none' or 'param_norm' with {key}, got 'grad_norm', "
                "which moves every layer to measure it"
            )


def _check_tuned(zo: ZOConfig) -> None:
    if zo.tuned == "scales":
        return
    if zo.direction in {"lozo", "subzero"}:
        raise ConfigError(
            f"zo.direction: expected 'rademacher' or 'gaussian' with zo.tuned {zo.tuned!r}, got "
            f"{zo.direction!r}, which factorizes matrices of scales"
        )
    if zo.mask == "magnitude":
        raise ConfigError(
            f"zo.mask: expected 'random' with zo.tuned {zo.tuned!r}, got 'magnitude', which is "
            "that of scales"
        )
    for key in ("unquantized", "modules", "stretch"):
        hint = "; use zo.lora_modules" if (zo.tuned, key) == ("lora", "modules") else ""
        if getattr(zo, key):
            raise ConfigError(
                f"zo.{key}: expected none with zo.tuned {zo.tuned!r}, got {getattr(zo, key)}; "
                f"it goes with 'scales'{hint}"
            )
    if zo.layer_scaling != "none":
        raise ConfigError(
            f"zo.layer_scaling: expected 'none' with zo.tuned {zo.tuned!r}, got "
            f"{zo.layer_scaling!r}; it goes with 'scales'"
        )
