"""A device other than the first: kernels are launched where the tensors are."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import tiny_model
from support.runs import RECORDS, json_lines, tiny_checkpoint, tiny_recipe, write_lines
from transformers import TrainingArguments

from qzo.model.kernels.current_device import on_device
from qzo.run import launch as run
from qzo.run.callbacks import Events


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The current device of a computer with GPUs, as torch.cuda.device and set_device leave it."""
    device = [0]

    @contextmanager
    def entered(wanted: torch.device) -> Iterator[None]:
        before, device[0] = device[0], wanted.index
        try:
            yield
        finally:
            device[0] = before

    monkeypatch.setattr("torch.cuda.device", entered)
    monkeypatch.setattr("torch.cuda.set_device", lambda wanted: device.__setitem__(0, wanted.index))
    return device


def test_a_device_is_the_current_one_for_a_block(current: list[int]) -> None:
    with on_device(torch.device("cuda:1")):
        assert current == [1]
        with on_device(torch.device("cpu")):
            assert current == [1]
    assert current == [0]


def test_callbacks_leave_the_current_device_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, current: list[int]
) -> None:
    def made(**keys: Any) -> TrainingArguments:
        torch.cuda.set_device(torch.device("cuda:0"))  # as transformers 5.23 does where GPUs are
        return TrainingArguments(**{**keys, "use_cpu": True})

    monkeypatch.setattr("qzo.run.callbacks.TrainingArguments", made)
    model = tiny_model()
    monkeypatch.setattr(type(model), "device", torch.device("cuda:1"))
    current[0] = 1

    Events(tiny_recipe(tmp_path, tmp_path / "run"), model, ())

    assert current == [1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_run_on_the_second_gpu_has_the_losses_of_the_first(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    data = write_lines(tmp_path / "data.jsonl", RECORDS)
    found = []
    for device in ("cuda:0", "cuda:1"):
        out = tmp_path / device.replace(":", "")
        run.train(tiny_recipe(base, out, data=str(data), device=device, max_steps=2))
        found.append([x["losses"] for x in json_lines(out / "journal.jsonl") if "losses" in x])
        assert torch.cuda.current_device() == 0
    assert len(found[0]) == 2
    assert found[1] == found[0]
