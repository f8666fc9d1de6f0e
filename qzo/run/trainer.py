"""The training loop: ask for probes, measure losses, tell derivatives, note them, move the scales.

Nothing is lost: a step is in the journal before the scales move, so a run continues from its
journal with bitwise the same scales, whatever stopped it. With several processes
(``distributed``) each computes some of the micro-batches and all of them move their scales alike;
the first one writes.
"""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from qzo.checkpoint.atomic import locked
from qzo.checkpoint.base import BASE_NAME
from qzo.data.examples import ExampleSet, from_encoded, from_records
from qzo.data.tokenize import EncodedExample
from qzo.data.vocabulary import check_examples
from qzo.distributed import Ranks, Wish
from qzo.errors import ConfigError, DataError
from qzo.method.estimators import make_estimator
from qzo.method.extra.section import sections_of
from qzo.method.layer_scaling import measured_stretches, stretch_scales
from qzo.method.optimizers import make_optimizer
from qzo.method.probes import Probe
from qzo.model.generate import Generator
from qzo.model.kernels.current_device import on_device
from qzo.model.wrap import checkpoint_of, tokenizer_of
from qzo.objective.evaluate import Evaluation, evaluate
from qzo.objective.loss import Objective
from qzo.objective.rewards import (
    WRITTEN,
    ObjectiveName,
    RewardFunction,
    check_objective,
    reward_name,
)
from qzo.plan.answer_memory import tokens_at_once
from qzo.run.callbacks import Events
from qzo.run.first_order import ExactPart, check_exact
from qzo.run.folder import Reference, header_of, open_journal, with_base, write_reference
from qzo.run.journal.journal import Journal
from qzo.run.journal.lines import Fingerprint, Step
from qzo.run.output.adapter import (
    adapter_tensors,
    apply_adapter,
    change_warnings,
    changed_fraction,
    open_adapter,
    save_adapter,
)
from qzo.run.output.metrics import CLOSING_KEY
from qzo.run.output.replay import adapter_config, apply_journal, check_fingerprint
from qzo.run.output.snapshots import BEST_NAME, Snapshots, read_snapshot
from qzo.run.periodic import BetweenSteps
from qzo.run.recipe.keys import Recipe
from qzo.run.result import DivergedError, Result, StoppedError, ahead_warnings
from qzo.run.signals import stop_signals
from qzo.run.step import Measured, TrainingSteps
from qzo.run.trainable import trained_vector

_AT_MASTER = (Probe(seed=0, offset=0.0),)


