"""What a run of a suite ended with, from the files in its folder."""

import json
from typing import Any

from qzo.bench.converge.cells import RECORD_NAME, Cell
from qzo.checkpoint.atomic import read_json
from qzo.run.output.metrics import NAME as METRICS_NAME
from qzo.run.output.metrics import evaluations


def measured(cell: Cell, target_loss: float | None) -> dict[str, Any]:
    """Return the numbers of a cell that is done, from the files in its folder.

    Args:
        cell: The cell.
        target_loss: The loss whose forwards are counted, if any.
    """
    path = cell.folder / RECORD_NAME
    untimed: dict[str, Any] = {"message": None, "seconds": 0.0, "timed_steps": 0}
    note = read_json(path) if path.exists() else untimed
    curve = _curve(cell)
    final = next((p for p in curve if p["step"] == cell.recipe.max_steps), None)
    message = note["message"]
    if message is None and (final is None or final["loss"] is None):
        message = f"evaluation loss: expected a finite value after {cell.recipe.max_steps} steps"
    timed = note["timed_steps"] * cell.forwards_per_step
    return {
        **{"task": cell.task, "method": cell.method, "point": cell.point, "seed": cell.seed},
        **{"folder": str(cell.folder), "is_tuning": cell.is_tuning},
        **{"status": "finished" if message is None else "diverged", "message": message},
        **{"max_steps": cell.recipe.max_steps, "forwards_per_step": cell.forwards_per_step},
        **{"forwards": cell.forwards, "curve": curve, "final": None if message else final},
        "seconds_per_forward": note["seconds"] / timed if timed else None,
        "forwards_to_target": None if target_loss is None else reached(curve, target_loss),
    }


def _curve(cell: Cell) -> list[dict[str, Any]]:
    """Return step, forwards and results of every evaluation."""
    path = cell.folder / METRICS_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    points = evaluations([json.loads(line) for line in lines])
    return [
        {
            "step": line["step"],
            "forwards": line["step"] * cell.forwards_per_step,
            **{k.removeprefix("eval_"): v for k, v in line.items() if k.startswith("eval_")},
        }
        for line in points
    ]


def reached(curve: list[dict[str, Any]], target_loss: float) -> float | None:
    """Return the forwards at which a loss was reached; None if it was not.

    That is where the line from the point before to the first evaluation at or below it crosses it.
    """
    before: tuple[float, float] | None = None
    for point in curve:
        forwards, loss = point["forwards"], point["loss"]
        if loss is None:
            before = None
        elif loss <= target_loss:
            if before is None:
                return float(forwards)
            part = (before[1] - target_loss) / (before[1] - loss)
            return float(before[0] + part * (forwards - before[0]))
        else:
            before = (forwards, loss)
    return None
