"""The training loop: ask for probes, measure losses, tell derivatives, note them, move the scales.

Nothing is lost: a step is in the journal before the scales move, so a run continues from its
journal with bitwise the same scales, whatever stopped it. With several processes (``ranks``) each
computes some of the micro-batches and all of them move their scales alike; the first one writes.
"""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from qzo import estimators
from qzo.adapter import (
    Snapshot,
    adapter_tensors,
    apply_adapter,
    change_warnings,
    changed_fraction,
    open_adapter,
    read_snapshot,
    save_adapter,
    save_snapshot,
)
from qzo.callbacks import Events
from qzo.config import Recipe
from qzo.conservative import candidates, choose
from qzo.encoding import EncodedExample
from qzo.errors import ConfigError, DataError, QZOError
from qzo.estimators import Estimator
from qzo.evaluate import Evaluation, evaluate
from qzo.examples import ExampleSet, from_encoded, from_records
from qzo.files import locked, new_folder, remove
from qzo.first_order import FirstOrder, first_order_of
from qzo.generation import Generator
from qzo.gradients import NAME as GRADIENTS_NAME
from qzo.gradients import Gradients
from qzo.hybrid import PROFILE_FORWARDS, first_order_header, write_importance
from qzo.interrupts import stop_signals
from qzo.journal import Journal
from qzo.journal_lines import Fingerprint, GradientNote, Step
from qzo.layer_scaling import factors_of, gradient_norms, relative_sizes, stretch_scales, stretches
from qzo.metrics import CLOSING_KEY, Metrics, Window
from qzo.model import decoder_blocks
from qzo.objective import Batch, Objective
from qzo.optimizers import make_optimizer
from qzo.probes import DirectionalDerivative, Probe, forwards_of
from qzo.ranks import Ranks, Wish
from qzo.replay import adapter_config, apply_journal, check_fingerprint
from qzo.rewards import WRITTEN, ObjectiveName, RewardFunction, check_objective, reward_name
from qzo.run_folder import begin, header_of, open_journal, write_reference
from qzo.schedules import learning_rate
from qzo.sections import sections_of
from qzo.tuned import trained_vector
from qzo.wrap import checkpoint_of, tokenizer_of

FINGERPRINT_STEPS = 100
_AT_MASTER = (Probe(seed=0, offset=0.0),)
_FIRST_ORDER_PREFIX = "first_order."  # of what its rule remembers, in a snapshot


@dataclass(frozen=True)
class Result:
    """What a run ended with.

    Attributes:
        steps: Steps done.
        best_step: The step whose scales were kept.
        before: Evaluation of the base, if it was done in this call.
        after: Evaluation of the scales that were kept, if there is evaluation data.
        changed_fraction: Scales that differ from the base in the file's dtype.
        skipped_steps: Steps of this call without a finite loss.
        seconds: Time of the steps of this call.
        warnings: What to know before the result is used; empty if all is well.
    """

    steps: int
    best_step: int
    before: Evaluation | None
    after: Evaluation | None
    changed_fraction: float
    skipped_steps: int
    seconds: float
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        evaluations = {
            "before": None if self.before is None else self.before.to_dict(),
            "after": None if self.after is None else self.after.to_dict(),
        }
        return {**asdict(self), **evaluations}


class DivergedError(QZOError):
    """The loss was not finite too many times in a row."""


