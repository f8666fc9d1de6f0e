"""Which elements of a direction are perturbed: a few blocks, a random part, the smallest scales.

A random choice is scaled so that ``E[z z^T] = I`` stays: k of n units by ``sqrt(n / k)``, elements
kept with probability ``q`` by ``sqrt(1 / q)``. A fixed choice is a projection ``P``, not scaled:
``E[z z^T] = P``.

Choices are made with integers alone, so they are the same on every device.

Source: block-wise and random sparse perturbations: ZO-LLM, arXiv 2402.11592, there unscaled;
several blocks at a time: LeZO, arXiv 2410.09823; the smallest magnitudes: S-MeZO, arXiv 2402.15751,
there of weights, here of scales.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qzo.method.directions.philox import uniform16, uniform32

BLOCKS_STREAM, MASK_STREAM = 1, 2  # of a basis

_WHOLE = 2**16


def kept_words(sparsity: float) -> int:
    """Return how many of 2**16 words keep an element: at least one, and exactly this fraction."""
    return max(1, round((1 - sparsity) * _WHOLE))


def random_mask(
    basis: int, sparsity: float, start: int, stop: int, device: torch.device
) -> Float[Tensor, " length"]:
    """Return 0 where an element is left out, ``sqrt(1 / q)`` where it is kept.

    ``q = kept_words(sparsity) / 2**16``.
    """
    kept = kept_words(sparsity)
    is_kept = uniform16(basis, start, stop, device, stream=MASK_STREAM) < kept
    return is_kept.to(torch.float32) * math.sqrt(_WHOLE / kept)


def magnitude_mask(
    scales: Sequence[Float[Tensor, "_ _"]], sparsity: float
) -> Bool[Tensor, " length"]:
    """Keep the smallest magnitudes of every layer, ``q`` of them rounded, and at least one.

    Of equal magnitudes the first are kept.
    """
    kept = kept_words(sparsity)
    return torch.cat([_smallest(layer, kept) for layer in scales])


def _smallest(scales: Float[Tensor, "_ _"], kept: int) -> Bool[Tensor, " length"]:
    order = scales.detach().float().abs().cpu().reshape(-1).argsort(stable=True)
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[: max(1, (len(order) * kept + _WHOLE // 2) // _WHOLE)]] = True
    return mask.to(scales.device)


def chosen_units(basis: int, num_units: int, num_chosen: int) -> list[int]:
    """Return the units with the smallest words of a basis, in ascending order."""
    words = uniform32(basis, num_units, stream=BLOCKS_STREAM)
    return sorted(sorted(range(num_units), key=lambda unit: (words[unit], unit))[:num_chosen])
