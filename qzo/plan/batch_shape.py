"""The largest forward that some examples ask for."""

from collections.abc import Sequence
from dataclasses import dataclass

from qzo.data.examples import ExampleSet


@dataclass(frozen=True)
class BatchShape:
    """What one forward is asked to do, at most.

    Attributes:
        rows: Sequences of the batch.
        tokens: Of the longest sequence, without those that are generated.
        scored: Predictions of a sequence that are scored.
        generated: Tokens that are generated behind a prompt; 0 for none.
    """

    rows: int
    tokens: int
    scored: int = 1
    generated: int = 0


def evaluation_shape(data: ExampleSet, batch_size: int, max_new_tokens: int) -> BatchShape:
    """Return the largest forward of an evaluation.

    Args:
        data: What is evaluated.
        batch_size: Examples of a forward.
        max_new_tokens: Of a generated answer, where answers are generated.
    """
    generated = max_new_tokens if data.is_generation else 0
    rows = most_rows(data) * min(batch_size, max(len(data.examples), 1))
    tokens = longest_row([data], default=1)
    return BatchShape(rows, tokens, min(most_scored([data]), tokens), generated)


def most_rows(data: ExampleSet) -> int:
    """Return the most sequences of an example: one for each candidate, unless they share one."""
    return max((len(example.rows) for example in data.examples), default=1)


def longest_row(sets: Sequence[ExampleSet], default: int) -> int:
    """Return the tokens of the longest sequence, or the default where there are no examples."""
    lengths = (len(row) for data in sets for example in data.examples for row in example.rows)
    return max(lengths, default=default)


def most_scored(sets: Sequence[ExampleSet]) -> int:
    """Return the most predictions that are scored of an answer."""
    answers = (c for data in sets for example in data.examples for c in example.candidates)
    return max((len(answer.positions) for answer in answers), default=1)
