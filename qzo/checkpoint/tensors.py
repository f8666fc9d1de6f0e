"""Folders of safetensors files: read by memory map, written as a stream.

Reading a tensor gives a view of the file's pages; nothing is copied until somebody computes with
it. Writing streams tensors one after the other, so memory stays at one tensor.

File format: 8 bytes header length, little endian; a JSON header ``{name: {dtype, shape,
data_offsets}}``; the bytes. Wider dtypes go first, so that every tensor lies at a multiple of its
element size in the mapped pages. Source: safetensors documentation, "Format".
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qzo.checkpoint.atomic import read_json, write_json
from qzo.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


_READ_BYTES = 2**22  # of a tensor that is read as a stream


class TensorFiles:
    """The tensors of a folder of safetensors files, by key.

    Args:
        folder: Where the files are.
        names: Which files; None for those of the index, or the only one.

    Attributes:
        folder: Where the files are.
        files: File name of each key, in the order of the files.
    """

    def __init__(self, folder: Path, names: Sequence[str] | None = None) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._offsets: dict[str, dict[str, tuple[int, int]]] = {}
        self.files: dict[str, str] = {}
        for name in shard_names(folder) if names is None else names:
            for key in self._file(name).offset_keys():
                if key in self.files:
                    raise CheckpointError(
                        f"{key}: expected in one file, found in {self.files[key]} and {name}"
                    )
                self.files[key] = name

    def __getitem__(self, key: str) -> Tensor:
        """Return a memory-mapped tensor.

        Raises:
            CheckpointError: There is no such tensor.
        """
        if key not in self.files:
            raise CheckpointError(f"{key}: expected this tensor in {self.folder}, not found")
        tensor: Tensor = self._file(self.files[key]).get_tensor(key)
        return tensor

    def read(self, key: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor part by part, read from the file and not through the map.

        A part is only valid until the next one: they share a buffer.

        Raises:
            CheckpointError: The file ends before the tensor does.
        """
        path = self.folder / self.files[key]
        if self.files[key] not in self._offsets:
            self._offsets[self.files[key]] = _data_offsets(path)
        start, stop = self._offsets[self.files[key]][key]
        buffer = memoryview(bytearray(min(_READ_BYTES, stop - start)))
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while start < stop:
                count = file.readinto(buffer[: stop - start])
                if not count:
                    raise CheckpointError(f"{path}: expected {key} up to byte {stop}, got {start}")
                yield buffer[:count]
                start += count

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum((self.folder / name).stat().st_size for name in set(self.files.values()))

    def metadata(self, file: str) -> dict[str, str]:
        """Return the metadata of one file's header."""
        return dict(self._file(file).metadata() or {})

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            try:
                self._open[name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise CheckpointError(f"{path}: expected a safetensors file: {reason}") from error
        return self._open[name]


def _data_offsets(path: Path) -> dict[str, tuple[int, int]]:
    """Return where in a file the bytes of each tensor start and stop."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        key: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for key, entry in header.items()
        if key != "__metadata__"
    }


def shard_names(folder: Path) -> list[str]:
    """Return the names of the safetensors files of a folder.

    Raises:
        CheckpointError: There is none, one is missing, or a name leaves the folder.
    """
    index = index_of(folder)
    if index is None:
        return [_single_file(folder)]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a weight_map, found none")
    for name in weight_map.values():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise CheckpointError(f"{index}: expected file names without a folder, got {name!r}")
    names = list(dict.fromkeys(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: expected this shard, not found")
    return names


def index_of(folder: Path) -> Path | None:
    """Return the index of a folder of shards, None where there is none.

    Raises:
        CheckpointError: There are several.
    """
    indexes = sorted(path.name for path in folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1 and INDEX_NAME not in indexes:
        raise CheckpointError(f"{folder}: expected one index, found {', '.join(indexes)}")
    if not indexes:
        return None
    return folder / (INDEX_NAME if INDEX_NAME in indexes else indexes[0])


def _single_file(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE_NAME in names:
        return SINGLE_NAME
    if len(names) == 1:
        return names[0]
    found = ", ".join(names) if names else "none"
    hint = "; pickled .bin files are never read" if list(folder.glob("*.bin")) else ""
    raise CheckpointError(f"{folder}: expected {SINGLE_NAME}, found {found}{hint}")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in memory order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_safetensors(
    path: Path, entries: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors into one file; memory-mapped ones pass through one at a time."""
    entries = sorted(entries, key=lambda entry: -entry[1].element_size())
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for name, tensor in entries:
        stop = offset + tensor.numel() * tensor.element_size()
        header[name] = _header_entry(tensor, offset, stop)
        offset = stop
    with path.open("wb") as file:
        file.write(_header_bytes(header))
        for _, tensor in entries:
            file.write(tensor_bytes(tensor))


def _header_entry(tensor: Tensor, start: int, stop: int) -> dict[str, Any]:
    return {
        "dtype": _DTYPE_NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "data_offsets": [start, stop],
    }


def _header_bytes(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8
    return len(text).to_bytes(8, "little") + text


class CheckpointWriter:
    """Streams tensors into ``model.safetensors``, or into shards with an index.

    A tensor is on disk when ``add`` returns; nothing is kept in memory. The folder must be a
    temporary one (``atomic.new_folder``) that is synced and renamed after ``close``.

    Args:
        folder: An existing folder.
        max_shard_bytes: A shard is closed before it would grow beyond this.
        metadata: Written into every header.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_shard_bytes: int = 5 * 2**30,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._metadata = dict(metadata or {"format": "pt"})
        self._shards: list[dict[str, Any]] = [{}]  # headers
        self._sizes = [0]

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor to the current shard."""
        data = tensor_bytes(tensor)
        if self._sizes[-1] and self._sizes[-1] + len(data) > self._max_shard_bytes:
            self._shards.append({})
            self._sizes.append(0)
        start = self._sizes[-1]
        with self._data_path(len(self._shards) - 1).open("ab") as file:
            file.write(data)
        self._shards[-1][name] = _header_entry(tensor, start, start + len(data))
        self._sizes[-1] += len(data)

    def close(self) -> None:
        """Put the headers before the data and write the index."""
        count = len(self._shards)
        names = [SINGLE_NAME] if count == 1 else [_shard_name(i, count) for i in range(count)]
        for i, name in enumerate(names):
            self._write_shard(i, self._folder / name)
            self._data_path(i).unlink()
        if count > 1:
            weight_map = {key: names[i] for i, shard in enumerate(self._shards) for key in shard}
            write_json(
                self._folder / INDEX_NAME,
                {"metadata": {"total_size": sum(self._sizes)}, "weight_map": weight_map},
            )

    def _write_shard(self, shard: int, path: Path) -> None:
        """Write one shard, wider dtypes first."""
        added = self._shards[shard]
        widths = {_DTYPE_NAMES[dtype]: dtype.itemsize for dtype in _DTYPE_NAMES}
        order = sorted(added, key=lambda name: -widths[added[name]["dtype"]])
        header: dict[str, Any] = {"__metadata__": self._metadata}
        offset = 0
        for name in order:
            start, stop = added[name]["data_offsets"]
            header[name] = {**added[name], "data_offsets": [offset, offset + stop - start]}
            offset += stop - start
        with path.open("wb") as file, self._data_path(shard).open("rb") as data:
            file.write(_header_bytes(header))
            for name in order:
                start, stop = added[name]["data_offsets"]
                data.seek(start)
                file.write(data.read(stop - start))

    def _data_path(self, shard: int) -> Path:
        return self._folder / f".data-{shard}"


def _shard_name(shard: int, count: int) -> str:
    return f"model-{shard + 1:05}-of-{count:05}.safetensors"


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names and bytes."""
    digest = sha256()
    for key in sorted(tensors):
        digest.update(key.encode("utf-8") + b"\0" + tensor_bytes(tensors[key].cpu()))
    return digest.hexdigest()
