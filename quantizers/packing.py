"""Integers of 2, 3, 4 or 8 bits packed into 32-bit words along the first axis.

2, 4 and 8 bits: element ``j`` of a word sits at bits ``j * bits``, least significant first. 3 bits:
32 elements run through three words as one stream of 96 bits, so elements 10 and 21 are split
between two words.

Source: AutoGPTQ 9f7d370, ``auto_gptq/nn_modules/qlinear/qlinear_cuda.py`` (layout only).
"""

import torch
from jaxtyping import Float, Float16, Int, Shaped
from torch import Tensor

from quantizers.errors import FormatError

BITS = (2, 3, 4, 8)


def words_per_run(bits: int) -> int:
    """Return how many words one run of elements fills: 3 for 3 bits, else 1."""
    return 3 if bits == 3 else 1


def run_length(bits: int) -> int:
    """Return how many elements one run of words holds."""
    return 32 * words_per_run(bits) // bits


def unpack_into(
    words: Int[Tensor, "packed columns"], bits: int, out: Float[Tensor, "elements columns"]
) -> None:
    """Write the packed elements into ``out`` as floats; elements beyond its length are dropped.

    ``words`` is not modified. One run of words gives ``run_length(bits)`` rows of ``out``.
    """
    count, run = out.shape[0], run_length(bits)
    whole = count - count % run
    runs = words.view(-1, words_per_run(bits), words.shape[1])
    if whole:
        _unpack_runs(runs[: whole // run], bits, out[:whole].view(-1, run, out.shape[1]))
    if whole < count:
        tail = out.new_empty(1, run, out.shape[1])
        _unpack_runs(runs[whole // run : whole // run + 1], bits, tail)
        out[whole:] = tail[0, : count - whole]


def _unpack_runs(
    runs: Int[Tensor, "runs words columns"], bits: int, out: Float[Tensor, "runs elements columns"]
) -> None:
    mask = 2**bits - 1
    for element in range(out.shape[1]):
        word, shift = divmod(element * bits, 32)
        values = runs[:, word] >> shift
        if shift + bits > 32:  # the rest of a 3-bit element is in the next word
            values = (values & (2 ** (32 - shift) - 1)) | (runs[:, word + 1] << (32 - shift))
        out[:, element] = values.bitwise_and_(mask)


def has_fused_unpack(bits: int, device: torch.device) -> bool:
    """Return whether ``unpack_affine`` can be used; torch may lack its operator one day."""
    is_known = bits in {2, 4} and device.type == "cpu"
    return is_known and hasattr(torch.ops.quantized, _fused_unpack_name(bits))


def _fused_unpack_name(bits: int) -> str:
    """Return torch's operator for rows of codes that end in an fp16 scale and an fp16 bias."""
    return f"embedding_bag_{bits}bit_unpack"


def unpack_affine(
    words: Int[Tensor, "packed columns"],
    bits: int,
    scales: float | Float16[Tensor, "groups columns"],
    biases: float | Shaped[Tensor, "groups columns"],
    groups: int,
) -> Float[Tensor, "columns elements"]:
    """Return ``scale * element + bias`` of packed columns as fp32 rows, in one pass.

    torch's operator for quantized embedding tables does the work. It reads rows of codes that end
    in an fp16 scale and an fp16 bias; product and sum are fused, and rounded once. Each group of a
    column is such a row, so the words are copied once, transposed.

    Args:
        words: Whole words per group; not modified.
        bits: 2 or 4; see ``has_fused_unpack``.
        scales: In fp16.
        biases: Must fit fp16 exactly.
        groups: Equal parts of a column, each with a scale and a bias.
    """
    columns, width = words.shape[1], words.shape[0] // groups
    rows = words.new_empty(columns, groups, width + 1)
    rows[..., :width] = words.T.contiguous().view(columns, groups, width)
    ends = rows.view(torch.float16)[..., -2:]
    for place, values in enumerate((scales, biases)):
        ends[..., place] = values.T if isinstance(values, Tensor) else values
    flat = rows.view(torch.uint8).view(columns * groups, -1)
    result: Tensor = getattr(torch.ops.quantized, _fused_unpack_name(bits))(flat)
    return result.view(columns, -1)


def pack(values: Int[Tensor, "elements columns"], bits: int) -> Int[Tensor, "packed columns"]:
    """Pack integers ``0 .. 2**bits - 1`` into int32 words.

    Raises:
        FormatError: The number of elements does not fill whole runs of words.
    """
    run = run_length(bits)
    if values.shape[0] % run:
        raise FormatError(f"elements: expected a multiple of {run}, got {values.shape[0]}")
    runs = values.view(-1, run, values.shape[1]).to(torch.int64)
    words = runs.new_zeros(runs.shape[0], words_per_run(bits), runs.shape[2])
    for element in range(run):
        word, shift = divmod(element * bits, 32)
        words[:, word] |= (runs[:, element] << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= runs[:, element] >> (32 - shift)
    return as_int32(words.view(-1, values.shape[1]))


def as_int32(words: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Turn unsigned 32-bit numbers held in int64 into the int32 with the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
