"""What one key of a recipe says of another: combinations that are refused, in words.

A key that is set where nothing reads it is refused as well; ``without_effect`` finds those.
"""

import json
from dataclasses import asdict

from qzo.errors import ConfigError
from qzo.method.coordinates import BY_FACTORS
from qzo.method.directions.settings import LOW_RANK, problem_of
from qzo.method.estimators import make_estimator
from qzo.model.memory import parse_memory
from qzo.run.recipe.keys import Recipe, ZOConfig


def check_together(values: Recipe) -> None:
    """Refuse keys that do not go together.

    Raises:
        ConfigError: There are such keys.
    """
    if values.reward is not None and values.objective != "reward":
        raise ConfigError(
            f"reward has no effect with objective: {values.objective}; remove it or set objective: "
            "reward"
        )
    if values.warmup_steps > 0 and values.lr_scheduler_type == "constant":
        raise ConfigError(
            "warmup_steps has no effect with lr_scheduler_type: constant; remove it or set "
            "lr_scheduler_type: constant_with_warmup"
        )
    if values.memory_limit is not None:
        parse_memory(values.memory_limit, "memory_limit")
    if values.prompt == "none" and values.task is None:
        raise ConfigError(
            "prompt has no effect without a task: own data has the prompts that it holds; remove "
            "it or set task"
        )
    if values.task is not None and values.labelling.is_given:
        key, got = next((k, v) for k, v in asdict(values.labelling).items() if v is not None)
        raise ConfigError(
            f"{key}: {got!r} cannot be combined with task {values.task!r}: a task has its own "
            f"prompts and answers; leave out {key}, or the task"
        )
    zo = values.zo
    problem = problem_of(zo.direction, zo.coordinates, zo.direction_settings, prefix="zo.")
    if problem is not None:
        raise ConfigError(problem)
    _check_effect(zo)
    _check_estimator(values)
    _check_optimizer(zo)
    _check_exact(values)
    _check_depth(zo)
    _check_layer_scaling(zo)
    _check_tuned(zo)


# Keys that another one decides about: with which of its values they are read.
_READ_WITH: list[tuple[tuple[str, ...], str, tuple[object, ...]]] = [
    (("examples_per_direction", "sides"), "estimator", ("per_example",)),
    (("normalize", "normalize_over"), "estimator", ("per_example",)),
    (("normalize_over",), "normalize", (True,)),
    (("momentum",), "optimizer", ("momentum", "lozo_momentum")),
    (("meazo_beta", "meazo_epsilon"), "optimizer", ("meazo",)),
    (("hizoo_alpha",), "optimizer", ("hizoo",)),
    (("conmezo_angle", "conmezo_beta"), "optimizer", ("conmezo",)),
    (("layer_scaling_rule",), "layer_scaling", ("param_norm", "grad_norm")),
    (("first_order_share",), "first_order_layers", ("profile",)),
    (("first_order_blocks",), "first_order_layers", ("last",)),
    (("lora_rank", "lora_alpha", "lora_modules"), "tuned", ("lora",)),
    (("prefix_tokens",), "tuned", ("prefix",)),
    (("modules", "stretch"), "tuned", ("scales",)),
    (("depth",), "num_blocks", (None,)),
]


def _check_effect(zo: ZOConfig) -> None:
    """Refuse keys that say something where nothing reads them.

    Raises:
        ConfigError: There is such a key.
    """
    for key, why in without_effect(zo).items():
        raise ConfigError(f"zo.{key} has no effect {why}")


def without_effect(zo: ZOConfig) -> dict[str, str]:
    """Return the keys that are set and that nothing reads, each with the end of its message."""
    found: dict[str, str] = {}
    for keys, decider, readers in _READ_WITH:
        chosen = getattr(zo, decider)
        if chosen not in readers:
            what = " or ".join(map(_shown, readers))
            why = f"with zo.{decider}: {_shown(chosen)}; remove it or set zo.{decider}: {what}"
            found = {**dict.fromkeys(keys, why), **found}
    found |= _without_effect_otherwise(zo)
    return {key: why for key, why in found.items() if _is_set(zo, key)}


