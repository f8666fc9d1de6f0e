"""The product of a GPTQ layer on a GPU, from the codes as they lie in the file.

Two ways, both with scales as arguments:

- fused, for few tokens: a program unpacks a tile of codes in registers and multiplies it with the
  tokens of one probe. Codes minus zeros are small integers, exact in every dtype, so the sum over a
  group is multiplied by its fp32 scale after the dot product. Where a group is not made of whole
  words (``g_idx``), weights are scaled before it instead. Factors of output rows are multiplied
  into the fp32 sum. Where there are too few outputs for the GPU, programs share the inputs, and
  their partial sums are added in a fixed order, so that the same inputs give the same bits;
- dense: the matrix of one set of scales is written out, some rows at a time, and ``torch.mm`` does
  the rest. In row coordinates one set serves the tokens of all probes.

Not yet timed on a GPU. Triton is imported with this module; import it only where a GPU is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from quantizers.gptq import GPTQWeight
from qzo.model.by_probe import RowFactors, probe_of_token
from qzo.model.kernels.settings import num_processors, settings_of
from qzo.model.kernels.triton_kernels import dense_kernel, fused_kernel, sum_kernel
from qzo.model.kernels.uploads import uploaded

BITS = (2, 4, 8)  # 3-bit codes run across words
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_WORDS_MAX = 2**31  # the kernels count them in 32 bits
_INPUTS_MIN = 32  # of a step: whole words, and enough for every matrix instruction
_SUMMED = 256  # outputs that a program adds


def fits(weight: GPTQWeight, dtype: torch.dtype) -> bool:
    """Return whether the kernels read this layout and dtype."""
    return (
        weight.bits in BITS
        and dtype in DTYPES
        and weight.qweight.is_contiguous()
        and weight.qweight.numel() < _WORDS_MAX
    )


def product(
    weight: GPTQWeight,
    x: Float[Tensor, "tokens in"],
    bounds: Sequence[int],
    scales: Sequence[Float[Tensor, "out groups"]],
    rows: RowFactors | None = None,
) -> Float[Tensor, "tokens out"]:
    """Return ``x W^T`` where tokens ``bounds[p]`` to ``bounds[p + 1]`` see ``scales[p]``.

    Accumulates in fp32; the result has the dtype of ``x``. Factors of rows are applied to it.
    """
    way = is_fused(x, len(scales))
    return (fused_product if way else dense_product)(weight, x, bounds, scales, rows)


def is_fused(x: Float[Tensor, "tokens in"], num_sets: int) -> bool:
    """Return whether so many tokens for each set of scales are too few for a dense matrix."""
    return len(x) <= settings_of(x.device).fused_tokens_max * num_sets


def fused_product(
    weight: GPTQWeight,
    x: Float[Tensor, "tokens in"],
    bounds: Sequence[int],
    scales: Sequence[Float[Tensor, "out groups"]],
    rows: RowFactors | None = None,
) -> Float[Tensor, "tokens out"]:
    """Return the product without a dense matrix; see ``product``."""
    y = x.new_empty(len(x), weight.out_features)
    if x.is_meta or not len(x):
        return y
    settings = settings_of(x.device)
    block_tokens = settings.token_tile(max(stop - start for start, stop in pairwise(bounds)))
    tile = settings.fused[block_tokens]
    tiles = _token_tiles(tuple(bounds), block_tokens, x.device)
    steps = _Steps.of(weight, tile.inputs)
    grid = (triton.cdiv(weight.out_features, tile.outputs), len(tiles))
    splits = steps.splits(grid[0] * grid[1], settings.programs_per_processor, x.device)
    parts = y if splits == 1 else y.new_empty(splits, *y.shape, dtype=torch.float32)
    factors, probes = _row_operands(rows if splits == 1 else None, y)
    fused_kernel[*grid, splits](
        x.contiguous(),
        *_operands(weight),
        *_scale_operands(scales),
        factors,
        probes,
        tiles,
        parts,
        *(len(x), weight.in_features, weight.out_features, _group_size(weight)),
        *(steps.span, steps.per_span, steps.count, triton.cdiv(steps.count, splits)),
        **_layout(weight),
        HAS_ROWS=rows is not None and splits == 1,
        BLOCK_TOKENS=block_tokens,
        BLOCK_OUT=tile.outputs,
        BLOCK_IN=steps.block,
        UPCAST=x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y if splits == 1 else _sum(parts, rows, y)


@dataclass(frozen=True)
class _Steps:
    """How the fused kernel goes through the inputs: in steps that stay within a span.

    Attributes:
        span: A group; all inputs where a scale is looked up for each of them.
        block: Inputs of a step.
        per_span: Steps of a span.
        count: Steps of all spans.
    """

    span: int
    block: int
    per_span: int
    count: int

    @classmethod
    def of(cls, weight: GPTQWeight, block_max: int) -> "_Steps":
        span = weight.in_features if _is_by_input(weight) else _group_size(weight)
        block = max(min(triton.next_power_of_2(span), block_max), _INPUTS_MIN)
        per_span = triton.cdiv(span, block)
        return cls(span, block, per_span, per_span * (weight.in_features // span))

    def splits(self, num_tiles: int, programs_per_processor: int, device: torch.device) -> int:
        """Return how many programs share the inputs of a tile, so that every processor has work."""
        wanted = triton.cdiv(programs_per_processor * num_processors(device), num_tiles)
        per_split = triton.cdiv(self.count, min(wanted, self.count))
        return int(triton.cdiv(self.count, per_split))


def _sum(
    parts: Float[Tensor, "splits tokens out"],
    rows: RowFactors | None,
    y: Float[Tensor, "tokens out"],
) -> Float[Tensor, "tokens out"]:
    """Fill ``y`` with the sum of partial products, times the factors of its rows."""
    factors, probes = _row_operands(rows, y)
    grid = (triton.cdiv(y.shape[1], _SUMMED), len(y))
    sizes = (*y.shape, len(parts))
    sum_kernel[grid](parts, factors, probes, y, *sizes, HAS_ROWS=rows is not None, BLOCK=_SUMMED)
    return y


def dense_product(
    weight: GPTQWeight,
    x: Float[Tensor, "tokens in"],
    bounds: Sequence[int],
    scales: Sequence[Float[Tensor, "out groups"]],
    rows: RowFactors | None = None,
) -> Float[Tensor, "tokens out"]:
    """Return the product from dense tiles of output rows; see ``product``."""
    y = x.new_empty(len(x), weight.out_features)
    for of_probe, (first, last) in zip(scales, pairwise(bounds), strict=True):
        if first == last:
            continue
        for tile, dense in dense_tiles(weight, of_probe, x.dtype):
            torch.mm(x[first:last], dense, out=y[first:last, tile])
    return y if rows is None else rows.multiply(y)


def dense_tiles(
    weight: GPTQWeight, scales: Float[Tensor, "out groups"], dtype: torch.dtype
) -> Iterator[tuple[slice, Float[Tensor, "in rows"]]]:
    """Yield the matrix of a set of scales, transposed, some rows at a time in one buffer."""
    settings = settings_of(weight.qweight.device)
    step = min(max(settings.dense_elements // weight.in_features, 1), weight.out_features)
    buffer = weight.qweight.new_empty(weight.in_features * step, dtype=dtype)
    for start in range(0, weight.out_features, step):
        rows = slice(start, min(start + step, weight.out_features))
        count = rows.stop - rows.start
        dense = buffer[: weight.in_features * count].view(weight.in_features, count)
        _fill(dense, weight, scales, rows)
        yield rows, dense


def _fill(
    dense: Float[Tensor, "in rows"],
    weight: GPTQWeight,
    scales: Float[Tensor, "out groups"],
    rows: slice,
) -> None:
    """Write some rows of the matrix, transposed."""
    if dense.is_meta:
        return
    tile = settings_of(dense.device).dense
    count, num_words = rows.stop - rows.start, len(weight.qweight)
    stacked, _, *strides = _scale_operands([scales])
    grid = (triton.cdiv(count, tile.outputs), triton.cdiv(num_words, tile.words))
    dense_kernel[grid](
        *_operands(weight),
        stacked,
        *strides,
        dense,
        *(rows.start, count, num_words, weight.out_features, _group_size(weight)),
        **_layout(weight),
        BLOCK_OUT=tile.outputs,
        BLOCK_WORDS=tile.words,
        num_warps=tile.num_warps,
    )


def _group_size(weight: GPTQWeight) -> int:
    return weight.in_features // weight.file_scales.shape[0]


def _is_by_input(weight: GPTQWeight) -> bool:
    """Return whether a word may hold inputs of several groups."""
    return weight.group_index is not None or _group_size(weight) % (32 // weight.bits) != 0


def _operands(weight: GPTQWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, zeros and group index.

    What a layer does not have is stood in for by its codes, which the kernel then does not read.
    """
    zeros = weight.qweight if isinstance(weight.zeros, int) else weight.zeros
    index = weight.qweight if weight.group_index is None else weight.group_index
    return weight.qweight, zeros.contiguous(), index


