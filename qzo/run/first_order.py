"""What a run does about exact gradients: nothing, where all of its steps are zeroth-order.

The gradient of a step is on disk before its line in the journal; see ``gradients``.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qzo.distributed import Ranks
from qzo.errors import ConfigError
from qzo.method.first_order import FirstOrder, first_order_of
from qzo.method.trained_vector import Scales
from qzo.objective.loss import Batch, Objective
from qzo.run.hybrid import PROFILE_FORWARDS, backward_part, first_order_header, write_importance
from qzo.run.journal.gradients import NAME, Gradients
from qzo.run.journal.journal import Journal
from qzo.run.journal.lines import GradientNote
from qzo.run.recipe.keys import Recipe, ZOConfig


class ExactPart:
    """The part of the trained vector that exact gradients move, if there is one.

    Args:
        journal: Of the run. Where it is on disk, its header says what the part is.
        zo: What the recipe says.
        model: The model.
        scales: Its trained vector; set to where training starts.
        objective: Gives the gradients.

    Attributes:
        header: What the journal says of it, or None.
        part: What is moved, or None.
        backward: The part of the model, from 0 to 1, that a backward goes through.
    """

    def __init__(
        self,
        journal: Journal,
        zo: ZOConfig,
        model: PreTrainedModel,
        scales: Scales,
        objective: Objective,
    ) -> None:
        scales.reset()
        scales.directions.still = ()
        self.header: Mapping[str, Any] | None = (
            journal.header.get("first_order")
            if journal.is_on_disk
            else first_order_header(zo, model, scales, objective)
        )
        self.part: FirstOrder | None = first_order_of({"first_order": self.header}, scales)
        self._objective, self._scales, self._folder = objective, scales, journal.path.parent
        self.backward = 0.0
        if self.part is not None and self.header is not None:
            self._gradients = Gradients(self._folder / NAME, self.part.size)
            self.backward = backward_part(model, self.header["layers"])

    @property
    def moves_everything(self) -> bool:
        """Whether nothing is left for zeroth-order steps."""
        return self.part is not None and self.part.size == len(self._scales)

    @property
    def profile_forwards(self) -> float:
        """What the profile of importance cost, in forwards of a batch."""
        has_profile = self.header is not None and self.header.get("importance") is not None
        return PROFILE_FORWARDS if has_profile else 0.0

    def write_importance(self) -> dict[str, Any] | None:
        """Write what the profile found into the run folder, once; return what was written now."""
        header = self.header
        if header is None or not write_importance(self._folder, header):
            return None
        return {f"first_order_{key}": header[key] for key in ("num_blocks", "importance")}

    def gradient(self, batch: Batch, rate: float) -> tuple[Tensor | None, GradientNote | None]:
        """Return the gradient at the master and what the journal says of it.

        Where loss or gradient are not finite, there are zeros instead, and no loss.

        Args:
            batch: Of the step.
            rate: Learning rate of the part.
        """
        if self.part is None:
            return None, None
        loss, gradient = self._objective.gradient(batch, self.part.layers)
        if not math.isfinite(loss) or not bool(gradient.isfinite().all()):
            return torch.zeros_like(gradient), GradientNote(None, rate)
        return gradient, GradientNote(loss, rate)

    def append(self, step: int, gradient: Tensor | None) -> None:
        """Put the gradient of a step on disk."""
        if gradient is not None:
            self._gradients.append(step, gradient)

    def step(self, gradient: Tensor | None, note: GradientNote | None) -> bool:
        """Move the part; return whether it moved."""
        if self.part is None or gradient is None or note is None or note.loss is None:
            return False
        self.part.step(self._scales, gradient, note.learning_rate)
        return True


def check_exact(model: PreTrainedModel, config: Recipe, ranks: Ranks) -> None:
    """Refuse what exact derivatives cannot go with.

    Raises:
        ConfigError: There is such a thing.
    """
    zo = config.zo
    if zo.has_first_order and ranks.size > 1:
        raise ConfigError(
            f"zo.first_order_blocks: expected one process, got {ranks.size}: exact gradients are "
            "not summed over processes; run without torchrun, or without first-order blocks"
        )
    is_exact = zo.has_first_order or zo.estimator == "forward_gradient"
    if is_exact and getattr(model, "qzo_budget", None) is not None:
        raise ConfigError(
            "model: expected one that fits into memory with exact derivatives, got one that "
            "streams its blocks; choose another zo.estimator and no first-order blocks, or a "
            "smaller model"
        )
