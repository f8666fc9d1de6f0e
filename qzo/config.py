"""The recipe: what `qzo train` is told. Names follow transformers' TrainingArguments.

Unknown keys are errors that name the nearest known one. A preset fills in what is not given:

- ``paper``: QZO as published (arXiv 2505.13430, section 4.1).
- ``default``: row coordinates with a direction per example.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from qzo.coordinates import BY_FACTORS, Coordinates
from qzo.direction_settings import (
    RANK_MAX,
    RANKS,
    DirectionSettings,
    LawName,
    MaskName,
    basis_steps_of,
    problem_of,
)
from qzo.errors import ConfigError
from qzo.estimators import make_estimator
from qzo.memory import parse_memory
from qzo.schedules import learning_rate

_BYTES_MAX = 2**20
_OTHER_NAMES = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "dataset": "data",
    "evaluation_strategy": "eval_steps",
    "eval_strategy": "eval_steps",
    "num_train_epochs": "max_steps",
    "overwrite_output_dir": "resume_from_checkpoint",
    "no_cuda": "device",
    "use_cpu": "device",
    "logging_dir": "output_dir",
    "warmup_ratio": "warmup_steps",
}


def _no_truth(value: Any) -> Any:
    """Refuse true and false, which are numbers in Python.

    Raises:
        PydanticCustomError: The value is one of them.
    """
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


Int = Annotated[int, BeforeValidator(_no_truth)]
Float = Annotated[float, BeforeValidator(_no_truth)]
Part = Annotated[Float, Field(ge=0, le=1)]
Count = Annotated[Int, Field(ge=1)]


class ZOConfig(BaseModel):
    """How the loss is estimated and the scales move."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    estimator: Literal[
        "spsa", "one_sided", "fzoo", "rloo", "per_example", "spsa_1_5", "forward_gradient"
    ] = "per_example"
    examples_per_direction: Int = Field(default=1, ge=1)  # per_example: examples that share one
    sides: Literal["two", "leave_one_out"] = "two"  # per_example: where a group is evaluated
    coordinates: Coordinates = "row"
    direction: LawName = "rademacher"
    rank: Int | None = Field(default=None, ge=1, le=RANK_MAX)  # lozo (2), subzero (8)
    sparsity: Float | None = Field(default=None, ge=0, lt=1)  # part that is not perturbed
    mask: MaskName | None = None  # with a sparsity: random, or magnitude, which is fixed
    blocks_per_step: Int | None = Field(default=None, ge=1)  # perturb so many at a time
    basis_steps: Int | None = Field(default=None, ge=1)  # steps whose directions share a basis
    epsilon: Float = Field(default=1e-2, gt=0)
    num_directions: Int = Field(default=1, ge=1)
    num_blocks: Int | None = Field(default=None, ge=1)  # train the last so many decoder blocks
    depth: tuple[Part, Part] | None = None  # or those from this to before that part of the depth
    modules: list[str] | None = None  # train layers whose names hold one of these, such as k_proj
    normalize: bool = True  # per_example: derivatives of a step have a root mean square of 1
    max_loss_difference: Float | None = Field(default=None, gt=0)
    optimizer: Literal[
        "sgd",
        "sign",
        "momentum",
        "adam",
        "meazo",
        "hizoo",
        "conmezo",
        "conservative",
        "lozo_momentum",
    ] = "sgd"
    momentum: Float = Field(default=0.9, ge=0, lt=1)
    adam_beta1: Float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: Float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: Float = Field(default=1e-8, gt=0, lt=1)
    meazo_beta: Float = Field(default=0.99, ge=0, lt=1)
    meazo_epsilon: Float = Field(default=1e-8, gt=0, lt=1)
    hizoo_alpha: Float = Field(default=1e-8, ge=0, lt=1)
    conmezo_angle: Float = Field(default=1.35, ge=0, le=math.pi / 2)  # radians
    conmezo_beta: Float = Field(default=0.99, ge=0, lt=1)
    # A factor of the directions of layers, by a part of their names; the longest part wins.
    stretch: dict[str, Annotated[Float, Field(gt=0)]] | None = None
    layer_scaling: Literal["none", "param_norm", "grad_norm"] = "none"
    layer_scaling_rule: Literal["variance", "expectation"] = "variance"
    max_skipped_steps: Int = Field(default=10, ge=1)
    tuned: Literal["scales", "lora", "prefix"] = "scales"  # the others leave the scales as they are
    unquantized: list[Literal["norms", "biases", "head"]] = []  # trained besides the scales
    unquantized_factor: Float = Field(default=1.0, gt=0)  # of their directions: step factor**2
    lora_rank: Int = Field(default=8, ge=1)
    lora_alpha: Float = Field(default=16, gt=0)
    lora_modules: list[str] = ["q_proj", "v_proj"]  # layers whose names hold one of these
    prefix_tokens: Int = Field(default=5, ge=1)

    # Exact gradients for the scales of the last so many trained blocks, or of as many as have a
    # share of the importance that a profile finds; the other scales stay zeroth-order.
    first_order_blocks: Int = Field(default=0, ge=0)
    first_order_layers: Literal["last", "profile"] = "last"
    first_order_share: Float = Field(default=0.5, gt=0, le=1)
    first_order_optimizer: Literal["adam", "sgd"] = "adam"
    first_order_learning_rate: Float | None = Field(default=None, gt=0)  # Adam: see below

    @property
    def has_first_order(self) -> bool:
        """Whether exact gradients move a part of the scales."""
        return self.first_order_blocks > 0 or self.first_order_layers == "profile"

    @property
    def first_order_rate(self) -> float:
        """The learning rate of the first-order part, before the schedule."""
        if self.first_order_learning_rate is not None:
            return self.first_order_learning_rate
        return 1e-5 if self.coordinates == "absolute" else 3e-3  # of Adam, not tuned

    @property
    def first_order_settings(self) -> dict[str, float]:
        """The arguments of the rule of the first-order part."""
        names = ("adam_beta1", "adam_beta2", "adam_epsilon")
        return {name: getattr(self, name) for name in names if self.first_order_optimizer == "adam"}

    @property
    def optimizer_settings(self) -> dict[str, float]:
        """The arguments of the optimizer."""
        names: dict[str, tuple[str, ...]] = {
            "momentum": ("momentum",),
            "lozo_momentum": ("momentum",),
            "adam": ("adam_beta1", "adam_beta2", "adam_epsilon"),
            "meazo": ("meazo_beta", "meazo_epsilon"),
            "hizoo": ("hizoo_alpha",),
            "conmezo": ("conmezo_angle", "conmezo_beta"),
        }
        return {name: getattr(self, name) for name in names.get(self.optimizer, ())}

    @property
    def direction_settings(self) -> DirectionSettings:
        """What the law of the directions is told; defaults are filled in."""
        return DirectionSettings(
            self.rank or RANKS.get(self.direction),
            self.sparsity,
            self.mask or (None if self.sparsity is None else "random"),
            self.blocks_per_step,
        )


