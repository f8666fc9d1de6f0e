"""Is what was exported what was trained: the files are loaded again and their loss is compared.

The trained loss was measured in the dtype of the run, with the scales in float32. Like is compared
with like: the files compute in the same dtype, and two numbers may differ by what rounding does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.errors import CheckpointError
from qzo.model.load import quant_linears
from qzo.model.placement import Placement
from qzo.objective.evaluate import evaluate
from qzo.plan.batch_shape import BatchShape, evaluation_shape
from qzo.run.folder import Reference
from qzo.run.inference import load_for_inference

# In nats, by the coarser one of two dtypes. float32: the scales are rounded to fp16, which moves
# each weight by at most 2**-11 of its size and a loss by far less than this. Half precision: logits
# up to 30 apart are rounded to 2**-11 (float16) or 2**-8 (bfloat16) of their size besides. A wrong
# scale moves the loss by far more.
_TOLERANCES = {
    torch.float32: 0.02,
    torch.float16: 0.02 + 30 * 2**-11,
    torch.bfloat16: 0.02 + 30 * 2**-8,
}
_LOWER = "--dtype to float16 or bfloat16"
_ONE_TOKEN = BatchShape(rows=1, tokens=1)


class OtherLossError(CheckpointError):
    """The files have another loss than the trained model."""


@dataclass(frozen=True)
class Losses:
    """What a check compared.

    Attributes:
        trained: The trained model's loss on the reference examples.
        exported: That of the files.
    """

    trained: float
    exported: float


def check_export(
    folder: Path,
    reference: Reference | None,
    placement: Placement,
    progress: Callable[..., None] | None = None,
) -> Losses | None:
    """Load what was exported and compare its loss with the trained model's.

    Args:
        folder: The checkpoint.
        reference: Of the run; without one, the files are loaded and no more.
        placement: Device and memory limit, and the dtype if it is not that of the run. Within a
            limit, the examples are evaluated one at a time.
        progress: Told how many layers are loaded and examples evaluated, of how many, and which.

    Returns:
        The losses, None without a reference.

    Raises:
        OtherLossError: They differ by more than rounding can explain.
    """
    dtype = placement.dtype or (reference.dtype if reference else None)
    place = Placement(placement.device, dtype, placement.memory_limit)
    batch_size = 1 if reference is None or place.memory_limit else len(reference.data.examples)
    shape = evaluation_shape(reference.data, batch_size, 0) if reference else _ONE_TOKEN
    loading, checking = (_named(progress, name) for name in ("loading", "checking"))
    exported = open_checkpoint(folder)
    model = load_for_inference(exported, place, shape, lower=_LOWER, progress=loading)
    if reference is None:
        return None
    live = quant_linears(model)[0].live
    loss = evaluate(model, live, reference.data, batch_size=batch_size, progress=checking).loss
    tolerance = max(_TOLERANCES[reference.dtype], _TOLERANCES[model.dtype])
    if not abs(loss - reference.loss) <= tolerance:  # also true for NaN
        name = str(model.dtype).removeprefix("torch.")
        raise OtherLossError(
            f"export: expected the trained model's loss {reference.loss:.4f} up to {tolerance:.2f} "
            f"from the exported files, got {loss:.4f} in {name} on {place.device}"
        )
    return Losses(reference.loss, loss)


def _named(progress: Callable[..., None] | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(done, total, name)
