"""COPA: which of two sentences is the cause or the effect of the premise? Accuracy.

    {premise without its full stop} so|because {choice, first word in lower case}

Without the template the conjunction is left out, as in ZO-LLM (arXiv 2402.11592). Nothing then
tells a cause from an effect.

The loss is that of the right sentence alone, not a comparison of the two.

Data: SuperGLUE's ``train.jsonl`` and ``val.jsonl`` (premise, choice1, choice2, question, label).
Template: MeZO (arXiv 2305.17333).
"""

from qzo.data.records import Record
from qzo.data.tasks.files import SUPERGLUE, Example, Source, label_column, read_rows, text_column
from qzo.data.tasks.task import Kind, Loss, Metric, choice_score
from qzo.errors import DataError

_CONJUNCTIONS = {"effect": "so", "cause": "because"}


class Copa:
    """Choice of plausible alternatives.

    Args:
        place: A folder with the official files, a hub id, or None for the one on the hub.
        is_prompted: Whether prompts have the words of the template.
    """

    name = "copa"
    kind: Kind = "choice"
    metric: Metric = "accuracy"
    loss: Loss = "language_modeling"

    def __init__(self, place: str | None = None, *, is_prompted: bool = True) -> None:
        self.is_prompted = is_prompted
        self.source = Source(place, "aps/super_glue", "copa", _parse, SUPERGLUE, read_rows)

    def examples(self, split: str) -> list[Example]:
        """Read a split."""
        return self.source.examples(split)

    def prompt(self, example: Example) -> str:
        """Return the premise as the beginning of a sentence."""
        premise: str = example["premise"].rstrip().removesuffix(".")
        return f"{premise} {_CONJUNCTIONS[example['question']]}" if self.is_prompted else premise

    def candidates(self, example: Example) -> tuple[str, ...]:
        """Return the two choices as its end."""
        return (_as_clause(example["choice1"]), _as_clause(example["choice2"]))

    def label(self, example: Example) -> int:
        """Return 0 for the first choice."""
        return int(example["label"])

    def score(self, example: Example, output: int | str) -> float:
        """Return 1 if the choice is right."""
        return choice_score(self.label(example), output)


def _as_clause(sentence: str) -> str:
    first, space, rest = sentence.partition(" ")
    return f" {first if first == 'I' else first.lower()}{space}{rest}"


def _parse(record: Record) -> Example:
    question = text_column(record, "question")
    if question not in _CONJUNCTIONS:
        raise DataError(f"question: expected effect or cause, got {question!r}; correct the file")
    return {
        "premise": text_column(record, "premise"),
        "choice1": text_column(record, "choice1"),
        "choice2": text_column(record, "choice2"),
        "question": question,
        "label": label_column(record, ["0"], ["1"]),
    }
