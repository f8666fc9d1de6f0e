"""Sums and norms whose bits depend on nothing but the values: not on threads or device.

Halves are added to each other in float64 until one number is left; an elementwise addition has the
same bits everywhere, which a library's sum has not.
"""

import math

from jaxtyping import Float
from torch import Tensor

_PART = 2**18  # elements that exist in float64 at one time


def tree_sum(values: Float[Tensor, "length ..."]) -> Float[Tensor, "..."]:
    """Sum over the first axis, halves onto halves: the same bits whatever computes it."""
    length = len(values)
    while length > 1:
        half = (length + 1) // 2
        folded = values[:half].clone()
        folded[: length - half] += values[half:length]
        values, length = folded, half
    return values[0]


def norm(values: Float[Tensor, " size"]) -> float:
    """Return the Euclidean norm, in float64."""
    parts = (values[i : i + _PART].double() for i in range(0, len(values), _PART))
    return math.sqrt(math.fsum(float(tree_sum(part * part)) for part in parts))
