"""The lines of a journal: what they hold, and the checks of what is read.

Line 1 is the header. A step line is ``{"step", "losses", "derivatives", "learning_rate"}``; what
is not finite is null. ``derivatives`` are what moved the scales; where the clip or the
normalisation changed one, ``raw`` holds them as measured. Where the estimator measures curvatures,
``curvatures`` holds one per derivative. ``gradient`` is there where a part of the scales has exact
gradients: ``{"loss", "learning_rate"}``; see ``gradients``. A line ``{"step", "fingerprint"}``
holds the sha256 of the master before that step. Where directions are stretched, the header's
``stretch`` holds a factor per layer for probes and one for updates.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

from qzo.checkpoint.atomic import parse_json
from qzo.errors import CheckpointError
from qzo.method.coordinates import Coordinates
from qzo.method.directions.settings import DirectionSettings, LawName, basis_steps_of, settings_of
from qzo.method.probes import DirectionalDerivative, basis_seed, direction_seed

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


def line_of(value: Mapping[str, Any]) -> bytes:
    """Return a line with its end."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("utf-8") + b"\n"


def finite_or_none(value: float) -> float | None:
    """Return a number, or None for what JSON cannot hold."""
    return value if math.isfinite(value) else None


def read_header(path: Path, line: bytes) -> dict[str, Any]:
    """Check the header of a journal and return it.

    Raises:
        CheckpointError: It is damaged, or of another version.
    """
    header = _parse(path, 1, line)
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


def read_records(path: Path, lines: Sequence[bytes]) -> Iterator[Step | Fingerprint]:
    """Yield what the lines behind the header hold, in order.

    Raises:
        CheckpointError: A line is damaged, or not of the next step.
    """
    expected = 0
    for number, line in enumerate(lines, start=2):
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
