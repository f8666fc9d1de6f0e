"""The way out: the base checkpoint with the tuned tensors, everything else byte for byte.

Works from files. The result is loaded again and its loss compared with the trained model's before
the export counts as done.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from qzo.adapter import (
    CONFIG_NAME,
    Adapter,
    check_base,
    open_adapter,
    tuned_weight,
    unquantized_tensors,
)
from qzo.base import open_base
from qzo.card import model_card
from qzo.checkpoint import Checkpoint, open_checkpoint
from qzo.errors import CheckpointError, ConfigError
from qzo.evaluate import evaluate
from qzo.files import new_folder, read_json, write_json
from qzo.hub import Origin
from qzo.model import load_checkpoint, quant_linears
from qzo.replay import replay
from qzo.run_folder import read_reference
from qzo.tensor_files import TensorFiles, write_safetensors

_SKIPPED = {".git", ".cache", "README.md"}
# Rounding the scales to fp16 moves each weight by at most 2**-11 of its size; a loss moves by far
# less than this many nats, and a wrong scale by far more.
_LOSS_TOLERANCE = 0.02


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        folder: Where.
        num_changed: Scale tensors that come from the run.
        trained_loss: The trained model's loss on the reference examples; None without any.
        exported_loss: The loss of the files that were written.
        unquantized: Keys of the other tensors that come from the run.
    """

    folder: Path
    num_changed: int
    trained_loss: float | None
    exported_loss: float | None
    unquantized: tuple[str, ...] = ()


def export(
    run: str | Path, out: str | Path, *, base: str | None = None, revision: str | None = None
) -> Exported:
    """Write the full checkpoint of a run.

    Args:
        run: A run folder, or a journal in either form, in a folder of its own or named itself.
        out: A new or empty folder.
        base: The base checkpoint, where it is no longer where the run says.
        revision: Of the base: a branch, tag or commit of its repository on the hub.
    """
    folder, target = Path(run), Path(out)
    with TemporaryDirectory() as temporary, new_folder(target) as partial:
        if not (folder / CONFIG_NAME).is_file():  # a bare journal is an adapter too
            replay(folder, out=Path(temporary) / "adapter", base=base, revision=revision)
            folder = Path(temporary) / "adapter"
        adapter = open_adapter(folder)
        _check_folds(adapter, str(run))
        recorded = Origin(adapter.config["base_model_name_or_path"], adapter.config.get("revision"))
        checkpoint = open_base(recorded, Path(run), base=base, revision=revision)
        check_base(checkpoint, adapter.config)
        _write_files(checkpoint, adapter, partial)
        trained, exported = _compare(folder, partial)
    unquantized = tuple(unquantized_tensors(adapter))
    num_scales = len(adapter.tensors.files) - len(unquantized)
    return Exported(target, num_scales, trained, exported, unquantized)


def _check_folds(adapter: Adapter, run: str) -> None:
    """Refuse what is no part of a checkpoint.

    Raises:
        ConfigError: The adapter holds LoRA factors or a prefix.
    """
    if "lora" in adapter.config:
        raise ConfigError(
            f"{run}: expected trained scales, got LoRA factors, which do not fold into 4-bit "
            "codes; load the run with peft, or with qzo eval and generate --adapter"
        )
    if "prefix" in adapter.config:
        raise ConfigError(
            f"{run}: expected trained scales, got a prefix, which no checkpoint holds; load the "
            "run with qzo eval and generate --adapter"
        )


def _write_files(checkpoint: Checkpoint, adapter: Adapter, folder: Path) -> None:
    replaced = _replaced_tensors(checkpoint, adapter)
    for name in dict.fromkeys(checkpoint.tensors.files.values()):
        entries = list(_entries(checkpoint, name, replaced))
        write_safetensors(folder / name, entries, checkpoint.tensors.metadata(name))
    for path in checkpoint.folder.iterdir():
        is_tensor_file = path.suffix == ".safetensors"
        if path.is_file() and not is_tensor_file and path.name not in _SKIPPED:
            shutil.copyfile(path, folder / path.name)
    _rewrite_configs(checkpoint, folder)
    _rewrite_index(folder, {key for key, tensor in replaced.items() if tensor is None})
    (folder / "README.md").write_text(model_card(adapter.folder, adapter.config), encoding="utf-8")


def _replaced_tensors(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, Tensor | None]:
    """Return what stands in the place of each key that the run changed; None: dropped."""
    replaced: dict[str, Tensor | None] = {}
    for layer in checkpoint.layers:
        keys = checkpoint.layer_keys(layer)
        stored = checkpoint.layer_tensors(layer)
        tuned = tuned_weight(checkpoint, adapter, layer)
        repacked = checkpoint.format.repack_scales(stored, tuned.scales.float(), layer)
        replaced |= {key: repacked.get(role) for role, key in keys.items()}
    return replaced | unquantized_tensors(adapter)


def _entries(
    checkpoint: Checkpoint, file: str, replaced: dict[str, Tensor | None]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one file in their order."""
    for key, name in checkpoint.tensors.files.items():
        tensor = replaced.get(key, checkpoint.tensors[key])
        if name == file and tensor is not None:
            yield key, tensor


def _rewrite_configs(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the quantization config of the export where it differs from the base's."""
    exported = checkpoint.format.export_config(checkpoint.quantization)
    if exported != checkpoint.quantization:
        config = {**checkpoint.config, "quantization_config": exported}
        write_json(folder / "config.json", config)


def _rewrite_index(folder: Path, dropped: set[str]) -> None:
    if not dropped:
        return
    tensors = TensorFiles(folder)
    size = sum(tensors[key].nbytes for key in tensors.files)
    for path in folder.glob("*.safetensors.index.json"):
        metadata = {**read_json(path).get("metadata", {}), "total_size": size}
        write_json(path, {"metadata": metadata, "weight_map": tensors.files})


def _compare(run: Path, exported: Path) -> tuple[float | None, float | None]:
    """Load what was written and compare its loss with the trained model's.

    Raises:
        CheckpointError: They differ by more than the rounding of the scales can explain.
    """
    reference = read_reference(run)
    model = load_checkpoint(open_checkpoint(exported))
    if reference is None:
        return None, None
    data, trained = reference
    live = quant_linears(model)[0].live
    loss = evaluate(model, live, data, batch_size=len(data.examples)).loss
    if not abs(loss - trained) <= _LOSS_TOLERANCE:  # also true for NaN
        raise CheckpointError(
            f"export: expected the trained model's loss {trained:.4f} from the exported files, got "
            f"{loss:.4f}; nothing was written"
        )
    return trained, loss
