"""Taking over a model that the user loaded with transformers.

bitsandbytes 4-bit modules (quantized on the fly or loaded so) and GPTQ modules in their natural
layout are replaced by ``QuantLinear`` over the same codes. Modules whose kernel has repacked the
codes or permuted the scales are refused: what they hold is no longer what a checkpoint holds.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantizers import gptq, nf4
from qzo.checkpoint.atomic import new_folder, write_json
from qzo.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qzo.checkpoint.stored_layer import StoredLayer
from qzo.checkpoint.tensors import CheckpointWriter
from qzo.errors import CheckpointError
from qzo.model.linear import Live, QuantLinear
from qzo.model.load import decoder_blocks, load_tokenizer, quant_linears
from qzo.model.pretrained import as_four_bit, quantization_of

# Names as in GPTQModel 7.3 to 7.6. These modules hold qweight, scales and g_idx as the file has
# them, and zero points as gptq_v2 stores them, whatever the file has.
_NATURAL_GPTQ = {"TorchLinear", "TritonV2Linear"}
# These do so until their first forward in eval mode, which repacks the codes in place.
_NATURAL_GPTQ_UNTIL_USED = {"TorchAtenLinear", "TorchFusedLinear"}


def wrap(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the quantized modules of a model, in place.

    Args:
        model: Loaded with ``BitsAndBytesConfig(load_in_4bit=True)`` or from a GPTQ checkpoint.

    Returns:
        The same model in eval mode; ``qzo.Trainer`` takes it.

    Raises:
        CheckpointError: There is nothing to adopt, a module holds repacked codes, or the model is
            spread over several devices.
    """
    config = quantization_of(model)
    _check_one_device(model)
    live = Live()
    found = [(name, module) for name, module in model.named_modules() if _is_quantized(module)]
    if not found:
        raise CheckpointError(
            "model: expected modules quantized by bitsandbytes (4 bit) or GPTQ, found none; pass "
            "quantization_config=BitsAndBytesConfig(load_in_4bit=True) to from_pretrained"
        )
    adopted = [(name, _adopt(name, module, config, live)) for name, module in found]
    for name, layer in adopted:  # a refusal above leaves the model as it was
        model.set_submodule(name, layer)
    live.forked = decoder_blocks(model)
    model.requires_grad_(False)
    model.is_quantized = False  # type: ignore[assignment]  # transformers' own kernels are gone
    model.hf_quantizer = None  # type: ignore[assignment]  # so it has nothing to save
    as_four_bit(model)
    model.eval()
    return model


def _check_one_device(model: PreTrainedModel) -> None:
    """Refuse a model that is spread over several devices, or offloaded.

    Raises:
        CheckpointError: It is.
    """
    tensors = chain(model.parameters(), model.buffers())
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise CheckpointError(
            f"model: expected all of it on one device, found tensors on {' and '.join(devices)}; "
            'pass one device to from_pretrained, such as device_map={"": 0}'
        )


def checkpoint_of(model: PreTrainedModel, folder: Path, tokenizer: Any = None) -> Checkpoint:
    """Return the checkpoint of a model; a wrapped model is written to ``folder`` first.

    Args:
        model: From ``qzo.load`` or ``wrap``.
        folder: A checkpoint that is there already has to be that of the model.
        tokenizer: Written beside a wrapped model; the one that belongs to it unless given.
    """
    checkpoint: Checkpoint | None = getattr(model, "qzo_checkpoint", None)
    if checkpoint is None:
        if not folder.exists():
            save_base(model, folder, tokenizer)
        checkpoint = open_checkpoint(folder)
        _check_base(model, checkpoint)
        model.qzo_checkpoint = checkpoint  # type: ignore[assignment]  # no tensor or module
    return checkpoint


def tokenizer_of(model: PreTrainedModel) -> Any:
    """Load the tokenizer that belongs to a model.

    Raises:
        CheckpointError: There is none, or nothing says where it is.
    """
    checkpoint: Checkpoint | None = getattr(model, "qzo_checkpoint", None)
    if checkpoint is not None:
        return load_tokenizer(checkpoint.folder)
    if not model.config.name_or_path:
        raise CheckpointError(
            "tokenizer: expected one for a model without a name_or_path, got none; pass "
            "tokenizer= to qzo.Trainer"
        )
    return load_tokenizer(Path(model.config.name_or_path))


def save_base(model: PreTrainedModel, folder: Path, tokenizer: Any = None) -> None:
    """Write a wrapped model as a pre-quantized checkpoint of its format."""
    with new_folder(folder) as partial:
        writer = CheckpointWriter(partial)
        for name, tensor in _tensors(model):
            writer.add(name, tensor)
        writer.close()
        write_json(partial / "config.json", _config(model))
        if model.generation_config is not None:
            model.generation_config.save_pretrained(partial)
        with suppress(CheckpointError):  # without a tokenizer the export has none either
            tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
            tokenizer.save_pretrained(partial)


