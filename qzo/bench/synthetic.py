"""Checkpoints of a published shape with random codes, to measure time and memory with.

Every tensor is drawn from its own stream, Philox with the key (seed, number of the tensor), and
written before the next one is drawn. Codes are uniform, and scales are such that the weights have
the standard deviation that the architecture starts with: activations stay finite, losses mean
nothing. There is no tokenizer.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import PreTrainedModel

from quantizers import gptq, nf4
from quantizers.weight import QuantizedWeight
from qzo.bench.model_shapes import SHAPES
from qzo.checkpoint.atomic import new_folder, read_json, write_json
from qzo.checkpoint.cache import cache_folder
from qzo.checkpoint.tensors import CheckpointWriter
from qzo.errors import CheckpointError, ConfigError
from qzo.plan.shapes import LinearShape, build_skeleton, head_name, linear_shapes
from qzo.quantize.settings import QuantizeSettings, bitsandbytes_config, gptq_config

FORMATS = ("gptq", "nf4")
SHARD_BYTES = 2**30

_MARK = "synthetic.json"
_VERSION = 1  # other bytes for the same settings need another number
_SPREAD = 0.2  # scales differ from their mean by up to this part of it
_BITS = 4
_V1_ZEROS = 0x77777777  # eight zero points of 8, minus one each
_NF4_BLOCK = 64


@dataclass(frozen=True)
class Synthetic:
    """Which checkpoint to make.

    Attributes:
        shape: A key of ``model_shapes.SHAPES``.
        format: ``gptq`` or ``nf4``.
        group_size: Inputs that share a scale. None: 128 for GPTQ where it divides the inputs of
            every layer, else 64.
        seed: Of codes, scales and embeddings.
        num_layers: Decoder blocks; those of the shape if None.

    Raises:
        ConfigError: A value is not among those, or the group size divides no layer.
    """

    shape: str
    format: str = "gptq"
    group_size: int | None = None
    seed: int = 0
    num_layers: int | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(f"shape: expected one of {', '.join(SHAPES)}, got {self.shape!r}")
        if self.format not in FORMATS:
            raise ConfigError(f"format: expected gptq or nf4, got {self.format!r}")
        if self.seed < 0:
            raise ConfigError(f"seed: expected a number of at least 0, got {self.seed}")
        if self.num_layers is not None and self.num_layers < 1:
            raise ConfigError(f"num_layers: expected a number above 0, got {self.num_layers}")
        size = self.group_size
        is_possible = size is None or (
            size == _NF4_BLOCK if self.format == "nf4" else size > 0 and self._divides(size)
        )
        if not is_possible:
            usual = "64" if self.format == "nf4" else "a divisor of the input size of every layer"
            raise ConfigError(f"group_size: expected {usual}, got {size}")

    @property
    def settings(self) -> QuantizeSettings:
        """The kind of checkpoint, its group size decided."""
        usual = 128 if self.format == "gptq" and self._divides(128) else _NF4_BLOCK
        return QuantizeSettings(format=self.format, group_size=self.group_size or usual)

    @property
    def name(self) -> str:
        """Folder name that no other checkpoint has."""
        layers = "" if self.num_layers is None else f"-{self.num_layers}-layers"
        group_size = self.settings.group_size
        return f"{self.shape}{layers}-{self.format}-g{group_size}-seed{self.seed}"

    @property
    def config(self) -> dict[str, Any]:
        """``config.json``."""
        config = dict(SHAPES[self.shape])
        if self.num_layers is not None:
            config["num_hidden_layers"] = self.num_layers
        if self.format == "gptq":
            return {**config, "quantization_config": gptq_config(self.settings)}
        quantization = bitsandbytes_config(self.settings, torch.float16, [])
        return {**config, "quantization_config": quantization}

    def _divides(self, group_size: int) -> bool:
        sizes = (SHAPES[self.shape][key] for key in ("hidden_size", "intermediate_size"))
        return all(size % group_size == 0 for size in sizes)


def default_folder() -> Path:
    """Return where synthetic checkpoints are kept between runs: in the user's cache."""
    return cache_folder() / "synthetic"


def synthetic_checkpoint(
    what: Synthetic, parent: Path | None = None, *, max_shard_bytes: int = SHARD_BYTES
) -> Path:
    """Return the folder of a synthetic checkpoint; write it unless it is there, complete.

    Args:
        what: Which checkpoint.
        parent: Folder that holds its folder; the user's cache if None.
        max_shard_bytes: A shard is closed before it would grow beyond this.

    Raises:
        CheckpointError: Another checkpoint is in its place, or the disk is too small.
    """
    folder = (parent or default_folder()) / what.name
    mark = {"version": _VERSION, **asdict(what), "group_size": what.settings.group_size}
    if (folder / _MARK).is_file():
        if read_json(folder / _MARK) != mark:
            raise CheckpointError(
                f"{folder}: expected a synthetic checkpoint of version {_VERSION}, found another; "
                "remove the folder"
            )
        return folder
    with new_folder(folder) as partial:
        _write(partial, what, max_shard_bytes)
        write_json(partial / _MARK, mark)
    return folder


def _write(folder: Path, what: Synthetic, max_shard_bytes: int) -> None:
    """Write everything but the mark.

    Raises:
        CheckpointError: The disk is too small.
    """
    config = what.config
    skeleton = build_skeleton(config, torch.float16)
    needed = _num_bytes(skeleton, what) + max_shard_bytes  # the writer's temporary file
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder.parent}: expected {needed / 2**30:.1f} GiB of free disk for {what.name}, "
            f"found {free / 2**30:.1f} GiB; choose another --dir"
        )
    writer = CheckpointWriter(folder, max_shard_bytes=max_shard_bytes)
    for name, tensor in _tensors(skeleton, what):
        writer.add(name, tensor)
    writer.close()
    write_json(folder / "config.json", config)


