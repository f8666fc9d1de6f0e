"""The parts of a training step's memory, each with its formula in words.

What the forward does (``stacked``, ``linear``, ``trained_vector``): the batch is stacked once per
probe and runs through the layers in inference mode without cache or attention mask, in fp32 on a
CPU and in 16 bits on CUDA; a layer's codes become fp32 numbers one tile of output rows at a time;
logits exist at answer positions only; shifted vectors exist for a window of layers at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from qzo.method.coordinates import BY_FACTORS, num_values
from qzo.method.optimizers import REMEMBERED
from qzo.model.lazy_layers import TILE_ELEMENTS as HEAD_TILE_ELEMENTS
from qzo.model.linear import TILE_ELEMENTS
from qzo.model.placement import DTYPES
from qzo.model.stacked import LOGITS_ELEMENTS
from qzo.plan.shapes import LinearShape, ModelShapes
from qzo.plan.sizes import (
    Quantization,
    codes_bytes,
    group_index_bytes,
    num_scales,
    scales_bytes,
    zeros_bytes,
)
from qzo.plan.workload import Differentiated, Trained, Workload

TILE_STEP = 32  # rows; a tile has a multiple of them
WINDOW = 2**18  # elements of one shifted vector at one time

# What a run of the trainer has in memory beside the other parts, at its peak: peak resident memory
# of `qzo bench memory --shape smollm2-135m --batch-size 1` less all other parts. Python 3.11, Linux
# x86-64, 2 cores, torch 2.13 for CPU, transformers 5.23.
CPU_PROCESS_BYTES = 393 * 2**20
TRITON_BYTES = 83 * 2**20  # torch imports it where it is installed
BITSANDBYTES_BYTES = 50 * 2**20  # unpacks NF4
# Freed blocks below 32 MiB, the largest that glibc ever takes from its heap, stay with the process
# where something behind them is in use: half to all of the activations, different in every run,
# and up to 110 MiB, on the same computer. Larger blocks go back to the system.
KEPT_SHARE = 0.75
KEPT_BYTES_MAX = 110 * 2**20
# Of a backward they are between an eighth and nearly half of what is alive, by the sizes of its
# tensors: ``qzo bench memory --model SmolLM2 --first-order-blocks``; recipes/BENCHMARKS.md.
BACKWARD_SHARE = 0.45
CUDA_ALLOWANCE_BYTES = 2**30


@dataclass(frozen=True)
class Part:
    """One line of the table.

    Attributes:
        name: What the memory holds.
        bytes: How much.
        formula: The arithmetic behind it, in words and numbers.
        streams: Under ``memory_limit`` it is there only while it is used.
    """

    name: str
    bytes: int
    formula: str
    streams: bool = False


def all_parts(
    shapes: ModelShapes,
    quantization: Quantization,
    workload: Workload,
    row_bytes: int,
    *,
    token_values: int,
    trained: Trained,
    stored_dtype: str,
    differentiated: Differentiated | None = None,
) -> tuple[Part, ...]:
    """List every part, always in the same order, those of zero bytes included.

    Args:
        shapes: Layers and counts of the model.
        quantization: How its codes and scales are stored.
        workload: What the step does.
        row_bytes: Activations of one row of the stacked batch.
        token_values: Keys and values that all layers keep of a token.
        trained: What is trained.
        stored_dtype: Of what is not quantized, in the files.
        differentiated: What gets exact gradients, if anything does.
    """
    forward = workload.forward_rows * row_bytes
    of_scales = num_trained(trained.linears, quantization, workload.coordinates)
    return (
        *_file_parts(shapes, quantization, workload.device),
        _master(of_scales, workload.coordinates),
        _instead_of_scales(trained.num_instead, workload.num_probes),
        _optimizer(of_scales + trained.num_instead, workload.optimizer),
        *_float_parts(shapes, workload, stored_dtype),
        _tile(shapes, quantization, workload, stored_dtype),
        _activations(workload, row_bytes),
        _keys_and_values(workload, token_values),
        _logits(workload, shapes.vocab_size, row_bytes),
        _backward(differentiated, quantization, workload, shapes.vocab_size, forward=forward),
        _directions(shapes, trained, quantization, workload),
        _framework(quantization, workload, row_bytes),
    )


def _file_parts(shapes: ModelShapes, quantization: Quantization, device: str) -> tuple[Part, ...]:
    """Count what stays as it lies in the file, and what reading adds to it.

    On a CPU all of it can stream, on CUDA the codes alone.
    """
    is_mapped = device == "cpu"
    layers, bits = shapes.linears, quantization.bits
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    scales = sum(num_scales(layer, quantization) for layer in layers)
    codes = sum(codes_bytes(layer, quantization) for layer in layers)
    group_index = sum(group_index_bytes(layer, quantization) for layer in layers)
    return (
        Part(
            "codes",
            codes,
            f"{weights:,} weights x {bits} bits, as in the file (mapped pages)",
            streams=True,
        ),
        _zeros(shapes, quantization, is_mapped=is_mapped),
        Part(
            "base scales",
            sum(scales_bytes(layer, quantization) for layer in layers),
            f"{scales:,} scales x {_scale_words(quantization)}, as in the file",
            streams=is_mapped,
        ),
        Part(
            "un-nested scales",
            4 * scales if quantization.is_nested else 0,
            f"{scales:,} x 4 bytes" if quantization.is_nested else "scales are not nested",
        ),
        Part(
            "g_idx",
            group_index,
            "4 bytes an input column" if group_index else "none",
            streams=is_mapped,
        ),
    )


def _scale_words(quantization: Quantization) -> str:
    if quantization.format == "gptq":
        return "2 bytes"
    return "(1 byte + 4 bytes / 256)" if quantization.is_nested else "4 bytes"


def _zeros(shapes: ModelShapes, quantization: Quantization, *, is_mapped: bool) -> Part:
    packed = sum(zeros_bytes(layer, quantization) for layer in shapes.linears)
    if not packed:
        return Part("zeros", 0, f"{quantization.format} has none")
    count = sum(num_scales(layer, quantization) for layer in shapes.linears)
    formula = f"{count:,} zero points x {quantization.bits} bits, as in the file"
    if quantization.is_symmetric:
        return Part("zeros", packed, formula, streams=is_mapped)
    return Part("zeros", packed + count, f"{formula}, + 1 byte each when unpacked")


def num_trained(layers: Sequence[LinearShape], quantization: Quantization, coordinates: str) -> int:
    """Return the length of the trained vector."""
    if coordinates not in BY_FACTORS:
        return sum(num_scales(layer, quantization) for layer in layers)
    groups = [num_scales(layer, quantization) // layer.out_features for layer in layers]
    return sum(
        num_values(coordinates, layer.out_features, count)
        for layer, count in zip(layers, groups, strict=True)
    )


def _master(count: int, coordinates: str) -> Part:
    units = {"row": "output rows", "column": "groups of inputs", "rank_one": "rows and groups"}
    unit = units.get(coordinates, "scales")
    return Part("master", 4 * count, f"{count:,} {unit} x 4 bytes (the trained vector, fp32)")


def _instead_of_scales(count: int, num_probes: int) -> Part:
    if not count:
        return Part("LoRA or prefix", 0, "the scales are trained")
    window = num_probes * min(count, WINDOW)
    formula = f"{count:,} values and {window:,} elements of {num_probes} shifted ones x 4 bytes"
    return Part("LoRA or prefix", 4 * (count + window), formula)


def _optimizer(count: int, name: str) -> Part:
    remembered = REMEMBERED.get(name, 0)
    if not remembered:
        return Part("optimizer", 0, f"{name} remembers nothing for a value")
    return Part("optimizer", 4 * remembered * count, f"{count:,} values x {remembered} x 4 bytes")


def _float_parts(shapes: ModelShapes, workload: Workload, stored_dtype: str) -> tuple[Part, ...]:
    """Count the weights that are not quantized.

    They are converted to the activations' type; on a CPU embeddings and head stay in the file. All
    pages of the embeddings count: one token maps up to 2 MiB around its row.
    """
    is_mapped = workload.device == "cpu"

    def part(name: str, count: int, none: str, *, is_file: bool) -> Part:
        dtype = stored_dtype if is_file else workload.dtype
        size = DTYPES[dtype].itemsize
        where = ", as in the file (mapped pages)" if is_file else ""
        formula = f"{count:,} x {size} bytes ({dtype}{where})" if count else none
        return Part(name, size * count, formula, streams=is_file)

    head = "tied to the embeddings, or quantized"
    return (
        part("embeddings", shapes.num_embedding, "none", is_file=is_mapped),
        part("head", shapes.num_head, head, is_file=is_mapped),
        part("norms, biases, other", shapes.num_other, "none", is_file=False),
    )


def _tile(
    shapes: ModelShapes, quantization: Quantization, workload: Workload, stored_dtype: str
) -> Part:
    """Count the buffers that all layers share; their size is that of the largest tile."""
    layers = max(rows * columns for rows, columns in map(_tile_shape, shapes.linears))
    elements, size, words = layers, 4.0, "4 decoded"
    is_cpu = workload.device == "cpu"
    if is_cpu and quantization.format == "gptq" and quantization.bits in {2, 4}:
        size, words = size + quantization.bits / 8, f"{words} + {quantization.bits / 8} rearranged"
    if workload.coordinates not in BY_FACTORS and workload.num_probes > 1:
        size, words = size + 4, f"{words} + 4 times a probe's scales"
    if workload.dtype != "float32":
        size, words = size + 2, f"{words} + 2 in {workload.dtype}"
    if quantization.format != "gptq" and not (is_cpu and _has_whole_blocks(shapes, quantization)):
        size, words = size + 5, f"{words} + 5 as table indices"
    is_converted = is_cpu and stored_dtype != workload.dtype
    of_head = 4 * min(shapes.num_head or shapes.num_embedding, HEAD_TILE_ELEMENTS) * is_converted
    formula = f"{elements:,} weights x {size:g} bytes ({words}); or {of_head:,} bytes of the head"
    return Part("dequantized tile", max(int(elements * size), of_head), formula)


def _has_whole_blocks(shapes: ModelShapes, quantization: Quantization) -> bool:
    return all(layer.in_features % quantization.group_size == 0 for layer in shapes.linears)


def _tile_shape(layer: LinearShape) -> tuple[int, int]:
    step = max(TILE_ELEMENTS // layer.in_features // TILE_STEP, 1) * TILE_STEP
    return min(step, layer.out_features), layer.in_features


def _activations(workload: Workload, row_bytes: int) -> Part:
    formula = (
        f"{_rows(workload)} x {row_bytes:,} bytes a row of {workload.seq_len:,} tokens "
        f"({workload.dtype}, traced on meta tensors)"
    )
    return Part("activations", workload.forward_rows * row_bytes, formula)


def _keys_and_values(workload: Workload, token_values: int) -> Part:
    """Count the cache of a generation."""
    if not workload.max_new_tokens:
        return Part("keys and values", 0, "nothing is generated")
    tokens = workload.seq_len + workload.max_new_tokens
    size = DTYPES[workload.dtype].itemsize
    num_bytes = workload.forward_rows * tokens * token_values * size
    formula = (
        f"{workload.forward_rows} rows generated together x {tokens:,} tokens x {token_values:,} "
        f"values x {size} bytes"
    )
    return Part("keys and values", num_bytes, formula)


def _logits(workload: Workload, vocab_size: int, row_bytes: int) -> Part:
    """Count what logits need beyond the activations, which are gone by then."""
    size, positions = DTYPES[workload.dtype].itemsize, workload.forward_rows * workload.answer_len
    at_once = min(positions, max(LOGITS_ELEMENTS // vocab_size, 1))
    in_fp32 = 1 if workload.device == "cpu" else at_once
    num_bytes = vocab_size * (at_once * size + in_fp32 * 8)
    formula = (
        f"{at_once:,} at a time of {_rows(workload)} x {workload.answer_len} answer positions x "
        f"{vocab_size:,} tokens x {size} bytes, + 8 bytes at {in_fp32:,} of them (log-sum-exp in "
        f"fp32) = {num_bytes:,}; what exceeds the activations, which are gone by then"
    )
    return Part("logits", max(num_bytes - workload.forward_rows * row_bytes, 0), formula)


def _backward(
    differentiated: Differentiated | None,
    quantization: Quantization,
    workload: Workload,
    vocab_size: int,
    *,
    forward: int,
) -> Part:
    """Count what a backward needs beyond the activations of the probes, which are gone by then."""
    if differentiated is None:
        return Part("backward", 0, "no exact gradients")
    # Logits, their slopes and two more of the log-sum-exp; in 16 bits the latter are in fp32.
    is_cpu = workload.device == "cpu"
    logits = (16 if is_cpu else 10) * workload.answer_len * vocab_size
    share = 1 + BACKWARD_SHARE * is_cpu
    kept = int(workload.batch_size * (differentiated.row_bytes + logits) * share)
    trained = num_trained(differentiated.linears, quantization, workload.coordinates)
    tile = 4 * max(rows * columns for rows, columns in map(_tile_shape, differentiated.linears))
    formula = (
        f"{workload.batch_size} examples x ({differentiated.row_bytes:,} bytes of the graph "
        f"+ {logits:,} of logits and their slopes) x {share:g} for freed blocks = "
        f"{kept:,}, less the activations; + {trained:,} values x 16 bytes (gradient, moments) + "
        f"{tile:,} of a second tile"
    )
    return Part("backward", max(kept - forward, 0) + 16 * trained + tile, formula)


def _directions(
    shapes: ModelShapes, trained: Trained, quantization: Quantization, workload: Workload
) -> Part:
    """Count the window of shifted vectors, and one layer's scales in fp32 for each probe.

    Where rows and columns are multiplied, every example has a direction of its own.
    """
    is_by_factors = workload.coordinates in BY_FACTORS
    probes = workload.forward_rows if is_by_factors else workload.num_probes
    counts = [num_trained((x,), quantization, workload.coordinates) for x in trained.linears]
    window = probes * min(sum(counts), max([WINDOW, *counts]))
    most = max(num_scales(layer, quantization) for layer in shapes.linears)
    copies = 1 + (workload.num_probes if workload.coordinates == "relative" else 0)
    formula = (
        f"{window:,} elements of {probes} shifted vectors x 4 bytes (their directions are gone "
        f"before the activations are many), + {most:,} scales of a layer x 4 bytes x {copies}"
    )
    return Part("directions", window * 4 + most * 4 * copies, formula)


def _rows(workload: Workload) -> str:
    if workload.forward_rows < workload.num_rows:
        return f"{workload.forward_rows} rows"
    return f"{workload.num_probes} probes x {workload.batch_size} examples"


def _framework(quantization: Quantization, workload: Workload, row_bytes: int) -> Part:
    if workload.device == "cuda":
        formula = "CUDA context, kernels, fragmentation: an allowance, not measured"
        return Part("framework", CUDA_ALLOWANCE_BYTES, formula)
    sizes = {
        "Python, torch, transformers and the run": CPU_PROCESS_BYTES,
        "Triton": TRITON_BYTES if find_spec("triton") is not None else 0,
        "bitsandbytes": 0 if quantization.format == "gptq" else BITSANDBYTES_BYTES,
        "freed blocks that the allocator keeps": int(
            min(KEPT_SHARE * workload.forward_rows * row_bytes, KEPT_BYTES_MAX)
        ),
    }
    words = " + ".join(f"{size >> 20} MiB {name}" for name, size in sizes.items() if size)
    return Part("framework", sum(sizes.values()), f"measured: {words}")
