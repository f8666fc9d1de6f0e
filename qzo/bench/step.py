"""``qzo bench step``: a QZO step against what a user would run instead, on the same tokens.

=================== ===========================================================================
``vs_dense``        over two forwards of the model with dense weights of the activations' dtype
``vs_mezo``         over a MeZO step: all weights dense, perturbed in place
``vs_bitsandbytes`` over two forwards through bitsandbytes' ``Linear4bit`` (NF4)
``vs_separate``     both probes in one stacked forward, over a forward for each
``mixed_vs_equal``  a step on rows of 8 to 128 tokens, over one on as many tokens in equal rows
=================== ===========================================================================

A step is that of ``Trainer.train``: ask, stacked losses, tell, journal (synced to disk), update.
``tokens`` are those of the batch at one probe, in rows of up to ``row_tokens``; every contender
sees them twice. The answer is the last ``ANSWER_TOKENS`` predictions of a row, and the head sees
only them, in all contenders.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from qzo.bench.baselines import MeZO, as_batch, dense_model, two_forwards, use_bitsandbytes
from qzo.bench.batches import ANSWER_TOKENS, MIXED_LENGTHS, random_examples, row_lengths
from qzo.bench.clock import Ratio, interleaved, ratio
from qzo.bench.machine import hardware, versions
from qzo.bench.parts import PARTS, Stopwatch, timed
from qzo.checkpoint import open_checkpoint
from qzo.encoding import EncodedExample
from qzo.errors import ConfigError
from qzo.examples import from_encoded
from qzo.journal import NAME, Journal
from qzo.model import load_checkpoint, quant_linears
from qzo.recipe_file import recipe
from qzo.trainer import Trainer

Progress = Callable[[str], None]
Part = Callable[[str], AbstractContextManager[None]]

_REFERENCES = ("dense", "mezo", "bitsandbytes")


@dataclass(frozen=True)
class StepSettings:
    """What to measure.

    Attributes:
        tokens: Batches, by their tokens at one probe.
        repeats: Rounds; every contender runs once in each.
        row_tokens: Tokens of a row; a batch of fewer is one row.
        coordinates: ``row``, ``relative`` or ``absolute``; the estimator is the recipe's default
            for them: one direction an example in row coordinates, else one for the batch.
        device: ``cpu`` or ``cuda``.
        dtype: Of the activations of all contenders, and of the dense weights.
        mixed_lengths: Rows of the comparison with equal rows.
    """

    tokens: tuple[int, ...] = (32, 128, 512, 2048)
    repeats: int = 7
    row_tokens: int = 128
    coordinates: str = "row"
    device: str = "cpu"
    dtype: str = "float32"
    mixed_lengths: tuple[int, ...] = MIXED_LENGTHS

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError(f"repeats: expected a number above 0, got {self.repeats}")
        for count in self.tokens:
            row_lengths(count, self.row_tokens)


def estimator_keys(coordinates: str) -> dict[str, Any]:
    """Return the recipe keys that train all layers in these coordinates with two-sided probes.

    Args:
        coordinates: ``row`` (one direction an example), ``relative`` (one for the batch) or
            ``absolute`` (the paper's).

    Raises:
        ConfigError: There are no such coordinates.
    """
    keys: dict[str, dict[str, Any]] = {
        "row": {"zo": {"coordinates": "row", "estimator": "per_example"}},
        "relative": {"zo": {"coordinates": "relative", "estimator": "spsa"}},
        "absolute": {"preset": "paper"},
    }
    if coordinates not in keys:
        raise ConfigError(f"coordinates: expected one of {', '.join(keys)}, got {coordinates!r}")
    return keys[coordinates]


class QZOStep:
    """Steps of a training run on one batch, with the trainer's own pieces.

    Args:
        model: From ``qzo.load``; its scales are trained.
        examples: The batch.
        folder: For the journal; new or empty.
        coordinates: Of the trained vector.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        examples: Sequence[EncodedExample],
        folder: Path,
        coordinates: str = "row",
    ) -> None:
        values = {
            **{"model": "bench", "output_dir": str(folder)},
            **{"per_device_train_batch_size": len(examples), **estimator_keys(coordinates)},
        }
        self._trainer = Trainer(model, recipe(values), from_encoded(examples))
        folder.mkdir(parents=True, exist_ok=True)
        self._journal = Journal.create(folder / NAME, dict)
        self._journal.begin()

    def step(self, part: Part = lambda _: nullcontext()) -> list[float]:
        """Take one step as ``Trainer.train`` does; return its losses.

        Args:
            part: Times the parts that have no seam of their own.
        """
        trainer, number = self._trainer, self._journal.next_step
        batch = trainer.objective.batch(number)
        trainer.optimizer.aim(trainer.scales)
        probes = trainer.estimator.ask(number)
        losses = trainer.objective.losses(probes, batch)
        derivatives = trainer.estimator.tell(probes, losses)
        rate = trainer.config.learning_rate
        with part("journal"):
            self._journal.append(number, losses, derivatives, rate)
        with part("update"):
            trainer.optimizer.step(trainer.scales, derivatives, rate)
        return losses

    def stacked(self) -> list[float]:
        """Return the losses at all probes, from one stacked forward."""
        probes = self._trainer.estimator.ask(0)
        return self._trainer.objective.losses(probes, self._trainer.objective.batch(0))

    def separate(self) -> list[float]:
        """Return the same losses from a forward for each side."""
        probes = self._trainer.estimator.ask(0)
        objective, half = self._trainer.objective, len(probes) // 2
        batch = objective.batch(0)
        return [
            *objective.losses(probes[:half], batch),
            *objective.losses(probes[half:], batch),
        ]

    def parts(self, repeats: int) -> dict[str, float]:
        """Return the median seconds of each part of a step, over steps of their own."""
        model = self._trainer.model
        rounds = []
        for _ in range(repeats):
            watch = Stopwatch(model.device)
            with timed(quant_linears(model), watch), watch.part("other"):
                self.step(watch.part)
            rounds.append(watch.seconds)
        return {part: median(seconds[part] for seconds in rounds) for part in PARTS}


