"""Batches of random tokens.

Every example is one row; its last ``ANSWER_TOKENS`` predictions are scored unless said otherwise,
as those of a short answer behind a prompt are.
"""

from collections.abc import Sequence

import numpy as np

from qzo.data.tokenize import Candidate, EncodedExample
from qzo.errors import ConfigError

ANSWER_TOKENS = 4
MIXED_LENGTHS = (8, 25, 42, 59, 77, 94, 111, 128)
"""Tokens of eight rows from 8 to 128 in even steps; together as many as eight rows of 68."""


def row_lengths(num_tokens: int, max_row_tokens: int) -> tuple[int, ...]:
    """Split a batch into rows of equal length.

    Args:
        num_tokens: Of the batch.
        max_row_tokens: Of a row; a batch of fewer is one row.

    Raises:
        ConfigError: The batch is no whole number of rows, or a row is too short for an answer.
    """
    length = min(num_tokens, max_row_tokens)
    if length < ANSWER_TOKENS or num_tokens % length:
        raise ConfigError(
            f"tokens: expected {ANSWER_TOKENS} or more, in whole rows of {max_row_tokens}, got "
            f"{num_tokens}"
        )
    return (length,) * (num_tokens // length)


def random_examples(
    lengths: Sequence[int], vocab_size: int, seed: int = 0, *, answer_len: int = ANSWER_TOKENS
) -> list[EncodedExample]:
    """Draw one example for every length; its last ``answer_len`` predictions are scored."""
    generator = np.random.Generator(np.random.Philox(key=[seed, len(lengths)]))
    drawn = [generator.integers(vocab_size, size=n + 1).tolist() for n in lengths]
    return [_example(tokens, answer_len) for tokens in drawn]


def _example(tokens: list[int], answer_len: int) -> EncodedExample:
    positions = tuple(range(len(tokens) - 1 - answer_len, len(tokens) - 1))
    targets = tuple(tokens[position + 1] for position in positions)
    return EncodedExample((tuple(tokens[:-1]),), (Candidate(0, positions, targets),), 0)
