"""The journal: a header, then a line per step, on disk before the scales move.

A step is its losses, its directional derivatives and its learning rate; the seeds follow from the
run's seed and the step (``probes.direction_seed``). With the base checkpoint that is all it takes
to rebuild the tuned scales, so the journal is the smallest adapter there is.

``journal.jsonl``: line 1 is the header. A step line is ``{"step", "losses", "derivatives",
"learning_rate"}``; what is not finite is null. ``derivatives`` are what moved the scales; where the
clip or the normalisation changed one, ``raw`` holds them as measured. Where the estimator measures
curvatures, ``curvatures`` holds one per derivative. ``gradient`` is there where a part of the
scales has exact gradients: ``{"loss", "learning_rate"}``; see ``gradients``. A line ``{"step",
"fingerprint"}`` holds the sha256 of the master before that step. Where directions are stretched,
the header's ``stretch`` holds a factor per layer for probes and one for updates.

The compact form, ``journal.safetensors``, holds what a replay needs and no more: 16 bytes for a
step of one direction. See ``write_compact``.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from qzo.coordinates import Coordinates
from qzo.direction_settings import DirectionSettings, LawName, basis_steps_of, settings_of
from qzo.errors import CheckpointError
from qzo.files import WriteError, new_file, parse_json, write_bytes
from qzo.probes import DirectionalDerivative, basis_seed, direction_seed
from qzo.tensor_files import TensorFiles, write_safetensors

NAME = "journal.jsonl"
COMPACT_NAME = "journal.safetensors"
VERSION = 1

_LINE_BYTES_MAX = 2**24
# What a replay reads, and its type in JSON.
_HEADER_TYPES: dict[str, type] = {
    **dict.fromkeys(("base", "codes_sha256", "scales_sha256", "generator", "qzo_version"), str),
    **dict.fromkeys(("coordinates", "direction", "optimizer"), str),
    **{"layers": list, "num_values": int, "seed": int, "recipe": dict, "optimizer_settings": dict},
}


@dataclass(frozen=True)
class Step:
    """One step; a loss, derivative or curvature that is not finite is None.

    The compact form has no losses. Where the estimator measures no curvatures there are none.
    """

    step: int
    losses: tuple[float | None, ...]
    derivatives: tuple[float | None, ...]
    learning_rate: float
    curvatures: tuple[float | None, ...] = ()
    gradient: "GradientNote | None" = None


@dataclass(frozen=True)
class GradientNote:
    """What a step says of its exact gradient; the vector is in the side file (``gradients``).

    Attributes:
        loss: At the master; None where loss or gradient were not finite: the part did not move.
        learning_rate: Of the first-order part.
    """

    loss: float | None
    learning_rate: float


@dataclass(frozen=True)
class Fingerprint:
    """The sha256 of the master before a step."""

    step: int
    sha256: str


@runtime_checkable
class Record(Protocol):
    """A journal in either form, as a replay reads it."""

    path: Path
    header: dict[str, Any]
    next_step: int

    def records(self) -> Iterator[Step | Fingerprint]:
        """Yield what it holds, in order."""
        ...


class Journal:
    """An open journal.

    Attributes:
        path: The file.
        header: Its first line.
        next_step: The first step that it does not hold.
        was_torn: True if the last line was torn. It does not count; the next line replaces it.
        sync_steps: Steps that may pass until what was written is forced onto the disk.
    """

    sync_steps = 1

    def __init__(self, path: Path, header: Mapping[str, Any], next_step: int) -> None:
        self.path = path
        self.header = dict(header)
        self.next_step = next_step
        self._marked_step: int | None = None
        self._torn_at: int | None = None
        self._num_unsynced = 0
        self._make_header: Callable[[], Mapping[str, Any]] | None = None
        self._copy: bytes | None = None

    @classmethod
    def create(cls, path: Path, make_header: Callable[[], Mapping[str, Any]]) -> "Journal":
        """Prepare a new journal; nothing is on disk before ``begin``, which makes the header."""
        journal = cls(path, {}, 0)
        journal._make_header = make_header
        return journal

    @classmethod
    def open(cls, path: Path) -> "Journal":
        """Read a journal and continue it with the next line; reading changes nothing."""
        return cls._of_bytes(path, _read(path))

    @classmethod
    def copy_of(cls, path: Path, data: bytes) -> "Journal":
        """Take the bytes of a journal that lies elsewhere; such a copy can be read only."""
        journal = cls._of_bytes(path, data)
        journal._copy = data
        return journal

    @classmethod
    def _of_bytes(cls, path: Path, data: bytes) -> "Journal":
        lines, torn_at = _split(data)
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
        gradient: GradientNote | None = None,
    ) -> None:
        """Put a step on disk."""
        assert step == self.next_step
        line: dict[str, Any] = {
            "step": step,
            "losses": [_finite_or_none(loss) for loss in losses],
            "derivatives": [_finite_or_none(d.value) for d in derivatives],
            "learning_rate": learning_rate,
        }
        raw = [_finite_or_none(d.raw) for d in derivatives]
        if raw != line["derivatives"]:
            line["raw"] = raw
        curvatures = [d.curvature for d in derivatives if d.curvature is not None]
        if curvatures:
            assert len(curvatures) == len(derivatives)
            line["curvatures"] = [_finite_or_none(curvature) for curvature in curvatures]
        if gradient is not None:
            line["gradient"] = asdict(gradient)
        self._num_unsynced += 1
        self._write(line, is_synced=self._num_unsynced >= self.sync_steps)
        self.next_step = step + 1

    def mark(self, fingerprint: str) -> None:
        """Put a fingerprint of the master, as it is before the next step, on disk, once."""
        if self._marked_step != self.next_step:
            self._write({"step": self.next_step, "fingerprint": fingerprint}, is_synced=True)
            self._marked_step = self.next_step

    def records(self) -> Iterator[Step | Fingerprint]:
        """Yield what the journal holds, in order."""
        lines, _ = _split(_read(self.path) if self._copy is None else self._copy)
        yield from _records(self.path, lines)

    def _write(self, value: Mapping[str, Any], *, is_synced: bool) -> None:
        self.begin()
        start = self.path.stat().st_size if self._torn_at is None else self._torn_at
        try:
            with self.path.open("ab") as file:
                file.truncate(start)
                self._torn_at = None
                file.write(_line(value))
                file.flush()
                if is_synced:
                    os.fsync(file.fileno())
                    self._num_unsynced = 0
        except OSError as error:
            os.truncate(self.path, start)
            raise WriteError(self.path, error) from error


class CompactJournal:
    """A journal in its compact form, to be replayed.

    Args:
        path: The file.

    Raises:
        CheckpointError: It is not one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        tensors = TensorFiles(path.parent, [path.name])
        text = tensors.metadata(path.name).get("header", "")
        self.header = _header(path, [text.encode("utf-8")])
        for key, (dtype, dims) in _COMPACT_TENSORS.items():
            got = tensors[key] if key in tensors.files else None
            if got is None or got.dtype != dtype or got.dim() != dims:
                raise CheckpointError(
                    f"{path}: {key}: expected a tensor of {dtype} with {dims} dimensions, got "
                    f"{'none' if got is None else (got.dtype, tuple(got.shape))}"
                )
        self._derivatives, self._rates, self._marked, self._digests = (
            tensors[key] for key in _COMPACT_TENSORS
        )
        self.next_step = len(self._rates)
        if len(self._derivatives) != len(self._rates) or len(self._marked) != len(self._digests):
            raise CheckpointError(f"{path}: expected tensors of as many steps, got others")
        self._curvatures = _compact_curvatures(tensors, path, self._derivatives)
        if not bool(self._rates.isfinite().all()):
            raise CheckpointError(f"{path}: learning_rates: expected finite numbers")

    def records(self) -> Iterator[Step | Fingerprint]:
        """Yield what it holds, in order."""
        marked = dict(zip(self._marked.tolist(), self._digests, strict=True))
        steps = zip(self._derivatives, self._rates.tolist(), self._curvatures, strict=True)
        for step, (derivatives, rate, curvatures) in enumerate(steps):
            if step in marked:
                yield Fingerprint(step, bytes(marked[step].tolist()).hex())
            values, bends = (
                tuple(_finite_or_none(value) for value in row.tolist())
                for row in (derivatives, curvatures)
            )
            yield Step(step, (), values, rate, bends)
        if self.next_step in marked:
            yield Fingerprint(self.next_step, bytes(marked[self.next_step].tolist()).hex())


