"""The runs of a suite: each is one of `qzo train`, in a folder of its own, at a number of forwards.

A forward is one pass over a batch of the task's size. A probe of the whole batch costs one, a probe
of some examples their share of it; a step costs what its probes, its exact gradients and the tries
of a conservative step cost, more where the method's batch is larger than the task's.
"""

import json
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from quantizers.errors import ScaleRangeError
from qzo.bench.converge.suite import Method, Suite, TaskEntry, with_keys
from qzo.checkpoint.atomic import write_bytes, write_json
from qzo.data.load import hold_out, is_file, load_records
from qzo.data.tasks import examples_from_file, load_task
from qzo.errors import ConfigError, TrainedRangeError
from qzo.method.estimators import make_estimator
from qzo.method.estimators.conservative import NUM_TRIED
from qzo.method.probes import forwards_of
from qzo.model.load import trained_blocks
from qzo.run.folder import differing
from qzo.run.launch import train
from qzo.run.recipe.keys import Recipe
from qzo.run.recipe.older import in_todays_words
from qzo.run.recipe.read import read_keys, recipe
from qzo.run.result import DivergedError, StoppedError

RECORD_NAME = "cell.json"

_FREE = {"output_dir", "resume_from_checkpoint", "report_to", "preset"}
_TUNING = "tuning"  # folder of held-out examples
_HOLD_OUT_SEED = 0
_PART_HELD_OUT = 10  # of the training examples at most one in so many


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        task: Name of its task.
        method: Name of its method.
        point: Name of its grid point.
        seed: Of directions and data order.
        is_tuning: It serves to choose a grid point.
        recipe: What the run is told.
        forwards_per_step: What a step costs.
    """

    task: str
    method: str
    point: str
    seed: int
    is_tuning: bool
    recipe: Recipe
    forwards_per_step: float

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.recipe.output_dir)

    @property
    def forwards(self) -> float:
        """What the run costs."""
        return self.recipe.max_steps * self.forwards_per_step

    @property
    def is_done(self) -> bool:
        """It needs no run any more."""
        return (self.folder / RECORD_NAME).exists() or self._is_finished

    @property
    def _is_finished(self) -> bool:
        return (self.folder / "adapter_config.json").exists()


def make_cell(
    suite: Suite,
    folder: Path,
    task: TaskEntry,
    method: Method,
    point: str,
    *,
    seed: int,
    tuning_data: Mapping[str, str] | None = None,
) -> Cell:
    """Return a cell of a suite.

    Args:
        suite: The suite.
        folder: Of all results.
        task: Its task.
        method: Its method.
        point: Name of its grid point.
        seed: Of directions and data order.
        tuning_data: Keys of the data of a run that tunes; None for one that is reported.

    Raises:
        ConfigError: The keys do not go together, or a step costs more than the budget.
    """
    place = folder / "cells" / task.name / method.name / point / f"seed-{seed}"
    own = {
        **{"output_dir": str(place), "resume_from_checkpoint": True},
        **{"seed": seed, "data_seed": seed, "load_best_model_at_end": False},
        "num_eval_examples": suite.num_eval_examples,
    }
    keys = with_keys(task.fragment, method.fragment, method.points[point], tuning_data or {}, own)
    budget = suite.forwards if tuning_data is None else suite.tuning_forwards
    try:
        config = recipe(keys)
        _check_exact(config)
        cost = forwards_per_step(config, task)
    except ConfigError as error:
        raise ConfigError(f"{task.name}, {method.name}, {point}: {error}") from error
    if cost > budget:
        raise ConfigError(
            f"{task.name}, {method.name}, {point}: forwards: expected at least those of one step, "
            f"{cost:g}, got {budget}"
        )
    steps = _steps(budget, cost)
    points = suite.eval_forwards if tuning_data is None else ()
    evaluated = sorted({_steps(count, cost) for count in points} - {0})
    values = {**keys, "max_steps": steps, "eval_steps": evaluated or None}
    is_tuning = tuning_data is not None
    return Cell(task.name, method.name, point, seed, is_tuning, recipe(values), cost)


def _check_exact(config: Recipe) -> None:
    """Refuse exact gradients whose cost cannot be told before the run.

    Raises:
        ConfigError: There are such.
    """
    zo = config.zo
    if zo.first_order_layers == "profile":
        raise ConfigError(
            "zo.first_order_layers: expected 'last', got 'profile', which finds the cost of a step "
            "only in the run; name zo.first_order_blocks"
        )
    if zo.first_order_blocks and zo.first_order_blocks > _num_blocks(config.model):
        raise ConfigError(
            f"zo.first_order_blocks: expected at most the {_num_blocks(config.model)} blocks of "
            f"the model, got {zo.first_order_blocks}"
        )


def _steps(forwards: int, cost: float) -> int:
    return math.floor(forwards / cost + 1e-9)  # a cost may be a rounded fraction


def forwards_per_step(config: Recipe, task: TaskEntry) -> float:
    """Return the forwards of a step, counted over batches of the task's size."""
    own, zo = _examples_of_step(config), config.zo
    usual = _examples_of_step(recipe({**task.fragment, "output_dir": ""}))
    is_exact, backward = False, 0.0
    if zo.has_first_order:
        count = _num_blocks(config.model)
        first, stop = trained_blocks(count, zo.num_blocks, zo.depth)
        is_exact = zo.first_order_blocks >= stop - first  # then nothing is probed
        backward = (count - stop + zo.first_order_blocks) / count
    probes = [] if is_exact else make_estimator(zo.estimator, config.estimator_settings).ask(0)
    tried = NUM_TRIED if zo.optimizer == "conservative" else 0
    cost = forwards_of(probes, own, backward) + tried
    return cost * own / usual


