"""Methods x tasks x seeds at an equal number of forwards: runs the cells and sums them up.

For every task each method is tuned on the same number of grid points, by the mean loss at the end
of the runs with the tuning seeds, on examples that are not those of the report. The chosen point
is run with the reported seeds. Numbers are of the last step, not of the best one.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qzo.bench.converge.cell_results import measured
from qzo.bench.converge.cells import (
    Cell,
    check_unchanged,
    make_cell,
    run_cell,
    write_tuning_data,
)
from qzo.bench.converge.suite import Method, Suite, TaskEntry
from qzo.bench.machine import hardware, versions
from qzo.model.placement import device_of
from qzo.objective.evaluate import mean_and_error

METRICS = ("loss", "accuracy", "accuracy_bias_corrected", "f1")

Measured = dict[str, Any]
Say = Callable[[str], None]


def converge(suite: Suite, folder: Path, say: Say) -> dict[str, Any]:
    """Run what is not done yet, and return every number.

    Args:
        suite: What to compare.
        folder: Of the results; a second call goes on in it.
        say: Told which run is at work, and the time left.
    """
    planned = {task.name: _Planned(suite, folder, task) for task in suite.tasks}
    for cell in (cell for task in planned.values() for cell in task.cells()):
        check_unchanged(cell)
    meter = _Meter([task.num_cells for task in planned.values()], suite, say)
    tasks = {name: _task_result(task, meter) for name, task in planned.items()}
    device = device_of(suite.tasks[0].fragment.get("device"))
    return {
        **{"suite": suite.text, "folder": str(folder), "forwards": suite.forwards},
        **{"tuning_forwards": suite.tuning_forwards, "seeds": list(suite.seeds)},
        **{"tuning_seeds": list(suite.tuning_seeds), "tasks": tasks},
        **{"hardware": hardware(device), "versions": versions()},
    }


class _Planned:
    """The cells of one task.

    Args:
        suite: What to compare.
        folder: Of the results.
        task: The task.
    """

    def __init__(self, suite: Suite, folder: Path, task: TaskEntry) -> None:
        self.suite, self.folder, self.task = suite, folder, task
        self.is_tuned = any(len(method.points) > 1 for method in suite.methods)
        self._tuning_data = write_tuning_data(suite, folder, task) if self.is_tuned else None

    @property
    def num_cells(self) -> tuple[int, int]:
        """How many runs tune, and how many are reported."""
        suite = self.suite
        points = len(suite.methods[0].points) if self.is_tuned else 0
        num_methods = len(suite.methods)
        return num_methods * points * len(suite.tuning_seeds), num_methods * len(suite.seeds)

    def tuning(self, method: Method, point: str) -> list[Cell]:
        """Return the runs that tell how good a grid point is."""
        return [self._cell(method, point, seed, True) for seed in self.suite.tuning_seeds]

    def reported(self, method: Method, point: str) -> list[Cell]:
        """Return the runs that are reported if this point is chosen."""
        return [self._cell(method, point, seed, False) for seed in self.suite.seeds]

    def cells(self) -> list[Cell]:
        """Return all that may come to run."""
        pairs = [(method, point) for method in self.suite.methods for point in method.points]
        tuning = [cell for pair in pairs if self.is_tuned for cell in self.tuning(*pair)]
        return tuning + [cell for pair in pairs for cell in self.reported(*pair)]

    def _cell(self, method: Method, point: str, seed: int, is_tuning: bool) -> Cell:
        data = self._tuning_data if is_tuning else None
        return make_cell(
            self.suite, self.folder, self.task, method, point, seed=seed, tuning_data=data
        )


class _Meter:
    """Runs cells, and says how far it is.

    Args:
        num_cells: Of every task: how many runs tune, and how many are reported.
        suite: Gives their budgets.
        say: Told in words.
    """

    def __init__(self, num_cells: Sequence[tuple[int, int]], suite: Suite, say: Say) -> None:
        self._say, self._number, self._started = say, 0, time.monotonic()
        self._total = sum(map(sum, num_cells))
        self._left = float(
            sum(t * suite.tuning_forwards + r * suite.forwards for t, r in num_cells)
        )
        self._done = 0.0  # forwards of this call

    def drop(self, cells: Sequence[Cell]) -> None:
        """Leave cells out: nothing is to be run."""
        self._number += len(cells)
        self._left -= sum(cell.forwards for cell in cells)

    def measure(self, cell: Cell, target_loss: float | None) -> Measured:
        """Run a cell unless it is done, and return its numbers."""
        self._number += 1
        self._left -= cell.forwards
        if not cell.is_done:
            done, first = self._done, True

            def on_step(steps: int) -> None:
                nonlocal done, first
                if first:  # a run that goes on starts somewhere
                    done, first = done - (steps - 1) * cell.forwards_per_step, False
                self._done = done + steps * cell.forwards_per_step
                left = (cell.recipe.max_steps - steps) * cell.forwards_per_step
                self._tell(cell, steps, left)

            self._tell(cell, 0, cell.forwards)
            run_cell(cell, on_step)
        return measured(cell, target_loss)

    def _tell(self, cell: Cell, steps: int, left: float) -> None:
        text = (
            f"run {self._number} of {self._total}: {cell.task}, {cell.method}, {cell.point}, "
            f"seed {cell.seed}{', tuning' if cell.is_tuning else ''}, "
            f"step {steps} of {cell.recipe.max_steps}"
        )
        if self._done:
            seconds = (time.monotonic() - self._started) / self._done * (self._left + left)
            text += f", {_duration(seconds)} left"
        self._say(text)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _task_result(planned: _Planned, meter: _Meter) -> dict[str, Any]:
    task = planned.task
    tunings = {method.name: _tune(planned, method, meter) for method in planned.suite.methods}
    methods = {}
    for method in planned.suite.methods:
        tuning = tunings[method.name]
        point = _best(tuning) if planned.is_tuned else next(iter(method.points))
        if point is None:
            meter.drop(planned.reported(method, next(iter(method.points))))
            methods[method.name] = {"point": None, "keys": None, "tuning": tuning, **summary([])}
            continue
        cells = [meter.measure(c, task.target_loss) for c in planned.reported(method, point)]
        keys = dict(method.points[point])
        methods[method.name] = {"point": point, "keys": keys, "tuning": tuning, **summary(cells)}
    return {
        "target_loss": task.target_loss,
        "tuning_set": _tuning_set(planned),
        "methods": methods,
    }


def _tuning_set(planned: _Planned) -> str | None:
    if not planned.is_tuned:
        return None
    return planned.task.tuning_eval_data or "training examples that were held out"


def _tune(planned: _Planned, method: Method, meter: _Meter) -> list[dict[str, Any]]:
    """Return the results of every grid point; none where nothing is tuned."""
    if not planned.is_tuned:
        return []
    results = []
    for point, keys in method.points.items():
        cells = [meter.measure(cell, None) for cell in planned.tuning(method, point)]
        results.append({"point": point, "keys": dict(keys), **summary(cells)})
    return results


def _best(tuning: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the point of the lowest mean loss, the first of equals; None if all diverged."""
    usable = [entry for entry in tuning if entry["loss"] is not None]
    if not usable:
        return None
    return str(min(usable, key=lambda entry: entry["loss"]["mean"])["point"])