def _scale_operands(
    scales: Sequence[Float[Tensor, "out groups"]],
) -> tuple[Tensor, int, int, int]:
    """Return the scales ``(sets, groups, out)`` and their strides.

    One set is read as it lies, whatever its layout and dtype: that of the file is. Several are
    gathered, with groups first, as neighbouring programs read neighbouring outputs.
    """
    by_group = scales[0].T[None] if len(scales) == 1 else torch.stack([s.T for s in scales])
    return by_group, by_group.stride(0), by_group.stride(1), by_group.stride(2)


def _row_operands(rows: RowFactors | None, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors and the probe of every token; without any, what is then not read."""
    if rows is None:
        return y, y
    return rows.factors.contiguous(), probe_of_token(tuple(rows.bounds), y.device)


def _layout(weight: GPTQWeight) -> dict[str, int | bool]:
    return {
        "BITS": weight.bits,
        "HAS_ZEROS": not isinstance(weight.zeros, int),
        "ZERO": weight.zeros if isinstance(weight.zeros, int) else 0,
        "HAS_INDEX": weight.group_index is not None,
        "BY_INPUT": _is_by_input(weight),
    }


@lru_cache(maxsize=32)
def _token_tiles(
    bounds: tuple[int, ...], size: int, device: torch.device
) -> Int[Tensor, "tiles 3"]:
    """Return the set of scales, the first token and the end of every tile of tokens."""
    tiles = [
        (probe, first, min(first + size, stop))
        for probe, (start, stop) in enumerate(pairwise(bounds))
        for first in range(start, stop, size)
    ]
    with torch.inference_mode(False):
        return uploaded(torch.tensor(tiles, dtype=torch.int32), device)
