"""Conservative steps: of staying, the step and its opposite, the one with the smallest loss.

After the derivative ``d`` along ``z``, the loss of the same batch is measured at ``v``,
``v - learning_rate d z`` and ``v + learning_rate d z``. The derivative that moves the scales is
0, ``d`` or ``-d`` accordingly, so that a replay is plain SGD. (Scales stop at 0 and probes do not:
a step that takes some below 0 ends short of where its loss was measured.)

Source: ZO-LLM, arXiv 2402.11592, ZO-SGD-Cons.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from qzo.method.probes import DirectionalDerivative, Probe

_SIGNS = (0, 1, -1)  # of the derivative; the first of equal losses wins
NUM_TRIED = len(_SIGNS)


def candidates(derivative: DirectionalDerivative, learning_rate: float) -> list[Probe]:
    """Return where the loss is measured; nowhere if there is no step to choose."""
    if not math.isfinite(derivative.value):
        return []
    seed, basis = derivative.seed, derivative.basis
    length = learning_rate * derivative.value
    return [Probe(seed, -sign * length, basis=basis) for sign in _SIGNS]


def choose(derivative: DirectionalDerivative, losses: Sequence[float]) -> DirectionalDerivative:
    """Return what moves the scales, with the derivative as measured in ``raw``.

    Args:
        derivative: As estimated.
        losses: At the candidates; a loss that is not finite is not chosen, and without any finite
            one nothing moves.
    """
    finite = [(loss, i) for i, loss in enumerate(losses) if math.isfinite(loss)]
    if not losses:
        return derivative
    sign = _SIGNS[min(finite)[1]] if finite else 0
    return replace(derivative, value=sign * derivative.value)
