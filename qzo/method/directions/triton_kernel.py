"""Directions drawn by a Triton kernel: the bits of ``philox``, in one pass over the result.

A program makes the Philox words of its elements with integer arithmetic, turns their bits into
values, multiplies them by the weights of their seeds and adds them up. Products and sums are
rounded apart, in the order in which the CPU takes them: the kernel is compiled without fused
multiply-add.

Not yet timed on a GPU. Triton is imported with this module; import it only where a GPU is.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from qzo.model.kernels.uploads import uploaded

BLOCK_ELEMENTS = 1024
# Sums and products are rounded apart, as the CPU does: no fused multiply-add.
COMPILED = {"num_warps": 4, "enable_fp_fusion": False}


def add_directions(
    out: Float[Tensor, "rows length"],
    base: Float[Tensor, " length"] | None,
    terms: Sequence[Sequence[tuple[int, float]]],
    start: int,
    *,
    quantiles: Float[Tensor, " 65536"] | None,
    stream: int = 0,
) -> None:
    """Fill each row with ``base + sum_i weights[i] z(seeds[i])``.

    Args:
        out: Is filled; contiguous.
        base: What every row starts with; None: 0.
        terms: Seeds and weights of each row, as many for all rows; a weight of 0 adds nothing.
        start: Element of the directions that the rows begin with.
        quantiles: The table of a Gaussian direction; None: Rademacher.
        stream: Which direction of a seed.
    """
    num_rows, length = out.shape
    if not num_rows or not length:
        return
    num_terms = len(terms[0])
    flat = [term for row in terms for term in row]
    seeds = _uploaded_seeds(tuple(seed for seed, _ in flat), out.device)
    weights = _uploaded_weights(tuple(weight for _, weight in flat), out.device)
    per_word = 32 if quantiles is None else 2
    first_word = start // per_word
    num_words = -(-(start + length) // per_word) - first_word
    block = BLOCK_ELEMENTS // per_word
    directions_kernel[triton.cdiv(num_words, block), num_rows](
        out,
        out if base is None else base,
        seeds,
        weights,
        out if quantiles is None else quantiles,
        first_word,
        start - first_word * per_word,
        length,
        NUM_TERMS=num_terms,
        STREAM=stream,
        HAS_BASE=base is not None,
        IS_GAUSSIAN=quantiles is not None,
        BLOCK_WORDS=block,
        **COMPILED,
    )


@lru_cache(maxsize=64)
def _uploaded_seeds(seeds: tuple[int, ...], device: torch.device) -> Int[Tensor, " terms"]:
    """Return 64-bit seeds on a device; the same for all windows of a step."""
    signed = [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]
    with torch.inference_mode(False):
        return uploaded(torch.tensor(signed, dtype=torch.int64), device)


@lru_cache(maxsize=64)
def _uploaded_weights(weights: tuple[float, ...], device: torch.device) -> Float[Tensor, " terms"]:
    with torch.inference_mode(False):
        return uploaded(torch.tensor(weights, dtype=torch.float32), device)


@triton.jit
@no_type_check  # neither mypy nor the shape checks of the tests can read a kernel
def _philox_word(word, key, STREAM: tl.constexpr):
    """Return 32-bit words of Philox4x32-10 (directions.py has its source).

    Word ``4 n + i`` is output ``i`` of the counter ``(n, n >> 32, STREAM, 0)``.
    """
    counter = word >> 2
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = tl.full(c0.shape, STREAM, tl.uint32)
    c3 = tl.zeros_like(c0)
    k0 = tl.zeros_like(c0) + key.to(tl.uint32)
    k1 = tl.zeros_like(c0) + (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        first = c0.to(tl.uint64) * 0xD2511F53
        second = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (second >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = second.to(tl.uint32)
        c2 = (first >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = first.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    low = tl.where(word % 2 == 0, c0, c1)
    high = tl.where(word % 2 == 0, c2, c3)
    return tl.where(word % 4 < 2, low, high)


@triton.jit
@no_type_check
def directions_kernel(
    out,
    base,
    seeds,
    weights,
    quantiles,
    first_word,
    skipped,
    length,
    NUM_TERMS: tl.constexpr,
    STREAM: tl.constexpr,
    HAS_BASE: tl.constexpr,
    IS_GAUSSIAN: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """Write ``out[row] = base + sum_t weights[row, t] z(seeds[row, t])``."""
    PER_WORD: tl.constexpr = 2 if IS_GAUSSIAN else 32
    number = tl.program_id(0) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    place = tl.arange(0, PER_WORD)
    element = number[:, None] * PER_WORD + place[None, :] - skipped
    is_inside = (element >= 0) & (element < length)
    row = tl.program_id(1)
    if HAS_BASE:
        total = tl.load(base + element, mask=is_inside, other=0.0)
    else:
        total = tl.zeros((BLOCK_WORDS, PER_WORD), dtype=tl.float32)
    for term in range(NUM_TERMS):
        key = tl.load(seeds + row * NUM_TERMS + term)
        weight = tl.load(weights + row * NUM_TERMS + term)
        words = _philox_word(first_word + number.to(tl.int64), key, STREAM)
        bits = words[:, None] >> (place * (32 // PER_WORD)).to(tl.uint32)[None, :]
        if IS_GAUSSIAN:
            z = tl.load(quantiles + (bits & 0xFFFF).to(tl.int32))
        else:
            z = (bits & 1).to(tl.float32) * 2 - 1
        total = tl.where(weight == 0, total, total + z * weight)
    tl.store(out + row.to(tl.int64) * length + element, total, mask=is_inside)
