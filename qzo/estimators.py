"""Estimators ask for losses at probes and tell directional derivatives. Floats only.

Two-sided SPSA: ``d = (L(v + epsilon z) - L(v - epsilon z)) / (2 epsilon)``, clipped to ``[-C, C]``.
On quantization scales it is the Q-SPSA of the QZO paper, and the clip its directional derivative
clipping (DDC). The clip is set as the largest ``|L+ - L-|`` in nats, which keeps its meaning when
epsilon or the coordinates change: ``C = max_loss_difference / (2 epsilon)``.

Source: QZO, arXiv 2505.13430, eq. 4 (Q-SPSA), eq. 6 (DDC), algorithm 1; SPSA: Spall, IEEE TAC 1992.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from qzo.errors import ConfigError
from qzo.probes import DirectionalDerivative, Probe, direction_seed


@runtime_checkable
class Estimator(Protocol):
    """The seam: ``ask(step) -> probes``, ``tell(probes, losses) -> directional derivatives``."""

    def ask(self, step: int) -> list[Probe]:
        """Return where the loss of this step is to be evaluated."""
        ...

    def tell(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[DirectionalDerivative]:
        """Turn one loss per probe into one derivative per direction; NaN where one is missing."""
        ...


class SPSA:
    """Two-sided SPSA along directions that the whole batch shares.

    Args:
        epsilon: Probe radius, in units of the trained vector.
        seed: Seed of the run.
        num_directions: Directions per step; their estimates are averaged.
        max_loss_difference: Clip of ``|L+ - L-|`` in nats; None for no clip.

    Raises:
        ConfigError: An argument is not positive.
    """

    def __init__(
        self,
        epsilon: float,
        seed: int,
        *,
        num_directions: int = 1,
        max_loss_difference: float | None = None,
    ) -> None:
        check_positive("zo.epsilon", epsilon)
        check_positive("zo.num_directions", num_directions)
        if max_loss_difference is not None:
            check_positive("zo.max_loss_difference", max_loss_difference)
        self.epsilon = epsilon
        self.seed = seed
        self.num_directions = num_directions
        self.max_loss_difference = max_loss_difference

    def ask(self, step: int) -> list[Probe]:
        """Return ``+epsilon`` for every direction, then ``-epsilon`` for every direction."""
        seeds = [direction_seed(self.seed, step, i) for i in range(self.num_directions)]
        return [Probe(seed, sign * self.epsilon) for sign in (1, -1) for seed in seeds]

    def tell(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[DirectionalDerivative]:
        """Return the clipped derivative of every direction; NaN where a loss is not finite.

        None is left out: the journal knows a direction by its place.
        """
        half = len(probes) // 2
        derivatives = []
        for probe, plus, minus in zip(probes[:half], losses[:half], losses[half:], strict=True):
            raw = (plus - minus) / (2 * self.epsilon)
            if not math.isfinite(raw):
                raw = math.nan  # not infinity, which the clip would turn into a number
            value = self.clip(raw)
            is_clipped = abs(value) < abs(raw)
            derivatives.append(DirectionalDerivative(probe.seed, value, raw, is_clipped))
        return derivatives

    def clip(self, derivative: float) -> float:
        """Clip a directional derivative (DDC, eq. 6); NaN stays NaN."""
        if self.max_loss_difference is None or math.isnan(derivative):
            return derivative
        bound = self.max_loss_difference / (2 * self.epsilon)  # C of the paper
        return min(max(derivative, -bound), bound)


class PerExampleSPSA(SPSA):
    """Two-sided SPSA with a direction of its own for every example of the batch.

    The two forwards of a batch give as many derivatives as it has examples; in row coordinates
    that costs nothing more, since a perturbation is a vector on a layer's output.

    Normalised, the derivatives of a step are divided by their root mean square, so that the
    learning rate alone sets the length of a step: ``d_i <- d_i / sqrt(mean_j d_j^2)``.

    Args:
        epsilon: Probe radius, in units of the trained vector.
        seed: Seed of the run.
        num_directions: Examples of a step.
        max_loss_difference: Clip of ``|L+ - L-|`` in nats; None for no clip.
        is_normalized: Whether to normalise.

    Source: GRZO, arXiv 2606.02857, which normalises by the standard deviation.
    """

    def __init__(
        self,
        epsilon: float,
        seed: int,
        *,
        num_directions: int,
        max_loss_difference: float | None = None,
        is_normalized: bool = False,
    ) -> None:
        super().__init__(
            epsilon,
            seed,
            num_directions=num_directions,
            max_loss_difference=max_loss_difference,
        )
        self.is_normalized = is_normalized

    def tell(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[DirectionalDerivative]:
        """Return the derivative of every example, clipped and normalised."""
        derivatives = super().tell(probes, losses)
        squares = [d.value**2 for d in derivatives if math.isfinite(d.value)]
        if not self.is_normalized or not any(squares):
            return derivatives
        size = math.sqrt(math.fsum(squares) / len(squares))
        return [replace(d, value=d.value / size) for d in derivatives]

    def ask(self, step: int) -> list[Probe]:
        """Return one probe at ``+epsilon`` per example, then one at ``-epsilon`` per example."""
        shared = super().ask(step)
        half = len(shared) // 2
        return [
            Probe(probe.seed, probe.offset, examples=(i % half, i % half + 1))
            for i, probe in enumerate(shared)
        ]


class ForwardGradient:
    """Exact slopes along directions that the whole batch shares; no radius, no clip.

    Args:
        seed: Seed of the run.
        num_directions: Directions per step; their estimates are averaged.

    Source: Baydin et al., "Gradients without backpropagation", arXiv 2202.08587, algorithm 1.
    """

    def __init__(self, seed: int, *, num_directions: int = 1) -> None:
        check_positive("zo.num_directions", num_directions)
        self.seed = seed
        self.num_directions = num_directions

    def ask(self, step: int) -> list[Probe]:
        """Return a tangent at the master for every direction."""
        seeds = [direction_seed(self.seed, step, i) for i in range(self.num_directions)]
        return [Probe(seed, 0.0, is_tangent=True) for seed in seeds]

    def tell(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[DirectionalDerivative]:
        """Return the slopes; NaN where one is not finite."""
        slopes = [slope if math.isfinite(slope) else math.nan for slope in losses]
        return [
            DirectionalDerivative(probe.seed, slope, slope)
            for probe, slope in zip(probes, slopes, strict=True)
        ]


def check_positive(key: str, value: float) -> None:
    """Refuse a number that is not finite and above 0.

    Raises:
        ConfigError: The value is not a positive number.
    """
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{key}: expected a number above 0, got {value}")
