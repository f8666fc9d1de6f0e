"""Adapters: the tuned tensors alone, under the keys of the checkpoint.

``adapter_model.safetensors`` holds scale tensors, and unquantized ones where they were trained, in
the layout and dtype of the base; ``adapter_config.json`` names the base and what was done. LoRA is
written as PEFT reads it; what QZO has to know besides is in ``qzo_adapter.json``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from quantizers.weight import QuantizedWeight
from qzo.checkpoint.atomic import new_file, read_json, sync, write_json
from qzo.checkpoint.checkpoint import Checkpoint
from qzo.checkpoint.tensors import TensorFiles, tensors_sha256, write_safetensors
from qzo.errors import CheckpointError
from qzo.method.extra.lora import adding_low_rank, file_key, peft_config
from qzo.method.extra.prefix import fixing_prefixes
from qzo.method.extra.section import UNQUANTIZED, Section
from qzo.method.extra.unquantized import replacing_tensors
from qzo.method.trained_vector import Scales
from qzo.model.linear import Live
from qzo.model.load import quant_linears

MODEL_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
FROZEN = frozenset(("lora", "prefix"))  # keys of adapters that leave the base as it is
_LORA_NAME = "qzo_adapter.json"
# Every direction moves every scale, so fewer mean that most updates were lost to rounding.
_MIN_CHANGED_FRACTION = 0.5
# What replay, eval and export read, and its type in JSON.
_CONFIG_TYPES: dict[str, type] = {
    **dict.fromkeys(("base_model_name_or_path", "codes_sha256", "coordinates"), str),
    **dict.fromkeys(("step", "num_trained_values"), int),
}


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        folder: Its folder.
        config: ``adapter_config.json``.
        tensors: What was trained.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: TensorFiles


def open_adapter(folder: Path) -> Adapter:
    """Open the adapter of a run folder.

    Raises:
        CheckpointError: There is none, or it is not one of QZO.
    """
    config = read_json(folder / CONFIG_NAME)
    if config.get("peft_type") == "LORA" and (folder / _LORA_NAME).is_file():
        config |= read_json(folder / _LORA_NAME)
    elif config.get("peft_type") != "QZO":
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: expected peft_type 'QZO', got {config.get('peft_type')!r}"
        )
    for key, kind in _CONFIG_TYPES.items():
        if type(config.get(key)) is not kind:  # True is no number here
            raise CheckpointError(
                f"{folder / CONFIG_NAME}: expected {key} of type {kind.__name__}, got "
                f"{config.get(key)!r}"
            )
    _check_tuned(folder, config)
    if not (folder / MODEL_NAME).is_file():
        raise CheckpointError(f"{folder / MODEL_NAME}: expected this file, not found")
    return Adapter(folder, config, TensorFiles(folder, [MODEL_NAME]))


def _check_tuned(folder: Path, config: Mapping[str, Any]) -> None:
    """Check what an adapter says of tensors that are no scales.

    Raises:
        CheckpointError: It is damaged.
    """
    keys, lora = config.get("unquantized", []), config.get("lora", {"rank": 1, "alpha": 1})
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: expected unquantized to be a list of keys, got {keys!r}"
        )
    values = [lora.get(key) for key in ("rank", "alpha")] if isinstance(lora, dict) else [None]
    if not all(isinstance(value, int | float) and 0 < value < math.inf for value in values):
        raise CheckpointError(
            f"{folder / _LORA_NAME}: expected lora with rank and alpha above 0, got {lora!r}"
        )


def scale_tensors(checkpoint: Checkpoint, scales: Scales) -> dict[str, Tensor]:
    """Return the scale tensors of the trained layers by key, as the files store them."""
    result = {}
    for index, layer in enumerate(scales.names):
        stored = checkpoint.layer_tensors(layer)
        repacked = checkpoint.format.repack_scales(stored, scales.tuned(index).cpu(), layer)
        result[checkpoint.scale_key(layer)] = repacked[checkpoint.format.SCALE_ROLE]
    return result


def adapter_tensors(checkpoint: Checkpoint, scales: Scales) -> dict[str, Tensor]:
    """Return everything that was trained by key, as an adapter stores it."""
    result = scale_tensors(checkpoint, scales)
    result |= scales.unquantized(lambda section: _stored(checkpoint, section))
    for number, section in enumerate(scales.sections):
        if section.kind not in UNQUANTIZED:
            key = section.name if section.kind.startswith("prefix") else file_key(section)
            result[key] = scales.tuned_section(number).cpu().clone()
    return result


def unquantized_sha256(checkpoint: Checkpoint, sections: Sequence[Section]) -> str:
    """Return a digest of the unquantized tensors of a base that sections change."""
    changed = [section for section in sections if section.kind in UNQUANTIZED]
    return tensors_sha256({section.name: _stored(checkpoint, section) for section in changed})


def _stored(checkpoint: Checkpoint, section: Section) -> Tensor:
    """Return the tensor of the base that a section changes.

    Raises:
        CheckpointError: There is none of its shape.
    """
    files = checkpoint.tensors.files
    stored = checkpoint.tensors[section.name] if section.name in files else None
    if stored is None or stored.shape[:1] != section.shape:
        raise CheckpointError(
            f"{section.name}: expected a tensor of {section.shape[0]} rows in the base, got "
            f"{'none' if stored is None else tuple(stored.shape)}; the journal was changed"
        )
    return stored


def changed_fraction(checkpoint: Checkpoint, scales: Scales) -> float:
    """Return the fraction of trained scales that differ from the base in the file's dtype.

    It is 1 where no scales were trained.
    """
    changed = total = 0
    for index, layer in enumerate(scales.names):
        stored = checkpoint.weight(layer).scales
        tuned = scales.tuned(index).cpu().to(stored.dtype)
        changed += int((tuned != stored).sum())
        total += stored.numel()
    return changed / total if total else 1.0


def change_warnings(
    checkpoint: Checkpoint, changed: float, *, best_step: int, by_reward: bool = False
) -> tuple[str, ...]:
    """Say in words where training will not be seen in the export.

    Args:
        checkpoint: The base.
        changed: What ``changed_fraction`` found.
        best_step: The step whose scales were kept.
        by_reward: They were chosen by the reward, not by the loss.
    """
    if best_step == 0:
        better = "larger reward" if by_reward else "smaller loss"
        return (
            f"no evaluation had a {better} than the base's, so the base's scales were kept; "
            "train longer, or change learning_rate",
        )
    if changed >= _MIN_CHANGED_FRACTION:
        return ()
    dtype = str(checkpoint.weight(checkpoint.layers[0]).scales.dtype).removeprefix("torch.")
    return (
        f"only {changed:.1%} of the scales differ from the base once rounded to {dtype}, the dtype "
        "of the file: the other updates are too small to survive the export; raise learning_rate, "
        "or train longer",
    )


def save_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    write_others: Callable[[], None] = lambda: None,
) -> None:
    """Write an adapter; the config comes last, so that an adapter with a config is complete.

    The config of an older adapter goes before anything else of it is replaced, so that a process
    that is killed in between leaves no mixture: ``replay`` then writes the adapter again.

    Args:
        folder: Of the run.
        tensors: By key.
        config: ``adapter_config.json``.
        write_others: Writes other files that belong to this adapter.
    """
    with new_file(folder / MODEL_NAME) as partial:
        write_safetensors(partial, tensors.items())
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        sync(folder)
    write_others()
    if "lora" in config:
        write_json(folder / _LORA_NAME, config)
        write_json(folder / CONFIG_NAME, peft_config(config))
    else:
        write_json(folder / CONFIG_NAME, {"peft_type": "QZO", **config})


def apply_adapter(model: PreTrainedModel, checkpoint: Checkpoint, adapter: Adapter) -> None:
    """Let a model compute with the tensors of an adapter; training still starts from its base."""
    check_base(checkpoint, adapter.config)
    layers = quant_linears(model)
    live = layers[0].live
    live.fixed_prefixes = {}
    live.renew_hooks("adapter", _hooks(model, live, adapter))
    live.replaced = unquantized_tensors(adapter)
    live.unfoldable = unfoldable(adapter)
    for layer in layers:
        if not FROZEN.isdisjoint(adapter.config):
            layer.tuned = None
            continue
        tuned = tuned_weight(checkpoint, adapter, layer.name).scales
        layer.tuned = tuned.to(layer.quantized.scales.device)


def unfoldable(adapter: Adapter) -> str:
    """Return what an adapter adds that no checkpoint can hold, in words; or nothing."""
    if "lora" in adapter.config:
        return "LoRA factors"
    return "a prefix" if "prefix" in adapter.config else ""


def _hooks(model: PreTrainedModel, live: Live, adapter: Adapter) -> list[RemovableHandle]:
    if "lora" in adapter.config:
        lora = adapter.config["lora"]
        tensors = {key: adapter.tensors[key] for key in adapter.tensors.files}
        return adding_low_rank(model, live, tensors, lora["alpha"] / lora["rank"])
    if "prefix" in adapter.config:
        tensors = {key: adapter.tensors[key] for key in adapter.tensors.files}
        return fixing_prefixes(model, live, tensors)
    return replacing_tensors(model, live, unquantized_tensors(adapter))


def unquantized_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of an adapter that are no scales, by key.

    Raises:
        CheckpointError: One of them is not there.
    """
    keys = adapter.config.get("unquantized", [])
    missing = [key for key in keys if key not in adapter.tensors.files]
    if missing:
        raise CheckpointError(
            f"{adapter.folder / MODEL_NAME}: expected {missing[0]} as in {CONFIG_NAME}, not found"
        )
    return {key: adapter.tensors[key] for key in keys}


def tuned_weight(checkpoint: Checkpoint, adapter: Adapter, layer: str) -> QuantizedWeight:
    """Return one layer with the scales of an adapter, or of the file if it was not trained."""
    key = checkpoint.scale_key(layer)
    weight: QuantizedWeight = (
        checkpoint.with_scales(layer, adapter.tensors[key])
        if key in adapter.tensors.files
        else checkpoint.weight(layer)
    )
    return weight


def check_base(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Refuse a base whose codes are not those that the scales were trained on.

    Raises:
        CheckpointError: The digests differ.
    """
    want, got = config.get("codes_sha256"), checkpoint.codes_sha256()
    if want != got:
        raise CheckpointError(
            f"{checkpoint.folder}: expected codes with sha256 {str(want)[:12]}..., got "
            f"{got[:12]}...; the scales were trained on another base"
        )
