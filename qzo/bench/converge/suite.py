"""What ``qzo bench converge`` compares: methods, tasks and seeds, from a YAML file.

A method is a fragment of a recipe: in the suite, in a file of its own, or in a ``file`` with keys
of the suite over it. A task is the fragment that names model and data. What makes the comparison
fair is the suite's alone: seeds, forwards, evaluation, and as many grid points for one method as
for any other.
"""

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qzo.errors import ConfigError
from qzo.run.recipe.keys import Count, Float, Int
from qzo.run.recipe.read import read_keys, recipe, wrong_value

NO_POINT = "as-given"  # name of the one point of a method without a grid

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
# Keys of a recipe that the suite decides, and by which of its own.
_DECIDED = {
    **{"output_dir": "--dir", "resume_from_checkpoint": "--dir"},
    **{"max_steps": "forwards", "eval_steps": "eval_forwards"},
    **{"seed": "seeds", "data_seed": "seeds", "num_eval_examples": "num_eval_examples"},
    "load_best_model_at_end": "forwards",
}
_Seed = Annotated[Int, Field(ge=0, lt=2**63)]


class _File(BaseModel):
    """The suite as it is written."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    methods: dict[str, dict[str, Any] | str] = Field(min_length=1)
    tasks: dict[str, dict[str, Any]] = Field(min_length=1)
    grid: dict[str, list[Any]] | None = None
    seeds: list[_Seed] = Field(default=[0, 1, 2], min_length=1)
    tuning_seeds: list[_Seed] = Field(default=[100], min_length=1)
    forwards: Count = 1000
    tuning_forwards: Count | None = None
    eval_forwards: list[Annotated[Int, Field(ge=0)]] | Annotated[Int, Field(ge=2)] = 5
    num_eval_examples: Count = 500


class _TaskKeys(BaseModel):
    """What a task holds besides keys of a recipe."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    target_loss: Float | None = None
    tuning_eval_data: str | None = None


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: Its name.
        fragment: Keys of a recipe.
        points: The keys of each grid point by its name, dotted; one empty point if nothing is
            tuned.
    """

    name: str
    fragment: Mapping[str, Any]
    points: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class TaskEntry:
    """What to train on.

    Attributes:
        name: Its name.
        fragment: Keys of a recipe: model, data, batch size.
        target_loss: The loss whose forwards are counted, if any.
        tuning_eval_data: What grid points are evaluated on; held-out training examples if None.
    """

    name: str
    fragment: Mapping[str, Any]
    target_loss: float | None
    tuning_eval_data: str | None


@dataclass(frozen=True)
class Suite:
    """What to compare; see the module.

    Attributes:
        methods: The methods.
        tasks: The tasks.
        seeds: Of the reported runs: directions and order of the data.
        tuning_seeds: Of the runs that choose a grid point.
        forwards: Budget of a reported run.
        tuning_forwards: Budget of a tuning run.
        eval_forwards: When a reported run is evaluated, ascending.
        num_eval_examples: Examples of an evaluation at most.
        text: The file.
    """

    methods: Sequence[Method]
    tasks: Sequence[TaskEntry]
    seeds: Sequence[int]
    tuning_seeds: Sequence[int]
    forwards: int
    tuning_forwards: int
    eval_forwards: Sequence[int]
    num_eval_examples: int
    text: str


def read_suite(path: Path, *, model: str | None = None, data: str | None = None) -> Suite:
    """Read a suite.

    Args:
        path: A YAML file; methods that are files are named relative to it.
        model: Replaces the model of every task.
        data: Replaces the data of every task: a folder with training and validation data.

    Raises:
        ConfigError: A key or value cannot be used; the message names it.
    """
    keys = read_keys(path)
    try:
        file = _File.model_validate(keys)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_problem(error, _File)}") from error
    given = {"model": model, "data": data}
    if data is not None:
        given["eval_data"] = data
    replaced = {key: value for key, value in given.items() if value is not None}
    _check_together(file)
    return Suite(
        methods=_methods(file, path.parent),
        tasks=[_task(name, {**keys, **replaced}) for name, keys in file.tasks.items()],
        seeds=file.seeds,
        tuning_seeds=file.tuning_seeds,
        forwards=file.forwards,
        tuning_forwards=file.tuning_forwards or file.forwards,
        eval_forwards=_eval_forwards(file),
        num_eval_examples=file.num_eval_examples,
        text=path.read_text(encoding="utf-8"),
    )


def with_keys(fragment: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fragment with the keys of others put over its own, inside ``zo`` one by one."""
    result = dict(fragment)
    for other in others:
        for key, value in other.items():
            parent, _, rest = key.partition(".")
            new = {rest: value} if rest else value
            is_block = isinstance(new, Mapping) and isinstance(result.get(parent, {}), Mapping)
            result[parent] = with_keys(result.get(parent, {}), new) if is_block else new
    return result


def _check_together(file: _File) -> None:
    for kind, names in (("methods", file.methods), ("tasks", file.tasks)):
        for name in names:
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"{kind}: expected names of letters, digits, '_', '-' and '.', got {name!r}"
                )
    for key, seeds in (("seeds", file.seeds), ("tuning_seeds", file.tuning_seeds)):
        if len(set(seeds)) < len(seeds):
            raise ConfigError(f"{key}: expected every seed once, got {seeds}")
    both = sorted(set(file.seeds) & set(file.tuning_seeds))
    if both:
        raise ConfigError(
            f"tuning_seeds: expected seeds that are not in 'seeds', got {both}; a method must not "
            "be chosen by the runs that are reported"
        )
    if isinstance(file.eval_forwards, list) and max(file.eval_forwards, default=0) > file.forwards:
        raise ConfigError(
            f"eval_forwards: expected at most 'forwards', {file.forwards}, got "
            f"{max(file.eval_forwards)}"
        )


