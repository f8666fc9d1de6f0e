"""The product of a GPTQ layer on a GPU, from the codes as they lie in the file.

Two ways, both with scales as arguments and all probes from one read of the codes:

- fused: a program reads a tile of codes once and multiplies it with its tokens, whichever probes
  they belong to. Codes minus zeros are small integers, exact in every dtype, so the sum over a
  group is multiplied by the fp32 scale of its token's probe after the dot product. Where inputs
  are assigned to groups one by one (``g_idx``), weights are scaled before it instead, per probe;
- dense: a tile of the matrix is written out once per probe, and ``torch.mm`` does the rest.

Not yet timed on a GPU. Triton is imported with this module; import it only where a GPU is.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from quantizers.gptq import GPTQWeight

FUSED_TOKENS_MAX = 256  # more tokens pay for a dense tile; a guess, not timed
DENSE_ELEMENTS = 32 * 2**20  # of all probes' dense tiles that exist at one time
BITS = (2, 4, 8)  # 3-bit codes run across words
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_BLOCK_OUT = 64
_BLOCK_IN = 64
_BLOCK_MIN = 16  # tl.dot takes no smaller side
_BLOCK_TOKENS_MAX = 64


def fits(weight: GPTQWeight, x: Float[Tensor, "tokens in"]) -> bool:
    """Return whether the kernels read this layout and dtype."""
    return weight.bits in BITS and x.dtype in DTYPES and weight.qweight.is_contiguous()


def product(
    weight: GPTQWeight,
    x: Float[Tensor, "tokens in"],
    bounds: Sequence[int],
    scales: Sequence[Float[Tensor, "out groups"]],
) -> Float[Tensor, "tokens out"]:
    """Return ``x W^T`` where tokens ``bounds[p]`` to ``bounds[p + 1]`` see ``scales[p]``.

    Accumulates in fp32; the result has the dtype of ``x``.
    """
    if len(x) <= FUSED_TOKENS_MAX:
        return fused_product(weight, x, bounds, scales)
    return dense_product(weight, x, bounds, scales)


def fused_product(
    weight: GPTQWeight,
    x: Float[Tensor, "tokens in"],
    bounds: Sequence[int],
    scales: Sequence[Float[Tensor, "out groups"]],
) -> Float[Tensor, "tokens out"]:
    """Return the product without a dense tile; see ``product``."""
    y = x.new_empty(len(x), weight.out_features)
    x = x.contiguous()
    block_tokens = min(max(triton.next_power_of_2(len(x)), _BLOCK_MIN), _BLOCK_TOKENS_MAX)
    has_index = weight.group_index is not None
    group_size = weight.in_features if has_index else _group_size(weight)
    block_in = min(max(triton.next_power_of_2(group_size), _BLOCK_MIN), _BLOCK_IN)
    grid = (triton.cdiv(weight.out_features, _BLOCK_OUT), triton.cdiv(len(x), block_tokens))
    if x.is_meta or not len(x):
        return y
    _fused_kernel[grid](
        x,
        *_operands(weight, scales),
        _probe_of_token(tuple(bounds), x.device),
        y,
        len(x),
        *_sizes(weight),
        group_size,
        triton.cdiv(group_size, block_in),
        triton.cdiv(group_size, block_in) * (weight.in_features // group_size),
        **_layout(weight),
        BLOCK_TOKENS=block_tokens,
        BLOCK_OUT=_BLOCK_OUT,
        BLOCK_IN=block_in,
        UPCAST=x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
    )
    return y


def dense_product(
    weight: GPTQWeight,
    x: Float[Tensor, "tokens in"],
    bounds: Sequence[int],
    scales: Sequence[Float[Tensor, "out groups"]],
) -> Float[Tensor, "tokens out"]:
    """Return the product from dense tiles of output rows; see ``product``."""
    y = x.new_empty(len(x), weight.out_features)
    step = max(DENSE_ELEMENTS // (weight.in_features * len(scales)), 1)
    for start in range(0, weight.out_features, step):
        rows = slice(start, min(start + step, weight.out_features))
        dense = dense_rows(weight, scales, rows, x.dtype)
        for p, (first, last) in enumerate(pairwise(bounds)):
            torch.mm(x[first:last], dense[p], out=y[first:last, rows])
    return y


def dense_rows(
    weight: GPTQWeight,
    scales: Sequence[Float[Tensor, "out groups"]],
    rows: slice,
    dtype: torch.dtype,
) -> Float[Tensor, "probes in rows"]:
    """Return some rows of the matrix, transposed, once per set of scales."""
    count = rows.stop - rows.start
    dense = weight.qweight.new_empty(len(scales), weight.in_features, count, dtype=dtype)
    if dense.is_meta:
        return dense
    grid = (triton.cdiv(count, _BLOCK_OUT), triton.cdiv(weight.in_features, _BLOCK_IN))
    _dense_kernel[grid](
        *_operands(weight, scales),
        dense,
        rows.start,
        count,
        len(scales),
        *_sizes(weight),
        _group_size(weight),
        **_layout(weight),
        BLOCK_OUT=_BLOCK_OUT,
        BLOCK_IN=_BLOCK_IN,
    )
    return dense


def _group_size(weight: GPTQWeight) -> int:
    return weight.in_features // weight.file_scales.shape[0]


def _operands(
    weight: GPTQWeight, scales: Sequence[Float[Tensor, "out groups"]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes, zeros, group index and ``(probes, groups, out)`` scales.

    What a layer does not have is stood in for by its codes, which the kernel then does not read.
    """
    zeros = weight.qweight if isinstance(weight.zeros, int) else weight.zeros
    index = weight.qweight if weight.group_index is None else weight.group_index
    # neighbouring programs read neighbouring outputs, so groups come first
    stacked = torch.stack([s.float().T for s in scales]).contiguous()
    return weight.qweight, zeros.contiguous(), index, stacked


