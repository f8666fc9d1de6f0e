"""E2E: write a sentence about a restaurant from its attributes. F1.

    Data: name[Blue Spice], eatType[coffee shop], area[city centre]
    Text: A coffee shop in the city centre area called Blue Spice.

The text is one line, so only the first line of a generated text counts. The template is our own:
MeZO has no such task. Without it: the attributes, a line end, the text.

Attributes stand in several rows with a text each. For training every row is an example; for
evaluation the rows of the same attributes are one, whose score is that of the text that fits best.

Data: ``trainset.csv``, ``devset.csv`` and ``testset_w_refs.csv`` (mr, ref) of Novikova et al. 2017
(arXiv 1706.09254). Score: the F1 of SQuAD over words, not the challenge's own measures.
"""

from qzo.data.records import Record
from qzo.data.tasks.files import Example, Source, read_rows, text_column
from qzo.data.tasks.squad import token_f1
from qzo.data.tasks.task import Kind, Loss, Metric
from qzo.errors import DataError


class E2E:
    """Text from attributes.

    Args:
        place: A folder with the official files, a hub id, or None for the one on the hub.
        is_prompted: Whether prompts have the words of the template.
    """

    name = "e2e"
    kind: Kind = "generation"
    metric: Metric = "f1"
    loss: Loss = "language_modeling"

    def __init__(self, place: str | None = None, *, is_prompted: bool = True) -> None:
        self.is_prompted = is_prompted
        files = {
            "train": ["trainset.csv"],
            "validation": ["devset.csv"],
            "test": ["testset_w_refs.csv"],
        }
        hub_id = "tuetschek/e2e_nlg"
        self.source = Source(place, hub_id, None, _parse, files, read_rows, group=_group)

    def examples(self, split: str) -> list[Example]:
        """Read a split."""
        return self.source.examples(split)

    def prompt(self, example: Example) -> str:
        """Return the attributes."""
        attributes = example["mr"].strip()
        return f"Data: {attributes}\nText:" if self.is_prompted else f"{attributes}\n"

    def candidates(self, example: Example) -> tuple[str, ...]:
        """Return the texts, a line each."""
        space = " " if self.is_prompted else ""
        return tuple(f"{space}{' '.join(text.split())}\n" for text in example["refs"])

    def label(self, example: Example) -> int:
        """Return 0: the first text is the one to learn."""
        del example
        return 0

    def score(self, example: Example, output: int | str) -> float:
        """Return the F1 of the first line, with the text that it fits best."""
        line = str(output).partition("\n")[0]
        return max(token_f1(line, text) for text in example["refs"])


def _parse(record: Record) -> Example:
    refs = record.get("refs")
    if not (isinstance(refs, list | tuple) and refs and all(isinstance(r, str) for r in refs)):
        refs = (text_column(record, "ref", "human_reference"),)
    for text in refs:
        if not text.strip():
            raise DataError(f"ref: expected some text, got {text!r}; fill it or remove the row")
    return {"mr": text_column(record, "mr", "meaning_representation"), "refs": tuple(refs)}


def _group(examples: list[Example]) -> list[Example]:
    """Join the texts of the same attributes, in the order in which these first occur."""
    texts: dict[str, tuple[str, ...]] = {}
    for example in examples:
        texts[example["mr"]] = texts.get(example["mr"], ()) + example["refs"]
    return [{"mr": attributes, "refs": refs} for attributes, refs in texts.items()]
