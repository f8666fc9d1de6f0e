"""A 4-bit checkpoint on disk: its config, its format, its quantized layers."""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from quantizers.formats import detect
from qzo.background import in_background
from qzo.checkpoint.atomic import read_json
from qzo.checkpoint.cache import remembered_digests
from qzo.checkpoint.hub import SIDE_FILES, Origin, checked_folder, fetch, is_hub_id, origin_of
from qzo.checkpoint.stored_layer import StoredLayer
from qzo.checkpoint.tensors import TensorFiles
from qzo.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """A 4-bit checkpoint on disk.

    Attributes:
        folder: Its folder.
        config: ``config.json``.
        quantization: Its quantization config.
        format: The module of ``quantizers`` that reads it.
        spec: What that module made of the quantization config.
        tensors: Its tensors.
        layers: Names of the quantized layers as the files spell them, in natural order.
        origin: How its user names it.
    """

    folder: Path
    config: Mapping[str, Any]
    quantization: Mapping[str, Any]
    format: ModuleType
    spec: Any
    tensors: TensorFiles
    layers: tuple[str, ...]
    origin: Origin

    def layer_tensors(self, layer: str) -> dict[str, Tensor]:
        """Return the stored tensors of one layer by role; absent roles are left out."""
        names = self.layer_keys(layer)
        return {role: self.tensors[key] for role, key in names.items()}

    def stored_layer(self, layer: str) -> StoredLayer:
        """Return the stored tensors of one layer with what reads them."""
        return StoredLayer(layer, self.format, self.spec, self.layer_tensors(layer))

    def layer_keys(self, layer: str) -> dict[str, str]:
        """Return the keys of one layer by role, those that exist."""
        names = self.format.tensor_names(layer, self.spec)
        return {role: key for role, key in names.items() if key in self.tensors.files}

    def scale_key(self, layer: str) -> str:
        """Return the key of the tensor that training changes."""
        names: dict[str, str] = self.format.tensor_names(layer, self.spec)
        return names[self.format.SCALE_ROLE]

    def weight(self, layer: str) -> Any:
        """Return one layer as a ``QuantizedWeight``."""
        return self.format.unpack(self.layer_tensors(layer), self.spec, layer)

    def with_scales(self, layer: str, stored: Tensor) -> Any:
        """Return one layer as a ``QuantizedWeight`` with a scale tensor of the file's layout."""
        tensors = {**self.layer_tensors(layer), self.format.SCALE_ROLE: stored}
        return self.format.unpack(tensors, self.spec, layer)

    @property
    def group_size(self) -> int:
        """Inputs that share a scale, in the first layer."""
        weight = self.weight(self.layers[0])
        size = weight.out_features * weight.in_features
        return int(-(-size // weight.scales.numel()))

    def codes_sha256(self) -> str:
        """Return a digest of everything in the quantized layers but the scales."""
        return self.digests.result()[0]

    def scales_sha256(self) -> str:
        """Return a digest of the scales."""
        return self.digests.result()[1]

    @cached_property
    def digests(self) -> "Future[tuple[str, str]]":
        """Both digests, computed once, in the background from the first look on.

        They are remembered in the user's cache for as long as no file changes.
        """
        files = [self.folder / name for name in dict.fromkeys(self.tensors.files.values())]
        of = json.dumps(self._digested_keys())
        return in_background(lambda: remembered_digests(files, of, self._digests))

    def _digested_keys(self) -> list[tuple[str, bool]]:
        """Return the key of each tensor of a quantized layer, and whether it holds scales."""
        return [
            (key, role in self.format.SCALE_ROLES)
            for layer in self.layers
            for role, key in self.layer_keys(layer).items()
        ]

    def _digests(self) -> tuple[str, str]:
        codes, scales = sha256(), sha256()
        for key, is_scale in self._digested_keys():
            digest = scales if is_scale else codes
            digest.update(key.encode("utf-8"))
            for part in self.tensors.read(key):
                digest.update(part)
        return codes.hexdigest(), scales.hexdigest()


def open_checkpoint(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a 4-bit checkpoint: a folder, or the id of one on the Hugging Face hub.

    Args:
        source: The folder or the id.
        revision: A branch, tag or commit of the repository.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    folder = local_folder(source, revision)
    config = read_json(folder / "config.json")
    tensors = TensorFiles(folder)
    quantization = quantization_config(folder, config)
    format_module = detect(quantization, tensors.files)
    assert quantization is not None  # detect refuses a missing one
    spec = format_module.spec(quantization)
    layers = tuple(sorted(format_module.layer_names(tensors.files), key=natural_order))
    if not layers:
        raise CheckpointError(
            f"{folder}: expected quantized layers as {format_module.QUANT_METHOD} names them, "
            "found none"
        )
    origin = origin_of(source, folder)
    return Checkpoint(folder, config, quantization, format_module, spec, tensors, layers, origin)


def quantization_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the quantization config from ``config.json`` or ``quantize_config.json``."""
    inside = config.get("quantization_config")
    if isinstance(inside, dict):
        return inside
    beside = folder / "quantize_config.json"
    return read_json(beside) if beside.is_file() else None


def dtype_name(config: Mapping[str, Any]) -> str:
    """Return the dtype of a config.json; transformers called it ``torch_dtype`` before 5."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float16")


def local_folder(source: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint, downloading it if it is a hub id.

    Args:
        source: The folder or the id.
        revision: A branch, tag or commit of the repository.
    """
    return _folder_or_fetched(source, revision, ["*.json", "*.safetensors", *SIDE_FILES])


def config_path(source: str | Path, revision: str | None = None) -> Path:
    """Return where the configuration of a checkpoint is; its weights are not downloaded.

    Args:
        source: A folder, a ``config.json``, or an id on the hub.
        revision: A branch, tag or commit of the repository.
    """
    if Path(source).exists() or str(source).endswith(".json"):
        return checked_folder(Path(source), revision)
    return _folder_or_fetched(source, revision, ["*config.json"])


def _folder_or_fetched(source: str | Path, revision: str | None, patterns: Sequence[str]) -> Path:
    """Return a folder, or that of a repository on the hub.

    Raises:
        CheckpointError: There is neither.
    """
    folder = Path(source)
    if folder.is_dir():
        return checked_folder(folder, revision)
    if "/" not in str(source) or not is_hub_id(str(source)):
        raise CheckpointError(f"{source}: expected a folder or a hub id, found neither")
    return fetch(str(source), revision, patterns, "expected a folder, or a repository on the hub")


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts ``layers.2`` before ``layers.10``."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]
