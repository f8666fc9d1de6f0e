"""The journal: a header, then a line per step, on disk before the scales move.

A step is its losses, its directional derivatives and its learning rate; the seeds follow from the
run's seed and the step (``probes.direction_seed``). With the base checkpoint that is all it takes
to rebuild the tuned scales, so the journal is the smallest adapter there is.

``journal.jsonl`` holds a line of JSON each: see ``lines``. ``compact`` has a form
for replays alone.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qzo.checkpoint.atomic import WriteError, sync, write_bytes
from qzo.errors import CheckpointError
from qzo.method.probes import DirectionalDerivative
from qzo.run.journal.lines import (
    VERSION,
    Fingerprint,
    GradientNote,
    Step,
    finite_or_none,
    line_of,
    read_header,
    read_records,
)

NAME = "journal.jsonl"


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
        header = read_header(path, lines[0])
        journal = cls(path, header, 0)
        for record in read_records(path, lines[1:]):
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
            write_bytes(self.path, line_of(self.header))
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
            "losses": [finite_or_none(loss) for loss in losses],
            "derivatives": [finite_or_none(d.value) for d in derivatives],
            "learning_rate": learning_rate,
        }
        raw = [finite_or_none(d.raw) for d in derivatives]
        if raw != line["derivatives"]:
            line["raw"] = raw
        curvatures = [d.curvature for d in derivatives if d.curvature is not None]
        if curvatures:
            assert len(curvatures) == len(derivatives)
            line["curvatures"] = [finite_or_none(curvature) for curvature in curvatures]
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

    def sync(self) -> None:
        """Force what was appended onto the disk."""
        if self._num_unsynced:
            sync(self.path)
            self._num_unsynced = 0

    def records(self) -> Iterator[Step | Fingerprint]:
        """Yield what the journal holds, in order."""
        lines, _ = _split(_read(self.path) if self._copy is None else self._copy)
        yield from read_records(self.path, lines[1:])

    def _write(self, value: Mapping[str, Any], *, is_synced: bool) -> None:
        self.begin()
        start = self.path.stat().st_size if self._torn_at is None else self._torn_at
        try:
            with self.path.open("ab") as file:
                file.truncate(start)
                self._torn_at = None
                file.write(line_of(value))
                file.flush()
                if is_synced:
                    os.fsync(file.fileno())
                    self._num_unsynced = 0
        except OSError as error:
            os.truncate(self.path, start)
            raise WriteError(self.path, error) from error


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