def _without_effect_otherwise(zo: ZOConfig) -> dict[str, str]:
    """Return the keys that nothing reads where more than one value of one key decides."""
    found: dict[str, str] = {}
    if zo.optimizer != "adam" and not (zo.has_first_order and zo.first_order_optimizer == "adam"):
        why = "without Adam, which reads it; remove it or set zo.optimizer: adam"
        found |= dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), why)
    if not zo.has_first_order:
        why = "without first-order blocks; remove it or set zo.first_order_blocks"
        found |= dict.fromkeys(("first_order_optimizer", "first_order_learning_rate"), why)
    if not zo.unquantized:
        found["unquantized_factor"] = (
            "without zo.unquantized; remove it or set zo.unquantized to what it is a factor of"
        )
    if zo.tuned == "lora":
        found["modules"] = "with zo.tuned: lora; remove it or set zo.lora_modules instead"
    if zo.estimator == "forward_gradient":
        found["max_loss_difference"] = (
            "with zo.estimator: forward_gradient, which measures slopes and no loss differences; "
            "remove it or set another zo.estimator"
        )
    if zo.optimizer == "conservative":
        found["num_directions"] = (
            "with zo.optimizer: conservative, which tries a step along one direction; remove it or "
            "set another zo.optimizer"
        )
    return found


def _is_set(zo: ZOConfig, key: str) -> bool:
    return bool(getattr(zo, key) != ZOConfig.model_fields[key].default)


def _shown(value: object) -> str:
    """Return a value as it stands in a recipe."""
    return value if isinstance(value, str) else json.dumps(value)


def _check_estimator(values: Recipe) -> None:
    zo = values.zo
    if zo.estimator == "per_example" and zo.coordinates not in BY_FACTORS:
        raise ConfigError(
            f"zo.coordinates: {zo.coordinates} cannot be combined with zo.estimator: per_example: "
            f"a direction for every few examples needs one of {', '.join(BY_FACTORS)}; set "
            "zo.estimator: spsa or zo.coordinates: row"
        )
    make_estimator(zo.estimator, values.estimator_settings)  # checks them


# The estimators that an optimizer works with, where it needs one, and why.
_ESTIMATORS = {
    "hizoo": (("spsa", "spsa_1_5"), "it measures the curvature along a direction"),
    "conmezo": (("spsa",), "it needs two-sided probes along directions of the whole batch"),
    "conservative": (("spsa", "one_sided"), "it needs directions of the whole batch"),
}


def _check_optimizer(zo: ZOConfig) -> None:
    with_it = f"cannot be combined with zo.optimizer: {zo.optimizer}"
    if zo.optimizer == "lozo_momentum" and zo.direction != "lozo":
        raise ConfigError(
            f"zo.direction: {zo.direction} {with_it}: its momentum lies in the subspace of LOZO; "
            "set zo.direction: lozo or zo.optimizer: momentum"
        )
    allowed, reason = _ESTIMATORS.get(zo.optimizer, ((zo.estimator,), ""))
    if zo.estimator not in allowed:
        raise ConfigError(
            f"zo.estimator: {zo.estimator} {with_it}: {reason}; set zo.estimator: "
            f"{' or '.join(allowed)}"
        )
    for key in ("sparsity", "blocks_per_step"):
        if zo.optimizer == "conmezo" and getattr(zo, key) is not None:
            raise ConfigError(
                f"zo.{key} {with_it}: its momentum moves every value in every step; remove zo.{key}"
                " or set another zo.optimizer"
            )
    if zo.optimizer == "conservative" and zo.layer_scaling != "none":
        raise ConfigError(
            f"zo.layer_scaling: {zo.layer_scaling} {with_it}: its steps go where probes went; set "
            "zo.layer_scaling: none or another zo.optimizer"
        )


