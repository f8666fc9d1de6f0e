"""A transformers causal LM whose quantized linears are ours.

The model is built without weights, its quantized linears are put in place over the memory-mapped
codes, and everything else (embeddings, norms, head) is loaded as it is. No other project's kernel
holds the scales: most of them copy or permute scales once and ignore later writes.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from quantizers.errors import FormatError
from qzo.checkpoint.atomic import read_json
from qzo.checkpoint.checkpoint import Checkpoint, natural_order, open_checkpoint
from qzo.checkpoint.config_counts import check_counts
from qzo.errors import CheckpointError, ConfigError
from qzo.model.layer_names import is_named, none_named
from qzo.model.lazy_layers import keep_stored
from qzo.model.linear import Live, QuantLinear
from qzo.model.placement import default_dtype
from qzo.model.pretrained import as_four_bit, quantized_layers
from qzo.model.streaming.blocks import Budget, stream

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
Progress = Callable[[int, int], None]
_HARMLESS = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|\.attn\.bias)$")


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a 4-bit checkpoint as a transformers model.

    Args:
        path: A folder, or the id of a repository on the hub.
        dtype: Of activations and unquantized tensors; unless given, float32 on a CPU, and float16
            on CUDA but for a few models (see ``default_dtype``).
        device: Where the model goes.
        revision: A branch, tag or commit of the repository.

    Returns:
        The model in eval mode, ready for ``model(input_ids=...)`` and ``generate``.
    """
    return load_checkpoint(open_checkpoint(path, revision), dtype, device)


def load_checkpoint(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load an opened checkpoint.

    Args:
        checkpoint: From ``open_checkpoint``.
        dtype: See ``load``.
        device: See ``load``.
        budget: Memory for the model's blocks, which stream where they do not fit; None: no limit.
        progress: Told how many layers are in place, and of how many.
    """
    device = torch.device(device)
    model = _skeleton(checkpoint.folder)
    if dtype is None:
        dtype = cast(torch.dtype, getattr(torch, default_dtype(checkpoint.config, device.type)))
    keys = _module_keys(model, checkpoint)
    live = Live()
    used: set[str] = set()
    for number, layer in enumerate(checkpoint.layers, start=1):
        used |= _place_layer(model, checkpoint, layer, keys[layer], dtype, live)
        if progress is not None:
            progress(number, len(checkpoint.layers))
    live.forked = decoder_blocks(model)
    state = _rest(model, checkpoint, used)
    model.tie_weights()  # shows which modules share a matrix
    kept = keep_stored(model, state, dtype, live) if device.type == "cpu" else []
    _load_rest(model, state, kept, dtype)
    if budget is None:
        nn.Module.to(model, device)
    else:
        stream(model, decoder_blocks(model), device, budget)
    model.generation_config = _generation_config(checkpoint.folder, model)
    model.qzo_checkpoint = checkpoint  # type: ignore[assignment]  # not a tensor or module
    model.qzo_budget = budget  # type: ignore[assignment]  # as above
    model.config.quantization_config = {
        "quant_method": checkpoint.format.QUANT_METHOD,
        **checkpoint.quantization,
    }
    as_four_bit(model)
    model.eval()
    return model


def quant_linears(model: nn.Module) -> list[QuantLinear]:
    """Return the quantized layers of a model in the order of the trained vector.

    Raises:
        CheckpointError: It has none.
    """
    layers = quantized_layers(model)
    if not layers:
        raise CheckpointError(
            "model: expected quantized layers of qzo, found none; use qzo.load or qzo.wrap"
        )
    return sorted(layers, key=lambda layer: natural_order(layer.name))


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder blocks of a model: its list with the most quantized layers.

    Raises:
        CheckpointError: There is no such list.
    """
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    counts = [sum(map(_num_quantized, blocks)) for blocks in lists]
    if not any(counts):
        raise CheckpointError(
            f"{type(model).__name__}: expected a list of decoder blocks with quantized layers, "
            "found none"
        )
    return lists[counts.index(max(counts))]


def _num_quantized(module: nn.Module) -> int:
    return sum(isinstance(part, QuantLinear) for part in module.modules())


def trained_layers(
    model: PreTrainedModel,
    num_blocks: int | None,
    modules: Sequence[str] | None = None,
    *,
    depth: tuple[float, float] | None = None,
    key: str = "zo.modules",
) -> list[QuantLinear]:
    """Choose the layers to train and let stacked forwards fork in front of the first of them.

    Args:
        model: Model with quantized layers; its fork is moved.
        num_blocks: Train the last so many decoder blocks, None for all; and a quantized head.
        modules: Train only layers that one of these names, None for all; see ``layer_names``.
        depth: Train only decoder blocks from the first to before the second part of the depth, 0 to
            1, instead of the last ones.
        key: Where the recipe says so.

    Returns:
        The layers, in the order of the trained vector; all others see the scales of the file.

    Raises:
        ConfigError: The model has fewer blocks, or none of these layers.
    """
    layers, blocks = quant_linears(model), decoder_blocks(model)
    num_blocks = num_blocks or len(blocks)
    if num_blocks > len(blocks):
        raise ConfigError(
            f"zo.num_blocks: expected at most the model's {len(blocks)} blocks, got {num_blocks}"
        )
    first, stop = trained_blocks(len(blocks), num_blocks, depth)
    for layer in layers:
        layer.index = -1
    live = layers[0].live
    live.forked, live.trained = blocks[first:], blocks[first:stop]
    inside = {part for block in live.trained for part in block.modules()}
    head = model.get_output_embeddings() if stop == len(blocks) else None
    chosen = [
        layer
        for layer in layers
        if layer in inside or layer is head
        if modules is None or is_named(layer.name, modules)
    ]
    if not chosen:
        raise ConfigError(none_named(key, [layer.name for layer in layers], modules))
    return chosen


def trained_blocks(
    count: int, num_blocks: int | None, depth: tuple[float, float] | None
) -> tuple[int, int]:
    """Return the first trained decoder block of ``count``, and the one behind the last."""
    if depth is None:
        return count - (num_blocks or count), count
    first, stop = (math.floor(part * count + 0.5) for part in depth)
    first = min(first, count - 1)
    return first, max(stop, first + 1)


def _skeleton(folder: Path) -> PreTrainedModel:
    """Build the model with parameters on ``meta`` and real buffers.

    Raises:
        CheckpointError: The config is not that of a causal language model.
    """
    from accelerate import init_empty_weights

    check_counts(read_json(folder / "config.json"))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # values of anybody, in the code of any architecture
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{folder / 'config.json'}: not understood: {reason}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # as above
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{folder / 'config.json'}: expected a causal language model: {reason}"
        ) from error
    return cast(PreTrainedModel, model)


