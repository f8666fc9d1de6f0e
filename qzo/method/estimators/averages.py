"""Means of losses. Sums are rounded once, so that they are the same on every Python."""

import math
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN of nothing, infinity where the sum overflows.

    It is never beyond the values, as a rounded quotient may be: that of equal ones is one of them.
    """
    if not values:
        return math.nan
    try:
        result = math.fsum(values) / len(values)
    except OverflowError:
        return math.inf
    return min(max(result, min(values)), max(values)) if math.isfinite(result) else result


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation over ``n - 1``; NaN of fewer than two."""
    if len(values) < 2:
        return math.nan
    center = mean(values)
    squares = [(value - center) * (value - center) for value in values]
    return math.sqrt(mean(squares) * (len(values) / (len(values) - 1)))
