"""Triton kernels for products with GPTQ codes as they lie in the file; see ``triton_product``.

A packed word holds the codes of ``32 // BITS`` consecutive inputs of one output. Each word is
loaded once by a program and unpacked in registers. Scales are read with their strides, in the dtype
in which they lie.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check  # neither mypy nor the shape checks of the tests can read a kernel
def _codes(words, BITS: tl.constexpr):
    """Return the lowest codes of some words as float32.

    Exact without a conversion: ``2**23 + code`` has the code in its lowest bits.
    """
    codes = words & (2**BITS - 1)
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
@no_type_check
def _unpacked(words, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return all codes of words ``(ROWS, words)``, those of a word one after the other.

    Every step doubles the last axis within a thread, so nothing moves between threads.
    """
    codes = tl.join(words, words >> 16)
    codes = tl.join(codes, codes >> 8)
    if BITS <= 4:
        codes = tl.join(codes, codes >> 4)
    if BITS <= 2:
        codes = tl.join(codes, codes >> 2)
    return tl.reshape(_codes(codes, BITS), (ROWS, COLUMNS))


@triton.jit
@no_type_check
def _dot(a, b, UPCAST: tl.constexpr):
    """Return the product of two tiles in fp32, without TF32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
@no_type_check
def fused_kernel(
    x,
    qweight,
    zeros,
    index,
    scales,
    set_stride,
    group_stride,
    out_stride,
    rows,
    probe_of_token,
    tiles,
    y,
    num_tokens,
    in_features,
    out_features,
    group_size,
    span,
    steps_per_span,
    num_steps,
    steps_per_split,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BY_INPUT: tl.constexpr,  # groups do not consist of whole words: every input has its own scale
    HAS_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UPCAST: tl.constexpr,  # exact; the interpreter's dot product does not know bf16
):
    """Write ``y[split] = rows * (x W^T)``, or a part of that sum for every split of the inputs.

    Computed as ``W x^T``: the codes of a word are neighbours in a row of W, so they stay together
    in one thread, and few tokens are the short side of a matrix instruction.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    BLOCK_WORDS: tl.constexpr = BLOCK_IN // PER_WORD
    tile = tiles + 3 * tl.program_id(1)
    scale_set = tl.load(tile)
    m = tl.load(tile + 1) + tl.arange(0, BLOCK_TOKENS)
    is_token = m < tl.load(tile + 2)
    n = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_out = n < out_features
    x_columns = x + m[None, :].to(tl.int64) * in_features
    own_scales = scales + scale_set * set_stride + n * out_stride
    first_step = tl.program_id(2) * steps_per_split
    last_step = tl.minimum(first_step + steps_per_split, num_steps)
    total = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
    for step in range(first_step, last_step):
        number = step // steps_per_span
        inside = (step % steps_per_span) * BLOCK_IN
        start = number * span + inside
        k = start + tl.arange(0, BLOCK_IN)
        is_in = inside + tl.arange(0, BLOCK_IN) < span
        word = start // PER_WORD + tl.arange(0, BLOCK_WORDS)
        is_word = inside + tl.arange(0, BLOCK_WORDS) * PER_WORD < span
        place = word[None, :] * out_features + n[:, None]
        words = tl.load(qweight + place, mask=is_out[:, None] & is_word[None, :], other=0)
        tokens = tl.load(x_columns + k[:, None], mask=is_in[:, None] & is_token[None, :], other=0.0)
        weights = _unpacked(words, BITS, BLOCK_OUT, BLOCK_IN)
        if BY_INPUT:
            if HAS_INDEX:
                group = tl.load(index + k, mask=is_in, other=0).to(tl.int32)
            else:
                group = k // group_size
            is_weight = is_out[:, None] & is_in[None, :]
            if HAS_ZEROS:
                at = group[None, :] * out_features + n[:, None]
                weights -= tl.load(zeros + at, mask=is_weight, other=0).to(tl.float32)
            else:
                weights -= ZERO
            at = group[None, :] * group_stride
            by_input = tl.load(own_scales[:, None] + at, mask=is_weight, other=0.0)
            weights *= by_input.to(tl.float32)
            total += _dot(weights.to(tokens.dtype), tokens, UPCAST)
        else:
            if HAS_ZEROS:
                zero = tl.load(zeros + number * out_features + n, mask=is_out, other=0)
                weights -= zero.to(tl.float32)[:, None]
            else:
                weights -= ZERO
            by_out = tl.load(own_scales + number * group_stride, mask=is_out, other=0.0)
            part = _dot(weights.to(tokens.dtype), tokens, UPCAST)
            total += part * by_out.to(tl.float32)[:, None]
    is_result = is_out[:, None] & is_token[None, :]
    if HAS_ROWS:
        probe = tl.load(probe_of_token + m, mask=is_token, other=0)
        factor = rows + probe[None, :].to(tl.int64) * out_features + n[:, None]
        total *= tl.load(factor, mask=is_result, other=0.0)
    row = (tl.program_id(2) * num_tokens + m).to(tl.int64)
    place = row[None, :] * out_features + n[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=is_result)


@triton.jit
@no_type_check
def sum_kernel(
    parts,
    rows,
    probe_of_token,
    y,
    num_tokens,
    out_features,
    num_parts,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``y = rows * sum(parts)``: in the order of the parts, and rounded once."""
    token = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_out = n < out_features
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(num_parts):
        row = (part * num_tokens + token).to(tl.int64)
        total += tl.load(parts + row * out_features + n, mask=is_out, other=0.0)
    if HAS_ROWS:
        factor = rows + tl.load(probe_of_token + token).to(tl.int64) * out_features
        total *= tl.load(factor + n, mask=is_out, other=0.0)
    place = token.to(tl.int64) * out_features + n
    tl.store(y + place, total.to(y.dtype.element_ty), mask=is_out)


@triton.jit
@no_type_check
def dense_kernel(
    qweight,
    zeros,
    index,
    scales,
    group_stride,
    out_stride,
    dense,
    first_out,
    num_out,
    num_words,
    out_features,
    group_size,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BY_INPUT: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """Write the outputs ``first_out`` to ``first_out + num_out`` of ``W^T``."""
    PER_WORD: tl.constexpr = 32 // BITS
    column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    n = first_out + column
    is_word = word < num_words
    is_tile = is_word[:, None] & (column < num_out)[None, :]
    words = tl.load(qweight + word[:, None] * out_features + n[None, :], mask=is_tile, other=0)
    for place in tl.static_range(PER_WORD):
        k = word * PER_WORD + place
        if HAS_INDEX:
            group = tl.load(index + k, mask=is_word, other=0).to(tl.int32)
        elif BY_INPUT:
            group = k // group_size
        else:
            group = word * PER_WORD // group_size  # the same for all codes of a word
        weights = _codes(words >> (place * BITS), BITS)
        if HAS_ZEROS:
            at = group[:, None] * out_features + n[None, :]
            weights -= tl.load(zeros + at, mask=is_tile, other=0).to(tl.float32)
        else:
            weights -= ZERO
        at = group[:, None] * group_stride + n[None, :] * out_stride
        weights *= tl.load(scales + at, mask=is_tile, other=0.0).to(tl.float32)
        row = dense + k[:, None].to(tl.int64) * num_out
        tl.store(row + column[None, :], weights.to(dense.dtype.element_ty), mask=is_tile)
