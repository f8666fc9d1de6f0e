"""Where the loss is evaluated, and what the losses say.

A probe is the trained vector moved by ``offset`` along the direction of a seed. It covers the
whole batch, or the examples of it that share a direction.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Probe:
    """One place where the loss is evaluated.

    Attributes:
        seed: Seed of the direction; see ``directions.philox``.
        offset: How far along it, in units of the trained vector (``+epsilon`` or ``-epsilon``).
        examples: The examples that it covers, from the first to before the second, counted over all
            micro-batches; None for all.
        basis: Seed of what the directions of several steps share (a mask, a subspace); 0 for none.
        is_tangent: What is asked for is the slope of the loss along the direction, not the loss.
    """

    seed: int
    offset: float
    examples: tuple[int, int] | None = None
    basis: int = 0
    is_tangent: bool = False


@dataclass(frozen=True)
class DirectionalDerivative:
    """How fast the loss changes along the direction of a seed, in nats per unit.

    Attributes:
        seed: Seed of the direction.
        value: What moves the scales: after clipping and normalising; NaN if the losses were not
            finite.
        raw: As measured.
        is_clipped: The clip changed it.
        curvature: Second derivative along the direction, in nats per squared unit, where the
            estimator measures it.
        basis: As in the probe.
    """

    seed: int
    value: float
    raw: float
    is_clipped: bool = False
    curvature: float | None = None
    basis: int = 0


# Of one forward: the probes of a micro-batch that have more take several, one after another. A
# number of its own, not what memory allows, since sums of other stacks round in other ways.
STACKED_TOKENS = 2**14


def stacked_probes(num_probes: int, batch_size: int, seq_len: int) -> int:
    """Return how many probes of a batch, all rows of one length, go into one forward."""
    return min(num_probes, max(STACKED_TOKENS // max(batch_size * seq_len, 1), 1))


def forwards_of(probes: Sequence[Probe], num_examples: int, backward: float = 0.0) -> float:
    """Return what a step costs, in forwards of its whole batch.

    A probe of the whole batch counts 1, one of some examples their share of the batch; a tangent
    counts as much again. An exact gradient counts 1 for its forward, and its backward, which makes
    two products for each product of the forward, 2 for the part of the model that it goes through.

    Args:
        probes: Of the step.
        num_examples: Of the batch.
        backward: The part of the model, from 0 to 1, that a backward goes through; 0 for none.
    """
    covered = sum(
        (1 + probe.is_tangent)
        * (probe.examples[1] - probe.examples[0] if probe.examples else num_examples)
        for probe in probes
    )
    return covered / num_examples + (1 + 2 * backward if backward else 0.0)


def direction_seed(run_seed: int, step: int, number: int) -> int:
    """Return the 64-bit seed of direction ``number`` of a step.

    A bijection of ``(step, number)`` for each run seed, so seeds never repeat within a run.

    Source: the SplitMix64 finaliser (Steele, Lea, Flood, OOPSLA 2014).
    """
    mask = 2**64 - 1
    mixed = ((step << 24) + number + run_seed * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return mixed ^ (mixed >> 31)


# Numbers of the directions of a step are below both. Numbers from the first on are those of a
# direction per layer, before the first step.
_LAYER_NUMBER = 2**23


def layer_seed(run_seed: int, layer: int) -> int:
    """Return the seed of a direction that moves one layer alone, before the first step."""
    return direction_seed(run_seed, 0, _LAYER_NUMBER + layer)


# The seed of a basis takes the last number of its first step.
BASIS_NUMBER = 2**24 - 1


def basis_seed(run_seed: int, step: int, basis_steps: int) -> int:
    """Return the seed of what the directions of ``basis_steps`` consecutive steps share."""
    return direction_seed(run_seed, step // basis_steps, BASIS_NUMBER)


# No run has as many steps: the seeds of its directions are others.
_START_STEP = 2**39


def start_seed(run_seed: int, number: int) -> int:
    """Return the seed of what section ``number`` of the trained vector starts from."""
    return direction_seed(run_seed, _START_STEP, number)