class Recipe(BaseModel):
    """A run."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    model: str
    output_dir: str
    data: str | None = None
    task: Literal["sst2", "rte", "boolq", "copa", "squad", "trec", "e2e"] | None = None
    prompt: Literal["template", "none"] = "template"  # none: a task without its template's words
    eval_data: str | None = None
    quantize: Literal["nf4", "gptq"] | None = None
    preset: Literal["default", "paper"] = "default"

    max_steps: Int = Field(default=500, ge=1)
    learning_rate: Float = Field(default=5e-2, gt=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Int = Field(default=0, ge=0)
    per_device_train_batch_size: Int = Field(default=16, ge=1)
    gradient_accumulation_steps: Int = Field(default=1, ge=1)
    stratified_batches: bool = True  # classes are spread evenly over an epoch
    per_device_eval_batch_size: Int = Field(default=32, ge=1)
    max_length: Int = Field(default=512, ge=2)
    num_train_examples: Int | None = Field(default=None, ge=1)
    num_eval_examples: Int = Field(default=500, ge=0)

    logging_steps: Int = Field(default=10, ge=1)
    eval_steps: Count | tuple[Count, ...] | None = None  # every so many, or after these
    save_steps: Int = Field(default=500, ge=1)
    save_total_limit: Int = Field(default=2, ge=1)
    load_best_model_at_end: bool = True
    seed: Int = Field(default=0, ge=0, lt=2**63)
    data_seed: Int = Field(default=0, ge=0, lt=2**63)
    report_to: str | list[str] = "none"
    resume_from_checkpoint: bool = False
    # Steps until the journal is forced onto the disk; power loss costs at most one less than that.
    journal_sync_steps: Int = Field(default=1, ge=1)
    device: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    memory_limit: str | None = None  # such as 4GiB; what does not fit streams from the files

    # What is trained on: the loss, or a reward of the answers; see qzo/rewards.py.
    objective: Literal["loss", "accuracy", "f1", "exact_match", "reward"] = "loss"
    reward: str | None = None  # path/to/file.py:function, which is run
    max_new_tokens: Int = Field(default=50, ge=1)  # of a written answer
    generation_stop: str | None = Field(default="\n", min_length=1)  # where it ends

    zo: ZOConfig = ZOConfig()

    @property
    def estimator_settings(self) -> dict[str, Any]:
        """The arguments of the estimator."""
        zo = self.zo
        names = ("epsilon", "num_directions", "max_loss_difference", "basis_steps")
        settings = {"seed": self.seed, **{name: getattr(zo, name) for name in names}}
        if zo.estimator != "per_example":
            return settings
        num_examples = self.per_device_train_batch_size * self.gradient_accumulation_steps
        own = {"examples_per_direction": zo.examples_per_direction, "sides": zo.sides}
        return {
            **settings,
            **own,
            "num_examples": num_examples,
            "is_normalized": zo.normalize,
        }

    def evaluates_at(self, step: int) -> bool:
        """Tell whether ``eval_steps`` names this number of steps."""
        if isinstance(self.eval_steps, tuple):
            return step in self.eval_steps
        return self.eval_steps is not None and step % self.eval_steps == 0

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self._scheduled(self.learning_rate, step)

    def first_order_rate_at(self, step: int) -> float:
        """Return the learning rate of the first-order part in a step."""
        return self._scheduled(self.zo.first_order_rate, step)

    def _scheduled(self, highest: float, step: int) -> float:
        return learning_rate(
            self.lr_scheduler_type,
            highest,
            step,
            max_steps=self.max_steps,
            warmup_steps=self.warmup_steps,
        )


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


class _Loader(yaml.SafeLoader):
    """YAML without aliases: a few of them can stand for more values than fit into any memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not supported", problem_mark=mark)
        return super().compose_node(parent, index)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply ``key=value`` overrides (``zo.epsilon=0.01``).

    A file or value that cannot be used is a ConfigError that names the key.
    """
    values = read_keys(path)
    for override in overrides:
        _set(values, override)
    return recipe(values)


def read_keys(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds keys and values.

    Raises:
        ConfigError: It cannot be read, or holds something else.
    """
    try:
        if path.stat().st_size > _BYTES_MAX:
            raise ConfigError(f"{path}: expected at most {_BYTES_MAX} bytes of YAML")
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: expected YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(values).__name__}")
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: expected names as keys, got {key!r}")
    return values