def _check_exact(values: Recipe) -> None:
    """Refuse what exact derivatives cannot go with.

    Raises:
        ConfigError: There is such a thing.
    """
    zo = values.zo
    if zo.estimator == "forward_gradient":
        exact, other = "zo.estimator: forward_gradient", "set another zo.estimator"
    elif zo.has_first_order:
        exact, other = "first-order blocks", "remove the keys zo.first_order_*"
    else:
        return
    with_it = f"cannot be combined with {exact}"
    if values.objective != "loss":
        raise ConfigError(
            f"objective: {values.objective} {with_it}: it has no derivative; set objective: loss, "
            f"or {other}"
        )
    if values.memory_limit is not None:
        raise ConfigError(
            f"memory_limit {with_it}: exact derivatives need more memory than forward passes; "
            f"remove memory_limit, or {other}"
        )
    if zo.tuned != "scales":
        raise ConfigError(
            f"zo.tuned: {zo.tuned} {with_it}: exact derivatives are those of scales; set "
            f"zo.tuned: scales, or {other}"
        )
    if zo.unquantized:
        raise ConfigError(
            f"zo.unquantized {with_it}: exact derivatives are those of scales; remove "
            f"zo.unquantized, or {other}"
        )
    if zo.has_first_order:
        _check_first_order(zo)


def _check_first_order(zo: ZOConfig) -> None:
    if zo.blocks_per_step is not None:
        raise ConfigError(
            "zo.blocks_per_step cannot be combined with first-order blocks: it would choose from "
            "these too; remove zo.blocks_per_step or the keys zo.first_order_*"
        )
    if zo.num_blocks is not None and zo.first_order_blocks > zo.num_blocks:
        raise ConfigError(
            f"zo.first_order_blocks: expected at most zo.num_blocks, {zo.num_blocks}, got "
            f"{zo.first_order_blocks}"
        )
    if zo.first_order_optimizer == "sgd" and zo.first_order_learning_rate is None:
        raise ConfigError(
            "zo.first_order_learning_rate: expected a number with zo.first_order_optimizer: sgd, "
            "which has no default, got null; set it"
        )


def _check_depth(zo: ZOConfig) -> None:
    if zo.depth is not None and zo.depth[0] >= zo.depth[1]:
        raise ConfigError(
            "zo.depth: expected two parts of the depth, the smaller one first, got "
            f"{list(zo.depth)}"
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
        "first-order blocks": zo.has_first_order,
    }
    for key, is_set in left_alone.items():
        if is_set:
            raise ConfigError(
                f"zo.layer_scaling: grad_norm cannot be combined with {key}: it moves every layer "
                "to measure it; set zo.layer_scaling: param_norm or none"
            )


def _check_tuned(zo: ZOConfig) -> None:
    """Refuse what goes with scales where something else is trained.

    Raises:
        ConfigError: There is such a key.
    """
    if zo.tuned == "scales":
        return
    with_it = f"cannot be combined with zo.tuned: {zo.tuned}"
    if zo.direction in LOW_RANK:
        raise ConfigError(
            f"zo.direction: {zo.direction} {with_it}: it factorizes matrices of scales; set "
            "zo.direction: rademacher or gaussian"
        )
    if zo.mask == "magnitude":
        raise ConfigError(
            f"zo.mask: magnitude {with_it}: the magnitudes are those of scales; set zo.mask: random"
        )
    if zo.unquantized:
        raise ConfigError(
            f"zo.unquantized {with_it}: norms, biases and head are trained beside scales; remove "
            "zo.unquantized or set zo.tuned: scales"
        )
    if zo.layer_scaling != "none":
        raise ConfigError(
            f"zo.layer_scaling: {zo.layer_scaling} {with_it}: it is for layers whose scales are "
            "trained; set zo.layer_scaling: none or zo.tuned: scales"
        )
