"""TREC: what kind of thing does a question ask for? Six coarse classes. Accuracy.

    {question} It was about Expression|Entity|Description|Human|Location|Number

MeZO's template (arXiv 2305.17333, RoBERTa experiments, from LM-BFF) is ``{answer}: {question}``,
with the same six words. A model that reads from left to right has to answer behind the question, so
the answer moved there, after words like those of SST-2. Expression stands for abbreviations.

Without the template: ``{question} Expression|...``.

Data: ``train_5500.label`` and ``TREC_10.label`` as published, or the same as ``train.txt`` and
``test.txt``: lines ``COARSE:fine question``. There is no validation split: ``validation`` is the
test file with its 500 questions. Labels are numbered as on the hub.
"""

from pathlib import Path

from qzo.data.records import READERS, Record, read_records, read_text
from qzo.data.tasks.files import Example, Source, label_column, text_column
from qzo.data.tasks.task import Kind, Loss, Metric, choice_score
from qzo.errors import DataError

_WORDS = {
    "abbr": "Expression",
    "enty": "Entity",
    "desc": "Description",
    "hum": "Human",
    "loc": "Location",
    "num": "Number",
}


class TREC:
    """Question types.

    Args:
        place: A folder with the official files, a hub id, or None for the one on the hub.
        is_prompted: Whether prompts have the words of the template.
    """

    name = "trec"
    kind: Kind = "classification"
    metric: Metric = "accuracy"
    loss: Loss = "classification"

    def __init__(self, place: str | None = None, *, is_prompted: bool = True) -> None:
        self.is_prompted = is_prompted
        files = {
            "train": ["train.txt", "train_5500.label"],
            "validation": ["test.txt", "TREC_10.label"],
        }
        hub_splits = {"validation": "test"}
        self.source = Source(place, "CogComp/trec", None, _parse, files, _read, hub_splits)

    def examples(self, split: str) -> list[Example]:
        """Read a split."""
        return self.source.examples(split)

    def prompt(self, example: Example) -> str:
        """Return the question and the beginning of a remark about it."""
        question: str = example["text"].strip()
        return f"{question} It was about" if self.is_prompted else question

    def candidates(self, example: Example) -> tuple[str, ...]:
        """Return the six words, in the order of the hub's labels."""
        del example
        return tuple(f" {word}" for word in _WORDS.values())

    def label(self, example: Example) -> int:
        """Return 0 for an abbreviation, as on the hub."""
        return int(example["label"])

    def score(self, example: Example, output: int | str) -> float:
        """Return 1 if the word is right."""
        return choice_score(self.label(example), output)


def _read(path: Path) -> list[Record]:
    if path.suffix.lower() in READERS:
        return read_records(path)
    # The published files hold a byte that is not UTF-8.
    lines = read_text(path, fallback="latin-1").split("\n")
    records = [_record(path, n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not records:
        raise DataError(f"{path}: expected at least one row, got none; is this the right file?")
    return records


def _record(path: Path, number: int, line: str) -> Record:
    label, _, question = line.strip().partition(" ")
    coarse, colon, _ = label.partition(":")
    if not (coarse and colon and question):
        raise DataError(
            f"{path}: expected lines COARSE:fine question, got {line[:40]!r} in line {number}; "
            "is this the right file?"
        )
    return {"coarse_label": coarse, "text": question}


def _parse(record: Record) -> Example:
    spellings = [[word, str(label)] for label, word in enumerate(_WORDS)]
    return {
        "text": text_column(record, "text"),
        "label": label_column(
            record, *spellings, name="label" if "label" in record else "coarse_label"
        ),
    }
