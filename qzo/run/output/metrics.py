"""metrics.jsonl: a line of averages every few steps, and a line per evaluation."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qzo.checkpoint.atomic import WriteError, parse_json, write_bytes
from qzo.errors import CheckpointError
from qzo.method.probes import DirectionalDerivative

NAME = "metrics.jsonl"
DATA_KEY = "evaluated_on"  # the digest of the data
CLOSING_KEY = "changed_fraction"  # of the line that a finished run ends with


@dataclass
class Window:
    """Averages since the last line.

    Attributes:
        losses: At the probes of all steps.
        slopes: Size of each derivative before the clip.
        clipped: Whether it was clipped.
    """

    losses: list[float] = field(default_factory=list)
    slopes: list[float] = field(default_factory=list)
    clipped: list[bool] = field(default_factory=list)

    def add(self, losses: Sequence[float], derivatives: Sequence[DirectionalDerivative]) -> None:
        """Take in one step; what is not finite is left out."""
        self.losses += [loss for loss in losses if math.isfinite(loss)]
        finite = [d for d in derivatives if math.isfinite(d.raw)]
        self.slopes += [abs(d.raw) for d in finite]
        self.clipped += [d.is_clipped for d in finite]

    def take(self) -> dict[str, float | None]:
        """Return the averages and start again."""
        result = {
            "loss": _mean(self.losses),
            "derivative": _mean(self.slopes),
            "clip_rate": _mean([float(clipped) for clipped in self.clipped]),
        }
        self.losses, self.slopes, self.clipped = [], [], []
        return result


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def evaluations(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the lines of evaluations on the data of the newest one, or on data that none names."""
    found = [line for line in lines if "eval_loss" in line]
    newest = found[-1].get(DATA_KEY) if found else None
    return [line for line in found if line.get(DATA_KEY, newest) == newest]


class Metrics:
    """The file.

    When a run continues, lines beyond ``next_step`` and the closing line of an earlier end are
    dropped. Evaluations on other data than those of now stay, but are not compared with.

    Args:
        path: The file.
        next_step: Of the run.
        data: The digest of the evaluation data.
    """

    def __init__(self, path: Path, next_step: int, data: str | None = None) -> None:
        self.path, self._data = path, data
        lines = [line for line in _read(path) if line["step"] <= next_step]
        self.lines = [line for line in lines if CLOSING_KEY not in line]
        if path.exists():
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            write_bytes(path, text.encode("utf-8"))

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line; NaN becomes null.

        Raises:
            WriteError: The disk is full or the file cannot be written.
        """
        clean = {key: _clean(value) for key, value in line.items()}
        start = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, start)
            raise WriteError(self.path, error) from error
        self.lines.append(clean)

    @property
    def logged_step(self) -> int:
        """The number of steps done at the newest line of averages; 0 if there is none."""
        return max((line["step"] for line in self.lines if "learning_rate" in line), default=0)

    @property
    def forwards(self) -> float | None:
        """Forwards of a batch up to the newest line of averages, or None where none says."""
        counts = [line["forwards"] for line in self.lines if "forwards" in line]
        return float(counts[-1]) if counts else None

    def cost(self, step: int, *, by_reward: bool = False) -> float | None:
        """Return the loss of the evaluation after so many steps, or minus its reward."""
        key, sign = ("eval_reward", -1) if by_reward else ("eval_loss", 1)
        found = [line[key] for line in self._evaluations if line["step"] == step]
        return sign * found[-1] if found and found[-1] is not None else None

    def has_evaluation(self, step: int) -> bool:
        """Tell whether this step was evaluated."""
        return any(line["step"] == step for line in self._evaluations)

    def append_evaluation(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Add a line for an evaluation."""
        self.append({"step": step, **numbers, DATA_KEY: self._data})

    @property
    def _evaluations(self) -> list[dict[str, Any]]:
        """Those on the data of now; a line that names none is taken for one."""
        lines = [line for line in self.lines if "eval_loss" in line]
        return [line for line in lines if line.get(DATA_KEY, self._data) == self._data]


def _clean(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # a torn last line has no end
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except ValueError:
        value = None
    keys = ("eval_loss", "eval_reward")
    numbers = [value.get(key) for key in keys] if isinstance(value, dict) else []
    is_valid = all(number is None or isinstance(number, int | float) for number in numbers)
    if not isinstance(value, dict) or type(value.get("step")) is not int or not is_valid:
        raise CheckpointError(
            f"{path}: line {number}: expected a JSON object with a step, got something else; "
            "remove the file to go on without earlier metrics"
        )
    return value
