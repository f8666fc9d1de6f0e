"""Whether a model streams: the memory that there is, against what a plan says."""

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch

from qzo.checkpoint.checkpoint import Checkpoint
from qzo.errors import ConfigError
from qzo.model.streaming.blocks import Budget
from qzo.model.streaming.free_memory import available_bytes
from qzo.plan.planner import Plan

_SMALL = 0.5  # of the memory: a checkpoint that is smaller is not planned before it is loaded


class Planned(NamedTuple):
    """What a model and its work need.

    Attributes:
        streaming: Bytes that need not be there all the time.
        other: All other bytes.
        generated_tokens: See ``Budget``.
    """

    streaming: int
    other: int
    generated_tokens: int = 0


def planned_of(plan: Plan, names: Collection[str] = ()) -> Planned:
    """Return what a plan says.

    Args:
        plan: The plan.
        names: Parts that are not there.
    """
    parts = [part for part in plan.parts if part.name not in names]
    streaming = sum(part.bytes for part in parts if part.streams)
    rows = plan.generation_batch_size or 0
    tokens = rows * (plan.workload.seq_len + plan.workload.max_new_tokens)
    return Planned(streaming, sum(part.bytes for part in parts) - streaming, tokens)


def memory_budget(
    limit: int | None,
    checkpoint: Checkpoint,
    device: torch.device,
    planned: Callable[[int], Planned],
    *,
    lower: str,
) -> Budget | None:
    """Return the memory for a model where it is limited, or where the plan says that it is short.

    Args:
        limit: Bytes that the user allows; None: what the device has.
        checkpoint: Of the model.
        device: Where it computes.
        planned: Says what is needed of so much memory.
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
        needed = planned(limit)
    except ConfigError:
        if is_given:
            raise
        return None
    if not is_given and needed.streaming + needed.other <= limit:
        return None
    return Budget(limit, needed.other, is_given, lower, needed.generated_tokens)
