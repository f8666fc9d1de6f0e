"""The tokens that a model knows: those that have a row of its embeddings.

A tokenizer may have more, such as tokens of a chat template that were added to it alone.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any

from transformers import PreTrainedModel

from qzo.data.examples import ExampleSet
from qzo.errors import DataError


def num_embeddings(model: PreTrainedModel) -> int:
    """Return how many tokens a model knows."""
    return int(model.config.get_text_config().vocab_size)


def check_examples(data: ExampleSet, model: PreTrainedModel, tokenizer: Any = None) -> None:
    """Refuse examples with a token that the model does not know.

    Args:
        data: The examples.
        model: The model.
        tokenizer: Knows the names of tokens.
    """
    known = num_embeddings(model)
    for place, example in enumerate(data.examples):
        where = f"row {data.numbers[place]}" if data.numbers else f"example {place + 1}"
        targets = [candidate.targets for candidate in example.candidates]
        check_tokens(chain(*example.rows, *targets), known, tokenizer, where)


def check_tokens(tokens: Iterable[int], known: int, tokenizer: Any, where: str) -> None:
    """Refuse tokens that a model does not know.

    Args:
        tokens: Ids of tokens.
        known: How many tokens the model knows.
        tokenizer: Knows their names; None if nothing does.
        where: What the tokens are from.

    Raises:
        DataError: There is such a token.
    """
    unknown = next((token for token in tokens if token >= known), None)
    if unknown is None:
        return
    name = "" if tokenizer is None else f" {tokenizer.convert_ids_to_tokens(unknown)!r}"
    raise DataError(
        f"{where}: token{name}: expected an id below {known}, as many rows as the model's "
        f"embeddings have, got {unknown}; take the tokenizer and chat template that the model was "
        "trained with, or resize the embeddings of the float model and quantize it again"
    )