class Trainer:
    """Trains the scales of a model with quantized layers.

    Args:
        model: From ``qzo.load`` or ``qzo.wrap``.
        config: The recipe.
        train_dataset: Encoded examples, or records (``prompt`` and ``completion``, ``messages`` or
            ``text``).
        eval_dataset: The same, or None.
        callbacks: transformers callbacks.
        tokenizer: Needed for records and generation; that of the checkpoint unless given.
        ranks: The processes of the run; those that ``torchrun`` started unless given.
        reward: The function of objective ``reward``: of prompt, output and example.

    Raises:
        ConfigError: There is a memory limit, and the model was loaded without; or there are several
            processes or streaming blocks, and exact derivatives.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: Recipe,
        train_dataset: ExampleSet | Sequence[Any],
        eval_dataset: ExampleSet | Sequence[Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        tokenizer: Any = None,
        ranks: Ranks | None = None,
        reward: RewardFunction | None = None,
    ) -> None:
        if config.memory_limit is not None and getattr(model, "qzo_budget", None) is None:
            raise ConfigError(
                "memory_limit: expected a model that streams its blocks, got one that does not; "
                "run the recipe with qzo train, or leave memory_limit out"
            )
        self.model, self.config, self.tokenizer = model.eval(), config, tokenizer
        self._ranks = ranks or Ranks.join(model.device)
        check_exact(model, config, self._ranks)
        self.folder = Path(config.output_dir)
        self._live, self.scales = trained_vector(model, config.zo, config.seed)
        self.estimator = make_estimator(config.zo.estimator, config.estimator_settings)
        self.optimizer = make_optimizer(config.zo.optimizer, config.zo.optimizer_settings)
        self._stretches: dict[str, list[float]] | None = None
        self._ahead: list[str] = []  # snapshots of steps that the journal lost
        self._exact: ExactPart | None = None  # known once the journal was looked for
        self.train_set = train_set = self._example_set(train_dataset, "train_dataset")
        if train_set.labelling is not None:  # nothing of it is left open in recipe.yaml
            config = config.model_copy(update=asdict(train_set.labelling))
            self.config = config
        self.eval_set = (
            None if eval_dataset is None else self._example_set(eval_dataset, "eval_dataset")
        )
        for data in filter(None, (train_set, self.eval_set)):
            check_examples(data, model, self.tokenizer)
        self._reward = reward
        self._generator = self._make_generator(self.eval_set)
        if self.eval_set is not None:
            check_objective(config.objective, self.eval_set, reward)
        self.objective = Objective(
            model,
            self._live,
            self.scales,
            train_set,
            batch_size=config.per_device_train_batch_size,
            num_micro_batches=config.gradient_accumulation_steps,
            data_seed=config.data_seed,
            is_stratified=config.stratified_batches,
            ranks=self._ranks,
            objective=config.objective,
            reward=reward,
            generator=self._generator,
        )
        self._reference = (self.eval_set or train_set).first(config.per_device_eval_batch_size)
        self._events = Events(config, model, callbacks if self._ranks.is_first else ())

    def train(self) -> Result:
        """Run to ``max_steps``; continue the journal in ``output_dir`` if the recipe says so.

        The model computes with the tuned scales afterwards, rounded as in the adapter; with several
        processes that of the first one.

        Ends with a StoppedError after SIGINT or SIGTERM, once the step is finished; with another
        QZOError where the loss was not finite too many times in a row, a file could not be written,
        or another process of the run is gone. In each case the run can be continued.
        """
        self._ranks.begin()
        lock = locked(self.folder) if self._ranks.is_first else nullcontext()
        stops = stop_signals(lambda: self._ranks.ask(Wish.STOP))
        try:
            with lock, stops, on_device(self.model.device):
                return self._train()
        finally:
            self._live.master = None

    def _train(self) -> Result:
        scales, ranks = self.scales, self._ranks
        base = self.folder / BASE_NAME
        self.checkpoint = ranks.in_turn(lambda: checkpoint_of(self.model, base, self.tokenizer))
        config = with_base(self.config, self.checkpoint)
        _ = self.checkpoint.digests  # for the header; they need not be there before the first step
        journal = open_journal(config, self._header, ranks)
        exact = self._exact = ExactPart(journal, config.zo, self.model, scales, self.objective)
        self._snapshots = Snapshots(self.folder, scales, self.optimizer, exact.part)
        self._restore(journal)
        self._live.master = scales  # what a callback saves
        between = self._between = BetweenSteps(
            config,
            journal,
            scales=scales,
            exact=exact,
            snapshots=self._snapshots,
            events=self._events,
            ranks=ranks,
            evaluate=None if self.eval_set is None else self.evaluate,
            eval_data=None if self.eval_set is None else self.eval_set.sha256(),
        )
        self._training_steps = TrainingSteps(
            config,
            self.objective,
            estimator=self.estimator,
            optimizer=self.optimizer,
            scales=scales,
            exact=exact,
        )
        self._steps = journal.next_step
        self._events.tell("train_begin", journal.next_step)
        before = between.evaluate(0) if journal.next_step == 0 else None
        started = time.monotonic()
        self._catch_up(journal)
        skipped = self._take_steps(journal, exact, started)
        seconds = time.monotonic() - started
        return self._finish(journal, before, skipped, seconds)

    def _take_steps(self, journal: Journal, exact: ExactPart, started: float) -> int:
        """Take the steps that are left; return how many moved nothing.

        Raises:
            DivergedError: Too many of them in a row.
        """
        config, steps, between = self.config, self._training_steps, self._between
        skipped, skipped_in_a_row = 0, 0

        def write(measured: Measured) -> None:
            if self._ranks.is_first:
                between.begin()
                exact.append(measured.step, measured.gradient)
                journal.append(
                    measured.step,
                    measured.losses,
                    measured.derivatives,
                    measured.learning_rate,
                    measured.note,
                )

        for step in range(journal.next_step, config.max_steps):
            self._events.tell("step_begin", step)
            measured, is_moved = steps.take(step, write)
            self._steps = step + 1
            skipped += not is_moved
            skipped_in_a_row = 0 if is_moved else skipped_in_a_row + 1
            if skipped_in_a_row >= config.zo.max_skipped_steps:
                raise DivergedError(
                    f"{self._measured}: expected finite values, got none in {skipped_in_a_row} "
                    f"steps in a row up to step {step}; lower learning_rate or zo.epsilon"
                    f"{_other_dtype(self.model)}. The journal and the scales are intact"
                )
            between.note(measured)
            self._events.tell("step_end", step + 1)
            between.after_step(step + 1, time.monotonic() - started)
            if self._events.wants_stop:
                self._ranks.ask(Wish.FINISH)
            if self._ranks.wish is Wish.STOP:
                self._stop(journal)
            if self._ranks.wish is Wish.FINISH:
                break
        return skipped

    def evaluate(self, data: ExampleSet | None = None) -> Evaluation:
        """Evaluate the present scales; with several processes each takes a part.

        Raises:
            ConfigError: There is no evaluation data.
        """
        data = data or self.eval_set
        if data is None:
            raise ConfigError("eval_dataset: expected evaluation examples, got none")
        return self._evaluation(data, self._ranks, self.config.objective)

    def _evaluation(self, data: ExampleSet, ranks: Ranks, objective: ObjectiveName) -> Evaluation:
        with self.scales.shifted(self._live, _AT_MASTER):
            return evaluate(
                self.model,
                self._live,
                data,
                batch_size=self.config.per_device_eval_batch_size,
                progress=self._events.evaluated,
                ranks=ranks,
                generator=self._generator or self._make_generator(data),
                objective=objective,
                reward=self._reward,
            )

    @property
    def _measured(self) -> str:
        """What a bad value comes from, for messages."""
        if self.config.objective != "reward" or self._reward is None:
            return self.config.objective
        return reward_name(self._reward)

    def _make_generator(self, evaluated: ExampleSet | None) -> Generator | None:
        """Return what writes answers, where there are any to write."""
        config = self.config
        is_evaluated = evaluated is not None and evaluated.is_generation
        if config.objective not in WRITTEN and not is_evaluated:
            return None
        if self.tokenizer is None:
            self.tokenizer = tokenizer_of(self.model)
        return Generator(
            self.model,
            self.tokenizer,
            self._live,
            max_length=config.max_length,
            max_new_tokens=config.max_new_tokens,
            stop=config.generation_stop,
            batch_size=config.generation_batch_size,
            max_tokens=tokens_at_once(self.model) if config.generation_batch_size is None else None,
        )

    def _example_set(self, data: ExampleSet | Sequence[Any], key: str) -> ExampleSet:
        """Take examples as they are, and encode records.

        Args:
            data: Of either kind.
            key: What the caller named it.

        Raises:
            DataError: There are none.
        """
        if isinstance(data, ExampleSet):
            return data
        rows = list(data)
        if not rows:
            raise DataError(f"{key}: expected at least one example, got none")
        if isinstance(rows[0], EncodedExample):
            return from_encoded(rows)
        if self.tokenizer is None:
            self.tokenizer = tokenizer_of(self.model)
        config = self.config
        return from_records(
            rows, self.tokenizer, max_length=config.max_length, labelling=config.labelling
        )

    def _header(self) -> dict[str, Any]:
        if self._ranks.size > 1:  # they have it before any of them knows whether a run goes on
            self._stretch()
        sets = (self.train_set, self.eval_set)
        header = header_of(self.config, self.checkpoint, self.scales, *sets, self._stretches)
        part = None if self._exact is None else self._exact.header
        return header if part is None else {**header, "first_order": part}

    def _stretch(self) -> dict[str, list[float]] | None:
        """Return the factors of directions by layer, measured once, at the start."""
        zo, objective = self.config.zo, self.objective
        if self._stretches is None:
            self._stretches = measured_stretches(
                self.scales,
                lambda probes: objective.losses(probes, objective.batch(0)),
                by_hand=zo.stretch,
                scaling=zo.layer_scaling,
                rule=zo.layer_scaling_rule,
                epsilon=zo.epsilon,
                seed=self.config.seed,
            )
        return self._stretches

    def _restore(self, journal: Journal) -> None:
        """Bring scales and optimizer to the end of the journal, from the newest snapshot on.

        Only the first process has snapshots; the others replay the journal from its start.
        """
        if journal.is_on_disk:
            self.scales.take_sections(sections_of(journal.header))
        self.scales.reset()
        self.optimizer.restore({})
        first_order = None if self._exact is None else self._exact.part
        if first_order is not None:
            first_order.restore({})
        if not journal.is_on_disk:
            stretch_scales(self.scales, {"stretch": self._stretch()})
            return
        start = 0
        folders: list[Path] = []
        if self._ranks.is_first:
            self._ahead = self._snapshots.set_aside(journal.next_step)
            folders = self._snapshots.numbered()
        if folders:
            snapshot = read_snapshot(folders[-1])
            self._snapshots.take(snapshot)
            check_fingerprint(Fingerprint(snapshot.step, snapshot.fingerprint), self.scales)
            start = snapshot.step
        apply_journal(
            journal, self.scales, self.optimizer, from_step=start, first_order=first_order
        )

    def _catch_up(self, journal: Journal) -> None:
        """Do what the end of an earlier call left undone after its last step."""
        if journal.next_step == 0:
            return
        between = self._between
        for record in journal.records() if self._ranks.is_first else ():
            if isinstance(record, Step) and record.step >= between.metrics.logged_step:
                losses = [math.nan if loss is None else loss for loss in record.losses]
                between.note(self._training_steps.recall(record.step, losses, record.gradient))
        between.after_step(journal.next_step, 0.0)

    def _stop(self, journal: Journal) -> None:
        """End between two steps, so that the run can be continued at once.

        Raises:
            StoppedError: Always.
        """
        if self._ranks.is_first:
            journal.mark(self.scales.fingerprint())
            self._between.save(self._steps)
        raise StoppedError(
            f"stopped by a signal after step {self._steps} of {self.config.max_steps}; to go on: "
            "resume_from_checkpoint=true"
        )

    def _finish(
        self, journal: Journal, before: Evaluation | None, skipped: int, seconds: float
    ) -> Result:
        """Choose the scales to keep, write the adapter and the reference loss."""
        steps, between = self._steps, self._between
        best_step = steps
        between.mark(steps)
        if not self._ranks.is_first:
            after = between.evaluate(steps)
            changed = changed_fraction(self.checkpoint, self.scales)
            return Result(steps, steps, before, after, changed, skipped, seconds)
        between.save(steps)
        after = between.evaluate(steps)
        if self.eval_set is not None:
            best = between.best()
            if self.config.load_best_model_at_end and best is not None and best[0] != steps:
                self._snapshots.take(read_snapshot(self.folder / BEST_NAME))
                best_step, after = best[0], None
            after = after or self._evaluation(self.eval_set, Ranks(), self.config.objective)
        self._write_adapter(journal, best_step)
        changed = changed_fraction(self.checkpoint, self.scales)
        between.metrics.append({"step": steps, "best_step": best_step, CLOSING_KEY: changed})
        self._events.tell("train_end", steps)
        warnings = change_warnings(
            self.checkpoint,
            changed,
            best_step=best_step,
            by_reward=self.config.objective != "loss",
        )
        warnings += ahead_warnings(self._ahead, journal.path.name)
        return Result(steps, best_step, before, after, changed, skipped, seconds, warnings)

    def _write_adapter(self, journal: Journal, step: int) -> None:
        tensors: dict[str, Tensor] = adapter_tensors(self.checkpoint, self.scales)
        scored = ExampleSet(self._reference.examples, self._reference.loss)
        loss = self._evaluation(scored, Ranks(), "loss").loss
        reference = Reference(self._reference, loss, self.model.dtype)
        save_adapter(
            self.folder,
            tensors,
            adapter_config(journal, self.checkpoint, step),
            lambda: write_reference(self.folder, reference),
        )
        apply_adapter(self.model, self.checkpoint, open_adapter(self.folder))


def _other_dtype(model: PreTrainedModel) -> str:
    """Return what else helps where numbers do not fit the dtype of a model."""
    if model.dtype != torch.float16:
        return ""
    return ", or set dtype: bfloat16 or float32: nothing above 65,504 fits float16"
