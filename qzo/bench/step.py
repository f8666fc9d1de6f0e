"""``qzo bench step``: a QZO step against what a user would run instead, on the same tokens.

=================== ===========================================================================
``vs_dense``        over two forwards of the model with dense weights of the activations' dtype
``vs_mezo``         over a MeZO step: all weights dense, perturbed in place
``vs_bitsandbytes`` over two forwards through bitsandbytes' ``Linear4bit`` (NF4)
``vs_qlora``        over a QLoRA step: peft's factors beside NF4 weights, gradient checkpointing
``vs_separate``     both probes in one stacked forward, over a forward for each
``mixed_vs_equal``  a step on rows of 8 to 128 tokens, over one on as many tokens in equal rows
=================== ===========================================================================

A step is that of ``Trainer.train``: ask, stacked losses, tell, journal (synced to disk), update.
``tokens`` are those of the batch at one probe, in rows of up to ``row_tokens``; every contender
sees them twice. The answer is the last ``ANSWER_TOKENS`` predictions of a row, and the head sees
only them, in all contenders. On CUDA ``peak_bytes`` is what a contender has allocated at most: its
weights, and what a step of it adds.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from qzo.bench.baselines import (
    Batch,
    MeZO,
    QLoRA,
    as_batch,
    dense_model,
    two_forwards,
    use_bitsandbytes,
)
from qzo.bench.batches import ANSWER_TOKENS, MIXED_LENGTHS, random_examples, row_lengths
from qzo.bench.clock import Ratio, interleaved, ratio
from qzo.bench.machine import hardware, versions
from qzo.bench.parts import PARTS, Stopwatch, timed
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.data.examples import from_encoded
from qzo.data.tokenize import EncodedExample
from qzo.errors import ConfigError
from qzo.model.load import load_checkpoint, quant_linears
from qzo.run.journal.journal import NAME, Journal
from qzo.run.recipe.read import recipe
from qzo.run.trainer import Trainer

Progress = Callable[[str], None]
Part = Callable[[str], AbstractContextManager[None]]

AGAINST = ("dense", "mezo", "bitsandbytes")
REFERENCES = (*AGAINST, "qlora")


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
        mixed_lengths: Rows of the comparison with equal rows; none: no such comparison.
        against: Some of ``REFERENCES``.
        looks_inside: Time the parts of a step too, and its probes in separate forwards.
    """

    tokens: tuple[int, ...] = (32, 128, 512, 2048)
    repeats: int = 7
    row_tokens: int = 128
    coordinates: str = "row"
    device: str = "cpu"
    dtype: str = "float32"
    mixed_lengths: tuple[int, ...] = MIXED_LENGTHS
    against: tuple[str, ...] = AGAINST
    looks_inside: bool = True

    def __post_init__(self) -> None:
        for name in self.against:
            if name not in REFERENCES:
                raise ConfigError(
                    f"against: expected some of {', '.join(REFERENCES)}, got {name!r}"
                )
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
        "row": {"preset": "none", "zo": {"coordinates": "row", "estimator": "per_example"}},
        "relative": {"preset": "none", "zo": {"coordinates": "relative", "estimator": "spsa"}},
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
    checkpoint: str | Path,
    settings: StepSettings,
    progress: Progress = lambda _: None,
    note: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure all batches; see the module for what the ratios are.

    Args:
        checkpoint: A 4-bit checkpoint; needs no tokenizer.
        settings: What to measure.
        progress: Told what is measured next.
        note: Told the result so far after every batch.

    Returns:
        ``tokens``: for each batch its ratios, their ``spread`` (lowest and highest ratio of a
        round), ``seconds`` (medians), ``parts`` (medians) and, on CUDA, ``peak_bytes``; what could
        not run is under ``failed`` with the reason. ``mixed_vs_equal`` with its spread; what was
        measured, ``hardware`` and ``versions``.
    """
    progress("loading")
    bench = StepBench(checkpoint, settings, progress)
    settings_shown = {**vars(settings), "answer_tokens": ANSWER_TOKENS}
    machine = {"hardware": hardware(bench.device), "versions": versions()}
    result: dict[str, Any] = {"checkpoint": str(checkpoint), "tokens": {}}
    result |= {"settings": settings_shown, **machine}
    with TemporaryDirectory() as folder:
        for count in settings.tokens:
            progress(f"{count} tokens")
            result["tokens"][str(count)] = bench.batch(count, Path(folder) / str(count))
            note(result)
        if settings.mixed_lengths:
            progress("rows of mixed length")
            result["mixed_vs_equal"] = bench.mixed(Path(folder) / "mixed")
    return result


class StepBench:
    """The models under comparison, loaded once.

    Args:
        checkpoint: A 4-bit checkpoint; needs no tokenizer.
        settings: What to measure.
        progress: Told what is loaded next.
    """

    def __init__(self, checkpoint: str | Path, settings: StepSettings, progress: Progress) -> None:
        self.device = torch.device(settings.device)
        self._settings, self._checkpoint = settings, open_checkpoint(checkpoint)
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        self._failed: dict[str, str] = {}
        self._own_bytes: dict[str, int] = {}
        self._steps: dict[str, Callable[[Batch], object]] = {}
        with self._weighed("qzo"):
            self._model = load_checkpoint(self._checkpoint, self._dtype, self.device)
        for name in settings.against:
            progress(f"loading {name}")
            try:
                with self._weighed(name):
                    self._steps[name] = self._reference(name)
            except (ImportError, torch.OutOfMemoryError) as error:
                self._failed[name] = _reason(error)

    def _reference(self, name: str) -> Callable[[Batch], object]:
        """Load a contender and return what a step of it does; dense and MeZO share weights."""
        if name in {"dense", "mezo"}:
            if not hasattr(self, "_dense"):
                self._dense = dense_model(self._checkpoint, self._dtype, self.device)
            dense = self._dense
            if name == "dense":
                return lambda batch: two_forwards(dense, batch)
            mezo = MeZO(dense)
            return lambda batch: mezo.step(0, batch)
        layers = self._checkpoint.layers
        copy = dense_model(self._checkpoint, self._dtype, self.device)
        model = use_bitsandbytes(copy, layers)
        if name == "bitsandbytes":
            return lambda batch: two_forwards(model, batch)
        return QLoRA(model, layers).step

    @contextmanager
    def _weighed(self, name: str) -> Iterator[None]:
        """Note the memory that a contender has when it is loaded."""
        before = _allocated(self.device)
        yield
        gc.collect()
        own = _allocated(self.device) - before
        if name == "mezo":  # beside the weights of ``dense``, which were there
            own += self._own_bytes.get("dense", 0)
        self._own_bytes[name] = own

    def batch(self, num_tokens: int, folder: Path, row_tokens: int | None = None) -> dict[str, Any]:
        """Compare the contenders on one batch.

        Args:
            num_tokens: At one probe.
            folder: For the journal; new or empty.
            row_tokens: Of a row; as in the settings if None.
        """
        settings = self._settings
        examples = self._examples(row_lengths(num_tokens, row_tokens or settings.row_tokens))
        qzo_step = QZOStep(self._model, examples, folder, settings.coordinates)
        batch = as_batch(examples, self.device)
        contenders: dict[str, Callable[[], object]] = {"qzo": qzo_step.step}
        contenders |= {name: partial(step, batch) for name, step in self._steps.items()}
        if settings.looks_inside:
            contenders |= {"stacked": qzo_step.stacked, "separate": qzo_step.separate}
        contenders, peaks, failed = self._tried(contenders)
        seconds = interleaved(contenders, settings.repeats, self.device)
        ratios = {
            f"vs_{name}": ratio(seconds["qzo"], seconds[name])
            for name in settings.against
            if name in seconds
        }
        if {"stacked", "separate"} <= set(seconds):
            ratios["vs_separate"] = ratio(seconds["stacked"], seconds["separate"])
        parts = {"parts": qzo_step.parts(settings.repeats)} if settings.looks_inside else {}
        return {
            "rows": len(examples),
            **_shown(ratios),
            "seconds": {name: median(values) for name, values in seconds.items()},
            "fastest": {name: min(values) for name, values in seconds.items()},
            "peak_bytes": peaks,
            "failed": {**self._failed, **failed},
            **parts,
        }

    def _tried(
        self, contenders: Mapping[str, Callable[[], object]]
    ) -> tuple[dict[str, Callable[[], object]], dict[str, int], dict[str, str]]:
        """Run each once; return those that fit into memory, their peaks, and why the others do not.

        Raises:
            OutOfMemoryError: A QZO step does not fit.
        """
        kept, peaks, failed = {}, {}, {}
        for name, run in contenders.items():
            before = _allocated(self.device)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            try:
                run()
            except torch.OutOfMemoryError as error:
                if name == "qzo":
                    raise
                failed[name] = _reason(error)
                gc.collect()
                continue
            kept[name] = run
            if self.device.type == "cuda" and name in self._own_bytes:
                added = torch.cuda.max_memory_allocated(self.device) - before
                peaks[name] = self._own_bytes[name] + added
        return kept, peaks, failed

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


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return str(error).strip().splitlines()[0][:200]


def _shown(ratios: Mapping[str, Ratio]) -> dict[str, Any]:
    return {
        **{name: found.value for name, found in ratios.items()},
        "spread": {name: [found.lowest, found.highest] for name, found in ratios.items()},
    }
