"""Load a model to compute with, not to train: for evaluation, generation and checks."""

from functools import partial

from transformers import PreTrainedModel

from qzo.checkpoint.checkpoint import Checkpoint
from qzo.model.load import Progress, load_checkpoint
from qzo.model.placement import DTYPES, Placement
from qzo.plan.batch_shape import BatchShape
from qzo.plan.budget import Planned, memory_budget, planned_of
from qzo.plan.planner import plan
from qzo.run.output.adapter import Adapter, apply_adapter

# Parts of a plan that are there in training alone.
_OF_TRAINING = ("master", "LoRA or prefix", "optimizer", "directions")


def load_for_inference(
    checkpoint: Checkpoint,
    placement: Placement,
    shape: BatchShape,
    *,
    adapter: Adapter | None = None,
    lower: str = "--batch-size or --max-length",
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load a checkpoint, with what an adapter holds if there is one.

    The decoder blocks stream where the limit, or the memory that is free, does not hold them.

    Args:
        checkpoint: From ``open_checkpoint``.
        placement: Device, dtype and memory limit.
        shape: The largest forward that the model has to do.
        adapter: From ``open_adapter``.
        lower: What to lower where the limit is too small.
        progress: See ``load_checkpoint``.
    """
    budget = memory_budget(
        placement.memory_limit,
        checkpoint,
        placement.device,
        partial(_planned_bytes, checkpoint, placement, shape, adapter),
        lower=lower,
    )
    model = load_checkpoint(
        checkpoint, placement.dtype, placement.device, budget=budget, progress=progress
    )
    if adapter is not None:
        apply_adapter(model, checkpoint, adapter)
    return model


def _planned_bytes(
    checkpoint: Checkpoint,
    placement: Placement,
    shape: BatchShape,
    adapter: Adapter | None,
    limit: int,
) -> Planned:
    names = {dtype: name for name, dtype in DTYPES.items()}
    planned = plan(
        checkpoint.folder,
        batch_size=shape.rows,
        seq_len=shape.tokens,
        answer_len=shape.scored,
        num_probes=1,
        dtype=names[placement.dtype] if placement.dtype else None,
        device=placement.device.type,
        max_new_tokens=shape.generated,
        memory_bytes=limit,
    )
    needed = planned_of(planned, _OF_TRAINING)
    tuned = 0 if adapter is None else adapter.tensors.num_bytes
    return needed._replace(other=needed.other + tuned)
