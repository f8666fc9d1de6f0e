"""Codes that are copied ahead of use, on devices that take their time."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, Literal

import pytest
import torch
from support.gptq_files import write_gptq
from support.late_streams import LateStreams
from support.models import tiny_model
from torch import Tensor, nn

from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.model.linear import QuantLinear
from qzo.model.load import decoder_blocks, load_checkpoint
from qzo.model.streaming import device_copies
from qzo.model.streaming.device_copies import CudaStreams, DeviceCopies, Streams

NUM_BLOCKS = 4
Slow = Literal["copying", "computing"]
_CYCLES = 10**7  # some milliseconds of a GPU


@pytest.mark.parametrize("slow", ["copying", "computing"])
def test_a_unit_is_computed_from_its_own_codes_however_late_the_device_is(
    tmp_path: Path, slow: Slow
) -> None:
    streams = LateStreams(slow)

    def queue(work: Callable[[], None]) -> None:
        streams.computing.do(partial(_done, work))

    want, got = codes_of_two_passes(tmp_path, torch.device("cpu"), queue, streams)
    streams.finish()

    assert len(got) == 2 * NUM_BLOCKS * 7  # layers of a block
    assert [torch.equal(a, b) for a, b in zip(got, want, strict=True)] == [True] * len(got)


def _done(work: Callable[[], None]) -> bool:
    work()
    return True


class BusyStreams(CudaStreams):
    """A device that has something else to do before each copy."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.copying):
            torch.cuda._sleep(_CYCLES)
        super().copy(target, source)


@pytest.mark.gpu
@pytest.mark.parametrize("slow", ["copying", "computing"])
def test_a_unit_is_computed_from_its_own_codes_on_a_gpu(tmp_path: Path, slow: Slow) -> None:
    device = torch.device("cuda")
    streams = BusyStreams(device) if slow == "copying" else CudaStreams(device)

    def queue(work: Callable[[], None]) -> None:
        if slow == "computing":
            torch.cuda._sleep(_CYCLES)
        work()

    want, got = codes_of_two_passes(tmp_path, device, queue, streams)
    torch.cuda.synchronize()

    assert len(got) == 2 * NUM_BLOCKS * 7
    assert [torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True)] == [True] * len(got)


def test_a_copy_waits_for_the_one_before_though_a_pass_ended_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error nobody enters the unit that is still being copied into the slot."""
    write_gptq(tmp_path, tiny_model(num_layers=NUM_BLOCKS))
    model = load_checkpoint(open_checkpoint(tmp_path))
    blocks = decoder_blocks(model)
    want = [codes.clone() for codes in codes_of(blocks[2])]
    copies = DeviceCopies(blocks, model, torch.device("cpu"))
    copies.keep(0)
    gate, is_second, stage = Event(), Event(), device_copies._stage
    calls: list[None] = []

    def late(*given: Any) -> int:
        calls.append(None)
        if len(calls) > 1:
            is_second.set()
        else:
            gate.wait(10)
        return stage(*given)

    monkeypatch.setattr(device_copies, "_stage", late)
    copies.fetch(0)  # what the error left behind
    first = copies._coming[0][1]
    copies.fetch(2)  # the same slot

    overtook = is_second.wait(0.2)
    gate.set()
    first.result()
    copies.enter(2)

    assert not overtook
    assert [torch.equal(a, b) for a, b in zip(codes_of(blocks[2]), want, strict=True)] == [True] * 7


def codes_of_two_passes(
    folder: Path,
    device: torch.device,
    queue: Callable[[Callable[[], None]], None],
    streams: Streams,
) -> tuple[list[Tensor], list[Tensor]]:
    """Go through all units twice; return their codes, and those that the device computed from.

    Args:
        folder: A new folder.
        device: Where the units compute.
        queue: Gives the stream that computes something to do.
        streams: Of the device.
    """
    write_gptq(folder, tiny_model(num_layers=NUM_BLOCKS))
    model = load_checkpoint(open_checkpoint(folder))
    blocks = decoder_blocks(model)
    want = [codes.clone() for block in blocks for codes in codes_of(block)]
    copies = DeviceCopies(blocks, model, device, streams)
    copies.keep(0)
    got: list[Tensor] = []

    def read(parts: list[Tensor]) -> None:
        got.extend(part.clone() for part in parts)

    for unit in [*range(NUM_BLOCKS)] * 2:
        copies.enter(unit)
        copies.fetch((unit + 1) % NUM_BLOCKS)  # one ahead, as in a pass
        queue(partial(read, codes_of(blocks[unit])))
        copies.leave(unit)
    return 2 * want, got


def codes_of(block: nn.Module) -> list[Tensor]:
    layers = [part for part in block.modules() if isinstance(part, QuantLinear)]
    return [vars(layer.quantized)["qweight"] for layer in layers]
