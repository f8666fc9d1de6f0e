"""Will it fit: memory of a training step, part by part, from a config.json alone.

``peak = codes + zeros + scales + master + g_idx + floating point weights + tile + activations
+ logits + backward + directions + framework``. Each part carries its formula in words. The sum is
an upper bound: the logits exist when the activations of the last layer are already gone.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedModel

from qzo.checkpoint.atomic import read_json
from qzo.checkpoint.checkpoint import dtype_name, quantization_config
from qzo.errors import ConfigError
from qzo.method.coordinates import BY_FACTORS, Coordinates, crossing_message
from qzo.method.optimizers import OPTIMIZERS
from qzo.method.probes import stacked_probes
from qzo.model.blocks import find_blocks
from qzo.model.layer_names import is_named, none_named
from qzo.model.load import trained_blocks
from qzo.model.placement import DTYPES, default_dtype
from qzo.plan.activation_trace import activation_bytes_per_row, backward_bytes_per_row
from qzo.plan.answer_memory import tokens_within
from qzo.plan.shapes import (
    ModelShapes,
    build_skeleton,
    head_name,
    model_shapes,
    values_of_token,
)
from qzo.plan.sizes import (
    Quantization,
    assumed_quantization,
    block_size,
    codes_bytes,
    group_index_bytes,
    holds_codes,
    num_scales,
    read_quantization,
    scales_bytes,
    with_group_size,
    zeros_bytes,
)
from qzo.plan.table import Part, all_parts, num_trained
from qzo.plan.workload import EVAL_BATCH_SIZE, Differentiated, Trained, Workload


@dataclass(frozen=True)
class Plan:
    """What a training step needs, and whether it fits.

    Attributes:
        model_type: Architecture.
        quantization: What the config says of the codes, or what was assumed.
        workload: What was asked.
        device: ``cpu`` or ``cuda``.
        num_quantized_weights: Weights that are codes.
        num_scales: Scales of all layers.
        num_trained: Length of the trained vector.
        checkpoint_bytes: Tensors in the checkpoint's files.
        parts: The table.
        peak_bytes: Sum of the parts.
        smallest_peak_bytes: The same with one example a forward.
        memory_bytes: What is there; None if not asked.
        verdict: ``yes``, ``yes with per_device_train_batch_size N and
            gradient_accumulation_steps M``, ``no``, or None if not asked.
        per_device_train_batch_size: N; the whole batch if it fits, None if nothing does.
        gradient_accumulation_steps: M; ``N * M`` is the batch that was asked for.
        generation_batch_size: Sequences that are generated together; None: nothing is generated.
        notes: Assumptions, one sentence each.
    """

    model_type: str
    quantization: Quantization
    workload: Workload
    device: str
    num_quantized_weights: int
    num_scales: int
    num_trained: int
    checkpoint_bytes: int
    parts: tuple[Part, ...]
    peak_bytes: int
    smallest_peak_bytes: int
    memory_bytes: int | None
    verdict: str | None
    per_device_train_batch_size: int | None
    gradient_accumulation_steps: int | None
    generation_batch_size: int | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dictionaries, strings and numbers, ready for JSON."""
        return asdict(self)