def _num_blocks(model: str) -> int:
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    return int(config.get_text_config().num_hidden_layers)


def _examples_of_step(config: Recipe) -> int:
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


def write_tuning_data(suite: Suite, folder: Path, task: TaskEntry) -> dict[str, str]:
    """Return the data keys of the runs that tune; training examples are held out into two files.

    Rows that an evaluation joins to one question are on one side.

    Raises:
        ConfigError: There are too few to hold some out.
    """
    if task.tuning_eval_data is not None:
        return {"eval_data": task.tuning_eval_data}
    records, keys = _training_records(task.fragment)
    questions = list(dict.fromkeys(keys))
    num_eval = min(suite.num_eval_examples, len(questions) // _PART_HELD_OUT)
    if num_eval == 0:
        raise ConfigError(
            f"tasks.{task.name}.data: expected at least {_PART_HELD_OUT} training examples, of "
            f"which some are held out for tuning, got {len(questions)}; name tuning_eval_data"
        )
    held_out = set(hold_out(questions, num_eval=num_eval, seed=_HOLD_OUT_SEED)[1])
    place = folder / _TUNING / task.name
    place.mkdir(parents=True, exist_ok=True)
    for name in ("train", "held-out"):
        is_held_out = name == "held-out"
        part = [r for r, k in zip(records, keys, strict=True) if (k in held_out) == is_held_out]
        # str: of the dates that Parquet may hold
        lines = "".join(json.dumps(record, default=str) + "\n" for record in part)
        write_bytes(place / f"{name}.jsonl", lines.encode("utf-8"))
    return {"data": str(place / "train.jsonl"), "eval_data": str(place / "held-out.jsonl")}


def _training_records(
    fragment: Mapping[str, Any],
) -> tuple[Sequence[Mapping[str, Any]], Sequence[Hashable]]:
    """Return the training examples of a task, and for each what names its question."""
    name, data = fragment.get("task"), fragment.get("data")
    is_one = data is not None and is_file(data)
    if name is None:
        records = load_records(str(data), None if is_one else "train")
        return records, range(len(records))
    task = load_task(name, None if is_one else data)
    examples = examples_from_file(task, str(data), "train") if is_one else task.examples("train")
    is_joined = task.source.group is not None
    return examples, [*map(task.prompt, examples)] if is_joined else range(len(examples))


def check_unchanged(cell: Cell) -> None:
    """Refuse a cell whose run was told something else.

    Raises:
        ConfigError: It was; the message names the key.
    """
    path = cell.folder / "recipe.yaml"
    if not path.exists():
        return
    old = _comparable(recipe(in_todays_words(read_keys(path))))
    new = _comparable(cell.recipe)
    found = {key: (want, got) for key, want, got in differing(old, new, _FREE)}
    if not found:
        return
    key = "max_steps" if "max_steps" in found else next(iter(found))
    raise ConfigError(
        f"{key}: expected {found[key][0]!r} as in the run in {cell.folder}, got {found[key][1]!r} "
        "from the suite; choose another --dir, or remove that folder"
    )


def _comparable(config: Recipe) -> dict[str, Any]:
    """Return the keys of a recipe; data that were held out are named apart from their folder."""
    keys = config.model_dump(mode="json")
    for key in ("data", "eval_data"):
        parts = Path(keys[key] or "").parts[-3:]
        if parts and parts[0] == _TUNING:
            keys[key] = "/".join(parts)
    return keys


def run_cell(cell: Cell, on_step: Callable[[int], None]) -> None:
    """Run a cell, or go on with it; what diverges is noted.

    Args:
        cell: Not done yet.
        on_step: Called with the number of steps done.

    Raises:
        StoppedError: A signal asked for the end.
    """
    clock, message = StepClock(on_step), None
    try:
        train(cell.recipe, [clock])
    except (DivergedError, ScaleRangeError, TrainedRangeError) as error:
        message = str(error)
    except StoppedError as error:
        raise StoppedError(
            f"stopped by a signal in {cell.folder}; the same command goes on from there"
        ) from error
    note = {"message": message, "seconds": clock.seconds, "timed_steps": clock.num_steps}
    write_json(cell.folder / RECORD_NAME, note)


class StepClock(TrainerCallback):
    """Adds up the time of steps: losses, journal and update, without evaluations.

    Args:
        on_step: Called with the number of steps done.
    """

    def __init__(self, on_step: Callable[[int], None]) -> None:
        self.seconds = 0.0
        self.num_steps = 0
        self._on_step = on_step
        self._started = 0.0

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Stop it."""
        self.seconds += time.monotonic() - self._started
        self.num_steps += 1
        self._on_step(state.global_step)
