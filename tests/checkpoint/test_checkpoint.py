import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.gptq_files import GPTQVariant, random_layer, write_tensors
from torch import Tensor

from quantizers.errors import FormatError
from qzo.checkpoint.atomic import new_folder
from qzo.checkpoint.checkpoint import (
    Checkpoint,
    natural_order,
    open_checkpoint,
    quantization_config,
)
from qzo.checkpoint.tensors import (
    CheckpointWriter,
    TensorFiles,
    shard_names,
    tensor_bytes,
    write_safetensors,
)
from qzo.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TENSORS = {
    "float64": torch.arange(3, dtype=torch.float64),
    "float32": torch.arange(6.0).view(2, 3),
    "float16": torch.arange(5).half(),
    "bfloat16": torch.arange(4).bfloat16(),
    "int64": torch.tensor([-(2**60), 2**60]),
    "int32": torch.tensor([[-1], [2**31 - 1]], dtype=torch.int32),
    "int16": torch.tensor([-3], dtype=torch.int16),
    "int8": torch.tensor([-3, 3], dtype=torch.int8),
    "uint8": torch.arange(7, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def write_layers(folder: Path, layers: list[str], num_shards: int = 1) -> dict[str, Tensor]:
    """Write a GPTQ checkpoint of bare layers."""
    variant = GPTQVariant()
    tensors: dict[str, Tensor] = {}
    for seed, layer in enumerate(layers):
        parts = random_layer(32, 8, variant, seed=seed)
        tensors |= {f"{layer}.{role}": tensor for role, tensor in parts.items()}
    write_tensors(folder, tensors, num_shards)
    config = {"model_type": "llama", "quantization_config": variant.config()}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return got.keys() == want.keys() and all(
        torch.equal(got[key], want[key]) and got[key].dtype == want[key].dtype for key in want
    )


def read_all(folder: Path) -> dict[str, Tensor]:
    files = TensorFiles(folder)
    return {key: files[key] for key in files.files}


def mapped_files(address: int) -> str:
    """Return the line of this process's memory map that holds an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= address < stop:
            return line
    return ""


def test_tensors_are_those_that_safetensors_wrote(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE)
    assert same(read_all(tmp_path), TENSORS)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps here")
def test_a_tensor_is_a_view_of_the_mapped_file(tmp_path: Path) -> None:
    save_file({"a": torch.arange(5000)}, tmp_path / SINGLE)
    tensor = TensorFiles(tmp_path)["a"]
    assert mapped_files(tensor.data_ptr()).endswith(str(tmp_path / SINGLE))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps here")
def test_the_codes_of_a_layer_stay_in_the_mapped_file(tmp_path: Path) -> None:
    write_layers(tmp_path, ["a"])
    weight = open_checkpoint(tmp_path).weight("a")
    assert mapped_files(weight.qweight.data_ptr()).endswith(str(tmp_path / SINGLE))


def test_tensors_of_shards_are_found_by_key(tmp_path: Path) -> None:
    write_tensors(tmp_path, TENSORS, num_shards=3)
    assert len(shard_names(tmp_path)) == 3
    assert same(read_all(tmp_path), TENSORS)


def test_a_single_file_may_have_any_name(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "gptq_model-4bit-128g.safetensors")
    assert same(read_all(tmp_path), TENSORS)


def test_the_usual_name_goes_before_other_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / SINGLE)
    save_file({"b": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert shard_names(tmp_path) == [SINGLE]


def test_the_usual_index_goes_before_others(tmp_path: Path) -> None:
    write_tensors(tmp_path, TENSORS, num_shards=2)
    (tmp_path / "other.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')
    assert len(shard_names(tmp_path)) == 2


def test_metadata_is_that_of_the_header(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE, {"format": "pt", "made": "here"})
    assert TensorFiles(tmp_path).metadata(SINGLE) == {"format": "pt", "made": "here"}


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / SINGLE)
    message = rf"^b: expected this tensor in {tmp_path}, not found$"
    with pytest.raises(CheckpointError, match=message):
        TensorFiles(tmp_path)["b"]


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "y.safetensors")
    weight_map = {"a": "x.safetensors", "b": "y.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    message = r"^a: expected in one file, found in x.safetensors and y.safetensors$"
    with pytest.raises(CheckpointError, match=message):
        TensorFiles(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path, TENSORS, num_shards=3)
    missing = tmp_path / "model-00002-of-00003.safetensors"
    missing.unlink()
    with pytest.raises(CheckpointError, match=rf"^{missing}: expected this shard, not found$"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "", 7, ["x"]]
)
def test_a_shard_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: object) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError) as error:
        shard_names(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / INDEX}: expected file names without a folder, got {name!r}"
    )


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, index: dict[str, Any]) -> None:
    (tmp_path / INDEX).write_text(json.dumps(index))
    message = rf"^{tmp_path / INDEX}: expected a weight_map, found none$"
    with pytest.raises(CheckpointError, match=message):
        shard_names(tmp_path)


def test_two_indexes_of_other_names_are_refused(tmp_path: Path) -> None:
    for name in ("b.safetensors.index.json", "a.safetensors.index.json"):
        (tmp_path / name).write_text('{"weight_map": {"x": "y"}}')
    message = (
        rf"^{tmp_path}: expected one index, found a.safetensors.index.json, "
        r"b.safetensors.index.json$"
    )
    with pytest.raises(CheckpointError, match=message):
        shard_names(tmp_path)


def test_a_folder_without_tensors_is_refused(tmp_path: Path) -> None:
    message = rf"^{tmp_path}: expected model.safetensors, found none$"
    with pytest.raises(CheckpointError, match=message):
        shard_names(tmp_path)


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    message = rf"^{tmp_path}: expected model.safetensors, found a.safetensors, b.safetensors$"
    with pytest.raises(CheckpointError, match=message):
        shard_names(tmp_path)


def test_pickled_files_are_never_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    message = (
        rf"^{tmp_path}: expected model.safetensors, found none; pickled .bin files are never read$"
    )
    with pytest.raises(CheckpointError, match=message):
        TensorFiles(tmp_path)
    assert not (tmp_path / "exploded").exists()


def cut(data: bytes, header: dict[str, Any]) -> bytes:
    del header
    return data[:-1]


def only_a_length(data: bytes, header: dict[str, Any]) -> bytes:
    del header
    return data[:8]


def huge_header(data: bytes, header: dict[str, Any]) -> bytes:
    del header
    return (2**62).to_bytes(8, "little") + data[8:]


def no_json(data: bytes, header: dict[str, Any]) -> bytes:
    del header
    return data[:8] + b"?" + data[9:]


def with_header(data: bytes, header: dict[str, Any]) -> bytes:
    start = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[start:]


def wrong_shape(data: bytes, header: dict[str, Any]) -> bytes:
    header["a"]["shape"] = [4, 4]
    return with_header(data, header)


def beyond_the_end(data: bytes, header: dict[str, Any]) -> bytes:
    header["a"]["data_offsets"] = [8, 40]
    return with_header(data, header)


def unknown_dtype(data: bytes, header: dict[str, Any]) -> bytes:
    header["a"]["dtype"] = "F99"
    return with_header(data, header)


DAMAGES = [cut, only_a_length, huge_header, no_json, wrong_shape, beyond_the_end, unknown_dtype]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: str(damage.__name__))
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / SINGLE
    save_file({"a": torch.arange(8.0)}, path)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    path.write_bytes(damage(data, header))
    # what follows is in safetensors' own words
    with pytest.raises(CheckpointError, match=rf"\A{path}: expected a safetensors file: .+\Z"):
        TensorFiles(tmp_path)


def test_an_open_checkpoint_knows_its_layers_in_natural_order(tmp_path: Path) -> None:
    write_layers(tmp_path, ["h.10.q", "h.2.q", "h.2.k", "h.1.q"], num_shards=2)
    assert open_checkpoint(tmp_path).layers == ("h.1.q", "h.2.k", "h.2.q", "h.10.q")


def test_natural_order_compares_numbers_as_numbers() -> None:
    names = ["b", "a.10.x", "a.9.x", "a.9.10", "a.9.9", "10", "9", "a"]
    want = ["9", "10", "a", "a.9.9", "a.9.10", "a.9.x", "a.10.x", "b"]
    assert sorted(names, key=natural_order) == want


def test_a_checkpoint_without_layers_is_refused(tmp_path: Path) -> None:
    write_layers(tmp_path, ["a"])
    save_file({"a.weight": torch.zeros(1)}, tmp_path / SINGLE)
    message = rf"^{tmp_path}: expected quantized layers as gptq names them, found none$"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / SINGLE)
    message = rf"^{tmp_path / 'config.json'}: expected this file, not found$"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1]", "expected a JSON object, got list"),
        ("{", "expected JSON, got Expecting property name enclosed in double quotes.*"),
        ("[" * 100000, "expected JSON, got values nested too deeply"),
    ],
    ids=["list", "cut", "deep"],
)
def test_a_damaged_config_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(text)
    message = rf"\A{tmp_path / 'config.json'}: {reason}\Z"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_source_that_is_no_folder_and_no_hub_id_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    message = rf"^{missing}: expected a folder or a hub id, found neither$"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(missing)


def test_the_quantization_config_may_have_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text('{"bits": 4}')
    assert quantization_config(tmp_path, {}) == {"bits": 4}


def test_the_quantization_config_inside_goes_first(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text('{"bits": 4}')
    assert quantization_config(tmp_path, {"quantization_config": {"bits": 8}}) == {"bits": 8}


def test_no_quantization_config_is_none(tmp_path: Path) -> None:
    assert quantization_config(tmp_path, {}) is None


def changed(folder: Path, key: str, row: int, value: float) -> Checkpoint:
    """Change one element of one stored tensor."""
    tensors = load_file(folder / SINGLE)
    tensors[key].view(-1)[row] = value
    save_file(tensors, folder / SINGLE)
    return open_checkpoint(folder)


@pytest.mark.parametrize("role", ["qweight", "qzeros", "g_idx"])
def test_the_digest_of_the_codes_changes_with_them(tmp_path: Path, role: str) -> None:
    write_layers(tmp_path, ["a", "b"])
    before = open_checkpoint(tmp_path)
    codes, scales = before.codes_sha256(), before.scales_sha256()
    after = changed(tmp_path, f"b.{role}", 0, 1234 if role != "g_idx" else 3)
    assert after.codes_sha256() != codes
    assert after.scales_sha256() == scales


def test_the_digest_of_the_codes_does_not_change_with_a_scale(tmp_path: Path) -> None:
    write_layers(tmp_path, ["a", "b"])
    before = open_checkpoint(tmp_path)
    codes, scales = before.codes_sha256(), before.scales_sha256()
    after = changed(tmp_path, "b.scales", 0, 0.5)
    assert after.codes_sha256() == codes
    assert after.scales_sha256() != scales


def test_digests_do_not_depend_on_the_sharding(tmp_path: Path) -> None:
    for folder, num_shards in (("one", 1), ("three", 3)):
        (tmp_path / folder).mkdir()
        write_layers(tmp_path / folder, ["a", "b"], num_shards)
    one, three = (open_checkpoint(tmp_path / folder) for folder in ("one", "three"))
    assert one.codes_sha256() == three.codes_sha256()
    assert one.scales_sha256() == three.scales_sha256()


def test_with_scales_replaces_the_scales_of_one_layer(tmp_path: Path) -> None:
    write_layers(tmp_path, ["a"])
    other = torch.full((1, 8), 0.25).half()
    assert torch.equal(open_checkpoint(tmp_path).with_scales("a", other).scales, other.T)


def test_with_scales_refuses_another_shape(tmp_path: Path) -> None:
    write_layers(tmp_path, ["a"])
    message = (
        r"^a.scales: expected shape \(1, 8\), got \(2, 8\); are bits 4, group_size 32 right\?$"
    )
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tmp_path).with_scales("a", torch.ones(2, 8).half())


def test_group_size_is_that_of_the_first_layer(tmp_path: Path) -> None:
    write_layers(tmp_path, ["a"])
    assert open_checkpoint(tmp_path).group_size == 32


def test_tensor_bytes_are_in_memory_order() -> None:
    matrix = torch.tensor([[1, 2], [3, 4]], dtype=torch.int16)
    assert bytes(tensor_bytes(matrix)) == b"\x01\0\x02\0\x03\0\x04\0"
    assert bytes(tensor_bytes(matrix.T)) == b"\x01\0\x03\0\x02\0\x04\0"


def test_a_written_file_is_read_by_safetensors(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", TENSORS.items(), {"format": "pt", "step": "3"})
    assert same(load_file(tmp_path / "x"), TENSORS)
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": "3"}


def written_by_function(folder: Path, tensors: dict[str, Tensor]) -> None:
    write_safetensors(folder / SINGLE, tensors.items())


def written_by_writer(folder: Path, tensors: dict[str, Tensor]) -> None:
    writer = CheckpointWriter(folder)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()


every_writer = pytest.mark.parametrize("write", [written_by_function, written_by_writer])


@every_writer
def test_every_tensor_lies_at_a_multiple_of_its_element_size(tmp_path: Path, write: Any) -> None:
    write(tmp_path, dict(reversed(TENSORS.items())))
    data = (tmp_path / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    assert header.keys() == TENSORS.keys()
    for name, entry in header.items():
        assert (8 + length + entry["data_offsets"][0]) % TENSORS[name].element_size() == 0
    assert same(load_file(tmp_path / SINGLE), TENSORS)


@every_writer
def test_tensors_of_one_width_keep_their_order(tmp_path: Path, write: Any) -> None:
    tensors = {name: torch.zeros(2) for name in ("c", "a", "b")}
    write(tmp_path, tensors)
    assert list(TensorFiles(tmp_path).files) == ["c", "a", "b"]


@every_writer
def test_eight_bit_floats_are_written(tmp_path: Path, write: Any) -> None:
    dtypes = (torch.float8_e4m3fn, torch.float8_e5m2)
    tensors = {str(dtype): torch.arange(5.0).to(dtype) for dtype in dtypes}
    write(tmp_path, tensors)
    for name, tensor in load_file(tmp_path / SINGLE).items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor.float(), torch.arange(5.0))


def test_data_start_at_a_multiple_of_eight_bytes(tmp_path: Path) -> None:
    for length in range(1, 9):
        write_safetensors(tmp_path / "x", [("a" * length, torch.zeros(1))])
        with (tmp_path / "x").open("rb") as file:
            assert int.from_bytes(file.read(8), "little") % 8 == 0


def test_the_writer_writes_one_file_where_all_fits(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    assert same(load_file(tmp_path / SINGLE), TENSORS)


def test_the_writer_starts_a_shard_at_the_limit(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((8,), float(i)) for i in range(5)}  # 32 bytes each
    writer = CheckpointWriter(tmp_path, max_shard_bytes=64, metadata={"made": "here"})
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, INDEX]
    held = [load_file(tmp_path / name) for name in files]
    assert [sorted(shard) for shard in held] == [["t0", "t1"], ["t2", "t3"], ["t4"]]
    assert same({k: v for shard in held for k, v in shard.items()}, tensors)
    assert TensorFiles(tmp_path).metadata(files[2]) == {"made": "here"}


def test_the_index_of_the_writer_names_every_tensor(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, max_shard_bytes=32)
    for name in ("a", "b"):
        writer.add(name, torch.zeros(8))
    writer.close()
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 64},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        },
    }


def test_a_tensor_above_the_limit_gets_a_shard_of_its_own(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, max_shard_bytes=8)
    for name in ("a", "b"):
        writer.add(name, torch.full((100,), 1.0))
    writer.close()
    assert len(shard_names(tmp_path)) == 2
    assert same(read_all(tmp_path), {"a": torch.ones(100), "b": torch.ones(100)})


def interrupted_entries() -> Iterator[tuple[str, Tensor]]:
    yield "a", torch.zeros(100)
    yield "b", torch.zeros(100)
    raise KeyboardInterrupt


@pytest.mark.parametrize("max_shard_bytes", [100, 10**9])
def test_an_interrupted_writer_leaves_nothing_behind(tmp_path: Path, max_shard_bytes: int) -> None:
    def write() -> None:
        with new_folder(tmp_path / "out") as partial:
            writer = CheckpointWriter(partial, max_shard_bytes=max_shard_bytes)
            for name, tensor in interrupted_entries():
                writer.add(name, tensor)
            writer.close()

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []
