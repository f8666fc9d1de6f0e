"""Which group size to quantize with, where nobody says."""

from collections.abc import Iterable

_USUAL = {"gptq": (128, 64, 32), "nf4": (64, 32), "fp4": (64, 32)}
_RAGGED = {"gptq": 32, "nf4": 64, "fp4": 64}


def usual_group_size(format_name: str, input_sizes: Iterable[int]) -> int:
    """Return the group size to use where none is given.

    The largest usual one that divides the input size of every layer. Where none does, the last
    GPTQ group of a row is shorter, and bitsandbytes blocks cross rows.

    Args:
        format_name: ``gptq``, ``nf4`` or ``fp4``.
        input_sizes: Of all layers.
    """
    sizes = set(input_sizes)
    dividing = (
        group_size
        for group_size in _USUAL[format_name]
        if all(size % group_size == 0 for size in sizes)
    )
    return next(dividing, _RAGGED[format_name])
