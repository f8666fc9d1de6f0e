"""Factors of probes, applied to the tokens of each probe.

The tokens of all probes follow one another: those of probe ``p`` are ``bounds[p]`` to
``bounds[p + 1]``. Factors are fp32 whatever the dtype of the activations: the product is computed
in fp32 and rounded once. In bfloat16 a factor of 1.003 would itself be rounded to 1, and the model
that is trained would not be the one that is exported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qzo.model.kernels.uploads import uploaded

GATHERED_ELEMENTS = 2**24  # of factors by token that exist at one time on CUDA


@dataclass(frozen=True)
class RowFactors:
    """Factors of the output rows of a layer.

    Attributes:
        factors: One per probe and row, in fp32.
        bounds: Where the tokens of each probe begin, and the end.
    """

    factors: Float[Tensor, "probes out"]
    bounds: Sequence[int]

    def multiply(self, y: Float[Tensor, "tokens out"]) -> Float[Tensor, "tokens out"]:
        """Multiply outputs in place, and return them."""
        return multiply(y, self.factors, self.bounds)


def multiply(
    values: Float[Tensor, "tokens features"],
    factors: Float[Tensor, "probes features"],
    bounds: Sequence[int],
) -> Float[Tensor, "tokens features"]:
    """Multiply the tokens of each probe by its factors, in place, and return them."""
    if values.is_cuda and len(factors) > 1:
        return _multiply_together(values, factors, bounds)
    for of_probe, (start, stop) in zip(factors, pairwise(bounds), strict=True):
        values[start:stop].mul_(of_probe)
    return values


def _multiply_together(
    values: Float[Tensor, "tokens features"],
    factors: Float[Tensor, "probes features"],
    bounds: Sequence[int],
) -> Float[Tensor, "tokens features"]:
    """Multiply the tokens of all probes with as few launches as memory allows.

    Where all probes have as many tokens, the factors are broadcast instead of gathered.
    """
    lengths = {stop - start for start, stop in pairwise(bounds)}
    if len(lengths) == 1:
        values.unflatten(0, (len(factors), lengths.pop())).mul_(factors[:, None])
        return values
    probes = probe_of_token(tuple(bounds), values.device)
    step = max(GATHERED_ELEMENTS // values.shape[1], 1)
    for part, of_part in zip(values.split(step), probes.split(step), strict=True):
        part.mul_(factors.index_select(0, of_part))
    return values


def multiplied(
    values: Float[Tensor, "tokens features"],
    factors: Float[Tensor, "probes features"],
    bounds: Sequence[int],
) -> Float[Tensor, "tokens features"]:
    """Return the same product as a new tensor, to be differentiated; slopes of factors are fp32."""
    spans = zip(factors, pairwise(bounds), strict=True)
    return torch.cat([(values[a:b] * of_probe).to(values.dtype) for of_probe, (a, b) in spans])


@lru_cache(maxsize=8)
def probe_of_token(bounds: tuple[int, ...], device: torch.device) -> Int[Tensor, " tokens"]:
    """Return the probe that each token belongs to; the same for all layers of a forward."""
    with torch.inference_mode(False):
        counts = torch.tensor([stop - start for start, stop in pairwise(bounds)])
        probes = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts)
        return uploaded(probes, device)
