"""One training step, in its order: ask, measure, tell, note, move.

=============================================  =================================================
``probes = estimator.ask(step)``               where the loss is evaluated
``losses = objective.losses(probes, batch)``   at ``live = master + offset z``
``derivatives = estimator.tell(...)``          directional derivatives, clipped (DDC, eq. 6)
``write(measured)``                            the journal: on disk before anything moves
``optimizer.step(scales, derivatives, rate)``  SGD: ``master -= rate mean_i d_i z_i`` (eq. 5)
=============================================  =================================================

Exact gradients, where a part of the scales has them, are of the same batch at the same point.

Source: QZO, arXiv 2505.13430, algorithm 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from qzo.method.estimators import Estimator
from qzo.method.estimators.conservative import candidates, choose
from qzo.method.optimizers import Optimizer
from qzo.method.probes import DirectionalDerivative, Probe
from qzo.method.trained_vector import Scales
from qzo.objective.loss import Objective
from qzo.run.first_order import ExactPart
from qzo.run.journal.lines import GradientNote
from qzo.run.recipe.keys import Recipe


@dataclass(frozen=True)
class Measured:
    """What a step measured, and what moves the scales.

    Attributes:
        step: Its number, from 0.
        probes: Where the loss was evaluated.
        losses: At the probes, and behind them at the candidates of a conservative step.
        derivatives: What moves the scales; NaN where a loss was not finite.
        learning_rate: Of the step.
        gradient: Of the part with exact gradients.
        note: What the journal says of it.
    """

    step: int
    probes: Sequence[Probe]
    losses: Sequence[float]
    derivatives: Sequence[DirectionalDerivative]
    learning_rate: float
    gradient: Tensor | None = None
    note: GradientNote | None = None


class TrainingSteps:
    """Takes the steps of a run.

    Args:
        config: The recipe.
        objective: Gives batches and losses.
        estimator: Says where to evaluate, and what the losses mean.
        optimizer: Moves the scales.
        scales: The trained vector.
        exact: What exact gradients move.
    """

    def __init__(
        self,
        config: Recipe,
        objective: Objective,
        *,
        estimator: Estimator,
        optimizer: Optimizer,
        scales: Scales,
        exact: ExactPart,
    ) -> None:
        self._config, self._objective, self._scales = config, objective, scales
        self._estimator, self._optimizer, self._exact = estimator, optimizer, exact

    def take(self, step: int, write: Callable[[Measured], None]) -> tuple[Measured, bool]:
        """Take a step.

        Args:
            step: Its number, from 0.
            write: Puts what was measured on disk; called before the scales move.

        Returns:
            What was measured, and whether anything moved.
        """
        measured = self._measure(step)
        write(measured)
        usable = [d for d in measured.derivatives if math.isfinite(d.value)]
        self._optimizer.step(self._scales, usable, measured.learning_rate)
        is_moved = self._exact.step(measured.gradient, measured.note) or bool(usable)
        return measured, is_moved

    def recall(self, step: int, losses: Sequence[float], note: GradientNote | None) -> Measured:
        """Return what a step measured, from the losses in its journal.

        For averages: derivatives are as estimated, before a conservative step chose.
        """
        probes = self._ask(step)  # losses at candidates stand behind those at the probes
        derivatives = self._estimator.tell(probes, losses[: len(probes)]) if probes else []
        rate = self._config.rate_at(step)
        return Measured(step, probes, losses, derivatives, rate, note=note)

    def _measure(self, step: int) -> Measured:
        config = self._config
        batch, rate = self._objective.batch(step), config.rate_at(step)
        self._optimizer.aim(self._scales)
        probes = self._ask(step)
        losses = self._objective.losses(probes, batch)
        derivatives = self._estimator.tell(probes, losses) if probes else []
        gradient, note = self._exact.gradient(batch, config.first_order_rate_at(step))
        if config.zo.optimizer == "conservative" and probes:
            tried = candidates(derivatives[0], rate)
            tried_losses = self._objective.losses(tried, batch) if tried else []
            derivatives = [choose(derivatives[0], tried_losses)]
            losses = [*losses, *tried_losses]
        return Measured(step, probes, losses, derivatives, rate, gradient, note)

    def _ask(self, step: int) -> list[Probe]:
        """Return the probes of a step: none where exact gradients move everything."""
        return [] if self._exact.moves_everything else self._estimator.ask(step)
