"""Trained values of a layer -> its effective scales, in each kind of coordinates.

With ``s`` the scales of the file and ``v`` the values: ``absolute`` v, ``relative`` s v, ``row``
and ``column`` s times a factor per output row or group of inputs, ``rank_one`` s times both.
"""

from jaxtyping import Float
from torch import Tensor

from qzo.method.coordinates import BY_FACTORS, Coordinates
from qzo.model.linear import EffectiveScales, Multipliers, ProbeScales


def effective_scales(
    coordinates: Coordinates,
    stored: Float[Tensor, "out groups"],
    values: Float[Tensor, "probes length"],
) -> EffectiveScales:
    """Return the effective scales that values of one layer stand for, at every probe."""
    if coordinates in BY_FACTORS:
        return Multipliers(*_factors(coordinates, len(stored), values))
    stored = stored.float()
    by_group = [of_probe.view(stored.shape) for of_probe in values.unbind()]
    if coordinates == "relative":
        by_group = [stored * of_probe for of_probe in by_group]
    return ProbeScales(by_group)


def tuned_scales(
    coordinates: Coordinates,
    stored: Float[Tensor, "out groups"],
    values: Float[Tensor, " length"],
) -> Float[Tensor, "out groups"]:
    """Return the scales that values of one layer stand for, in fp32."""
    stored = stored.float()
    if coordinates in BY_FACTORS:
        rows, columns = _factors(coordinates, len(stored), values[None])
        stored = stored if rows is None else stored * rows.T
        return stored if columns is None else stored * columns
    by_group = values.view(stored.shape)
    return stored * by_group if coordinates == "relative" else by_group.clone()


def _factors(
    coordinates: Coordinates, out_features: int, values: Float[Tensor, "probes length"]
) -> tuple[Float[Tensor, "probes out"] | None, Float[Tensor, "probes groups"] | None]:
    """Return the factors of rows and of columns that values of one layer stand for."""
    if coordinates == "row":
        return values, None
    if coordinates == "column":
        return None, values
    return values[:, :out_features], values[:, out_features:]
