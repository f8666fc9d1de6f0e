"""SQuAD 1.1: write the answer to a question about a paragraph. F1.

    Title: {title}
    Context: {context}
    Question: {question}
    Answer: {answer}

Without the template the four lines have no names before them, and the answer follows the line end
after the question. That form is our own.

The answer ends with a line end, so only the first line of a generated text counts. MeZO generates
up to 50 tokens, greedily.

Data: ``train-v1.1.json`` and ``dev-v1.1.json`` as published, or rows as on the hub. Template: MeZO
(arXiv 2305.17333). Score: Rajpurkar et al. 2016 (arXiv 1606.05250), section 6.1.
"""

import re
import string
from collections import Counter
from pathlib import Path

from qzo.data.records import Record, read_json, read_records
from qzo.data.tasks.files import Example, Source, text_column
from qzo.data.tasks.task import Kind, Loss, Metric
from qzo.errors import DataError


class SQuAD:
    """Reading comprehension.

    Args:
        place: A folder with the official files, a hub id, or None for the one on the hub.
        is_prompted: Whether prompts have the words of the template.
    """

    name = "squad"
    kind: Kind = "generation"
    metric: Metric = "f1"
    loss: Loss = "language_modeling"

    def __init__(self, place: str | None = None, *, is_prompted: bool = True) -> None:
        self.is_prompted = is_prompted
        files = {"train": ["train-v1.1.json"], "validation": ["dev-v1.1.json"]}
        self.source = Source(place, "rajpurkar/squad", None, _parse, files, _read)

    def examples(self, split: str) -> list[Example]:
        """Read a split."""
        return self.source.examples(split)

    def prompt(self, example: Example) -> str:
        """Return title, paragraph and question."""
        title, context = example["title"], example["context"]
        question = example["question"].strip()
        if not self.is_prompted:
            return f"{title}\n{context}\n{question}\n"
        return f"Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:"

    def candidates(self, example: Example) -> tuple[str, ...]:
        """Return the gold answers."""
        space = " " if self.is_prompted else ""
        return tuple(f"{space}{answer}\n" for answer in example["answers"])

    def label(self, example: Example) -> int:
        """Return 0: the first gold answer is the one to learn."""
        del example
        return 0

    def score(self, example: Example, output: int | str) -> float:
        """Return the F1 of the first line, with the gold answer that it fits best."""
        line = str(output).partition("\n")[0]
        return max(token_f1(line, gold) for gold in example["answers"])


def token_f1(answer: str, gold: str) -> float:
    """Return the harmonic mean of precision and recall of the words, 0 to 1.

    Words are compared in lower case, without punctuation and articles.
    """
    answer_words, gold_words = _words(answer), _words(gold)
    num_shared = (Counter(answer_words) & Counter(gold_words)).total()
    if num_shared == 0:
        return 0.0
    return 2 * num_shared / (len(answer_words) + len(gold_words))


def _words(text: str) -> list[str]:
    lower = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", lower).split()


def _read(path: Path) -> list[Record]:
    content = read_json(path) if path.suffix.lower() == ".json" else None
    if not isinstance(content, dict):
        return read_records(path)
    try:
        return [
            {"title": page["title"], "context": paragraph["context"], **question}
            for page in content["data"]
            for paragraph in page["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected the nested lists data, paragraphs and qas of SQuAD 1.1, "
            f"got {error!r}; is this the right file?"
        ) from error


def _parse(record: Record) -> Example:
    return {
        "title": text_column(record, "title"),
        "context": text_column(record, "context"),
        "question": text_column(record, "question"),
        "answers": _answers(record),
    }


def _answers(record: Record) -> tuple[str, ...]:
    answers = record.get("answers")
    if isinstance(answers, dict):  # on the hub: {"text": [...], "answer_start": [...]}
        texts = answers.get("text", [])
    else:  # in the files: [{"text": ..., "answer_start": ...}, ...]; in an example: plain texts
        listed = answers if isinstance(answers, list) else []
        texts = [answer.get("text") if isinstance(answer, dict) else answer for answer in listed]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"answers: expected at least one answer with its text, got {answers!r}; "
            "use SQuAD 1.1, not 2.0"
        )
    return tuple(texts)