def plan(
    path: str | Path,
    *,
    batch_size: int = 16,
    seq_len: int = 512,
    answer_len: int | None = None,
    memory_bytes: int | None = None,
    coordinates: str = "row",
    num_probes: int = 2,
    evaluations: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    first_order_blocks: int = 0,
    optimizer: str = "sgd",
    lora_rank: int = 0,
    prefix_tokens: int = 0,
    modules: Sequence[str] | None = None,
    num_blocks: int | None = None,
    depth: tuple[float, float] | None = None,
    max_new_tokens: int = 0,
    generation_batch_size: int | None = None,
    assumed: Quantization | None = None,
) -> Plan:
    """Plan the memory of a training step from a config.json; weights are not read.

    Args:
        path: A folder with a config.json, or the file itself.
        batch_size: See ``Workload``, as for the other arguments named there.
        seq_len: See ``Workload``.
        answer_len: See ``Workload``; 16, or ``seq_len`` if that is less, if None.
        memory_bytes: Memory that is there; decides the verdict.
        coordinates: See ``Workload``.
        num_probes: See ``Workload``.
        evaluations: Of an example in a step; where given, as many probes are stacked as training
            stacks of them, more with a smaller batch. ``num_probes`` is not read then.
        dtype: See ``Workload``; what the model is loaded in on that device if None.
        device: See ``Workload``.
        first_order_blocks: See ``Workload``; at most the blocks there are.
        optimizer: See ``Workload``.
        lora_rank: See ``Workload``; of the layers that are chosen.
        prefix_tokens: See ``Workload``; in all layers.
        modules: See ``Workload``.
        num_blocks: See ``Workload``.
        depth: See ``Workload``.
        max_new_tokens: See ``Workload``; the probes of a generation are not stacked as those of a
            loss, but as many as are generated together.
        generation_batch_size: See ``Workload``; if None, as many as ``memory_bytes`` holds.
        assumed: Quantization of a model that has none yet; GPTQ with 4 bits if None.

    An argument or an architecture that cannot be used is a ConfigError.
    """
    if evaluations is not None:
        num_probes = evaluations
        if not max_new_tokens:
            num_probes = stacked_probes(evaluations, batch_size, seq_len)
    config_path = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    config = read_json(config_path)
    scored = min(Workload.answer_len, seq_len) if answer_len is None else answer_len
    workload = Workload(
        batch_size,
        seq_len,
        scored,
        coordinates,
        num_probes,
        dtype or _default_dtype(config, device),
        device,
        first_order_blocks=first_order_blocks,
        optimizer=optimizer,
        lora_rank=lora_rank,
        prefix_tokens=prefix_tokens,
        modules=None if modules is None else tuple(modules),
        num_blocks=num_blocks,
        depth=depth,
        max_new_tokens=max_new_tokens,
        generation_batch_size=generation_batch_size,
    )
    _check_workload(workload)
    quantization = _quantization(config_path.parent, config, assumed)
    return _plan(config, quantization, workload, memory_bytes, evaluations)


def _quantization(
    folder: Path, config: dict[str, Any], assumed: Quantization | None
) -> Quantization:
    """Return what a checkpoint says of its codes, or what is assumed of a model without any.

    Raises:
        ConfigError: Both.
    """
    stored = quantization_config(folder, config)
    if stored is None:
        return assumed or assumed_quantization()
    if assumed is not None:
        raise ConfigError(
            "format, bits, group_size: expected none of them for a checkpoint that is quantized "
            f"already, got {assumed.format} with {assumed.bits} bits; leave them out"
        )
    return read_quantization(stored, block_size(folder))


def _check_workload(workload: Workload) -> None:
    if workload.max_new_tokens < 0:
        raise ConfigError(
            f"max_new_tokens: expected a number of at least 0, got {workload.max_new_tokens}"
        )
    if workload.generation_batch_size is not None and workload.generation_batch_size < 1:
        raise ConfigError(
            "generation_batch_size: expected a number above 0, got "
            f"{workload.generation_batch_size}"
        )
    for key in ("batch_size", "seq_len", "answer_len", "num_probes"):
        if getattr(workload, key) < 1:
            raise ConfigError(f"{key}: expected a number above 0, got {getattr(workload, key)}")
    if workload.answer_len > workload.seq_len:
        raise ConfigError(
            f"answer_len: expected at most seq_len, {workload.seq_len}, got {workload.answer_len}"
        )
    if workload.coordinates not in get_args(Coordinates):
        raise ConfigError(
            f"coordinates: expected one of {', '.join(get_args(Coordinates))}, got "
            f"{workload.coordinates!r}"
        )
    if workload.device not in {"cpu", "cuda"}:
        raise ConfigError(f"device: expected 'cpu' or 'cuda', got {workload.device!r}")
    if workload.dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {workload.dtype!r}")
    if workload.optimizer not in OPTIMIZERS:
        raise ConfigError(
            f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {workload.optimizer!r}"
        )


