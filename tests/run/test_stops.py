"""Runs that real signals, kills, full disks and damaged files end, and that go on afterwards."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import forked
from support.runs import RECORDS, json_lines, tiny_checkpoint, write_lines

import qzo
from qzo.run.launch import train
from qzo.run.recipe.read import recipe

STEPS = 120
KILLS = int(os.environ.get("QZO_KILLS", "50"))
PATIENCE_SECONDS = 600  # for a computer with much else to do; nothing depends on it
# Imports happen once: a process that trains is forked from one that has done them.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["qzo.run.launch", "qzo.cli", "support.forked"])


class Run:
    """A run on a tiny checkpoint, in processes that may be killed."""

    def __init__(self, folder: Path, **keys: Any) -> None:
        self.folder = folder / "run"
        self.errors = folder / "errors"
        self.values: dict[str, Any] = {
            "model": str(folder / "base"),
            "data": str(folder / "data.jsonl"),
            "eval_data": str(folder / "data.jsonl"),
            "output_dir": str(self.folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            **{"eval_steps": 40, "save_steps": 25, "logging_steps": 7},
            **{"resume_from_checkpoint": True, **keys},
        }
        if not (folder / "base").exists():
            tiny_checkpoint(folder / "base")
            write_lines(folder / "data.jsonl", RECORDS)

    def start(self) -> ForkServerProcess:
        process = FORKED.Process(target=forked.train, args=(self.values, str(self.errors)))
        process.start()
        return process

    def finish(self) -> int | None:
        process = self.start()
        process.join(PATIENCE_SECONDS)
        return process.exitcode

    def steps_done(self) -> int:
        journal = self.folder / "journal.jsonl"
        return journal.read_bytes().count(b'"losses"') if journal.exists() else 0

    def wait_for(self, steps: int) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.steps_done() < steps:
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.001)

    def said(self) -> str:
        """Return the last line on standard error."""
        return self.errors.read_text().strip().splitlines()[-1]

    def journal(self) -> list[dict[str, Any]]:
        """Return the steps; where fingerprints stand depends on the stops."""
        return [line for line in json_lines(self.folder / "journal.jsonl") if "losses" in line]

    def metrics(self) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in line.items() if key != "seconds"}
            for line in json_lines(self.folder / "metrics.jsonl")
        ]

    def adapter(self) -> bytes:
        return (self.folder / "adapter_model.safetensors").read_bytes()


def assert_equal(run: Run, straight: Run) -> None:
    assert run.journal() == straight.journal()
    assert run.metrics() == straight.metrics()
    assert run.adapter() == straight.adapter()
    assert qzo.replay(run.folder).adapter == "equal"


def straight_run(folder: Path, **keys: Any) -> Run:
    """Return a run that nothing stopped."""
    folder.mkdir()
    run = Run(folder, **keys)
    result = train(recipe({**run.values, "zo": keys.get("zo", {})}))
    assert result is not None
    return run


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return straight_run(tmp_path_factory.mktemp("stops") / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_a_run_killed_at_random_moments_ends_like_one_that_was_not(
    tmp_path: Path, optimizer: str
) -> None:
    zo = {"optimizer": optimizer}
    straight = straight_run(tmp_path / "straight", zo=zo)
    run, draw, kills = Run(tmp_path, zo=zo), random.Random(0), 0
    while kills < KILLS:
        process = run.start()
        # Somewhere between the start and a few steps later, also within writes and snapshots.
        target = run.steps_done() + draw.randrange(3)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while run.steps_done() <= target and process.is_alive():
            assert time.monotonic() < deadline
            if draw.random() < 0.001:
                break
            time.sleep(0.001)
        time.sleep(draw.random() * 0.01)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:  # done already: begin again
            for file in run.folder.rglob("*"):
                if file.is_file():
                    file.unlink()
    assert run.finish() == 0, run.said()
    assert_equal(run, straight)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step(tmp_path: Path, straight: Run, number: signal.Signals) -> None:
    run = Run(tmp_path)
    process = run.start()
    run.wait_for(5)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(PATIENCE_SECONDS)

    steps = run.steps_done()
    assert process.exitcode == 1
    assert 5 <= steps < STEPS
    assert run.said() == (
        f"qzo: stopped by a signal after step {steps} of {STEPS}; to go on: "
        "resume_from_checkpoint=true"
    )
    assert (run.folder / f"checkpoint-{steps}").is_dir()
    assert run.finish() == 0, run.said()
    assert_equal(run, straight)


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused(tmp_path: Path, straight: Run) -> None:
    run = Run(tmp_path)
    first = run.start()
    run.wait_for(1)
    assert run.finish() == 1
    refusal = (
        f"qzo: {run.folder}: expected a folder of one run, but another process is at work in it; "
        "wait for its end, or choose another output_dir"
    )
    assert refusal in run.errors.read_text().splitlines()  # between the lines of the first one
    first.join(PATIENCE_SECONDS)
    assert first.exitcode == 0
    assert_equal(run, straight)


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[None]:
    """Mount a small file system; skip where that is not allowed."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path, straight: Run) -> None:
    run = Run(tmp_path)
    with tmpfs(run.folder, "64k"):
        assert run.finish() == 1
        assert "cannot be written: No space left on device; nothing was left half-" in run.said()
        before = run.journal()
        assert 0 < len(before) < STEPS
        assert before == straight.journal()[: len(before)]
        subprocess.run(["mount", "-o", "remount,size=16m", str(run.folder)], check=True)
        assert run.finish() == 0, run.said()
        assert_equal(run, straight)


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with tmpfs(run.folder, "1m"):
        subprocess.run(["mount", "-o", "remount,ro", str(run.folder)], check=True)
        assert run.finish() == 1
        assert run.said() == (
            f"qzo: {run.folder}: cannot be written: Read-only file system; nothing was left "
            "half-written"
        )


