"""GPTQ checkpoints written and read the slow way: bit by bit, in Python integers.

Nothing here comes from ``quantizers``: what one writes, the other has to read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from support.models import block_linears

# GPTQModel f4c327a, utils/model.py, convert_gptq_v2_to_v1_format_module, for 3 bits.
_GPTQMODEL_3BIT = (
    0b00100100100100100100100100100100,
    0b10010010010010010010010010010010,
    0b01001001001001001001001001001001,
)


@dataclass(frozen=True)
class GPTQVariant:
    """What a checkpoint is like."""

    bits: int = 4
    group_size: int = 32
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: str = "gptq"
    writer: str = "auto_gptq"
    lowest_zero: int = 1  # of asymmetric zero points

    def config(self) -> dict[str, Any]:
        """Return the quantization config, as the writer spells it."""
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
        }
        if self.writer == "gptqmodel":
            config["meta"] = {"quantizer": ["gptqmodel:7.6.0"]}
            config["format"] = self.checkpoint_format
            config["pack_dtype"] = "int32"
        return {**config, "checkpoint_format": self.checkpoint_format}

    def num_groups(self, in_features: int) -> int:
        """Return the groups of a layer; the last one may be ragged."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)


def pack_stream(elements: list[int], bits: int) -> list[int]:
    """Lay elements end to end in one long integer, lowest first, and cut it into words."""
    stream = sum(element << (place * bits) for place, element in enumerate(elements))
    return [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(elements) * bits // 32))]


def unpack_stream(words: list[int], bits: int, count: int) -> list[int]:
    """Join words into one long integer and cut it into elements."""
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(stream >> (place * bits)) & (2**bits - 1) for place in range(count)]


def v1_constant(word: int, bits: int, writer: str) -> int:
    """Return what v1 subtracts from word number ``word`` of a row of zero points."""
    if bits == 3 and writer == "gptqmodel":
        return _GPTQMODEL_3BIT[word % 3]
    ones = sum(1 << (place * bits) for place in range(96 // bits))
    return (ones >> (32 * (word % 3))) & 0xFFFFFFFF


def shift_words(words: list[int], sign: int, variant: GPTQVariant) -> list[int]:
    """Add or subtract the constant of v1, word by word."""
    constants = [v1_constant(w, variant.bits, variant.writer) for w in range(len(words))]
    return [(word + sign * c) % 2**32 for word, c in zip(words, constants, strict=True)]


def signed(words: list[list[int]]) -> Tensor:
    """Return words as the int32 tensor with the same bits."""
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32).copy())


