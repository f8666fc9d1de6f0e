"""RTE: does the hypothesis follow from the premise? Accuracy.

    {premise}
    Does this mean that "{hypothesis}" is true? Yes or No?
    Yes|No

Without the template the second line is ``"{hypothesis}"``, as in ZO-LLM (arXiv 2402.11592).

Data: SuperGLUE's ``train.jsonl`` and ``val.jsonl`` (premise, hypothesis, label), or GLUE's
``train.tsv`` and ``dev.tsv`` (sentence1, sentence2, label). Template: MeZO (arXiv 2305.17333).
"""

from qzo.data.records import Record
from qzo.data.tasks.files import (
    GLUE_OR_SUPERGLUE,
    Example,
    Source,
    label_column,
    read_rows,
    text_column,
)
from qzo.data.tasks.task import Kind, Loss, Metric, choice_score


class RTE:
    """Textual entailment.

    Args:
        place: A folder with the official files, a hub id, or None for the one on the hub.
        is_prompted: Whether prompts have the words of the template.
    """

    name = "rte"
    kind: Kind = "classification"
    metric: Metric = "accuracy"
    loss: Loss = "classification"

    def __init__(self, place: str | None = None, *, is_prompted: bool = True) -> None:
        self.is_prompted = is_prompted
        self.source = Source(place, "aps/super_glue", "rte", _parse, GLUE_OR_SUPERGLUE, read_rows)

    def examples(self, split: str) -> list[Example]:
        """Read a split."""
        return self.source.examples(split)

    def prompt(self, example: Example) -> str:
        """Return the premise and a question about the hypothesis."""
        hypothesis = f'"{example["hypothesis"]}"'
        if self.is_prompted:
            hypothesis = f"Does this mean that {hypothesis} is true? Yes or No?"
        return f"{example['premise']}\n{hypothesis}\n"

    def candidates(self, example: Example) -> tuple[str, ...]:
        """Return the two answers, entailment first."""
        del example
        return ("Yes", "No")

    def label(self, example: Example) -> int:
        """Return 0 for entailment."""
        return int(example["label"])

    def score(self, example: Example, output: int | str) -> float:
        """Return 1 if the answer is right."""
        return choice_score(self.label(example), output)


def _parse(record: Record) -> Example:
    return {
        "premise": text_column(record, "premise", "sentence1"),
        "hypothesis": text_column(record, "hypothesis", "sentence2"),
        "label": label_column(record, ["entailment", "0"], ["not_entailment", "1"]),
    }
