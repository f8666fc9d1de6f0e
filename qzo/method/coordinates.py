"""Coordinates: what the trained vector ``v`` of a layer is to its file scales ``D``.

- ``absolute``: the scales are ``v`` (starts at ``D``; the QZO paper, where ``D`` is Delta),
- ``relative``: ``D * v`` (starts at 1, one element per scale),
- ``row``: ``D * v[:, None]`` (starts at 1, one element per output row),
- ``column``: ``D * v[None, :]`` (starts at 1, one element per group of inputs),
- ``rank_one``: ``D * r[:, None] * c[None, :]`` with ``v = (r, c)`` (starts at 1).

The last three multiply inputs and outputs of a layer, so one product with the matrix of the file
serves every probe, and every example can have a direction of its own at no further cost.
"""

from typing import Literal

Coordinates = Literal["absolute", "relative", "row", "column", "rank_one"]

BY_FACTORS = ("row", "column", "rank_one")  # those that multiply rows and columns


def num_values(coordinates: str, out_features: int, num_groups: int) -> int:
    """Return how many values of a layer are trained."""
    by_factors = {
        "row": out_features,
        "column": num_groups,
        "rank_one": out_features + num_groups,
    }
    return by_factors.get(coordinates, out_features * num_groups)


def crossing_message(coordinates: str, layer: str) -> str:
    """Say why a layer whose blocks cross rows cannot have factors."""
    factor = "group of inputs" if coordinates == "column" else "row"
    return (
        f"coordinates: expected 'absolute' or 'relative', got {coordinates!r}: blocks of {layer} "
        f"cross its rows, so a factor per {factor} cannot be written back exactly"
    )
