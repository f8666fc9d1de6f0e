"""The way out: the base checkpoint with the tuned tensors, everything else byte for byte.

Works from files. The result is loaded again and its loss compared with the trained model's before
the export counts as done (``export_check``).
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from quantizers.errors import FormatError
from qzo.checkpoint.atomic import new_folder, put_in_place, read_json, remove, write_json
from qzo.checkpoint.base import open_base
from qzo.checkpoint.checkpoint import Checkpoint
from qzo.checkpoint.hub import Origin, copy_side_files
from qzo.checkpoint.tensors import TensorFiles, index_of, write_safetensors
from qzo.errors import CheckpointError, ConfigError, QZOError
from qzo.model.placement import Placement, placement
from qzo.run.folder import Reference, read_reference
from qzo.run.journal.compact import open_record
from qzo.run.output.adapter import (
    CONFIG_NAME,
    Adapter,
    check_base,
    open_adapter,
    tuned_weight,
    unquantized_tensors,
)
from qzo.run.output.card import model_card
from qzo.run.output.export_check import Losses, OtherLossError, check_export
from qzo.run.output.replay import base_of, write_adapter

Progress = Callable[..., None]
_CONFIGS = ("config.json", "quantize_config.json")


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        folder: Where.
        num_changed: Scale tensors that come from the run.
        trained_loss: The trained model's loss on the reference examples; None where it was not
            compared.
        exported_loss: The loss of the files that were written.
        unquantized: Keys of the other tensors that come from the run.
    """

    folder: Path
    num_changed: int
    trained_loss: float | None
    exported_loss: float | None
    unquantized: tuple[str, ...] = ()


def export(
    run: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    verify: bool = True,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    memory_limit: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write the full checkpoint of a run.

    Args:
        run: A run folder, or a journal in either form, in a folder of its own or named itself.
        out: A new or empty folder. If the check fails, the files are in ``OUT.unverified``.
        base: The base checkpoint, where it is no longer where the run says.
        revision: Of the base: a branch, tag or commit of its repository on the hub.
        verify: Load the result and compare its loss with the trained model's.
        device: Where that is computed; a CUDA device where there is one, unless given.
        dtype: In which dtype; that of the run unless given.
        memory_limit: Such as ``4GiB``: the decoder blocks that do not fit stream.
        progress: Told how many files are written, then how many layers are loaded and how many
            examples are evaluated to check them, of how many, and which of the three it is.
    """
    folder, target = Path(run), Path(out)
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    place = placement(device, name, memory_limit)
    with TemporaryDirectory() as temporary, new_folder(target) as partial:
        if (folder / CONFIG_NAME).is_file():
            adapter, checkpoint = _opened(run, base, revision)
        else:  # a bare journal is an adapter too
            adapter, checkpoint = _rebuilt(run, Path(temporary), base, revision)
        reference = read_reference(adapter.folder) if verify else None
        _write_files(checkpoint, adapter, partial, progress)
        losses = _verified(partial, target, reference, place, progress) if verify else None
    unquantized = tuple(unquantized_tensors(adapter))
    num_scales = len(adapter.tensors.files) - len(unquantized)
    trained, exported = (losses.trained, losses.exported) if losses else (None, None)
    return Exported(target, num_scales, trained, exported, unquantized)


def _opened(run: str | Path, base: str | None, revision: str | None) -> tuple[Adapter, Checkpoint]:
    """Return the adapter of a run folder, and its base."""
    adapter = open_adapter(Path(run))
    _check_folds(adapter, str(run))
    recorded = Origin(adapter.config["base_model_name_or_path"], adapter.config.get("revision"))
    checkpoint = open_base(recorded, Path(run), base=base, revision=revision)
    check_base(checkpoint, adapter.config)
    return adapter, checkpoint


def _rebuilt(
    run: str | Path, temporary: Path, base: str | None, revision: str | None
) -> tuple[Adapter, Checkpoint]:
    """Return what a journal says, written into a temporary folder, and its base."""
    journal = open_record(Path(run))
    checkpoint = base_of(journal, base, revision)
    write_adapter(journal, checkpoint, temporary)
    adapter = open_adapter(temporary)
    _check_folds(adapter, str(run))
    return adapter, checkpoint


def _verified(
    partial: Path,
    target: Path,
    reference: Reference | None,
    place: Placement,
    progress: Progress | None,
) -> Losses | None:
    """Check what was written; set it aside under another name if the check fails.

    Raises:
        CheckpointError: It failed.
    """
    try:
        return check_export(partial, reference, place, progress)
    except Exception as error:
        kept = target.with_name(f"{target.name}.unverified")
        remove(kept)  # of an earlier try
        put_in_place(partial, kept)
        if not isinstance(error, QZOError | FormatError | MemoryError | torch.OutOfMemoryError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        is_compared = isinstance(error, OtherLossError)
        how = "check them with another --device, --dtype or --memory-limit"
        raise CheckpointError(
            f"{reason}; the files are in {kept}: "
            f"{'compare them with qzo eval' if is_compared else how}, or export with --no-verify"
        ) from error


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


def _write_files(
    checkpoint: Checkpoint, adapter: Adapter, folder: Path, progress: Progress | None
) -> None:
    replaced = _replaced_tensors(checkpoint, adapter)
    names = list(dict.fromkeys(checkpoint.tensors.files.values()))
    for number, name in enumerate(names):
        if progress is not None:
            progress(number, len(names), "writing")
        entries = list(_entries(checkpoint, name, replaced))
        write_safetensors(folder / name, entries, checkpoint.tensors.metadata(name))
    index = index_of(checkpoint.folder)
    for path in [checkpoint.folder / name for name in _CONFIGS] + ([index] if index else []):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    copy_side_files(checkpoint.folder, folder)
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
    """Write the config of the export where it differs from the base's.

    It does where the quantization config does, and where the base's points to a repository's code,
    which is not copied: without it, transformers takes its own class.
    """
    exported = checkpoint.format.export_config(checkpoint.quantization)
    changed = {} if exported == checkpoint.quantization else {"quantization_config": exported}
    if changed or "auto_map" in checkpoint.config:
        config = {**checkpoint.config, **changed}
        config.pop("auto_map", None)
        write_json(folder / "config.json", config)


def _rewrite_index(folder: Path, dropped: set[str]) -> None:
    if not dropped:
        return
    tensors = TensorFiles(folder)
    size = sum(tensors[key].nbytes for key in tensors.files)
    for path in folder.glob("*.safetensors.index.json"):
        metadata = {**read_json(path).get("metadata", {}), "total_size": size}
        write_json(path, {"metadata": metadata, "weight_map": tensors.files})
