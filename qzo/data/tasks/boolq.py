"""BoolQ: answer a yes/no question about a passage. Accuracy.

    {passage} {Question}?
    Yes|No

The question begins with a capital letter and has one question mark (MeZO's third template).
The template adds nothing else. Without it the question stays as the data set has it, mostly in
lower case and without a mark. That form is our own.

Data: SuperGLUE's ``train.jsonl`` and ``val.jsonl`` (question, passage, label).
Template: MeZO (arXiv 2305.17333).
"""

from qzo.data.records import Record
from qzo.data.tasks.files import SUPERGLUE, Example, Source, label_column, read_rows, text_column
from qzo.data.tasks.task import Kind, Loss, Metric, choice_score


class BoolQ:
    """Yes/no questions.

    Args:
        place: A folder with the official files, a hub id, or None for the one on the hub.
        is_prompted: Whether prompts have the words of the template.
    """

    name = "boolq"
    kind: Kind = "classification"
    metric: Metric = "accuracy"
    loss: Loss = "classification"

    def __init__(self, place: str | None = None, *, is_prompted: bool = True) -> None:
        self.is_prompted = is_prompted
        self.source = Source(place, "aps/super_glue", "boolq", _parse, SUPERGLUE, read_rows)

    def examples(self, split: str) -> list[Example]:
        """Read a split."""
        return self.source.examples(split)

    def prompt(self, example: Example) -> str:
        """Return the passage and the question."""
        question = example["question"]
        if not self.is_prompted:
            return f"{example['passage']} {question}\n"
        question = question[:1].upper() + question[1:].removesuffix("?")
        return f"{example['passage']} {question}?\n"

    def candidates(self, example: Example) -> tuple[str, ...]:
        """Return the two answers, in the order of the labels false and true."""
        del example
        return ("No", "Yes")

    def label(self, example: Example) -> int:
        """Return 1 for true."""
        return int(example["label"])

    def score(self, example: Example, output: int | str) -> float:
        """Return 1 if the answer is right."""
        return choice_score(self.label(example), output)


def _parse(record: Record) -> Example:
    return {
        "passage": text_column(record, "passage"),
        "question": text_column(record, "question"),
        "label": label_column(record, ["false", "0"], ["true", "1"]),
    }
