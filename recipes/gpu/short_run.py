"""Short training runs on random tokens, for the parts of the GPU check.

As a script it trains once, in a process that can be killed:
``python short_run.py CHECKPOINT OUTPUT_DIR KEYS [KILL_AFTER]``, with the keys of a recipe as JSON.
"""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qzo.bench.batches import random_examples
from qzo.bench.synthetic import Synthetic, synthetic_checkpoint
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.data.examples import ExampleSet, from_encoded
from qzo.run.journal.journal import NAME, Journal
from qzo.run.journal.lines import Step
from qzo.run.launch import load_model
from qzo.run.recipe.read import recipe
from qzo.run.trainer import Trainer

LENGTHS = (9, 14, 17, 23, 26, 31, 37, 40)  # of the rows of a batch: sums have no round size


class KillAfter(TrainerCallback):
    """Kill the process when so many steps are done, as a power cut would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Kill it."""
        if state.global_step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def small_checkpoint(folder: Path, format_name: str, *, is_tiny: bool) -> Path:
    """Make a small model of random codes: a few layers of SmolLM2's shape."""
    shape, layers = ("tiny", None) if is_tiny else ("smollm2-135m", 4)
    return synthetic_checkpoint(Synthetic(shape, format_name, num_layers=layers), folder)


def examples_for(checkpoint: Path, lengths: Sequence[int] = LENGTHS) -> ExampleSet:
    """Draw two batches of examples with short answers."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    return from_encoded(random_examples([*lengths, *lengths], config["vocab_size"]))


def train(
    checkpoint: Path, out: Path, keys: Mapping[str, Any], callbacks: Sequence[Any] = ()
) -> Trainer:
    """Train as ``qzo train`` does; return the trainer, its model tuned."""
    examples = examples_for(checkpoint)
    values = {
        **{"model": str(checkpoint), "output_dir": str(out), "max_steps": 5, "logging_steps": 1},
        **{"per_device_train_batch_size": len(LENGTHS), "max_length": max(LENGTHS) + 1},
        **keys,
    }
    config = recipe(values)
    opened = open_checkpoint(config.model)
    model = load_model(config, opened, [examples])
    trainer = Trainer(model, config, examples, callbacks=callbacks)
    trainer.train()
    return trainer


def steps_of(run: Path) -> list[Step]:
    """Return the steps of a journal."""
    records = Journal.open(run / NAME).records()
    return [record for record in records if isinstance(record, Step)]


def losses_of(run: Path) -> list[list[float]]:
    """Return the losses of every step at its probes."""
    return [[float("nan") if x is None else x for x in step.losses] for step in steps_of(run)]


def main(arguments: Sequence[str]) -> None:
    """Train once."""
    checkpoint, out, keys, *kill_after = arguments
    callbacks = [KillAfter(int(kill_after[0]))] if kill_after else []
    train(Path(checkpoint), Path(out), json.loads(keys), callbacks)


if __name__ == "__main__":
    main(sys.argv[1:])
