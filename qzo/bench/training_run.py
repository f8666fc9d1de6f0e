"""A real training run on random tokens, in a process of its own: what is watched from outside.

``python -m qzo.bench.training_run SETTINGS RESULT``: settings as JSON, and the file for the result.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from qzo.bench.batches import ANSWER_TOKENS, random_examples
from qzo.bench.clock import wait_for
from qzo.bench.process import Peaks, run_watched, seconds_since_start
from qzo.bench.step import estimator_keys
from qzo.checkpoint.atomic import read_json, write_json
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.data.examples import from_encoded
from qzo.errors import ConfigError
from qzo.model.linear import QuantLinear
from qzo.model.load import decoder_blocks
from qzo.model.memory import parse_memory
from qzo.model.streaming.free_memory import cuda_index
from qzo.run.journal.journal import NAME, Journal
from qzo.run.journal.lines import Step
from qzo.run.launch import load_model
from qzo.run.recipe.keys import Recipe
from qzo.run.recipe.read import recipe
from qzo.run.trainer import Trainer


@dataclass(frozen=True)
class RunSettings:
    """A training run.

    Attributes:
        checkpoint: Folder of a 4-bit checkpoint; needs no tokenizer.
        batch_size: Examples of a step, a row each.
        seq_len: Tokens of a row.
        answer_len: Predictions of a row that are scored, at most ``seq_len``.
        steps: How many.
        coordinates: ``row``, ``relative`` or ``absolute``; estimators as in ``bench step``.
        num_directions: Of a step, for the whole batch (SPSA); None: as in ``bench step``.
        first_order_blocks: The recipe's.
        memory_limit: The recipe's, or None.
        dtype: The recipe's, or None.
        device: The recipe's.
        memory_cap: Of a CUDA device, as ``24GiB``: what the process may allocate there at most, so
            that a large card stands in for a small one. It changes no speed.
    """

    checkpoint: str
    batch_size: int = 1
    seq_len: int = 128
    answer_len: int = ANSWER_TOKENS
    steps: int = 1
    coordinates: str = "row"
    num_directions: int | None = None
    first_order_blocks: int = 0
    memory_limit: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    memory_cap: str | None = None

    @property
    def num_probes(self) -> int:
        """Places where the loss of an example is computed in a step."""
        return 2 * (self.num_directions or 1)

    def recipe(self, output_dir: Path) -> Recipe:
        """Return the recipe of the run.

        Raises:
            ConfigError: It asks for a memory limit, which this version does not know, or for more
                scored predictions than there are tokens.
        """
        if self.answer_len > self.seq_len:
            raise ConfigError(
                f"--answer-len: expected at most --seq-len, {self.seq_len}, got {self.answer_len}"
            )
        keys: dict[str, Any] = {
            **{"model": self.checkpoint, "output_dir": str(output_dir), "max_steps": self.steps},
            **{"per_device_train_batch_size": self.batch_size, "max_length": self.seq_len},
            **{"dtype": self.dtype, "device": self.device, "logging_steps": self.steps},
            **estimator_keys(self.coordinates),
        }
        if self.num_directions is not None:
            spsa = {"estimator": "spsa", "num_directions": self.num_directions}
            keys["zo"] = {**keys.get("zo", {}), **spsa}
        if self.first_order_blocks:
            keys["zo"] = {**keys.get("zo", {}), "first_order_blocks": self.first_order_blocks}
        if self.memory_limit is not None:
            keys["memory_limit"] = self.memory_limit
        return recipe(keys)


@dataclass(frozen=True)
class RunResult:
    """What a run in a process of its own did.

    Attributes:
        peaks: Of its memory, from its start to its end, with what a run does after its last step.
        first_layer_seconds: From the start of the process to its first quantized layer's input.
        step_seconds: Of every step.
        losses: Of every step at its probes.
        device_peak: Bytes that torch had allocated on a CUDA device at most; None on a CPU.
        device_reserved: Those that it had taken from the device, to allocate from.
    """

    peaks: Peaks
    first_layer_seconds: float
    step_seconds: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    device_peak: int | None = None
    device_reserved: int | None = None


def run_apart(settings: RunSettings) -> RunResult:
    """Do a training run in a fresh process and watch it."""
    with TemporaryDirectory() as folder:
        settings.recipe(Path(folder) / "run")  # refuses here what the process would refuse
        if settings.memory_cap is not None and torch.device(settings.device).type != "cuda":
            cap_memory(settings.memory_cap, torch.device(settings.device))
        target = Path(folder) / "result.json"
        peaks = run_watched([__name__, json.dumps(asdict(settings)), str(target)])
        found = read_json(target)
    return RunResult(
        peaks,
        found["first_layer_seconds"],
        tuple(found["step_seconds"]),
        tuple(tuple(map(float.fromhex, losses)) for losses in found["losses"]),
        found.get("device_peak"),
        found.get("device_reserved"),
    )


class _Times(TrainerCallback):
    """Notes when the first quantized layer is reached, and how long the steps take."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.first_layer: float | None = None
        self.steps: list[float] = []
        self._device = model.device
        first = next(x for x in decoder_blocks(model)[0].modules() if isinstance(x, QuantLinear))
        self._handle = first.register_forward_pre_hook(self._reached)

    def _reached(self, _: nn.Module, __: object) -> None:
        self.first_layer = seconds_since_start()
        self._handle.remove()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of a step."""
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time of a step."""
        wait_for(self._device)
        self.steps.append(time.perf_counter() - self._started)


def train(settings: RunSettings) -> dict[str, Any]:
    """Train in this process; return times and losses, these as hexadecimal floats."""
    device = torch.device(settings.device)
    if settings.memory_cap is not None:
        cap_memory(settings.memory_cap, device)
    with TemporaryDirectory() as folder:
        config = settings.recipe(Path(folder) / "run")
        checkpoint = open_checkpoint(config.model)
        _ = checkpoint.digests  # as qzo train does it: read in the background
        lengths = [settings.seq_len] * settings.batch_size
        vocab_size = checkpoint.config["vocab_size"]
        examples = from_encoded(
            random_examples(lengths, vocab_size, answer_len=settings.answer_len)
        )
        model = load_model(config, checkpoint, [examples])
        times = _Times(model)
        Trainer(model, config, examples, callbacks=[times]).train()
        records = Journal.open(Path(config.output_dir) / NAME).records()
        losses = [record.losses for record in records if isinstance(record, Step)]
    return {
        "first_layer_seconds": times.first_layer,
        "step_seconds": times.steps,
        "losses": [[float("nan" if x is None else x).hex() for x in step] for step in losses],
        **_device_peaks(device),
    }


def cap_memory(cap: str, device: torch.device) -> None:
    """Let torch allocate no more than this on a CUDA device, in this process.

    Raises:
        ConfigError: The device is no CUDA device.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"--memory-cap cannot be combined with --device {device.type}: only CUDA memory can be "
            "capped; use --memory-limit"
        )
    total = torch.cuda.get_device_properties(device).total_memory
    share = min(parse_memory(cap, "--memory-cap") / total, 1.0)
    torch.cuda.set_per_process_memory_fraction(share, cuda_index(device))


def _device_peaks(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    return {
        "device_peak": torch.cuda.max_memory_allocated(device),
        "device_reserved": torch.cuda.max_memory_reserved(device),
    }


def main(arguments: Sequence[str]) -> None:
    """Run as the settings say and write the result.

    Args:
        arguments: Settings as JSON, and the file for the result.
    """
    settings, target = arguments
    write_json(Path(target), train(RunSettings(**json.loads(settings))))


if __name__ == "__main__":
    main(sys.argv[1:])
