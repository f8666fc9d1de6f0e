"""What a task is: prompts, possible answers and a score, in the words of MeZO (arXiv 2305.17333).

==============  =========================================  =====================================
kind            the model answers by                       ``output`` that ``score`` takes
==============  =========================================  =====================================
classification  the likeliest candidate, a fixed word      index of the chosen candidate
choice          the likeliest candidate, a sentence        index of the chosen candidate
generation      writing, greedily, up to a line end        the text
==============  =========================================  =====================================

Every task has a form without the words of its template, for MeZO's ablation: there RoBERTa lost 38
points of accuracy on SST-2 and 47 on TREC without a prompt. What the data set itself gives and the
possible answers stay; line ends between two texts stay as well.

"Likeliest" is by the mean log-probability of the candidate's tokens.

The loss of an example is one of two. ``classification``: the cross-entropy of the softmax over the
candidates, with the mean log-probability of a candidate's tokens as its logit.
``language_modeling``: minus the log-probability of the right answer's tokens.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from qzo.data.tasks.files import Example, Source
from qzo.data.tokenize import EncodedExample, Tokenizer, encode_candidates

Kind: TypeAlias = Literal["classification", "choice", "generation"]
Metric: TypeAlias = Literal["accuracy", "f1"]
Loss: TypeAlias = Literal["classification", "language_modeling"]


@runtime_checkable
class Task(Protocol):
    """A data set with its prompts and its score."""

    name: str
    kind: Kind
    metric: Metric
    loss: Loss
    is_prompted: bool
    source: Source

    def examples(self, split: str) -> list[Example]:
        """Read a split, ``train`` or ``validation``, in the order of the data set."""

    def prompt(self, example: Example) -> str:
        """Return the text before the answer."""

    def candidates(self, example: Example) -> tuple[str, ...]:
        """Return the possible answers, so that ``prompt + answer`` is the full text.

        For generation these are the gold answers, any of which is right.
        """

    def label(self, example: Example) -> int:
        """Return the index of the right candidate; for generation, of the one to learn."""

    def score(self, example: Example, output: int | str) -> float:
        """Return 0 for wrong to 1 for right; see the table above for ``output``."""


def encode_task_example(
    task: Task, example: Example, *, tokenizer: Tokenizer, max_length: int
) -> EncodedExample:
    """Encode an example: all candidates to choose from, or the one gold answer to write.

    Args:
        task: The task that the example is from.
        example: One of ``task.examples(split)``.
        tokenizer: A transformers tokenizer.
        max_length: The largest number of tokens of a row.
    """
    candidates: Sequence[str] = task.candidates(example)
    label = task.label(example)
    if task.kind == "generation":
        candidates, label = [candidates[label]], 0
    return encode_candidates(
        tokenizer,
        task.prompt(example),
        candidates=candidates,
        label=label,
        max_length=max_length,
    )


def choice_score(label: int, output: int | str) -> float:
    """Return 1 if the chosen index is the right one, 0 otherwise."""
    return float(output == label)