def _eval_forwards(file: _File) -> list[int]:
    if isinstance(file.eval_forwards, list):
        return sorted({0, *file.eval_forwards, file.forwards})
    last = file.eval_forwards - 1
    return sorted({round(i * file.forwards / last) for i in range(last + 1)})


def _methods(file: _File, folder: Path) -> list[Method]:
    """Return the methods with the points of their grids.

    Raises:
        ConfigError: The tuning budgets differ.
    """
    methods = []
    for name, given in file.methods.items():
        keys = _keys_of(f"methods.{name}", given, folder)
        own = keys.pop("grid", None)
        is_off = file.grid is not None and not file.grid
        grid = {} if is_off else own if own is not None else file.grid or {}
        _check_fragment(f"methods.{name}", keys)
        methods.append(Method(name, keys, _points(f"methods.{name}.grid", grid)))
    counts = {method.name: len(method.points) for method in methods}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ConfigError(
            "grid: expected the same number of points for every method, which is its tuning "
            f"budget, got {listed}; make them equal, or say 'grid: {{}}' to tune nothing"
        )
    return methods


def _keys_of(place: str, given: Mapping[str, Any] | str, folder: Path) -> dict[str, Any]:
    """Return the keys of a method: its own over those of the file that it names, if any.

    Raises:
        ConfigError: The file has no name, or cannot be read.
    """
    if isinstance(given, str):
        given = {"file": given}
    if "file" not in given:
        return dict(given)
    if not isinstance(given["file"], str):
        raise ConfigError(f"{place}.file: expected the name of a file, got {given['file']!r}")
    keys = read_keys(folder / given["file"])
    fragment, own = ({k: x[k] for k in x if k not in ("file", "grid")} for x in (keys, given))
    grid = given.get("grid", keys.get("grid"))  # as a whole, and of dotted keys
    return {**with_keys(fragment, own), **({} if grid is None else {"grid": grid})}


def _points(place: str, grid: Any) -> dict[str, dict[str, Any]]:
    """Return the points of a grid: every value of a key with every value of the others.

    Raises:
        ConfigError: It is no mapping of keys to values.
    """
    if not isinstance(grid, dict):
        raise ConfigError(f"{place}: expected keys with lists of values, got {grid!r}")
    for key, values in grid.items():
        is_list = isinstance(values, list) and values
        if not is_list or not all(isinstance(value, str | int | float) for value in values):
            raise ConfigError(f"{place}.{key}: expected a list of numbers or words, got {values!r}")
        if key in _DECIDED:
            raise ConfigError(f"{place}.{key}: {_decided(key)}")
    combined = [
        dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ]
    points = {_point_name(point): point for point in combined}
    if len(points) < len(combined):
        raise ConfigError(f"{place}: expected every value once, got {grid!r}")
    return points


def _point_name(point: Mapping[str, Any]) -> str:
    """Return a name that is a folder name too."""
    text = ",".join(f"{key}={value}" for key, value in point.items())
    return re.sub(r"[^\w.,=+-]", "_", text) or NO_POINT


def _task(name: str, given: Mapping[str, Any]) -> TaskEntry:
    """Read a task.

    Raises:
        ConfigError: A key is wrong, or there is nothing to evaluate on.
    """
    place = f"tasks.{name}"
    own_names = _TaskKeys.model_fields
    try:
        own = _TaskKeys.model_validate({k: v for k, v in given.items() if k in own_names})
    except ValidationError as error:
        raise ConfigError(f"{place}.{_first_problem(error, _TaskKeys)}") from error
    fragment = {key: value for key, value in given.items() if key not in own_names}
    _check_fragment(place, fragment)
    if fragment.get("task") is None and fragment.get("eval_data") is None:
        raise ConfigError(
            f"{place}.eval_data: expected data to evaluate on, got none; what a run holds out of "
            "its own data differs from seed to seed"
        )
    if own.tuning_eval_data is not None and own.tuning_eval_data == fragment.get("eval_data"):
        raise ConfigError(
            f"{place}.tuning_eval_data: expected other data than eval_data, got both "
            f"{own.tuning_eval_data!r}; a method must not be chosen by what is reported"
        )
    return TaskEntry(name, fragment, own.target_loss, own.tuning_eval_data)


def _check_fragment(place: str, keys: Mapping[str, Any]) -> None:
    """Refuse what no recipe has, and what the suite decides.

    Raises:
        ConfigError: There is such a key.
    """
    for key in keys:
        if key in _DECIDED:
            raise ConfigError(f"{place}.{key}: {_decided(key)}")
    try:
        recipe({"model": "", **keys, "output_dir": ""})
    except ConfigError as error:
        raise ConfigError(f"{place}.{error}") from error


def _decided(key: str) -> str:
    return f"expected no such key, since the suite decides it by {_DECIDED[key]!r}; remove it"


def _first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    problem = error.errors()[0]
    key = str(problem["loc"][0])
    if problem["type"] == "missing":
        return f"{key}: expected this key in the suite, not found"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_nearest(key, model.model_fields)}"
    if problem["type"] == "too_short":
        return f"{key}: expected at least one, got {problem['input']!r}"
    return wrong_value(key, problem)


def _nearest(key: str, known: Iterable[str]) -> str:
    names = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {names[0]!r}?" if names else f"known keys are {', '.join(sorted(known))}"