@pytest.mark.slow
def test_a_base_cut_short_under_a_run_is_named(tmp_path: Path, straight: Run) -> None:
    run = Run(tmp_path)
    weights = tmp_path / "base" / "model.safetensors"
    content = weights.read_bytes()
    process = run.start()
    run.wait_for(3)
    os.truncate(weights, 4096)
    process.join(PATIENCE_SECONDS)

    assert process.exitcode == 1
    assert run.said() == (
        f"qzo: {weights}: was cut short or cannot be read any more while it was in use; the "
        "journal holds every finished step: restore the file, then resume_from_checkpoint=true"
    )
    weights.write_bytes(content)
    assert run.finish() == 0, run.said()
    assert_equal(run, straight)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_skipped_and_journaled(tmp_path: Path) -> None:
    """The embedding of one letter is not a number; one text has it."""
    run = Run(tmp_path, eval_data="null", num_eval_examples=0, max_steps=8)
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    key = next(key for key in tensors if "embed_tokens" in key)
    letter = 4 + "abcdefghijklmnopqrstuvwxyz".index("x")
    tensors[key][letter] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    records = [*RECORDS, {**RECORDS[0], "prompt": "an xxx film. it was"}]
    write_lines(tmp_path / "data.jsonl", records)

    assert run.finish() == 0, run.said()
    lost = [line["step"] for line in run.journal() if None in line["losses"]]
    assert 0 < len(lost) < 8
    assert qzo.replay(run.folder).adapter == "equal"


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]


def run_ranks(run: Run, count: int, *options: str) -> "subprocess.Popen[str]":
    path = run.errors.with_suffix(".yaml")
    path.write_text("".join(f"{key}: {value}\n" for key, value in run.values.items()))
    command = [*TORCHRUN, str(count), "--standalone", *options, "-m", "qzo", "train", str(path)]
    with run.errors.open("a") as errors:
        return subprocess.Popen(command, stderr=errors, stdout=subprocess.DEVNULL, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "zo",
    [
        {},
        {"estimator": "spsa", "num_directions": 2},
        {"estimator": "spsa", "optimizer": "conservative"},
        {"estimator": "spsa", "optimizer": "hizoo", "layer_scaling": "grad_norm"},
    ],
    ids=str,
)
def test_the_number_of_processes_does_not_matter(tmp_path: Path, zo: dict[str, Any]) -> None:
    keys = {"max_steps": 10, "gradient_accumulation_steps": 4, "zo": zo}
    straight = straight_run(tmp_path / "1", **keys)
    for count in (2, 4):
        (tmp_path / str(count)).mkdir()
        run = Run(tmp_path / str(count), **keys)
        assert run_ranks(run, count).wait(240) == 0, run.said()
        assert_equal(run, straight)


def children(process: "subprocess.Popen[str]") -> dict[str, int]:
    """Return the processes that torchrun started, by their rank."""
    found: dict[str, int] = {}
    listing = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    for pid in map(int, listing.split()):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = [v[5:].decode() for v in variables if v.startswith(b"RANK=")]
        found |= {rank[0]: pid} if rank else {}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_lost_process_ends_the_run_and_another_number_of_them_goes_on(
    tmp_path: Path, straight: Run, rank: str
) -> None:
    run = Run(tmp_path)
    process = run_ranks(run, 2)
    run.wait_for(5)
    os.kill(children(process)[rank], signal.SIGKILL)
    assert process.wait(60) == 1
    if rank == "1":
        assert "processes: lost one of this run" in run.errors.read_text()
    assert run.steps_done() < STEPS
    assert run.finish() == 0, run.said()
    assert_equal(run, straight)


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_process(tmp_path: Path, straight: Run) -> None:
    run = Run(tmp_path, resume_from_checkpoint=False)
    process = run_ranks(run, 2, "--max-restarts", "1")
    run.wait_for(5)
    os.kill(children(process)["1"], signal.SIGKILL)
    assert process.wait(240) == 0, run.errors.read_text()
    assert_equal(run, straight)


@pytest.mark.slow
def test_processes_with_other_data_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, max_steps=4)
    path = run.errors.with_suffix(".yaml")
    path.write_text("".join(f"{key}: {value}\n" for key, value in run.values.items()))
    write_lines(tmp_path / "other.jsonl", RECORDS[:5])
    script = tmp_path / "start.sh"
    script.write_text(
        f'[ "$RANK" = 1 ] && more="data={tmp_path}/other.jsonl"\n'
        f"exec {sys.executable} -m qzo train {path} $more\n"
    )
    command = [*TORCHRUN, "2", "--standalone", "--no-python", "bash", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )

    assert done.returncode == 1
    assert "data: the digest of the training examples differs from that of process 0" in done.stderr
