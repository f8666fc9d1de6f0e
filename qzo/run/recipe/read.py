"""Reading recipes. Unknown keys are errors that name the nearest known one."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qzo.data.labelled import Labelling
from qzo.errors import ConfigError
from qzo.method.directions.settings import basis_steps_of
from qzo.run.recipe.compatibility import check_together
from qzo.run.recipe.keys import Recipe, ZOConfig
from qzo.run.recipe.older import in_todays_words
from qzo.run.recipe.presets import settled, with_preset

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


class _Loader(yaml.SafeLoader):
    """YAML without aliases: a few of them can stand for more values than fit into any memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not supported", problem_mark=mark)
        return super().compose_node(parent, index)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply ``key=value`` overrides (``zo.epsilon=0.01``).

    The recipe that lies in a run folder is resolved; see ``older``.

    A file or value that cannot be used is a ConfigError that names the key.
    """
    values = read_keys(path)
    if path.name == "recipe.yaml" and (path.parent / "journal.jsonl").exists():
        values = in_todays_words(values)
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
    try:
        result = Recipe.model_validate(with_preset(values))
    except ValidationError as error:
        raise ConfigError(_first_problem(error)) from error
    result = settled(result, values)
    check_together(result)
    return _with_basis_steps(result)


def read_labelling(run: Path | None, given: Mapping[str, str | None]) -> Labelling:
    """Return how rows of text and label are read: as in a run, but for what is given.

    Args:
        run: A run folder, or None; one without a recipe says nothing.
        given: Values of the keys, by name; words as YAML.

    Raises:
        ConfigError: A value cannot be used.
    """
    names = [field.name for field in fields(Labelling)]
    path = None if run is None else run / "recipe.yaml"
    values = {} if path is None or not path.is_file() else read_keys(path)
    values = {name: values[name] for name in names if name in values}
    for name, text in given.items():
        if text is not None and name == "label_words":
            _set(values, f"{name}={text}")
        elif text is not None:
            values[name] = text
    try:
        return Recipe(model="", output_dir="", **values).labelling
    except ValidationError as error:
        raise ConfigError(_first_problem(error)) from error


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
    return wrong_value(key, problem)


def wrong_value(key: str, problem: Mapping[str, Any]) -> str:
    """Say in words what pydantic says of a value."""
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