def _plan(
    config: dict[str, Any],
    quantization: Quantization,
    workload: Workload,
    memory: int | None,
    evaluations: int | None,
) -> Plan:
    model = build_skeleton(config, DTYPES[workload.dtype])
    head = head_name(model)
    shapes = model_shapes(model, lambda name: holds_codes(quantization, name, head))
    if not shapes.linears:
        raise ConfigError("config.json: expected linear layers to quantize, found none")
    quantization = with_group_size(quantization, shapes.linears)
    _check_rows(shapes, quantization, workload.coordinates)
    row_bytes = activation_bytes_per_row(model, workload.seq_len)
    trained = _trained(model, shapes, workload)
    differentiated = _differentiated(model, trained, workload)

    token_values = values_of_token(model.config) if workload.max_new_tokens else 0

    def parts_of(work: Workload) -> tuple[Part, ...]:
        return all_parts(
            shapes,
            quantization,
            work,
            row_bytes,
            token_values=token_values,
            trained=trained,
            stored_dtype=_stored_dtype(config),
            differentiated=differentiated,
        )

    @cache
    def work_of(batch_size: int) -> Workload:
        num_probes = workload.num_probes
        if evaluations is not None and not workload.max_new_tokens:
            num_probes = stacked_probes(evaluations, batch_size, workload.seq_len)
        work = replace(workload, batch_size=batch_size, num_probes=num_probes)
        return _generating(work, model.config, memory, parts_of)

    @cache
    def parts(batch_size: int) -> tuple[Part, ...]:
        return parts_of(work_of(batch_size))

    def peak(batch_size: int) -> int:
        return sum(part.bytes for part in parts(batch_size))

    fitting = None
    if memory is not None:
        fitting = _largest_divisor(workload.batch_size, lambda size: peak(size) <= memory)
    return Plan(
        model_type=str(config.get("model_type")),
        quantization=quantization,
        workload=workload,
        device=workload.device,
        num_quantized_weights=sum(x.out_features * x.in_features for x in shapes.linears),
        num_scales=sum(num_scales(layer, quantization) for layer in shapes.linears),
        num_trained=trained.num_instead
        + num_trained(trained.linears, quantization, workload.coordinates),
        checkpoint_bytes=_checkpoint_bytes(shapes, quantization, config),
        parts=parts(workload.batch_size),
        peak_bytes=peak(workload.batch_size),
        smallest_peak_bytes=peak(1),
        memory_bytes=memory,
        verdict=None if memory is None else _verdict(workload.batch_size, fitting),
        per_device_train_batch_size=fitting,
        gradient_accumulation_steps=fitting and workload.batch_size // fitting,
        generation_batch_size=work_of(workload.batch_size).generation_batch_size,
        notes=_notes(quantization, work_of(workload.batch_size), model.config._attn_implementation),
    )


def _generating(
    work: Workload,
    config: Any,
    memory: int | None,
    parts_of: Callable[[Workload], Sequence[Part]],
) -> Workload:
    """Decide how many sequences are generated together, as a run does.

    Beside a model that fits it is what the rest of the memory holds. Beside one that streams it is
    half of what is left: the other half is for its blocks.
    """
    if not work.max_new_tokens:
        return replace(work, generation_batch_size=None)
    rows = work.generation_batch_size or work.num_rows
    if memory is not None and work.generation_batch_size is None:
        one = parts_of(replace(work, generation_batch_size=1))
        space: float = memory - sum(part.bytes for part in one)
        if space <= 0:
            space = (space + sum(part.bytes for part in one if part.streams)) / 2
        tokens = tokens_within(space, config, DTYPES[work.dtype].itemsize)
        rows = tokens // (work.seq_len + work.max_new_tokens)
    return replace(work, generation_batch_size=min(max(rows, 1), work.num_rows))


def _trained(model: PreTrainedModel, shapes: ModelShapes, workload: Workload) -> Trained:
    """Choose the layers as ``qzo.model.trained_layers`` does.

    Raises:
        ConfigError: There are none.
    """
    name, blocks = find_blocks(model)
    first, stop = trained_blocks(len(blocks), workload.num_blocks, workload.depth)
    inside = tuple(f"{name}.{place}." for place in range(first, stop))
    ends = (*inside, head_name(model)) if stop == len(blocks) else inside
    modules = workload.modules
    linears = [
        layer
        for layer in shapes.linears
        if layer.name.startswith(ends)
        if modules is None or is_named(layer.name, modules)
    ]
    if not linears:
        names = [layer.name for layer in shapes.linears]
        raise ConfigError(none_named("modules", names, [*modules] if modules else None))
    tokens = workload.prefix_tokens
    num_instead = tokens * values_of_token(model.config) if tokens else 0
    num_instead += workload.lora_rank * sum(x.out_features + x.in_features for x in linears)
    return Trained(() if num_instead else linears, num_instead)


