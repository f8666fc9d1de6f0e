"""Adapters: the tuned scales alone, under the keys of the checkpoint.

``adapter_model.safetensors`` holds the scale tensors in the layout and dtype of the base;
``adapter_config.json`` names the base and what was done.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo.checkpoint import Checkpoint, TensorFiles, write_safetensors
from qzo.errors import CheckpointError
from qzo.files import new_file, read_json, write_json
from qzo.model import quant_linears
from qzo.scales import Scales

MODEL_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        folder: Its folder.
        config: ``adapter_config.json``.
        tensors: Its scale tensors.
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
    if config.get("peft_type") != "QZO":
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: expected peft_type 'QZO', got {config.get('peft_type')!r}"
        )
    if not (folder / MODEL_NAME).is_file():
        raise CheckpointError(f"{folder / MODEL_NAME}: expected this file, not found")
    return Adapter(folder, config, TensorFiles(folder, [MODEL_NAME]))


def scale_tensors(checkpoint: Checkpoint, scales: Scales) -> dict[str, Tensor]:
    """Return the tuned scale tensors by key, as the files store them."""
    result = {}
    for index, layer in enumerate(checkpoint.layers):
        stored = checkpoint.layer_tensors(layer)
        repacked = checkpoint.format.repack_scales(stored, scales.tuned(index).cpu(), layer)
        result[checkpoint.scale_key(layer)] = repacked[checkpoint.format.SCALE_ROLE]
    return result


def changed_fraction(checkpoint: Checkpoint, scales: Scales) -> float:
    """Return the fraction of scales that differ from the base once rounded to the file's dtype."""
    changed = total = 0
    for index, layer in enumerate(checkpoint.layers):
        stored = checkpoint.weight(layer).scales
        tuned = scales.tuned(index).cpu().to(stored.dtype)
        changed += int((tuned != stored).sum())
        total += stored.numel()
    return changed / total


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter; the config comes last, so that an adapter with a config is complete."""
    with new_file(folder / MODEL_NAME) as partial:
        write_safetensors(partial, tensors.items())
    write_json(folder / CONFIG_NAME, {"peft_type": "QZO", **config})


def apply_adapter(model: nn.Module, checkpoint: Checkpoint, adapter: Adapter) -> None:
    """Give a loaded model the scales of an adapter."""
    check_base(checkpoint, adapter.config)
    for layer in quant_linears(model):
        stored = adapter.tensors[checkpoint.scale_key(layer.name)]
        device = layer.quantized.scales.device
        layer.quantized = checkpoint.with_scales(layer.name, stored).to(device)


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


def save_snapshot(folder: Path, values: Tensor, state: Mapping[str, Any]) -> None:
    """Write the fp32 master and the state of the run into a new folder."""
    write_safetensors(folder / "scales.safetensors", [("values", values)])
    write_json(folder / "trainer_state.json", dict(state))


def read_snapshot(folder: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """Read what ``save_snapshot`` wrote."""
    tensors = TensorFiles(folder, ["scales.safetensors"])
    return tensors["values"], read_json(folder / "trainer_state.json")