class StoppedError(QZOError):
    """A signal asked for the end of a run; it can be continued."""


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
        _check_exact(model, config, self._ranks)
        self.folder = Path(config.output_dir)
        self._live, self.scales = trained_vector(model, config.zo, config.seed)
        self.estimator = make_estimator(config)
        self.optimizer = make_optimizer(config.zo.optimizer, config.zo.optimizer_settings)
        self._stretches: dict[str, list[float]] | None = None
        self.train_set = train_set = self._example_set(train_dataset)
        self.eval_set = None if eval_dataset is None else self._example_set(eval_dataset)
        self._reward = reward
        self._generator = self._make_generator()
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
        with lock, stop_signals(lambda: self._ranks.ask(Wish.STOP)):
            return self._train()

    def _train(self) -> Result:
        config, scales, estimator, ranks = self.config, self.scales, self.estimator, self._ranks
        self.checkpoint = checkpoint_of(self.model, self.folder / "base")
        _ = self.checkpoint.digests  # for the header; they need not be there before the first step
        journal = open_journal(config, self._header, ranks)
        self._journal = journal
        self._choose_first_order(journal)
        self._restore(journal)
        if ranks.is_first:
            self.metrics = Metrics(self.folder / "metrics.jsonl", journal.next_step)
            self._forwards = self.metrics.forwards or self._profile_forwards()
        self._window, skipped, skipped_in_a_row = Window(), 0, 0
        self._steps = journal.next_step
        self._events.tell("train_begin", journal.next_step)
        before = self._evaluate(0) if journal.next_step == 0 else None
        started = time.monotonic()
        self._catch_up(journal)

        for step in range(journal.next_step, config.max_steps):
            self._events.tell("step_begin", step)
            batch = self.objective.batch(step)
            self.optimizer.aim(scales)
            probes = self._ask(step)
            losses = self.objective.losses(probes, batch)
            derivatives = estimator.tell(probes, losses) if probes else []
            gradient, note = self._exact_gradient(step, batch)
            rate = self._learning_rate(step)
            if config.zo.optimizer == "conservative":
                tried = candidates(derivatives[0], rate)
                tried_losses = self.objective.losses(tried, batch) if tried else []
                derivatives = [choose(derivatives[0], tried_losses)]
                losses = [*losses, *tried_losses]
            if ranks.is_first:
                self._begin(journal)
                if gradient is not None:
                    self._gradients.append(step, gradient)
                journal.append(step, losses, derivatives, rate, note)
            usable = [d for d in derivatives if math.isfinite(d.value)]
            self.optimizer.step(scales, usable, rate)
            is_moved = self._step_first_order(gradient, note) or bool(usable)
            self._steps = step + 1

            skipped += not is_moved
            skipped_in_a_row = 0 if is_moved else skipped_in_a_row + 1
            if skipped_in_a_row >= config.zo.max_skipped_steps:
                raise DivergedError(
                    f"{self._measured}: expected finite values, got none in {skipped_in_a_row} "
                    f"steps in a row up to step {step}; lower learning_rate or zo.epsilon. The "
                    "journal and the scales are intact"
                )
            self._note(probes, losses, derivatives, note)
            self._events.tell("step_end", step + 1)
            self._after_step(journal, step + 1, time.monotonic() - started)
            if self._events.wants_stop:
                ranks.ask(Wish.FINISH)
            if ranks.wish is Wish.STOP:
                self._stop(journal)
            if ranks.wish is Wish.FINISH:
                break

        seconds = time.monotonic() - started
        return self._finish(journal, before, skipped, seconds)

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
                tokenizer=self.tokenizer,
                ranks=ranks,
                generator=self._generator,
                objective=objective,
                reward=self._reward,
            )

    @property
    def _measured(self) -> str:
        """What a bad value comes from, for messages."""
        if self.config.objective != "reward" or self._reward is None:
            return self.config.objective
        return reward_name(self._reward)

    def _make_generator(self) -> Generator | None:
        """Return what writes answers, where there are any to write."""
        config = self.config
        is_evaluated = self.eval_set is not None and self.eval_set.is_generation
        if config.objective not in WRITTEN and not is_evaluated:
            return None
        if self.tokenizer is None:
            self.tokenizer = tokenizer_of(self.model)
        return Generator(
            self.model,
            self.tokenizer,
            self._live,
            max_new_tokens=config.max_new_tokens,
            stop=config.generation_stop,
        )

    def _example_set(self, data: ExampleSet | Sequence[Any]) -> ExampleSet:
        """Take examples as they are, and encode records.

        Raises:
            DataError: There are none.
        """
        if isinstance(data, ExampleSet):
            return data
        rows = list(data)
        if not rows:
            raise DataError("train_dataset: expected at least one example, got none")
        if isinstance(rows[0], EncodedExample):
            return from_encoded(rows)
        if self.tokenizer is None:
            self.tokenizer = tokenizer_of(self.model)
        return from_records(rows, self.tokenizer, max_length=self.config.max_length)

    def _header(self) -> dict[str, Any]:
        if self._ranks.size > 1:  # they have it before any of them knows whether a run goes on
            self._stretch()
        sets = (self.train_set, self.eval_set)
        header = header_of(self.config, self.checkpoint, self.scales, *sets, self._stretches)
        part = self._first_order_header
        return header if part is None else {**header, "first_order": part}

    _first_order_header: dict[str, Any] | None = None  # known once the journal was looked for
    _forwards = 0.0  # of a batch, up to now

    def _choose_first_order(self, journal: Journal) -> None:
        """Choose what exact gradients move: as the journal says where there is one."""
        self.scales.reset()
        self.scales.directions.still = ()
        self._first_order_header = (
            journal.header.get("first_order")
            if journal.is_on_disk
            else first_order_header(self.config.zo, self.model, self.scales, self.objective)
        )
        header = {"first_order": self._first_order_header}
        self._first_order: FirstOrder | None = first_order_of(header, self.scales)
        if self._first_order is not None:
            self._gradients = Gradients(self.folder / GRADIENTS_NAME, self._first_order.size)

    def _begin(self, journal: Journal) -> None:
        begin(journal, self.config)
        part = self._first_order_header
        if part is not None and write_importance(self.folder, part):
            names = ("num_blocks", "importance")
            self.metrics.append({"step": 0, **{f"first_order_{k}": part[k] for k in names}})

    def _ask(self, step: int) -> list[Probe]:
        """Return the probes of a step: none where exact gradients move everything."""
        part = self._first_order
        has_probes = part is None or part.size < len(self.scales)
        return self.estimator.ask(step) if has_probes else []

    def _exact_gradient(self, step: int, batch: Batch) -> tuple[Tensor | None, GradientNote | None]:
        """Return the gradient of the first-order part and what the journal says of it.

        Where loss or gradient are not finite, there are zeros instead, and no loss.
        """
        if self._first_order is None:
            return None, None
        loss, gradient = self.objective.gradient(batch, self._first_order.layers)
        rate = self._learning_rate(step, self.config.zo.first_order_rate)
        if not math.isfinite(loss) or not bool(gradient.isfinite().all()):
            return torch.zeros_like(gradient), GradientNote(None, rate)
        return gradient, GradientNote(loss, rate)

    def _step_first_order(self, gradient: Tensor | None, note: GradientNote | None) -> bool:
        """Move the first-order part; return whether it moved."""
        if self._first_order is None or gradient is None or note is None or note.loss is None:
            return False
        self._first_order.step(self.scales, gradient, note.learning_rate)
        return True

    def _note(
        self,
        probes: Sequence[Probe],
        losses: Sequence[float],
        derivatives: Sequence[DirectionalDerivative],
        note: GradientNote | None,
    ) -> None:
        """Take a step into the averages, and count its forwards."""
        tried = losses[len(probes) :]  # at the candidates of a conservative step
        shown = [x for probe, x in zip(probes, losses, strict=False) if not probe.is_tangent]
        shown += tried
        if note is not None and note.loss is not None:
            shown.append(note.loss)
        self._window.add(shown, derivatives)
        config, part = self.config, self._first_order_header
        num_examples = config.per_device_train_batch_size * config.gradient_accumulation_steps
        backward = 0.0 if part is None else part["num_blocks"] / len(decoder_blocks(self.model))
        self._forwards += forwards_of(probes, num_examples, backward) + len(tried)

    def _profile_forwards(self) -> float:
        part = self._first_order_header
        return 0.0 if part is None or part.get("importance") is None else PROFILE_FORWARDS

    def _stretch(self) -> dict[str, list[float]] | None:
        """Return the factors of directions by layer, measured once, at the start."""
        zo, scales = self.config.zo, self.scales
        if zo.stretch is None and zo.layer_scaling == "none":
            return None
        if self._stretches is None:
            factors, sizes = factors_of(scales.names, zo.stretch or {}), None
            if zo.layer_scaling == "param_norm":
                sizes = relative_sizes(scales.names, scales.file_norms())
            if zo.layer_scaling == "grad_norm":
                scales.reset()
                batch = self.objective.batch(0)
                norms = gradient_norms(
                    scales,
                    lambda probes: self.objective.losses(probes, batch),
                    zo.epsilon,
                    self.config.seed,
                )
                sizes = relative_sizes(scales.names, norms)
            self._stretches = stretches(factors, sizes, zo.layer_scaling_rule)
        return self._stretches

    def _restore(self, journal: Journal) -> None:
        """Bring scales and optimizer to the end of the journal, from the newest snapshot on.

        Only the first process has snapshots; the others replay the journal from its start.
        """
        if journal.is_on_disk:
            self.scales.take_sections(sections_of(journal.header))
        self.scales.reset()
        self.optimizer.restore({})
        if self._first_order is not None:
            self._first_order.restore({})
        if not journal.is_on_disk:
            stretch_scales(self.scales, {"stretch": self._stretch()})
            return
        start = 0
        for folder in reversed(self._snapshots()) if self._ranks.is_first else ():
            snapshot = read_snapshot(folder)
            if snapshot.step <= journal.next_step:
                self._take(snapshot)
                check_fingerprint(Fingerprint(snapshot.step, snapshot.fingerprint), self.scales)
                start = snapshot.step
                break
        apply_journal(
            journal,
            self.scales,
            self.optimizer,
            from_step=start,
            first_order=self._first_order,
        )

    def _take(self, snapshot: Snapshot) -> None:
        device = self.scales.values.device
        self.scales.restore(snapshot.values)
        state = {key: tensor.to(device) for key, tensor in snapshot.optimizer.items()}
        prefix = _FIRST_ORDER_PREFIX
        self.optimizer.restore({k: t for k, t in state.items() if not k.startswith(prefix)})
        if self._first_order is not None:
            self._first_order.restore(
                {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
            )

    def _catch_up(self, journal: Journal) -> None:
        """Do what the end of an earlier call left undone after its last step."""
        if journal.next_step == 0:
            return
        for record in journal.records() if self._ranks.is_first else ():
            if isinstance(record, Step) and record.step >= self.metrics.logged_step:
                losses = [math.nan if loss is None else loss for loss in record.losses]
                probes = self._ask(record.step)  # more losses: of conservative candidates
                own = losses[: len(probes)]
                derivatives = self.estimator.tell(probes, own) if probes else []
                self._note(probes, losses, derivatives, record.gradient)
        self._after_step(journal, journal.next_step, 0.0)

    def _after_step(self, journal: Journal, step: int, seconds: float) -> None:
        """Log, evaluate and save where the recipe says so and it is not done.

        Args:
            journal: Of the run.
            step: The number of steps done.
            seconds: Time of the steps of this call.
        """
        config, is_first = self.config, self._ranks.is_first
        if step % FINGERPRINT_STEPS == 0:
            self._mark(journal, step)
        is_due = step % config.logging_steps == 0 or step == config.max_steps
        if is_first and is_due and self.metrics.logged_step < step:
            self._log(step, seconds)
        if config.evaluates_at(step) and step < config.max_steps:
            self._evaluate(step)
        if is_first and step % config.save_steps == 0 and step < config.max_steps:
            self._save(step)

    def _mark(self, journal: Journal, step: int) -> None:
        """Put a fingerprint into the journal, and see that all processes have the same scales.

        Raises:
            QZOError: They have not.
        """
        fingerprint = self.scales.fingerprint()
        differing = self._ranks.differing(fingerprint)
        if differing:
            raise QZOError(
                f"step {step}: expected the same scales in all processes, but those of {differing} "
                "differ from process 0; a computer or its memory fails there. The journal is intact"
            )
        if self._ranks.is_first:
            journal.mark(fingerprint)

    def _log(self, step: int, seconds: float) -> None:
        numbers = self._window.take()
        if self.config.objective != "loss" and numbers["loss"] is not None:
            numbers["reward"] = 0.0 - numbers["loss"]  # no negative zero
        numbers["learning_rate"] = self._learning_rate(step - 1)
        line = {"step": step, **numbers, "forwards": self._forwards, "seconds": seconds}
        self.metrics.append(line)
        self._events.tell("log", step, logs=line)

    def _learning_rate(self, step: int, highest: float | None = None) -> float:
        """Return the rate of a step; the recipe's unless ``highest`` says where it starts."""
        config = self.config
        return learning_rate(
            config.lr_scheduler_type,
            config.learning_rate if highest is None else highest,
            step,
            max_steps=config.max_steps,
            warmup_steps=config.warmup_steps,
        )

    def _evaluate(self, step: int) -> Evaluation | None:
        """Evaluate, note it, and keep the scales if they are the best so far."""
        if self.eval_set is None:
            return None
        is_first = self._ranks.is_first
        if self._ranks.agree(is_first and self.metrics.has_evaluation(step)):
            return None
        result = self.evaluate()
        if not is_first:
            return result
        self._begin(self._journal)
        best = self.metrics.best(by_reward=result.reward is not None)
        cost = result.loss if result.reward is None else -result.reward
        if best is None or cost < best[1]:  # before it is noted: a stop repeats both
            self._snapshot(self.folder / "best", step)
        line = {f"eval_{key}": value for key, value in result.to_dict().items()}
        self.metrics.append({"step": step, **line})
        self._events.tell("evaluate", step, metrics=line)
        return result

    def _save(self, step: int) -> None:
        """Write a snapshot, unless it is there, and remove the oldest ones."""
        folder = self.folder / f"checkpoint-{step}"
        if folder.exists():
            return
        self._snapshot(folder, step)
        for old in self._snapshots()[: -self.config.save_total_limit]:
            remove(old)
        self._events.tell("save", step)

    def _snapshot(self, folder: Path, step: int) -> None:
        scales, part = self.scales, self._first_order
        exact = {} if part is None else part.state()
        remembered = {_FIRST_ORDER_PREFIX + key: tensor for key, tensor in exact.items()}
        remembered |= self.optimizer.state()
        state = Snapshot(step, scales.values, remembered, scales.fingerprint())
        remove(folder)
        with new_folder(folder) as partial:
            save_snapshot(partial, state)

    def _snapshots(self) -> list[Path]:
        folders = self.folder.glob("checkpoint-*")
        steps = [folder.name.removeprefix("checkpoint-") for folder in folders]
        numbers = sorted(int(step) for step in steps if step.isdecimal())
        return [self.folder / f"checkpoint-{number}" for number in numbers]

    def _stop(self, journal: Journal) -> None:
        """End between two steps, so that the run can be continued at once.

        Raises:
            StoppedError: Always.
        """
        if self._ranks.is_first:
            journal.mark(self.scales.fingerprint())
            self._save(self._steps)
        raise StoppedError(
            f"stopped by a signal after step {self._steps} of {self.config.max_steps}; to go on: "
            "resume_from_checkpoint=true"
        )

    def _finish(
        self, journal: Journal, before: Evaluation | None, skipped: int, seconds: float
    ) -> Result:
        """Choose the scales to keep, write the adapter and the reference loss."""
        steps = best_step = self._steps
        self._mark(journal, steps)
        if not self._ranks.is_first:
            after = self._evaluate(steps)
            changed = changed_fraction(self.checkpoint, self.scales)
            return Result(steps, steps, before, after, changed, skipped, seconds)
        self._save(steps)
        after = self._evaluate(steps)
        if self.eval_set is not None:
            best = read_snapshot(self.folder / "best")
            if self.config.load_best_model_at_end and best.step != steps:
                self._take(best)
                best_step, after = best.step, None
            after = after or self._evaluation(self.eval_set, Ranks(), self.config.objective)
        self._write_adapter(journal, best_step)
        changed = changed_fraction(self.checkpoint, self.scales)
        self.metrics.append({"step": steps, "best_step": best_step, CLOSING_KEY: changed})
        self._events.tell("train_end", steps)
        warnings = change_warnings(
            self.checkpoint,
            changed,
            best_step=best_step,
            by_reward=self.config.objective != "loss",
        )
        return Result(steps, best_step, before, after, changed, skipped, seconds, warnings)

    def _write_adapter(self, journal: Journal, step: int) -> None:
        tensors: dict[str, Tensor] = adapter_tensors(self.checkpoint, self.scales)
        reference = ExampleSet(self._reference.examples, self._reference.loss)
        loss = self._evaluation(reference, Ranks(), "loss").loss
        write_reference(self.folder, self._reference, loss)
        save_adapter(self.folder, tensors, adapter_config(journal.header, self.checkpoint, step))
        apply_adapter(self.model, self.checkpoint, open_adapter(self.folder))


def _check_exact(model: PreTrainedModel, config: Recipe, ranks: Ranks) -> None:
    """Refuse what exact derivatives cannot go with.

    Raises:
        ConfigError: There is such a thing.
    """
    zo = config.zo
    if zo.has_first_order and ranks.size > 1:
        raise ConfigError(
            f"zo.first_order_blocks: expected one process, got {ranks.size}: exact gradients are "
            "not summed over processes; run without torchrun, or without first-order blocks"
        )
    is_exact = zo.has_first_order or zo.estimator == "forward_gradient"
    if is_exact and getattr(model, "qzo_budget", None) is not None:
        raise ConfigError(
            "memory: expected a model that fits with exact derivatives, got one that streams its "
            "blocks; choose zo.first_order_blocks: 0 and another zo.estimator, or a smaller model"
        )


def make_estimator(config: Recipe) -> Estimator:
    """Return the estimator of a recipe."""
    settings = config.estimator_settings
    if config.zo.optimizer == "hizoo" and config.zo.estimator == "spsa":
        settings["measures_curvature"] = True
    return estimators.make_estimator(config.zo.estimator, settings)