def _num_bytes(skeleton: PreTrainedModel, what: Synthetic) -> int:
    """Return about how many bytes the tensors have: half a byte a code, 16 bits what has none."""
    coded = sum(x.in_features * x.out_features for x in _coded(skeleton).values())
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    group_size = what.settings.group_size or 1
    group_bits = 32 if what.format == "nf4" else 16 + _BITS  # scale, and zero point
    return 2 * (total - coded) + coded // 2 + group_bits * coded // (8 * group_size)


def _coded(skeleton: PreTrainedModel) -> dict[str, LinearShape]:
    """Return the layers that hold codes, by name: all linear ones but the head."""
    head = head_name(skeleton)
    return {shape.name: shape for shape in linear_shapes(skeleton) if shape.name != head}


def _tensors(skeleton: PreTrainedModel, what: Synthetic) -> Iterator[tuple[str, Tensor]]:
    """Draw the tensors one after the other, in the order of the model."""
    coded = _coded(skeleton)
    std = float(skeleton.config.initializer_range)
    for number, (name, parameter) in enumerate(skeleton.named_parameters()):
        stream = np.random.Philox(key=[what.seed, number])
        layer = name.removesuffix(".weight")
        if layer not in coded:
            yield name, _float_tensor(parameter, std, stream)
            continue
        draw = _gptq_layer if what.format == "gptq" else _nf4_layer
        for role, tensor in draw(coded[layer], what.settings.group_size or 1, std, stream):
            yield f"{layer}.{role}", tensor


def random_weight(
    format_name: str, out_features: int, in_features: int, *, group_size: int = 64, seed: int = 0
) -> QuantizedWeight:
    """Draw one layer of random codes, as those of a synthetic checkpoint.

    Args:
        format_name: ``gptq`` or ``nf4``.
        out_features: Rows of the matrix.
        in_features: Its columns.
        group_size: Inputs that share a scale.
        seed: Of codes and scales.
    """
    shape = LinearShape("layer", out_features, in_features)
    draw = _gptq_layer if format_name == "gptq" else _nf4_layer
    stream = np.random.Philox(key=[seed, 0])
    drawn = dict(draw(shape, group_size, in_features**-0.5, stream))
    settings = QuantizeSettings(format=format_name, group_size=group_size)
    if format_name == "gptq":
        return gptq.unpack(drawn, gptq.spec(gptq_config(settings)), shape.name)
    spec = nf4.spec(bitsandbytes_config(settings, torch.float16, []))
    names = {
        role: name.removeprefix("layer.") for role, name in nf4.tensor_names("layer", spec).items()
    }
    tensors = {role: drawn[name] for role, name in names.items() if name in drawn}
    return nf4.unpack(tensors, spec, shape.name)


def _float_tensor(
    parameter: Float[Tensor, "..."], std: float, stream: np.random.Philox
) -> Float[Tensor, "..."]:
    """Draw a table of normals; norms are ones and biases zeros, as in a new model."""
    if parameter.dim() == 1:
        return torch.ones(parameter.shape, dtype=torch.float16)
    normals = np.random.Generator(stream).standard_normal(tuple(parameter.shape), np.float32)
    normals *= std
    return torch.from_numpy(normals.astype(np.float16))


def _gptq_layer(
    shape: LinearShape, group_size: int, std: float, stream: np.random.Philox
) -> Iterator[tuple[str, Tensor]]:
    """Draw a symmetric layer; tensors as in ``quantizers.gptq``."""
    groups = shape.in_features // group_size
    words = _random_bytes(shape.in_features * shape.out_features // 2, stream)
    yield "qweight", words.view(torch.int32).view(-1, shape.out_features)
    packed_out = -(-shape.out_features * _BITS // 32)
    yield "qzeros", torch.full((groups, packed_out), _V1_ZEROS, dtype=torch.int32)
    codes_std = float(np.arange(2**_BITS).std())
    yield "scales", _scales((groups, shape.out_features), std / codes_std, stream).half()
    yield "g_idx", torch.arange(shape.in_features, dtype=torch.int32) // group_size


def _nf4_layer(
    shape: LinearShape, group_size: int, std: float, stream: np.random.Philox
) -> Iterator[tuple[str, Tensor]]:
    """Draw a layer; tensors as in ``quantizers.nf4``, constants as bitsandbytes writes them."""
    size = shape.in_features * shape.out_features
    constants = _nf4_constants()
    yield "weight", _random_bytes(size // 2, stream).view(-1, 1)
    codebook = constants["weight.quant_map"]
    mean_absmax = std / float(codebook.std(correction=0))
    yield "weight.absmax", _scales((size // group_size,), mean_absmax, stream)
    yield "weight.quant_map", codebook
    key = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(constants[key].tolist()))
    state["shape"] = [shape.out_features, shape.in_features]
    yield key, torch.tensor(list(json.dumps(state).encode("utf-8")), dtype=torch.uint8)


def _nf4_constants() -> dict[str, Tensor]:
    from quantizers.nf4_algorithm import quantize_4bit

    return quantize_4bit(torch.ones(1, _NF4_BLOCK, dtype=torch.float16), block_size=_NF4_BLOCK)


def _random_bytes(count: int, stream: np.random.Philox) -> UInt8[Tensor, " bytes"]:
    words: Any = stream.random_raw(-(-count // 8))
    return torch.from_numpy(words.view(np.uint8)[:count])


def _scales(shape: tuple[int, ...], mean: float, stream: np.random.Philox) -> Float[Tensor, "..."]:
    spread = np.random.Generator(stream).random(shape, np.float32) * 2 - 1
    return torch.from_numpy(mean * (1 + _SPREAD * spread)).float()
