"""bitsandbytes checkpoints written by bitsandbytes, and read value by value."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from support.gptq_files import unquantized, write_configs, write_tensors
from support.models import block_linears


def bnb_config(quant_type: str = "nf4", **options: Any) -> BitsAndBytesConfig:
    """Return the config that users write."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type, **options)


def load_bnb(
    folder: Path,
    config: BitsAndBytesConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Load a float model with quantization on the fly, or one that is quantized."""
    options = {} if config is None else {"quantization_config": config}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    model.eval()
    return model


def write_bnb(
    folder: Path, model: PreTrainedModel, quant_type: str = "nf4", **options: Any
) -> PreTrainedModel:
    """Quantize a float model with transformers and bitsandbytes, save it, and return it loaded."""
    model.save_pretrained(folder / "float")
    quantized = load_bnb(folder / "float", bnb_config(quant_type, **options))
    quantized.save_pretrained(folder)
    return quantized


def quantize_layer(
    weight: Tensor,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    storage: torch.dtype = torch.uint8,
) -> dict[str, Tensor]:
    """Return the stored tensors of a layer by role, quantized by bitsandbytes."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight,
        blocksize=blocksize,
        compress_statistics=double_quant,
        quant_type=quant_type,
        quant_storage=storage,
    )
    parts = state.as_dict(packed=True)
    stored = {key: tensor for key, tensor in parts.items() if "bitsandbytes__" not in key}
    return {
        "weight": packed,
        **stored,
        "quant_state": parts[f"quant_state.bitsandbytes__{quant_type}"],
    }


def write_nf4(
    folder: Path, model: PreTrainedModel, *, num_shards: int = 1, **options: Any
) -> PreTrainedModel:
    """Write a checkpoint with any block size; turn the model into its dense equal, return it."""
    folder.mkdir(parents=True, exist_ok=True)
    quant_type = options.get("quant_type", "nf4")
    tensors = unquantized(model, torch.float32)
    for name, linear in block_linears(model).items():
        layer = quantize_layer(linear.weight.detach(), **options)
        state = layer.pop("quant_state")
        tensors[f"{name}.weight.quant_state.bitsandbytes__{quant_type}"] = state
        tensors |= {key_of(name, role): tensor for role, tensor in layer.items()}
        dense = read_layer({**layer, "quant_state": state})
        linear.weight = nn.Parameter(dense, requires_grad=False)
    write_tensors(folder, tensors, num_shards)
    config = bnb_config(quant_type, bnb_4bit_use_double_quant=options.get("double_quant", False))
    write_configs(folder, model, config.to_dict(), dtype="float32")
    return model


def key_of(layer: str, role: str) -> str:
    """Return the key of a stored tensor other than the quant_state."""
    return f"{layer}.weight" if role == "weight" else f"{layer}.weight.{role}"


def state_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Parse the JSON of a quant_state."""
    state: dict[str, Any] = json.loads(bytes(tensors["quant_state"].tolist()))
    return state


def state_tensor(state: Mapping[str, Any]) -> Tensor:
    """Return a quant_state as the bytes of its JSON."""
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def read_absmax(tensors: Mapping[str, Tensor]) -> list[float]:
    """Return the fp32 absmax of every block, un-nested where it is nested."""
    state, stored = state_of(tensors), tensors["absmax"].tolist()
    if tensors["absmax"].dtype != torch.uint8:
        return [float(value) for value in stored]
    codebook = tensors["nested_quant_map"].tolist()
    nested = tensors["nested_absmax"].tolist()
    size, offset = state["nested_blocksize"], state["nested_offset"]
    return [_fp32(_fp32(codebook[c] * nested[b // size]) + offset) for b, c in enumerate(stored)]


def read_layer(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the dense matrix ``(out, in)`` of stored tensors, one weight after the other."""
    state = state_of(tensors)
    data = tensors["weight"].contiguous().view(torch.uint8).reshape(-1).tolist()
    codebook, absmax = tensors["quant_map"].tolist(), read_absmax(tensors)
    out_features, in_features = state["shape"]
    values = []
    for place in range(out_features * in_features):
        byte = data[place // 2]
        code = byte & 15 if place % 2 else byte >> 4
        values.append(codebook[code] * absmax[place // state["blocksize"]])
    return torch.tensor(values, dtype=torch.float32).view(out_features, in_features)


def _fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
