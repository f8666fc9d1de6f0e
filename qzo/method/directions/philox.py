"""Seeded random directions: ``z(seed, index)``, the same numbers on every device.

Philox4x32-10 turns (seed, index) into random words with integer arithmetic alone, so any part of a
direction can be drawn on any device, in any order, at any time, and nothing has to be stored.

- Rademacher: bit ``index % 32`` of word ``index // 32`` gives the sign.
- Gaussian: 16 random bits choose one of 65,536 equally likely quantiles of N(0, 1), scaled to unit
  variance. A table look-up is exact on every device; logarithm and cosine are not. The largest
  value is 4.32 standard deviations.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, table 2
and section 3.3; test vectors from Random123 1.14.
"""

from collections.abc import Sequence
from functools import cache
from statistics import NormalDist
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qzo.model.kernels.settings import has_triton

DirectionName = Literal["rademacher", "gaussian"]

GENERATOR = "philox4x32-10/v1"  # goes into the journal: other numbers need another name

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10
_VALUES_PER_COUNTER = {"rademacher": 128, "gaussian": 8}


def philox4x32(
    counter: Sequence[Int[Tensor, "..."]], key: Sequence[Int[Tensor, "..."]]
) -> list[Int[Tensor, "..."]]:
    """Return the four output words of Philox4x32-10.

    Args:
        counter: Four tensors of 32-bit words held in int64, broadcast against the key.
        key: Two such tensors.

    Returns:
        Four tensors of 32-bit words held in int64.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _KEY_STEPS[0]) & _MASK
        k1 = (k1 + _KEY_STEPS[1]) & _MASK
    return [c0, c1, c2, c3]


def _multiply(
    word: Int[Tensor, "..."], multiplier: int
) -> tuple[Int[Tensor, "..."], Int[Tensor, "..."]]:
    product = word * multiplier  # wraps; the low 64 bits are right
    return (product >> 32) & _MASK, product & _MASK


def directions(
    name: DirectionName,
    seeds: Sequence[int],
    start: int,
    stop: int,
    device: torch.device | str = "cpu",
    *,
    stream: int = 0,
) -> Float[Tensor, "seeds length"]:
    """Return elements ``start`` to ``stop`` of one direction per seed.

    Args:
        name: ``rademacher`` (+1 or -1) or ``gaussian`` (mean 0, variance 1).
        seeds: 64-bit integers.
        start: First element.
        stop: One beyond the last element.
        device: Where the numbers are made.
        stream: Which of the 2**32 independent directions of a seed.
    """
    if draws_by_kernel(torch.device(device)):
        z = torch.empty(len(seeds), stop - start, device=device)
        add_by_kernel(name, [[(seed, 1.0)] for seed in seeds], z, start, stream=stream)
        return z
    per_counter = _VALUES_PER_COUNTER[name]
    first = start // per_counter
    words = _words(seeds, first, -(-stop // per_counter), device, stream)
    values = _signs(words) if name == "rademacher" else _normals(words)
    return values.view(len(seeds), -1)[:, start - first * per_counter : stop - first * per_counter]


def draws_by_kernel(device: torch.device) -> bool:
    """Return whether a Triton kernel draws the same bits on a device."""
    return device.type == "cuda" and has_triton(device)


def add_by_kernel(
    name: DirectionName,
    terms: Sequence[Sequence[tuple[int, float]]],
    out: Float[Tensor, "rows length"],
    start: int,
    *,
    base: Float[Tensor, " length"] | None = None,
    stream: int = 0,
) -> None:
    """Fill each row with ``base + sum_i weights[i] z(seeds[i])``; see ``triton_kernel``."""
    from qzo.method.directions.triton_kernel import (
        add_directions,  # here only: not every platform has Triton
    )

    quantiles = _quantiles_on(out.device) if name == "gaussian" else None
    add_directions(out, base, terms, start, quantiles=quantiles, stream=stream)


def uniform16(
    seed: int, start: int, stop: int, device: torch.device | str = "cpu", *, stream: int
) -> Int[Tensor, " length"]:
    """Return elements ``start`` to ``stop`` of integers that are uniform below 2**16."""
    first = start // 8
    halves = _halves(_words([seed], first, -(-stop // 8), device, stream)).reshape(-1)
    return halves[start - first * 8 : stop - first * 8]


def uniform32(seed: int, count: int, *, stream: int) -> list[int]:
    """Return the first integers of a stream that are uniform below 2**32."""
    words: list[int] = _words([seed], 0, -(-count // 4), "cpu", stream).reshape(-1).tolist()
    return words[:count]


def _signs(words: Int[Tensor, "seeds counters 4"]) -> Float[Tensor, "seeds counters 4 32"]:
    """Turn every bit into a sign, eight at a time."""
    shifts = torch.arange(0, 32, 8, device=words.device)
    octets = (words[..., None] >> shifts) & 0xFF
    return _sign_table_on(words.device)[octets].flatten(-2)


def _normals(words: Int[Tensor, "seeds counters 4"]) -> Float[Tensor, "seeds counters 4 2"]:
    """Turn every 16 bits into a quantile of N(0, 1)."""
    return _quantiles_on(words.device)[_halves(words)]


def _halves(words: Int[Tensor, "seeds counters 4"]) -> Int[Tensor, "seeds counters 4 2"]:
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1)


@cache
def _sign_table() -> Float[Tensor, "256 8"]:
    with torch.inference_mode(False):
        bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
        return (bits * 2 - 1).to(torch.float32)


@cache
def _sign_table_on(device: torch.device) -> Float[Tensor, "256 8"]:
    return _sign_table().to(device)


def _words(
    seeds: Sequence[int], first: int, last: int, device: torch.device | str, stream: int
) -> Int[Tensor, "seeds counters 4"]:
    keys = torch.tensor(
        [[seed & _MASK, (seed >> 32) & _MASK] for seed in seeds], dtype=torch.int64, device=device
    )
    position = torch.arange(first, last, dtype=torch.int64, device=device)[None, :]
    zero = torch.zeros_like(position)
    counter = (position & _MASK, position >> 32, zero + stream, zero)
    return torch.stack(philox4x32(counter, (keys[:, :1], keys[:, 1:])), dim=-1)


@cache
def _quantiles() -> Float[Tensor, " 65536"]:
    half = 2**15
    positive = [NormalDist().inv_cdf(0.5 + (i + 0.5) / 2**16) for i in range(half)]
    scale = (sum(value * value for value in positive) / half) ** -0.5
    with torch.inference_mode(False):
        upper = torch.tensor([value * scale for value in positive], dtype=torch.float32)
        return torch.cat((-upper.flip(0), upper))


@cache
def _quantiles_on(device: torch.device) -> Float[Tensor, " 65536"]:
    return _quantiles().to(device)


def combine(
    z: Float[Tensor, "directions length"], weights: Sequence[float]
) -> Float[Tensor, " length"]:
    """Return ``sum_i weights[i] * z[i]`` in fp32.

    The sum runs in the order of the directions, and product and sum are rounded apart, so that
    every device gives the same bits.
    """
    total = torch.zeros(z.shape[1], dtype=torch.float32, device=z.device)
    for direction, weight in zip(z, weights, strict=True):
        total += direction * weight
    return total