_COMPACT_TENSORS = {
    "derivatives": (torch.float64, 2),
    "learning_rates": (torch.float64, 1),
    "fingerprint_steps": (torch.int64, 1),
    "fingerprints": (torch.uint8, 2),
}


def _compact_curvatures(tensors: TensorFiles, path: Path, derivatives: Tensor) -> Tensor:
    """Return the curvatures, as wide as the derivatives; without columns where there are none.

    Raises:
        CheckpointError: The tensor has another type or shape.
    """
    if "curvatures" not in tensors.files:
        return derivatives[:, :0]
    got = tensors["curvatures"]
    if (got.dtype, got.shape) != (derivatives.dtype, derivatives.shape):
        raise CheckpointError(
            f"{path}: curvatures: expected a tensor of {derivatives.dtype} with the shape of the "
            f"derivatives, {tuple(derivatives.shape)}, got {(got.dtype, tuple(got.shape))}"
        )
    return got


def write_compact(journal: Record, path: Path) -> None:
    """Write the compact form of a journal: everything but the losses and the raw derivatives.

    A safetensors file with ``derivatives`` (F64, steps x directions; NaN where there is none),
    ``learning_rates`` (F64), ``fingerprint_steps`` (I64), ``fingerprints`` (U8, n x 32), where
    there are any ``curvatures`` (like the derivatives), and the header in its metadata.

    Raises:
        CheckpointError: Steps have different numbers of directions, or exact gradients.
    """
    if "first_order" in journal.header:
        raise CheckpointError(
            f"{journal.path}: expected a run of forward passes only, got one with exact gradients, "
            "which are vectors and have no compact form; keep journal.jsonl and gradients.f32"
        )
    records = list(journal.records())
    steps = [record for record in records if isinstance(record, Step)]
    marks = [record for record in records if isinstance(record, Fingerprint)]
    if len({(len(step.derivatives), len(step.curvatures)) for step in steps}) > 1:
        raise CheckpointError(f"{journal.path}: expected as many directions in every step")
    digests = [list(bytes.fromhex(mark.sha256)) for mark in marks]
    tensors = {
        "derivatives": _rows([step.derivatives for step in steps]),
        "learning_rates": torch.tensor([s.learning_rate for s in steps], dtype=torch.float64),
        "fingerprint_steps": torch.tensor([mark.step for mark in marks], dtype=torch.int64),
        "fingerprints": torch.tensor(digests, dtype=torch.uint8).view(len(marks), 32),
    }
    if any(step.curvatures for step in steps):
        tensors["curvatures"] = _rows([step.curvatures for step in steps])
    header = json.dumps(journal.header, separators=(",", ":"), allow_nan=False)
    with new_file(path) as partial:
        write_safetensors(partial, tensors.items(), {"header": header})


