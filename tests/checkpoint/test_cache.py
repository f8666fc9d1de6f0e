"""Digests are remembered, and never those of a file that changed."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.gptq_files import GPTQVariant, random_layer, write_tensors

from qzo.checkpoint import cache
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.checkpoint.tensors import TensorFiles

Reads = list[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of two shards whose files count as settled, and an empty cache."""
    monkeypatch.setenv("QZO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_SETTLED_NS", 0)
    variant, made = GPTQVariant(), tmp_path / "checkpoint"
    made.mkdir()
    layers = {layer: random_layer(32, 8, variant, seed=seed) for seed, layer in enumerate("ab")}
    tensors = {f"{layer}.{role}": t for layer, roles in layers.items() for role, t in roles.items()}
    write_tensors(made, tensors, 2)
    config = {"model_type": "llama", "quantization_config": variant.config()}
    (made / "config.json").write_text(json.dumps(config))
    return made


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """The keys whose bytes were read."""
    keys: Reads = []
    read = TensorFiles.read

    def noted(tensors: TensorFiles, key: str) -> Iterator[memoryview]:
        keys.append(key)
        return read(tensors, key)

    monkeypatch.setattr(TensorFiles, "read", noted)
    return keys


def digests(folder: Path) -> tuple[str, str]:
    checkpoint = open_checkpoint(folder)
    return checkpoint.codes_sha256(), checkpoint.scales_sha256()


def shard(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"))


def overwrite(path: Path) -> None:
    """Change the last byte in place; the file keeps size and inode."""
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(data) - 1)
        file.write(bytes([data[-1] ^ 1]))


def restore_mtime(path: Path, before: os.stat_result) -> None:
    """Give a file its old times, later than the clock's next tick: ctime cannot be set."""
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_digests_are_read_once(folder: Path, reads: Reads) -> None:
    first = digests(folder)
    assert len(reads) == 8  # two layers of qweight, qzeros, scales and g_idx
    assert digests(folder) == first
    assert len(reads) == 8


def test_a_link_to_the_files_shares_what_is_remembered(folder: Path, reads: Reads) -> None:
    first, snapshot = digests(folder), folder.with_name("snapshot")
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert digests(snapshot) == first
    assert len(reads) == 8


def _in_place(path: Path) -> None:
    before = path.stat()
    overwrite(path)
    while path.stat().st_mtime_ns == before.st_mtime_ns:
        os.utime(path)


def _in_place_with_its_old_mtime(path: Path) -> None:
    before = path.stat()
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    restore_mtime(path, before)
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert after.st_ino == before.st_ino


def _by_another_file(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    overwrite(copy)
    shutil.copystat(path, copy)  # its times
    copy.replace(path)


@pytest.mark.parametrize("change", [_in_place, _in_place_with_its_old_mtime, _by_another_file])
def test_a_changed_file_is_noticed(folder: Path, change: Callable[[Path], None]) -> None:
    before = digests(folder)
    change(shard(folder))
    assert digests(folder) != before


@pytest.mark.parametrize("key", ["path", "size", "inode", "mtime_ns", "ctime_ns"])
def test_an_entry_of_another_state_is_not_trusted(folder: Path, reads: Reads, key: str) -> None:
    digests(folder)
    entry = next((folder.parent / "cache" / "digests").iterdir())
    value = json.loads(entry.read_text())
    value["files"][1][key] = "elsewhere" if key == "path" else value["files"][1][key] + 1
    entry.write_text(json.dumps(value))
    digests(folder)
    assert len(reads) == 16


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"digests": ["a"]}', '{"digests": null}'])
def test_a_damaged_entry_is_written_again(folder: Path, reads: Reads, text: str) -> None:
    first = digests(folder)
    entry = next((folder.parent / "cache" / "digests").iterdir())
    good = entry.read_text()
    entry.write_text(text)
    assert digests(folder) == first
    assert entry.read_text() == good


def test_other_layers_of_the_same_files_are_read(folder: Path) -> None:
    of_all = digests(folder)
    checkpoint = open_checkpoint(folder)
    checkpoint = replace(checkpoint, layers=checkpoint.layers[:1])
    assert checkpoint.codes_sha256() != of_all[0]


def test_a_file_that_was_just_written_is_not_remembered(
    folder: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_SETTLED_NS", 3600 * 10**9)
    digests(folder)
    digests(folder)
    assert len(reads) == 16


def test_a_file_that_changes_while_it_is_read_is_not_remembered(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))

    def compute() -> tuple[str, str]:
        _in_place(files[0])
        return "old codes", "old scales"

    cache.remembered_digests(files, "", compute)
    got = cache.remembered_digests(files, "", lambda: ("new codes", "new scales"))
    assert got == ("new codes", "new scales")


def test_a_cache_that_cannot_be_written_is_not_used(
    folder: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QZO_CACHE", str(folder / "config.json"))  # a file
    assert digests(folder) == digests(folder)
    assert len(reads) == 16


def test_a_user_without_a_home_has_no_cache(
    folder: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("QZO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert digests(folder) == digests(folder)
    assert len(reads) == 16


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZO_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache.cache_folder() == Path("/own")
    monkeypatch.delenv("QZO_CACHE")
    assert cache.cache_folder() == Path("/xdg/qzo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path("/home/me/.cache/qzo")


def test_no_test_uses_the_cache_of_the_user() -> None:
    assert Path.home() not in cache.cache_folder().parents