def bench_step(
    checkpoint: str | Path, settings: StepSettings, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """Measure all batches; see the module for what the ratios are.

    Args:
        checkpoint: A 4-bit checkpoint; needs no tokenizer.
        settings: What to measure.
        progress: Told what is measured next.

    Returns:
        ``tokens``: for each batch its ratios, their ``spread`` (lowest and highest ratio of a
        round), ``seconds`` (medians) and ``parts`` (medians); ``mixed_vs_equal`` with its spread;
        what was measured, ``hardware`` and ``versions``.
    """
    progress("loading")
    bench = _Bench(checkpoint, settings)
    result: dict[str, Any] = {"checkpoint": str(checkpoint), "tokens": {}}
    with TemporaryDirectory() as folder:
        for count in settings.tokens:
            progress(f"{count} tokens")
            result["tokens"][str(count)] = bench.batch(count, Path(folder) / str(count))
        progress("rows of mixed length")
        result["mixed_vs_equal"] = bench.mixed(Path(folder) / "mixed")
    settings_shown = {**vars(settings), "answer_tokens": ANSWER_TOKENS}
    machine = {"hardware": hardware(bench.device), "versions": versions()}
    return {**result, "settings": settings_shown, **machine}


class _Bench:
    """The models under comparison, loaded once."""

    def __init__(self, checkpoint: str | Path, settings: StepSettings) -> None:
        self.device = torch.device(settings.device)
        self._settings = settings

        dtype: torch.dtype = getattr(torch, settings.dtype)
        opened = open_checkpoint(checkpoint)
        self._model = load_checkpoint(opened, dtype, self.device)
        self._dense = dense_model(opened, dtype, self.device)
        copy = dense_model(opened, dtype, self.device)
        self._bitsandbytes = use_bitsandbytes(copy, opened.layers)
        self._mezo = MeZO(self._dense)

    def batch(self, num_tokens: int, folder: Path) -> dict[str, Any]:
        """Compare the contenders on one batch."""
        settings = self._settings
        examples = self._examples(row_lengths(num_tokens, settings.row_tokens))
        qzo_step = QZOStep(self._model, examples, folder, settings.coordinates)
        batch = as_batch(examples, self.device)
        seconds = interleaved(
            {
                "qzo": qzo_step.step,
                "dense": lambda: two_forwards(self._dense, batch),
                "mezo": lambda: self._mezo.step(0, batch),
                "bitsandbytes": lambda: two_forwards(self._bitsandbytes, batch),
                "stacked": qzo_step.stacked,
                "separate": qzo_step.separate,
            },
            settings.repeats,
            self.device,
        )
        ratios = {f"vs_{name}": ratio(seconds["qzo"], seconds[name]) for name in _REFERENCES}
        ratios["vs_separate"] = ratio(seconds["stacked"], seconds["separate"])
        return {
            "rows": len(examples),
            **_shown(ratios),
            "seconds": {name: median(values) for name, values in seconds.items()},
            "parts": qzo_step.parts(settings.repeats),
        }

    def mixed(self, folder: Path) -> dict[str, Any]:
        """Compare rows of mixed length with equal rows of as many tokens."""
        mixed = self._settings.mixed_lengths
        equal = (sum(mixed) // len(mixed),) * len(mixed)
        steps = {
            name: QZOStep(
                self._model, self._examples(lengths), folder / name, self._settings.coordinates
            )
            for name, lengths in (("mixed", mixed), ("equal", equal))
        }
        seconds = interleaved(
            {name: qzo_step.step for name, qzo_step in steps.items()},
            self._settings.repeats,
            self.device,
        )
        return {
            "tokens": {"mixed": sum(mixed), "equal": sum(equal)},
            **_shown({"ratio": ratio(seconds["mixed"], seconds["equal"])}),
            "seconds": {name: median(values) for name, values in seconds.items()},
        }

    def _examples(self, lengths: Sequence[int]) -> list[EncodedExample]:
        return random_examples(lengths, self._model.config.vocab_size)


def _shown(ratios: Mapping[str, Ratio]) -> dict[str, Any]:
    return {
        **{name: found.value for name, found in ratios.items()},
        "spread": {name: [found.lowest, found.highest] for name, found in ratios.items()},
    }