def _differentiated(
    model: PreTrainedModel, trained: Trained, workload: Workload
) -> Differentiated | None:
    count = workload.first_order_blocks
    if count == 0:
        return None
    name, blocks = find_blocks(model)
    if not 0 <= count <= len(blocks):
        raise ConfigError(
            f"first_order_blocks: expected 0 to {len(blocks)}, the blocks there are, got {count}"
        )
    places = tuple(f"{name}.{place}." for place in range(len(blocks) - count, len(blocks)))
    linears = [layer for layer in trained.linears if layer.name.startswith(places)]
    if not linears:
        return None
    names = [layer.name for layer in linears]
    return Differentiated(
        linears, backward_bytes_per_row(model, workload.seq_len, names, workload.coordinates)
    )


def _check_rows(shapes: ModelShapes, quantization: Quantization, coordinates: str) -> None:
    if quantization.format == "gptq" or coordinates not in BY_FACTORS:
        return
    for layer in shapes.linears:
        if layer.in_features % quantization.group_size:
            raise ConfigError(crossing_message(coordinates, layer.name))


def _largest_divisor(batch_size: int, fits: Callable[[int], bool]) -> int | None:
    """Return the largest micro-batch that fits and divides the batch, or None."""
    divisors = (size for size in range(batch_size, 0, -1) if batch_size % size == 0)
    return next((size for size in divisors if fits(size)), None)


def _verdict(batch_size: int, fitting: int | None) -> str:
    if fitting is None:
        return "no"
    if fitting == batch_size:
        return "yes"
    steps = batch_size // fitting
    return f"yes with per_device_train_batch_size {fitting} and gradient_accumulation_steps {steps}"


def _checkpoint_bytes(
    shapes: ModelShapes, quantization: Quantization, config: dict[str, Any]
) -> int:
    size = DTYPES[_stored_dtype(config)].itemsize
    of_layer = (codes_bytes, zeros_bytes, scales_bytes, group_index_bytes)
    quantized = sum(count(layer, quantization) for layer in shapes.linears for count in of_layer)
    return quantized + size * (shapes.num_embedding + shapes.num_head + shapes.num_other)


def _default_dtype(config: dict[str, Any], device: str) -> str:
    dtype = default_dtype(config, device)
    return dtype if dtype in DTYPES else "float16"


def _stored_dtype(config: dict[str, Any]) -> str:
    dtype = dtype_name(config)
    return dtype if dtype in DTYPES else "float16"


def _notes(quantization: Quantization, workload: Workload, attention: str) -> tuple[str, ...]:
    notes = ["The peak is the sum of all parts: an upper bound, not all are alive at once."]
    if quantization.is_assumed:
        guess = f"{quantization.format}, {quantization.bits} bits, group {quantization.group_size}"
        notes.append(f"config.json has no quantization_config; assumed {guess}.")
    if attention == "eager":
        notes.append("Attention is eager in this model: its T x T scores are in the activations.")
    else:
        notes.append(f"Attention is {attention}: no T x T scores; batches need no attention mask.")
    if workload.generation_batch_size is not None:
        notes.append(
            f"Of {workload.num_rows} sequences {workload.generation_batch_size} are generated "
            "together: generation_batch_size, or what the memory holds."
        )
    elif workload.num_rows < EVAL_BATCH_SIZE:
        notes.append(
            "An evaluation has per_device_eval_batch_size examples a forward, "
            f"{EVAL_BATCH_SIZE} unless "
            f"set; with more than {workload.num_rows} it needs more than this."
        )
    if workload.device == "cuda":
        notes.append("Memory of the device; the file on the host is not counted.")
    return tuple(notes)
