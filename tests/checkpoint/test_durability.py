"""What is on the disk, and when: the real calls run, and are noted in their order."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import RECORDS, tiny_checkpoint, tiny_trainer
from transformers import TrainerCallback

from qzo.checkpoint.atomic import new_file, new_folder, replaced_folder, settle, sync, write_bytes
from qzo.run.journal.gradients import NAME as GRADIENTS_NAME
from qzo.run.journal.gradients import Gradients
from qzo.run.journal.journal import NAME as JOURNAL_NAME
from qzo.run.journal.journal import Journal
from qzo.run.output.snapshots import Snapshots

STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("durability") / "base")


class Disk:
    """What was synced and renamed, by inode: a file keeps its own when it is renamed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int]] = []
        self.sizes: dict[int, int] = {}  # at the newest sync
        self.on_sync: Callable[[int], None] = lambda _: None
        fsync = os.fsync

        def noted_fsync(descriptor: int) -> None:
            fsync(descriptor)
            state = os.fstat(descriptor)
            self.events.append(("sync", state.st_ino))
            self.sizes[state.st_ino] = state.st_size
            self.on_sync(state.st_ino)

        monkeypatch.setattr(os, "fsync", noted_fsync)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._noted(getattr(os, name)))

    def _noted(self, move: Callable[..., None]) -> Callable[..., None]:
        def noted(source: Any, target: Any) -> None:
            move(source, target)
            self.events.append(("rename", inode(Path(target))))

        return noted


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def inode(path: Path) -> int:
    return path.stat().st_ino


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_anything_else(
    tmp_path: Path, disk: Disk
) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    write_bytes(target, b"what is new")

    assert target.read_bytes() == b"what is new"
    file, folder = inode(target), inode(tmp_path)
    assert disk.events == [("sync", file), ("rename", file), ("sync", folder)]
    assert disk.sizes[file] == len(b"what is new")


def test_a_folder_and_all_in_it_are_on_the_disk_before_its_name(tmp_path: Path, disk: Disk) -> None:
    target = tmp_path / "folder"

    with new_folder(target) as partial:
        (partial / "part").mkdir()
        for name in ("one", "part/two"):
            (partial / name).write_bytes(b"content")

    parts = [target, target / "one", target / "part", target / "part" / "two"]
    *synced, rename, last = disk.events
    assert sorted(synced) == sorted(("sync", inode(part)) for part in parts)
    assert [rename, last] == [("rename", inode(target)), ("sync", inode(tmp_path))]
    assert disk.sizes[inode(target / "one")] == len(b"content")


def test_the_name_of_a_replaced_folder_is_on_the_disk(tmp_path: Path, disk: Disk) -> None:
    target = tmp_path / "folder"
    target.mkdir()

    with replaced_folder(target) as partial:
        (partial / "file").touch()

    renamed = ("rename", inode(target))
    assert disk.events[-2:] == [renamed, ("sync", inode(tmp_path))]
    assert disk.events.count(renamed) == 2  # complete beside the old one, then in its place
    disk.events.clear()
    settle(target)
    assert disk.events == []  # it is in its place


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_what_an_error_ends_gets_no_name(tmp_path: Path, disk: Disk, make: Any) -> None:
    with pytest.raises(KeyboardInterrupt), make(tmp_path / "target"):
        raise KeyboardInterrupt

    assert list(tmp_path.iterdir()) == []
    assert all(kind == "sync" for kind, _ in disk.events)


def test_syncing_a_file_forces_it_onto_the_disk(tmp_path: Path, disk: Disk) -> None:
    (tmp_path / "file").write_bytes(b"content")

    sync(tmp_path / "file")

    assert disk.events == [("sync", inode(tmp_path / "file"))]


def test_a_gradient_is_on_the_disk_when_it_was_appended(tmp_path: Path, disk: Disk) -> None:
    gradients = Gradients(tmp_path / "gradients", 3)

    for step in range(2):
        gradients.append(step, torch.ones(3))
        assert disk.events[-1] == ("sync", inode(gradients.path))
        assert disk.sizes[inode(gradients.path)] == 12 * (step + 1)


@pytest.mark.parametrize(
    "zo",
    [
        {},
        {"estimator": "spsa", "optimizer": "conservative"},
        {"first_order_blocks": 1},  # of one block: all of it moves by exact gradients
    ],
    ids=["per_example", "conservative", "exact"],
)
def test_a_step_is_on_the_disk_before_the_scales_move(
    base: Path, tmp_path: Path, disk: Disk, zo: dict[str, Any]
) -> None:
    before: list[str] = []  # fingerprints at the beginning of each step
    at_sync: list[tuple[int, str, int]] = []  # steps in the journal, fingerprint, its gradients
    run = tmp_path / "run"

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            before.append(trainer.scales.fingerprint())

    def look(number: int) -> None:
        path, gradients = run / JOURNAL_NAME, run / GRADIENTS_NAME
        if path.exists() and number == inode(path):
            assert disk.sizes[number] == path.stat().st_size
            synced = disk.sizes.get(inode(gradients), 0) if gradients.exists() else 0
            done = Journal.open(path).next_step
            at_sync.append((done, trainer.scales.fingerprint(), synced))

    trainer = tiny_trainer(base, run, callbacks=[Watch()], max_steps=STEPS, zo=zo)
    disk.on_sync = look
    trainer.train()

    assert len(set(before)) == len(before) == STEPS
    first = {done: rest for done, *rest in reversed(at_sync)}
    num_bytes = 4 * len(trainer.scales) if "first_order_blocks" in zo else 0
    for step in range(STEPS):
        assert first[step + 1] == [before[step], (step + 1) * num_bytes]


def test_no_snapshot_is_on_the_disk_before_the_steps_that_led_to_it(
    base: Path, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the journal is forced onto the disk rarely."""
    run, on_disk, write = tmp_path / "run", [], Snapshots.write

    def watched(snapshots: Snapshots, name: str, step: int) -> None:
        synced = disk.sizes[inode(run / JOURNAL_NAME)]
        steps = (run / JOURNAL_NAME).read_bytes()[:synced].count(b'"losses"')
        on_disk.append((name, step, steps))
        write(snapshots, name, step)

    monkeypatch.setattr(Snapshots, "write", watched)
    keys: dict[str, Any] = {
        "max_steps": 6,
        "save_steps": 2,
        "eval_steps": 3,
        "journal_sync_steps": 100,
    }
    tiny_trainer(base, run, evaluation=RECORDS[:4], **keys).train()

    assert {name for name, *_ in on_disk} == {
        "best",
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    }
    assert all(steps == step for _, step, steps in on_disk)
    assert any(name == "best" and step > 0 for name, step, _ in on_disk)
