"""Directions of a step, and the derivative along one of them, clipped.

The clip is directional derivative clipping (DDC). It is set in nats of a loss difference, which
keeps its meaning when epsilon or the coordinates change: a derivative measured over a ``distance``
is clipped to ``[-C, C]`` with ``C = max_loss_difference / distance``.

Source: QZO, arXiv 2505.13430, eq. 6 and algorithm 1.
"""

import math

from qzo.method.estimators.settings import Settings
from qzo.method.probes import DirectionalDerivative, Probe, basis_seed, direction_seed


def directions(settings: Settings, step: int, offset: float, count: int) -> list[Probe]:
    """Return a probe along each of the first ``count`` directions of a step."""
    seed, steps = settings.seed, settings.basis_steps
    basis = 0 if steps is None else basis_seed(seed, step, steps)
    return [
        Probe(direction_seed(seed, step, number), offset, basis=basis) for number in range(count)
    ]


def slope(
    probe: Probe, difference: float, distance: float, max_loss_difference: float | None
) -> DirectionalDerivative:
    """Return ``difference / distance``, clipped; NaN where that is not finite."""
    bound = None if max_loss_difference is None else max_loss_difference / distance
    return clipped(probe, difference / distance, bound)


def clipped(probe: Probe, raw: float, bound: float | None) -> DirectionalDerivative:
    """Clip a derivative to ``[-bound, bound]`` (DDC, eq. 6); NaN where it is not finite."""
    if not math.isfinite(raw):
        raw = math.nan  # not infinity, which the clip would turn into a number
    value = raw if bound is None or math.isnan(raw) else min(max(raw, -bound), bound)
    return DirectionalDerivative(probe.seed, value, raw, abs(value) < abs(raw), basis=probe.basis)
