"""Where the examples of a task come from: the official files in a folder, one file, or the hub.

An example is a dict with the data set's own column names, checked, and its ``label`` as a number.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from qzo.data.records import Record, read_hub, read_records
from qzo.errors import DataError

Example: TypeAlias = Mapping[str, Any]

SUPERGLUE = {
    "train": ["train.jsonl"],
    "validation": ["val.jsonl"],
    "test": ["test.jsonl"],
}
GLUE_OR_SUPERGLUE = {
    "train": ["train.jsonl", "train.tsv"],
    "validation": ["val.jsonl", "dev.tsv"],
    "test": ["test.jsonl", "test.tsv"],
}


@dataclass(frozen=True)
class Source:
    """A task's data: its place, the names of its files, and how a row becomes an example."""

    place: str | None
    """A folder with the official files, a hub id, or None for the data set's own hub id."""
    hub_id: str
    hub_config: str | None
    parse: Callable[[Record], Example]
    """A row of the data set to an example; raises DataError."""
    files: Mapping[str, Sequence[str]]
    """Of each split, the names that its file may have; the first that exists is read."""
    read: Callable[[Path], list[Record]]
    """Reads one of these files."""
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    """Splits that have another name on the hub."""
    group: Callable[[list[Example]], list[Example]] | None = None
    """Joins rows of one question that have an answer each, where a split is not for training."""

    def examples(self, split: str) -> list[Example]:
        """Read a split.

        Raises:
            DataError: There is no such split, or a row is malformed; the message names the file.
        """
        if split not in self.files:
            raise DataError(
                f"split: expected one of {', '.join(self.files)}, got {split!r}; "
                "name a file instead to read other data"
            )
        folder = Path(self.place or "").expanduser()
        if self.place and folder.is_dir():
            return self.read_file(self._find(folder, split), split)
        if self.place and folder.exists():
            raise DataError(
                f"{self.place}: expected a folder to take split {split!r} from, got a file; "
                "name its folder"
            )
        hub_id = self.place or self.hub_id
        hub_split = self.hub_splits.get(split, split)
        records = read_hub(hub_id, config=self.hub_config, split=hub_split)
        return self._parse(hub_id, records, split)

    def read_file(self, path: Path, split: str) -> list[Example]:
        """Read one file, whatever its name; a malformed row is a DataError that names both."""
        return self._parse(str(path), self.read(path), split)

    def _find(self, folder: Path, split: str) -> Path:
        names = self.files[split]
        for name in names:
            if (folder / name).exists():
                return folder / name
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "an empty folder"
        raise DataError(
            f"{folder}: expected {' or '.join(names)} for split {split!r}, got {found}; "
            "put the official file there"
        )

    def _parse(self, origin: str, records: Sequence[Record], split: str) -> list[Example]:
        examples: list[Example] = []
        for row, record in enumerate(records, start=1):
            try:
                examples.append(self.parse(record))
            except DataError as error:
                raise DataError(f"{origin}, row {row}: {error}") from error
        return examples if self.group is None or split == "train" else self.group(examples)


def read_rows(path: Path) -> list[Record]:
    """Read a file with a row per example; quotes in GLUE's ``.tsv`` files are plain characters."""
    return read_records(path, is_quoted=False)


def text_column(record: Record, *names: str) -> str:
    """Return the text of the first of these columns that the record has.

    Raises:
        DataError: It has none of them, or no text there.
    """
    name = next((name for name in names if name in record), None)
    if name is None:
        found = ", ".join(record)
        raise DataError(
            f"column: expected {' or '.join(names)}, got {found}; is this the right task?"
        )
    if not isinstance(record[name], str):
        raise DataError(
            f"{name}: expected a string, got {type(record[name]).__name__}; correct the file"
        )
    text: str = record[name]
    return text


def label_column(record: Record, *spellings: Sequence[str], name: str = "label") -> int:
    """Return which label the record has.

    Args:
        record: A row of the data set.
        *spellings: For each label, counted from 0, the ways in which files write it.
        name: The column.

    Raises:
        DataError: There is no label, as in public test files, or it is another one.
    """
    value = record.get(name)
    written = str(value).lower()
    for label, names in enumerate(spellings):
        if written in names:
            return label
    allowed = ", ".join(spelling for names in spellings for spelling in names)
    raise DataError(
        f"{name}: expected one of {allowed}, got {value!r}; "
        "test files without labels cannot be used"
    )
