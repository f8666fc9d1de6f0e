"""How many tokens of generated answers, and of their prompts, fit into memory at one time.

A token keeps its keys and values in every layer until its answer is done, and the prompts run
through the model together. The number is rounded down to a power of two, so that a little more or
less free memory does not change which answers are generated together, and with that how sums round.
"""

import os
from typing import Any

import torch
from transformers import PreTrainedModel

from qzo.errors import ConfigError
from qzo.model.streaming.free_memory import available_bytes
from qzo.plan.shapes import values_of_token

_SHARE = 0.75  # of the memory; a cache that grows token by token leaves gaps
_HIDDEN_VECTORS = 8  # of a token, alive at one time in a forward: of the hidden size,
_MLP_VECTORS = 4  # and of the size of the feed-forward layers


def tokens_within(num_bytes: float, config: Any, itemsize: int) -> int:
    """Return how many tokens fit into so much memory, a power of two; at least one.

    Args:
        num_bytes: What is left beside the model.
        config: A transformers config.
        itemsize: Bytes of a number in the dtype of the model.
    """
    count = int(max(num_bytes, 0) * _SHARE) // (_values(config) * itemsize)
    return 1 << max(count.bit_length() - 1, 0)


def tokens_at_once(model: PreTrainedModel) -> int | None:
    """Return how many tokens fit beside a model that is loaded; None where nobody knows.

    Where the model has a memory limit, or was found to be too large, its budget says so.
    """
    budget: Any = getattr(model, "qzo_budget", None)
    if budget is not None and budget.generated_tokens:
        return int(budget.generated_tokens)
    available = available_bytes(model.device)
    if available is None:
        return None
    if model.device.type == "cuda":  # what torch holds without using it is free as well
        available += torch.cuda.memory_reserved(model.device)
        available -= torch.cuda.memory_allocated(model.device)
    else:
        available //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        return tokens_within(available, model.config, model.dtype.itemsize)
    except ConfigError:
        return None


def _values(config: Any) -> int:
    text = config.get_text_config()
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    inner = getattr(text, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * hidden
    return values_of_token(config) + _HIDDEN_VECTORS * hidden + _MLP_VECTORS * inner
