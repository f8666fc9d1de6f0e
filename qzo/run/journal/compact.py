"""The compact form of a journal, ``journal.safetensors``: what a replay needs and no more.

16 bytes for a step of one direction. See ``write_compact``.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qzo.checkpoint.atomic import new_file
from qzo.checkpoint.tensors import TensorFiles, write_safetensors
from qzo.errors import CheckpointError
from qzo.run.journal.journal import NAME, Journal
from qzo.run.journal.lines import Fingerprint, Record, Step, finite_or_none, read_header

COMPACT_NAME = "journal.safetensors"
_COMPACT_TENSORS = {
    "derivatives": (torch.float64, 2),
    "learning_rates": (torch.float64, 1),
    "fingerprint_steps": (torch.int64, 1),
    "fingerprints": (torch.uint8, 2),
}


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
        self.header = read_header(path, text.encode("utf-8"))
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
                tuple(finite_or_none(value) for value in row.tolist())
                for row in (derivatives, curvatures)
            )
            yield Step(step, (), values, rate, bends)
        if self.next_step in marked:
            yield Fingerprint(self.next_step, bytes(marked[self.next_step].tolist()).hex())


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
