"""The recipe: what `qzo train` is told. Names follow transformers' TrainingArguments.

Unknown keys are errors that name the nearest known one. A preset fills in what is not given:

- ``paper``: QZO as published (arXiv 2505.13430, section 4.1).
- ``default``: row coordinates with a direction per example.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from qzo.coordinates import BY_FACTORS, Coordinates
from qzo.errors import ConfigError
from qzo.memory import parse_memory

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


class ZOConfig(BaseModel):
    """How the loss is estimated and the scales move."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    estimator: Literal["spsa", "per_example"] = "per_example"
    coordinates: Coordinates = "row"
    direction: Literal["rademacher", "gaussian"] = "rademacher"
    epsilon: Float = Field(default=1e-2, gt=0)
    num_directions: Int = Field(default=1, ge=1)
    num_blocks: Int | None = Field(default=None, ge=1)  # train the last so many decoder blocks
    modules: list[str] | None = None  # train layers whose names hold one of these, such as k_proj
    normalize: bool = True  # per_example: derivatives of a step have a root mean square of 1
    max_loss_difference: Float | None = Field(default=None, gt=0)
    optimizer: Literal["sgd", "sign", "momentum", "adam"] = "sgd"
    momentum: Float = Field(default=0.9, ge=0, lt=1)
    adam_beta1: Float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: Float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: Float = Field(default=1e-8, gt=0, lt=1)
    max_skipped_steps: Int = Field(default=10, ge=1)
    tuned: Literal["scales", "lora", "prefix"] = "scales"  # the others leave the scales as they are
    unquantized: list[Literal["norms", "biases", "head"]] = []  # trained besides the scales
    unquantized_factor: Float = Field(default=1.0, gt=0)  # of their directions: step factor**2
    lora_rank: Int = Field(default=8, ge=1)
    lora_alpha: Float = Field(default=16, gt=0)
    lora_modules: list[str] = ["q_proj", "v_proj"]  # layers whose names hold one of these
    prefix_tokens: Int = Field(default=5, ge=1)

    @property
    def optimizer_settings(self) -> dict[str, float]:
        """The arguments of the optimizer."""
        adam = ("adam_beta1", "adam_beta2", "adam_epsilon")
        names = {"momentum": ("momentum",), "adam": adam}.get(self.optimizer, ())
        return {name: getattr(self, name) for name in names}


class Recipe(BaseModel):
    """A run."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    model: str
    output_dir: str
    data: str | None = None
    task: Literal["sst2", "rte", "boolq", "copa", "squad"] | None = None
    eval_data: str | None = None
    quantize: Literal["nf4", "gptq"] | None = None
    preset: Literal["default", "paper"] = "default"

    max_steps: Int = Field(default=500, ge=1)
    learning_rate: Float = Field(default=5e-2, gt=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Int = Field(default=0, ge=0)
    per_device_train_batch_size: Int = Field(default=16, ge=1)
    gradient_accumulation_steps: Int = Field(default=1, ge=1)
    per_device_eval_batch_size: Int = Field(default=32, ge=1)
    max_length: Int = Field(default=512, ge=2)
    num_train_examples: Int | None = Field(default=None, ge=1)
    num_eval_examples: Int = Field(default=500, ge=0)

    logging_steps: Int = Field(default=10, ge=1)
    eval_steps: Int | None = Field(default=None, ge=1)
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

    zo: ZOConfig = ZOConfig()


# What an estimator takes if the recipe names no learning rate: their steps differ in length.
# per_example, normalised: recipes/LOG.md; absolute: the QZO paper; the others were not tuned.
_LEARNING_RATES = {
    ("per_example", "row"): 5e-2,
    ("per_example", "column"): 5e-2,
    ("per_example", "rank_one"): 5e-2,
    ("spsa", "row"): 3e-3,
    ("spsa", "relative"): 1e-3,
    ("spsa", "absolute"): 1e-7,
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

    Raises:
        ConfigError: The file or a value cannot be used; the message names the key.
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
    for override in overrides:
        _set(values, override)
    return recipe(values)


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
    return result


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
    if values.memory_limit is not None:
        parse_memory(values.memory_limit, "memory_limit")
    if values.zo.estimator == "per_example" and values.zo.coordinates not in BY_FACTORS:
        raise ConfigError(
            f"zo.estimator: expected 'spsa' in {values.zo.coordinates!r} coordinates, got "
            f"'per_example', which needs one of {', '.join(BY_FACTORS)}"
        )
    if values.zo.estimator == "per_example" and values.zo.num_directions != 1:
        raise ConfigError(
            "zo.num_directions: expected 1 with 'per_example', which has one direction per "
            f"example, got {values.zo.num_directions}"
        )
    _check_tuned(values.zo)


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