def _sizes(weight: GPTQWeight) -> tuple[int, int, int]:
    return weight.in_features, weight.out_features, weight.file_scales.shape[0]


def _layout(weight: GPTQWeight) -> dict[str, int | bool]:
    return {
        "BITS": weight.bits,
        "HAS_ZEROS": not isinstance(weight.zeros, int),
        "ZERO": weight.zeros if isinstance(weight.zeros, int) else 0,
        "HAS_INDEX": weight.group_index is not None,
    }


@lru_cache(maxsize=8)
def _probe_of_token(bounds: tuple[int, ...], device: torch.device) -> Int[Tensor, " tokens"]:
    """Return the probe that each token belongs to; the same for all layers of a forward."""
    counts = torch.tensor([stop - start for start, stop in pairwise(bounds)])
    probes = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts)
    return probes.to(device)


@triton.jit
@no_type_check  # neither mypy nor the shape checks of the tests can read a kernel
def _codes_minus_zeros(
    qweight,
    zeros,
    k,
    n,
    group,
    is_inside,
    out_features,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
):
    """Return a tile ``(inputs k, outputs n)`` as int32; undefined where not ``is_inside``."""
    per_word: tl.constexpr = 32 // BITS
    mask: tl.constexpr = 2**BITS - 1
    place = (k // per_word)[:, None].to(tl.int64) * out_features + n[None, :]
    words = tl.load(qweight + place, mask=is_inside, other=0)
    codes = (words >> ((k % per_word) * BITS)[:, None]) & mask
    if HAS_ZEROS:
        at = group[:, None] * out_features + n[None, :]
        return codes - tl.load(zeros + at, mask=is_inside, other=0).to(tl.int32)
    return codes - ZERO


@triton.jit
@no_type_check
def _dot(a, b, UPCAST: tl.constexpr):
    """Return the product of two tiles in fp32, without TF32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
@no_type_check
def _fused_kernel(
    x,
    qweight,
    zeros,
    index,
    scales,
    probe_of_token,
    y,
    num_tokens,
    in_features,
    out_features,
    num_groups,
    group_size,
    steps_per_group,
    num_steps,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UPCAST: tl.constexpr,  # exact; the interpreter's dot product does not know bf16
):
    first_token = tl.program_id(1) * BLOCK_TOKENS
    m = first_token + tl.arange(0, BLOCK_TOKENS)
    n = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_token = m < num_tokens
    is_out = n < out_features
    probe = tl.load(probe_of_token + m, mask=is_token, other=-1)
    first_probe = tl.load(probe_of_token + first_token)
    last_probe = tl.load(probe_of_token + tl.minimum(first_token + BLOCK_TOKENS, num_tokens) - 1)
    x_rows = x + m[:, None].to(tl.int64) * in_features
    total = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), dtype=tl.float32)
    for step in range(num_steps):
        step_group = step // steps_per_group
        inside = (step % steps_per_group) * BLOCK_IN + tl.arange(0, BLOCK_IN)
        k = step_group * group_size + inside
        is_in = inside < group_size
        is_weight = is_in[:, None] & is_out[None, :]
        if HAS_INDEX:
            group = tl.load(index + k, mask=is_in, other=0).to(tl.int32)
        else:
            group = step_group + tl.zeros((BLOCK_IN,), dtype=tl.int32)
        tokens = tl.load(x_rows + k[None, :], mask=is_token[:, None] & is_in[None, :], other=0.0)
        weights = _codes_minus_zeros(
            qweight, zeros, k, n, group, is_weight, out_features, BITS, HAS_ZEROS, ZERO
        ).to(tl.float32)
        if HAS_INDEX:
            for p in range(first_probe, last_probe + 1):
                at = (p * num_groups + group)[:, None] * out_features + n[None, :]
                by_input = tl.load(scales + at, mask=is_weight, other=0.0)
                scaled = (weights * by_input).to(tokens.dtype)
                own = tl.where((probe == p)[:, None], tokens, tl.zeros_like(tokens))
                total += _dot(own, scaled, UPCAST)
        else:
            by_token = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), dtype=tl.float32)
            for p in range(first_probe, last_probe + 1):
                at = (p * num_groups + step_group) * out_features + n
                by_output = tl.load(scales + at, mask=is_out, other=0.0)
                by_token = tl.where((probe == p)[:, None], by_output[None, :], by_token)
            total += _dot(tokens, weights.to(tokens.dtype), UPCAST) * by_token
    place = m[:, None].to(tl.int64) * out_features + n[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=is_token[:, None] & is_out[None, :])


@triton.jit
@no_type_check
def _dense_kernel(
    qweight,
    zeros,
    index,
    scales,
    dense,
    first_out,
    num_out,
    num_probes,
    in_features,
    out_features,
    num_groups,
    group_size,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    k = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    n = first_out + column
    is_in = k < in_features
    is_weight = is_in[:, None] & (column < num_out)[None, :]
    if HAS_INDEX:
        group = tl.load(index + k, mask=is_in, other=0).to(tl.int32)
    else:
        group = k // group_size
    weights = _codes_minus_zeros(
        qweight, zeros, k, n, group, is_weight, out_features, BITS, HAS_ZEROS, ZERO
    ).to(tl.float32)
    for p in range(num_probes):
        at = (p * num_groups + group)[:, None] * out_features + n[None, :]
        scaled = weights * tl.load(scales + at, mask=is_weight, other=0.0)
        row = (p * in_features + k)[:, None].to(tl.int64)
        place = row * num_out + column[None, :]
        tl.store(dense + place, scaled.to(dense.dtype.element_ty), mask=is_weight)
