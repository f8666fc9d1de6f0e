"""Whether a model streams: the memory that there is, against what a plan says."""

from collections.abc import Callable

import torch

from qzo.checkpoint import Checkpoint
from qzo.errors import ConfigError
from qzo.free_memory import available_bytes
from qzo.streaming import Budget

_SMALL = 0.5  # of the memory: a checkpoint that is smaller is not planned before it is loaded


def memory_budget(
    limit: int | None,
    checkpoint: Checkpoint,
    device: torch.device,
    planned: Callable[[], tuple[int, int]],
    *,
    lower: str,
) -> Budget | None:
    """Return the memory for a model where it is limited, or where the plan says that it is short.

    Args:
        limit: Bytes that the user allows; None: what the device has.
        checkpoint: Of the model.
        device: Where it computes.
        planned: Gives the bytes that can stream, and those of everything else.
        lower: What to lower where a limit is too small: keys or flags.

    Raises:
        ConfigError: There is a limit, and the architecture cannot be planned.
    """
    is_given = limit is not None
    if limit is None:
        limit = available_bytes(device)
        if limit is None or checkpoint.tensors.num_bytes < _SMALL * limit:
            return None
    try:
        streaming, other = planned()
    except ConfigError:
        if is_given:
            raise
        return None
    if not is_given and streaming + other <= limit:
        return None
    return Budget(limit, other, is_given, lower)