def _rows(rows: Sequence[Sequence[float | None]]) -> Tensor:
    numbers = [[math.nan if value is None else value for value in row] for row in rows]
    width = len(numbers[0]) if numbers else 0
    return torch.tensor(numbers, dtype=torch.float64).view(len(numbers), width)


def open_record(path: Path) -> Record:
    """Open the journal of a run folder, or a file that is one, in either form."""
    if path.is_file():
        return CompactJournal(path) if path.suffix == ".safetensors" else Journal.open(path)
    if not (path / NAME).exists() and (path / COMPACT_NAME).is_file():
        return CompactJournal(path / COMPACT_NAME)
    return Journal.open(path / NAME)


def direction_settings_of(header: Mapping[str, Any]) -> DirectionSettings:
    """Return what the law of the directions was told; the header has been checked."""
    found = header.get("direction_settings")
    return settings_of(found, header["direction"], header["coordinates"])


def header_basis_steps(header: Mapping[str, Any]) -> int | None:
    """Return how many steps share a basis, where the law has one."""
    settings = direction_settings_of(header)
    return basis_steps_of(header["direction"], settings, header.get("basis_steps"))


def derivatives_of(
    record: Step, run_seed: int, basis_steps: int | None = None
) -> list[DirectionalDerivative]:
    """Return the finite derivatives of a step with their seeds, curvatures and basis.

    Args:
        record: The step.
        run_seed: ``seed`` of the header.
        basis_steps: ``basis_steps`` of the header; None where it has none.
    """
    basis = 0 if basis_steps is None else basis_seed(run_seed, record.step, basis_steps)
    curvatures = record.curvatures or (None,) * len(record.derivatives)
    return [
        DirectionalDerivative(
            direction_seed(run_seed, record.step, number),
            value,
            value,
            curvature=curvature,
            basis=basis,
        )
        for number, (value, curvature) in enumerate(
            zip(record.derivatives, curvatures, strict=True)
        )
        if value is not None
    ]


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("utf-8") + b"\n"