def _check_base(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    for name, tensor in _tensors(model):
        stored = checkpoint.tensors[name] if name in checkpoint.tensors.files else None
        is_same = (
            stored is not None
            and stored.dtype == tensor.dtype
            and torch.equal(stored, tensor.cpu())
        )
        if not is_same:
            raise CheckpointError(
                f"{checkpoint.folder}: expected the base of this model, found another {name}; "
                "choose another output_dir"
            )


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Return all tensors of a wrapped model by their names in a checkpoint of its format."""
    yield from _unquantized(model).items()
    for layer in quant_linears(model):
        assert layer.stored is not None
        tensors = layer.stored.with_scales(None)
        yield from ((f"{layer.name}.{key}", tensor) for key, tensor in tensors.items())
        if layer.bias is not None:
            yield f"{layer.name}.bias", layer.bias


def _unquantized(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return parameters and saved buffers outside of the quantized layers; tied ones once."""
    inside = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, QuantLinear))
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if name.startswith(inside) or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        tensors[name] = tensor
    return tensors


def _config(model: PreTrainedModel) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    config["quantization_config"] = quantization_of(model)
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["architectures"] = [type(model).__name__]
    return config


def _is_quantized(module: nn.Module) -> bool:
    is_gptqmodel = any(kind.__name__ == "BaseQuantLinear" for kind in type(module).__mro__)
    return type(module).__name__ == "Linear4bit" or is_gptqmodel or hasattr(module, "qweight")


def _adopt(name: str, module: nn.Module, config: Mapping[str, Any], live: Live) -> QuantLinear:
    format_module: ModuleType
    if type(module).__name__ == "Linear4bit":
        format_module, roles = nf4, _bitsandbytes_tensors(name, module)
        spec: Any = nf4.NF4Spec(_quant_state(module).quant_type)
    else:
        spec = gptq.spec(config)
        format_module, roles = gptq, _gptq_tensors(name, module, spec)
    weight = format_module.unpack(roles, spec, name)
    bias = module.bias.detach() if isinstance(module.bias, Tensor) else None
    return QuantLinear(name, weight, bias, live, StoredLayer(name, format_module, spec, roles))


def _bitsandbytes_tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    state = _quant_state(module)
    if state is None:
        raise CheckpointError(
            f"{name}: expected 4-bit codes, found a float weight; bitsandbytes quantizes when the "
            "model is moved to its device: load it with device_map"
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise CheckpointError(
            f"{name}: expected codes in their natural layout, found them repacked by a forward "
            "pass; call qzo.wrap before the first forward"
        )
    packed = state.as_dict(packed=True)
    roles = {
        "weight": module.weight.data,
        "absmax": packed["absmax"],
        "quant_map": packed["quant_map"],
        "quant_state": next(v for k, v in packed.items() if "bitsandbytes__" in k),
    }
    nested = {
        role: packed[role] for role in ("nested_absmax", "nested_quant_map") if role in packed
    }
    return {**roles, **nested}


def _quant_state(module: nn.Module) -> Any:
    return getattr(module.weight, "quant_state", None)


def _gptq_tensors(name: str, module: nn.Module, spec: gptq.GPTQSpec) -> dict[str, Tensor]:
    """Return the tensors of a module by role, as the file has them."""
    _check_layout(name, module)
    tensors = {
        role: getattr(module, role, None) for role in ("qweight", "qzeros", "scales", "g_idx")
    }
    roles = {role: tensor for role, tensor in tensors.items() if isinstance(tensor, Tensor)}
    if spec.checkpoint_format == "gptq":
        held, num_outputs = replace(spec, checkpoint_format="gptq_v2"), roles["scales"].shape[1]
        zeros = gptq.unpack_zeros(roles["qzeros"], held, num_outputs)
        roles["qzeros"] = gptq.pack_zeros(zeros.int(), spec)
    return roles


def _check_layout(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    is_repacked = getattr(module, "linear_mode", None) == "inference"
    if kind in _NATURAL_GPTQ_UNTIL_USED and is_repacked:
        raise CheckpointError(
            f"{name}: expected GPTQ tensors in their natural layout, found {kind}, which a forward "
            "pass has repacked; call qzo.wrap before the first forward"
        )
    if kind not in _NATURAL_GPTQ | _NATURAL_GPTQ_UNTIL_USED:
        raise CheckpointError(
            f"{name}: expected GPTQ tensors in their natural layout, found {kind}, which may "
            "repack them; use qzo.load on the checkpoint, or load it with backend 'torch'"
        )