def recipe(values: Mapping[str, Any]) -> Recipe:
    """Check the keys of a recipe and fill in its preset and the defaults.

    Raises:
        ConfigError: A key is unknown, missing or has a value that cannot be used.
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
    merged = {"learning_rate": rate, **defaults, **values, "zo": zo}
    try:
        result = Recipe.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_first_problem(error)) from error
    _check_together(result)
    return _with_basis_steps(result)


def _with_basis_steps(values: Recipe) -> Recipe:
    zo = values.zo
    steps = basis_steps_of(zo.direction, zo.direction_settings, zo.basis_steps)
    return values.model_copy(update={"zo": zo.model_copy(update={"basis_steps": steps})})


def _set(values: dict[str, Any], override: str) -> None:
    key, found, text = override.partition("=")
    if not found:
        raise ConfigError(f"{override}: expected key=value")
    *parents, last = key.split(".")
    place: Any = values
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{key}: expected {parent} to hold keys, got {place!r}")
    try:
        place[last] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: expected a YAML value, got {text!r}") from error


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = problem["loc"] or ("recipe",)
    key = ".".join(str(part) for part in place[: 2 if place[0] == "zo" else 1])
    if problem["type"] == "missing":
        return f"{key}: expected this key in the recipe, not found"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_nearest(key)}"
    expected = problem["msg"].removeprefix("Input should be ")
    if expected.startswith(("greater", "less")):
        expected = f"a number {expected}"
    return f"{key}: expected {expected}, got {problem['input']!r}"


def _nearest(key: str) -> str:
    known = [*Recipe.model_fields, *(f"zo.{name}" for name in ZOConfig.model_fields)]
    if key in _OTHER_NAMES:
        return f"use {_OTHER_NAMES[key]!r}"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    last = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    names = last or close
    return f"did you mean {names[0]!r}?" if names else f"known keys are {', '.join(sorted(known))}"


def _check_together(values: Recipe) -> None:
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
    _check_estimator(values)
    _check_optimizer(values.zo)
    _check_exact(values)
    _check_depth(values.zo)
    _check_tuned(values.zo)


def _check_estimator(values: Recipe) -> None:
    zo = values.zo
    for key in ("examples_per_direction", "sides"):
        default, got = ZOConfig.model_fields[key].default, getattr(zo, key)
        if zo.estimator != "per_example" and got != default:
            raise ConfigError(
                f"zo.{key}: expected {default!r} with {zo.estimator!r}, got {got!r}; only "
                "'per_example' reads it"
            )
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
            f"forward passes, got {values.memory_limit!r}; leave it out, or choose "
            "zo.first_order_blocks: 0 and another zo.estimator"
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


def _check_tuned(zo: ZOConfig) -> None:
    if zo.tuned == "scales":
        return
    for key in ("unquantized", "modules"):
        hint = "; use zo.lora_modules" if (zo.tuned, key) == ("lora", "modules") else ""
        if getattr(zo, key):
            raise ConfigError(
                f"zo.{key}: expected none with zo.tuned {zo.tuned!r}, got {getattr(zo, key)}; "
                f"it goes with 'scales'{hint}"
            )
