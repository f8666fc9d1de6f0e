"""Norms of long vectors whose bits depend on nothing but the vector: not on threads or device.

Halves are added to each other in float64 until one number is left; an elementwise addition has the
same bits everywhere, which a library's sum has not.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

_PART = 2**18  # elements that exist in float64 at one time


def norm(values: Float[Tensor, " size"]) -> float:
    """Return the Euclidean norm, in float64."""
    parts = (values[i : i + _PART].double() for i in range(0, len(values), _PART))
    return math.sqrt(math.fsum(_folded(part * part) for part in parts))


def _folded(values: Float[Tensor, " size"]) -> float:
    while len(values) > 1:
        half = len(values) // 2
        folded = values[:half] + values[half : 2 * half]
        values = torch.cat((folded, values[2 * half :]))  # the odd one
    return float(values[0])