def _module_keys(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Map names in the files to names in the model; older files leave out the base prefix.

    Raises:
        CheckpointError: A layer of the files is no linear layer of the model.
    """
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    keys = {}
    for layer in checkpoint.layers:
        name = layer if layer in modules else prefix + layer
        if not isinstance(modules.get(name), nn.Linear):
            raise CheckpointError(
                f"{layer}: expected a linear layer of {type(model).__name__}, found none; does "
                "config.json belong to these files?"
            )
        keys[layer] = name
    return keys


def _place_layer(
    model: nn.Module,
    checkpoint: Checkpoint,
    layer: str,
    module_name: str,
    dtype: torch.dtype,
    live: Live,
) -> set[str]:
    """Put one QuantLinear in place; return the keys that it used.

    Raises:
        CheckpointError: Its bias is missing.
        FormatError: Its shape is not that of the config.
    """
    linear = model.get_submodule(module_name)
    weight = checkpoint.weight(layer)
    want = (linear.out_features, linear.in_features)
    got = (weight.out_features, weight.in_features)
    if want != got:
        raise FormatError(
            f"{layer}: expected shape {want} by config.json, got {got}; are the bits and the "
            "config right?"
        )
    bias_key = f"{layer}.bias"
    bias = checkpoint.tensors[bias_key].to(dtype) if bias_key in checkpoint.tensors.files else None
    if bias is None and linear.bias is not None:
        raise CheckpointError(f"{bias_key}: expected this tensor in the checkpoint, not found")
    stored = checkpoint.stored_layer(layer)
    model.set_submodule(module_name, QuantLinear(layer, weight, bias, live, stored))
    return {bias_key, *checkpoint.layer_keys(layer).values()}


def _rest(model: PreTrainedModel, checkpoint: Checkpoint, used: set[str]) -> dict[str, Tensor]:
    """Return the stored tensors of everything that is not quantized, by their names in the model.

    Raises:
        CheckpointError: A tensor is unexpected, or of another shape.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    for key in checkpoint.tensors.files:
        if key in used or _HARMLESS.search(key):
            continue
        name = key if key in expected else f"{model.base_model_prefix}.{key}"
        if name not in expected:
            raise CheckpointError(
                f"{key}: expected only tensors of {type(model).__name__}, found this one; does "
                "config.json belong to these files?"
            )
        tensor = checkpoint.tensors[key]
        if tensor.shape != expected[name]:
            raise CheckpointError(
                f"{key}: expected shape {tuple(expected[name])}, got {tuple(tensor.shape)}"
            )
        state[name] = tensor
    return state


def _load_rest(
    model: PreTrainedModel, stored: Mapping[str, Tensor], kept: Sequence[str], dtype: torch.dtype
) -> None:
    """Load everything that is not quantized in the dtype of the model, and tie what is tied.

    Args:
        model: Its quantized layers are in place.
        stored: By the names of the model.
        kept: What stays in the dtype of the file.
        dtype: Of the model.

    Raises:
        CheckpointError: A tensor is missing.
    """
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() and name not in kept else tensor
        for name, tensor in stored.items()
    }
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.device.type == "meta":
            raise CheckpointError(f"{name}: expected this tensor in the checkpoint, not found")
    model.requires_grad_(False)


def _generation_config(folder: Path, model: PreTrainedModel) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return model.generation_config


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a checkpoint.

    Raises:
        CheckpointError: The folder has no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            reason = f"found none of {', '.join(_TOKENIZER_FILES)}"
        raise CheckpointError(f"{folder}: expected a tokenizer: {reason}") from error