def summary(cells: Sequence[Measured]) -> dict[str, Any]:
    """Return means and standard errors over seeds, beside the numbers of every cell.

    A mean over those that did not diverge would flatter a method: where one diverged, there is
    none. The same holds for the forwards to a target that not all reached.
    """
    finals = [cell["final"] for cell in cells]
    before = [cell["curve"][0]["loss"] for cell in cells if cell["curve"]]
    return {
        "num_seeds": len(cells),
        "num_diverged": sum(final is None for final in finals),
        "before": before[0] if before else None,
        **{metric: _mean([final and final.get(metric) for final in finals]) for metric in METRICS},
        "num_reached": sum(cell["forwards_to_target"] is not None for cell in cells),
        "forwards_to_target": _mean([cell["forwards_to_target"] for cell in cells]),
        "seconds_per_forward": _mean([cell["seconds_per_forward"] for cell in cells]),
        "curve": _mean_curve(cells),
        "cells": list(cells),
    }


def _mean(values: Sequence[float | None]) -> dict[str, float | None] | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    mean, error = mean_and_error(known)
    return {"mean": mean, "se": None if math.isnan(error) else error}


def _mean_curve(cells: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return the mean loss over seeds at every evaluation that all of them have."""
    curves = [{p["forwards"]: p["loss"] for p in cell["curve"]} for cell in cells]
    points = []
    for forwards in sorted(curves[0]) if curves else ():
        mean = _mean([curve.get(forwards) for curve in curves])
        if mean is not None:
            points.append({"forwards": forwards, **mean})
    return points