def random_layer(
    in_features: int, out_features: int, variant: GPTQVariant, *, seed: int = 0
) -> dict[str, Tensor]:
    """Return the stored tensors of a layer with random codes, zeros, scales and groups."""
    draw = np.random.default_rng(seed)
    bits, groups = variant.bits, variant.num_groups(in_features)
    codes = draw.integers(0, 2**bits, (in_features, out_features)).tolist()
    zeros = draw.integers(variant.lowest_zero, 2**bits, (groups, out_features)).tolist()
    if variant.sym:
        zeros = [[2 ** (bits - 1)] * out_features for _ in range(groups)]
    scales = draw.uniform(0.5, 1.5, (groups, out_features)) * 0.3 / 2**bits
    group_size = in_features if variant.group_size == -1 else variant.group_size
    index = [i // group_size for i in range(in_features)]
    if variant.desc_act:
        draw.shuffle(index)
    return {
        "qweight": pack_columns(codes, bits),
        "qzeros": pack_zero_rows(zeros, variant),
        "scales": torch.from_numpy(scales).half(),
        "g_idx": torch.tensor(index, dtype=torch.int32),
    }


def pack_columns(codes: list[list[int]], bits: int) -> Tensor:
    """Pack codes ``[in][out]`` along the inputs."""
    columns = [pack_stream([row[o] for row in codes], bits) for o in range(len(codes[0]))]
    return signed([[column[w] for column in columns] for w in range(len(columns[0]))])


def pack_zero_rows(zeros: list[list[int]], variant: GPTQVariant) -> Tensor:
    """Pack zero points ``[groups][out]`` along the outputs, whole words minus a constant in v1."""
    rows = [pack_stream(row, variant.bits) for row in zeros]
    if variant.checkpoint_format == "gptq":
        rows = [shift_words(row, -1, variant) for row in rows]
    return signed(rows)


def read_zeros(qzeros: Tensor, variant: GPTQVariant, out_features: int) -> list[list[int]]:
    """Return zero points ``[groups][out]``."""
    rows: list[list[int]] = qzeros.tolist()
    if variant.checkpoint_format == "gptq":
        rows = [shift_words(row, +1, variant) for row in rows]
    return [unpack_stream(row, variant.bits, out_features) for row in rows]


def read_layer(tensors: Mapping[str, Tensor], variant: GPTQVariant) -> Tensor:
    """Return the dense matrix ``(out, in)`` of stored tensors, one weight after the other."""
    words, out_features = tensors["qweight"].tolist(), tensors["qweight"].shape[1]
    in_features = len(words) * 32 // variant.bits
    group_size = in_features if variant.group_size == -1 else variant.group_size
    plain = [i // group_size for i in range(in_features)]
    index = tensors["g_idx"].tolist() if "g_idx" in tensors else plain
    zeros = read_zeros(tensors["qzeros"], variant, out_features)
    scales = tensors["scales"].double().tolist()
    rows = []
    for o in range(out_features):
        codes = unpack_stream([row[o] for row in words], variant.bits, in_features)
        rows.append([scales[g][o] * (codes[i] - zeros[g][o]) for i, g in enumerate(index)])
    return torch.tensor(rows, dtype=torch.float32)


def write_gptq(
    folder: Path,
    model: PreTrainedModel,
    variant: GPTQVariant | None = None,
    *,
    num_shards: int = 1,
    config_file: str = "config.json",
    has_quant_method: bool = True,
) -> PreTrainedModel:
    """Write a checkpoint with random codes; turn the model into its dense equal and return it."""
    variant = variant or GPTQVariant()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = unquantized(model)
    for seed, (name, linear) in enumerate(block_linears(model).items()):
        layer = random_layer(linear.in_features, linear.out_features, variant, seed=seed)
        tensors |= {f"{name}.{role}": tensor for role, tensor in layer.items()}
        linear.weight = nn.Parameter(read_layer(layer, variant), requires_grad=False)
    write_tensors(folder, tensors, num_shards)
    config = variant.config()
    if not has_quant_method:
        del config["quant_method"]
    write_configs(folder, model, config, file=config_file)
    return model


def unquantized(model: PreTrainedModel, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Return what stays as it is: embeddings, norms, biases, an untied head."""
    quantized = {f"{name}.weight" for name in block_linears(model)}
    if model.config.tie_word_embeddings:
        quantized.add("lm_head.weight")
    state = model.state_dict()
    return {key: state[key].to(dtype).contiguous() for key in state if key not in quantized}


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], num_shards: int = 1) -> None:
    """Write tensors into one file, or dealt out to shards with an index."""
    if num_shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return
    names = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
    weight_map = {key: names[place % num_shards] for place, key in enumerate(tensors)}
    for name in names:
        shard = {key: tensor for key, tensor in tensors.items() if weight_map[key] == name}
        save_file(shard, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_configs(
    folder: Path,
    model: PreTrainedModel,
    quantization: dict[str, Any],
    *,
    file: str = "config.json",
    dtype: str = "float16",
) -> None:
    """Write ``config.json``, with the quantization config inside or in a file of its own."""
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config["dtype"] = dtype
    if file == "config.json":
        config["quantization_config"] = quantization
    else:
        (folder / file).write_text(json.dumps(quantization))
    (folder / "config.json").write_text(json.dumps(config))
