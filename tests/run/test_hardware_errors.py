"""Errors of the computer become one line."""

import importlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import Run, command, write_recipe
from support.runs import RECORDS, tiny_checkpoint, write_lines

from qzo.errors import QZOError
from qzo.run.hardware_errors import hardware_errors

# As torch 2.11 writes it.
CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.65 GiB of "
    "which 1.19 GiB is free. Including non-PyTorch memory, this process has 22.45 GiB memory in "
    "use. Of the allocated memory 21.00 GiB is allocated by PyTorch"
)


@pytest.fixture
def qzo(capsys: pytest.CaptureFixture[str]) -> Run:
    return command(capsys)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "model")


def too_much(*_: Any, **__: Any) -> None:
    torch.empty(2**50, dtype=torch.uint8)  # what torch says of it is its own


def full_gpu(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError(CUDA_MESSAGE)


ON_GPU = "out of memory on the GPU: tried to allocate 2.50 GiB, 1.19 GiB of 23.65 GiB are free; "
ON_HOST = "out of memory on the host: tried to allocate 1048576.00 GiB; "


@pytest.mark.parametrize(("failing", "start"), [(too_much, ON_HOST), (full_gpu, ON_GPU)])
def test_training_without_memory_says_which_keys_to_lower(
    qzo: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: Any, start: str
) -> None:
    data = write_lines(tmp_path / "data.jsonl", RECORDS)
    recipe = write_recipe(tmp_path / "recipe.yaml", base, data, tmp_path / "run")
    monkeypatch.setattr("qzo.objective.loss.answer_scores", failing)

    ran = qzo("train", recipe, "per_device_train_batch_size=6", "--json")

    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[-1] == (
        f"qzo: {start}lower per_device_train_batch_size from 6 to 3, per_device_eval_batch_size "
        "from 32 to 16 (gradient_accumulation_steps=2 keeps the batch of a step), or max_length; "
        "or set memory_limit, so that the model streams"
    )


def test_training_asks_the_plan_how_much_to_lower(
    qzo: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_lines(tmp_path / "data.jsonl", RECORDS)
    recipe = write_recipe(tmp_path / "recipe.yaml", base, data, tmp_path / "run")
    monkeypatch.setattr("qzo.objective.loss.answer_scores", too_much)
    monkeypatch.setattr("qzo.run.memory.available_bytes", lambda _: 1)

    ran = qzo("train", recipe, "per_device_train_batch_size=6")

    assert "lower per_device_train_batch_size from 6 to 1, per_device_eval_batch_size " in ran.err
    assert "from 32 to 1 (gradient_accumulation_steps=6 keeps the batch of a step)" in ran.err


@pytest.mark.parametrize(
    ("arguments", "place", "advice"),
    [
        (
            ("eval", "{base}", "--data", "{data}"),
            "qzo.objective.evaluate.answer_scores",
            "lower --batch-size from 32 to 16 or --max-length from 512 to 256; or set "
            "--memory-limit, so that the model streams",
        ),
        (
            ("generate", "{base}", "--prompt", "a film"),
            "qzo.model.generate.Generator._texts",
            "lower --max-new-tokens from 50 to 25; or set --memory-limit, so that the model "
            "streams",
        ),
        (
            ("quantize", "{base}", "--out", "{data}.4bit"),
            "qzo.quantize.quantize.quantize",
            "lower --num-samples from 32 to 16 or --seq-len from 256 to 128",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_command_without_memory_says_what_to_lower(
    qzo: Run,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    place: str,
    advice: str,
) -> None:
    data = write_lines(tmp_path / "data.jsonl", RECORDS)
    monkeypatch.setattr(place, too_much)

    ran = qzo(*(argument.format(base=base, data=data) for argument in arguments))

    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[-1] == f"qzo: {ON_HOST}{advice}"


def test_an_export_without_memory_says_so(
    qzo: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("qzo.run.output.export"), "export", too_much)

    ran = qzo("export", base, "--out", tmp_path / "out")

    assert (ran.code, ran.out, ran.err) == (1, "", f"qzo: {ON_HOST}free some memory\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), r"^out of memory on the host; lower it$"),
        (
            # triton/runtime/build.py
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
            r"^Triton: expected a C compiler, .*; install gcc .*, or name one in the variable CC$",
        ),
        (
            subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]),
            r"^Triton: the C compiler /usr/bin/gcc failed; install Python's headers .* CC$",
        ),
        (
            torch.distributed.DistBackendError("NCCL error in: x.cpp:1, invalid usage\nmore"),
            r"^processes: NCCL failed \(NCCL error in: x.cpp:1, invalid usage\); .*NCCL_DEBUG=INFO",
        ),
    ],
    ids=["memory", "compiler", "headers", "nccl"],
)
def test_errors_of_the_computer_are_one_line(error: Exception, message: str) -> None:
    with pytest.raises(QZOError, match=message), hardware_errors("lower it"):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), subprocess.CalledProcessError(1, ["git", "log"])]
)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, hardware_errors("lower it"):
        raise error
    assert caught.value is error