def _filled(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read(path: Path) -> bytes:
    """Return the bytes of a journal.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _split(data: bytes) -> tuple[list[bytes], int | None]:
    """Return the complete lines, and where a torn last line starts."""
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
        if type(header.get(key)) is not kind:  # True is no number here
            raise CheckpointError(
                f"{path}: line 1: expected {key} of type {kind.__name__}, got {header.get(key)!r}"
            )
    for key, names in (("coordinates", Coordinates), ("direction", LawName)):
        if header[key] not in get_args(names):
            raise CheckpointError(
                f"{path}: line 1: expected {key} to be one of {list(get_args(names))}, got "
                f"{header[key]!r}"
            )
    try:
        direction_settings_of(header)
    except ValueError as error:
        raise CheckpointError(f"{path}: line 1: direction_settings: {error}") from error
    basis_steps = header.get("basis_steps")
    if basis_steps is not None and not (type(basis_steps) is int and basis_steps > 0):
        raise CheckpointError(
            f"{path}: line 1: expected basis_steps to be a number above 0 or null, got "
            f"{basis_steps!r}"
        )
    if not all(isinstance(layer, str) for layer in header["layers"]):
        raise CheckpointError(f"{path}: line 1: expected names of layers, got something else")
    if not 0 <= header["seed"] < 2**63:
        raise CheckpointError(f"{path}: line 1: expected a seed of 63 bits, got {header['seed']}")
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
            if not _is_sha256(value["fingerprint"]):
                raise CheckpointError(
                    f"{path}: line {number}: expected a fingerprint of 64 hexadecimal digits"
                )
            yield Fingerprint(expected, value["fingerprint"])
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
    curvatures = _curvatures(path, number, value, len(derivatives))
    note = _gradient_note(path, number, value.get("gradient"))
    return Step(
        int(value["step"]), tuple(losses), tuple(derivatives), learning_rate, curvatures, note
    )


def _curvatures(
    path: Path, number: int, value: Mapping[str, Any], count: int
) -> tuple[float | None, ...]:
    """Return the curvatures of a step line, if it has them.

    Raises:
        CheckpointError: They are not numbers, or not as many as there are derivatives.
    """
    if "curvatures" not in value:
        return ()
    entries = value["curvatures"]
    is_list = isinstance(entries, list) and len(entries) == count
    if not (is_list and all(entry is None or _is_number(entry) for entry in entries)):
        raise CheckpointError(
            f"{path}: line {number}: expected {count} curvatures, one per derivative, got "
            "something else"
        )
    return tuple(entries)


def _gradient_note(path: Path, number: int, value: Any) -> GradientNote | None:
    if value is None:
        return None
    is_object = isinstance(value, dict)
    loss, rate = (value.get(k) if is_object else "" for k in ("loss", "learning_rate"))
    if not (loss is None or _is_number(loss)) or not _is_number(rate):
        raise CheckpointError(
            f"{path}: line {number}: expected a gradient with loss and learning_rate, got "
            "something else"
        )
    assert loss is None or isinstance(loss, int | float)
    assert isinstance(rate, int | float)
    return GradientNote(loss, rate)


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_number(value: object) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value)  # type: ignore[arg-type]  # checked above


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        if len(line) > _LINE_BYTES_MAX:
            raise CheckpointError(
                f"{path}: line {number}: expected at most {_LINE_BYTES_MAX} bytes"
            )
        value = parse_json(line)
    except ValueError as error:
        raise CheckpointError(f"{path}: line {number}: expected JSON, got {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: line {number}: expected a JSON object")
    return value
