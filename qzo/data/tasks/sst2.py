"""SST-2: is a film review snippet positive? Accuracy.

    {sentence} It was terrible|great

Without the template: ``{sentence} terrible|great``, as in ZO-LLM (arXiv 2402.11592).

Data: GLUE's ``train.tsv`` and ``dev.tsv`` (sentence, label). Template: MeZO (arXiv 2305.17333).
"""

from qzo.data.records import Record
from qzo.data.tasks.files import Example, Source, label_column, read_rows, text_column
from qzo.data.tasks.task import Kind, Loss, Metric, choice_score


class SST2:
    """Sentiment of a sentence.

    Args:
        place: A folder with the official files, a hub id, or None for the one on the hub.
        is_prompted: Whether prompts have the words of the template.
    """

    name = "sst2"
    kind: Kind = "classification"
    metric: Metric = "accuracy"
    loss: Loss = "classification"

    def __init__(self, place: str | None = None, *, is_prompted: bool = True) -> None:
        self.is_prompted = is_prompted
        files = {"train": ["train.tsv"], "validation": ["dev.tsv"], "test": ["test.tsv"]}
        self.source = Source(place, "nyu-mll/glue", "sst2", _parse, files, read_rows)

    def examples(self, split: str) -> list[Example]:
        """Read a split."""
        return self.source.examples(split)

    def prompt(self, example: Example) -> str:
        """Return the sentence and the beginning of a verdict."""
        sentence: str = example["sentence"].strip()
        return f"{sentence} It was" if self.is_prompted else sentence

    def candidates(self, example: Example) -> tuple[str, ...]:
        """Return the two verdicts, negative first."""
        del example
        return (" terrible", " great")

    def label(self, example: Example) -> int:
        """Return 1 for a positive sentence."""
        return int(example["label"])

    def score(self, example: Example, output: int | str) -> float:
        """Return 1 if the verdict is right."""
        return choice_score(self.label(example), output)


def _parse(record: Record) -> Example:
    return {
        "sentence": text_column(record, "sentence"),
        "label": label_column(record, ["0"], ["1"]),
    }
