"""The journal: a header, then a line per step, on disk before the scales move.

A step is its losses, its clipped directional derivatives and its learning rate; the seeds follow
from the run's seed and the step. With the base checkpoint that is all it takes to rebuild the tuned
scales, so the journal is the smallest adapter there is.

``journal.jsonl``: line 1 is the header. A step line is ``{"step", "losses", "derivatives",
"learning_rate"}``; what is not finite is null. A line
``{"step", "fingerprint"}`` holds the sha256 of the master before that step.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzo.errors import CheckpointError
from qzo.files import WriteError, write_bytes
from qzo.probes import DirectionalDerivative, direction_seed

NAME = "journal.jsonl"
VERSION = 1

_LINE_BYTES_MAX = 2**24
# What a replay reads, and its type in JSON.
_HEADER_TYPES: dict[str, type] = {
    **dict.fromkeys(("base", "codes_sha256", "scales_sha256", "generator", "qzo_version"), str),
    **dict.fromkeys(("coordinates", "direction", "optimizer"), str),
    **{"layers": list, "num_values": int, "seed": int, "recipe": dict},
}


@dataclass(frozen=True)
class Step:
    """One step line; a loss or derivative that is not finite is None."""

    step: int
    losses: tuple[float | None, ...]
    derivatives: tuple[float | None, ...]
    learning_rate: float


@dataclass(frozen=True)
class Fingerprint:
    """The sha256 of the master before a step."""

    step: int
    sha256: str


class Journal:
    """An open journal.

    Attributes:
        path: The file.
        header: Its first line.
        next_step: The first step that it does not hold.
        was_torn: True if the last line was torn. It does not count; the next line replaces it.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], next_step: int) -> None:
        self.path = path
        self.header = dict(header)
        self.next_step = next_step
        self._marked_step: int | None = None
        self._torn_at: int | None = None
        self._make_header: Callable[[], Mapping[str, Any]] | None = None

    @classmethod
    def create(cls, path: Path, make_header: Callable[[], Mapping[str, Any]]) -> "Journal":
        """Prepare a new journal; nothing is on disk before ``begin``, which makes the header."""
        journal = cls(path, {}, 0)
        journal._make_header = make_header
        return journal

    @classmethod
    def open(cls, path: Path) -> "Journal":
        """Read a journal and continue it with the next line; reading changes nothing."""
        lines, torn_at = _read_lines(path)
        header = _header(path, lines)
        journal = cls(path, header, 0)
        for record in _records(path, lines):
            if isinstance(record, Step):
                journal.next_step = record.step + 1
            else:
                journal._marked_step = record.step
        journal._torn_at = torn_at
        return journal

    @property
    def is_on_disk(self) -> bool:
        """Tell whether the header is on disk."""
        return self._make_header is None

    def begin(self) -> None:
        """Put the header on disk, unless it is there: before anything else of the run."""
        if self._make_header is not None:
            self.header = {"format": "qzo-journal", "version": VERSION, **self._make_header()}
            write_bytes(self.path, _line(self.header))
            self._make_header = None

    @property
    def was_torn(self) -> bool:
        """Tell whether the last line of the file is torn."""
        return self._torn_at is not None

    def append(
        self,
        step: int,
        losses: Sequence[float],
        derivatives: Sequence[DirectionalDerivative],
        learning_rate: float,
    ) -> None:
        """Put a step on disk."""
        assert step == self.next_step
        self._write(
            {
                "step": step,
                "losses": [_finite_or_none(loss) for loss in losses],
                "derivatives": [_finite_or_none(d.value) for d in derivatives],
                "learning_rate": learning_rate,
            }
        )
        self.next_step = step + 1

    def mark(self, fingerprint: str) -> None:
        """Put a fingerprint of the master, as it is before the next step, on disk, once."""
        if self._marked_step != self.next_step:
            self._write({"step": self.next_step, "fingerprint": fingerprint})
            self._marked_step = self.next_step

    def records(self) -> Iterator[Step | Fingerprint]:
        """Yield what the journal holds, in order."""
        lines, _ = _read_lines(self.path)
        yield from _records(self.path, lines)

    def _write(self, value: Mapping[str, Any]) -> None:
        self.begin()
        start = self.path.stat().st_size if self._torn_at is None else self._torn_at
        try:
            with self.path.open("ab") as file:
                file.truncate(start)
                self._torn_at = None
                file.write(_line(value))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            os.truncate(self.path, start)
            raise WriteError(self.path, error) from error


def derivatives_of(record: Step, run_seed: int) -> list[DirectionalDerivative]:
    """Return the finite derivatives of a step with their seeds."""
    return [
        DirectionalDerivative(direction_seed(run_seed, record.step, number), value, value)
        for number, value in enumerate(record.derivatives)
        if value is not None
    ]


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("utf-8") + b"\n"


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read_lines(path: Path) -> tuple[list[bytes], int | None]:
    """Return the complete lines, and where a torn last line starts.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    complete, _, rest = data.rpartition(b"\n")
    return complete.split(b"\n"), len(data) - len(rest) if rest else None


def _header(path: Path, lines: Sequence[bytes]) -> dict[str, Any]:
    header = _parse(path, 1, lines[0])
    if header.get("format") != "qzo-journal" or header.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: expected a qzo journal of version {VERSION}, got format "
            f"{header.get('format')!r} version {header.get('version')!r}"
        )
    for key, kind in _HEADER_TYPES.items():
        if not isinstance(header.get(key), kind):
            raise CheckpointError(
                f"{path}: line 1: expected {key} of type {kind.__name__}, got {header.get(key)!r}"
            )
    return header


def _records(path: Path, lines: Sequence[bytes]) -> Iterator[Step | Fingerprint]:
    expected = 0
    for number, line in enumerate(lines[1:], start=2):
        value = _parse(path, number, line)
        if value.get("step") != expected:
            raise CheckpointError(
                f"{path}: line {number}: expected step {expected}, got {value.get('step')!r}"
            )
        if "fingerprint" in value:
            yield Fingerprint(expected, str(value["fingerprint"]))
        else:
            yield _step(path, number, value)
            expected += 1


def _step(path: Path, number: int, value: Mapping[str, Any]) -> Step:
    losses, derivatives = value.get("losses"), value.get("derivatives")
    learning_rate = value.get("learning_rate")
    is_valid = (
        isinstance(losses, list)
        and isinstance(derivatives, list)
        and all(entry is None or _is_number(entry) for entry in [*losses, *derivatives])
        and _is_number(learning_rate)
    )
    if not is_valid:
        raise CheckpointError(
            f"{path}: line {number}: expected losses, derivatives and a learning_rate, got "
            "something else"
        )
    assert isinstance(losses, list)
    assert isinstance(derivatives, list)
    assert isinstance(learning_rate, int | float)
    return Step(int(value["step"]), tuple(losses), tuple(derivatives), learning_rate)


def _is_number(value: object) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value)  # type: ignore[arg-type]  # checked above


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        if len(line) > _LINE_BYTES_MAX:
            raise CheckpointError(
                f"{path}: line {number}: expected at most {_LINE_BYTES_MAX} bytes"
            )
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: line {number}: expected JSON, got {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: line {number}: expected a JSON object")
    return value
