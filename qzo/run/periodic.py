"""What a run does between its steps: fingerprints, metrics, evaluations and snapshots.

Each is done once, however often a run was stopped and continued.
"""

from collections.abc import Callable

from qzo.distributed import Ranks
from qzo.errors import QZOError
from qzo.method.probes import forwards_of
from qzo.method.trained_vector import Scales
from qzo.objective.evaluate import Evaluation
from qzo.run.callbacks import Events
from qzo.run.first_order import ExactPart
from qzo.run.folder import begin
from qzo.run.journal.journal import Journal
from qzo.run.output.metrics import NAME as METRICS_NAME
from qzo.run.output.metrics import Metrics, Window
from qzo.run.output.snapshots import BEST_NAME, Snapshots
from qzo.run.recipe.keys import Recipe
from qzo.run.step import Measured

FINGERPRINT_STEPS = 100


class BetweenSteps:
    """The duties of one run. Only the first of its processes writes.

    Args:
        config: The recipe.
        journal: Of the run.
        scales: The trained vector.
        exact: What exact gradients move.
        snapshots: In the run folder.
        events: Tells callbacks.
        ranks: The processes of the run.
        evaluate: Evaluates the present scales; None without evaluation data.
        eval_data: The digest of these data.

    Attributes:
        metrics: Of the run; of the first process only.
    """

    def __init__(
        self,
        config: Recipe,
        journal: Journal,
        *,
        scales: Scales,
        exact: ExactPart,
        snapshots: Snapshots,
        events: Events,
        ranks: Ranks,
        evaluate: Callable[[], Evaluation] | None,
        eval_data: str | None,
    ) -> None:
        self._config, self._journal, self._scales, self._exact = config, journal, scales, exact
        self._snapshots, self._events, self._ranks = snapshots, events, ranks
        self._run_evaluation = evaluate
        self._window = Window()
        self._forwards = 0.0  # of a batch, up to now
        if ranks.is_first:
            path = journal.path.with_name(METRICS_NAME)
            self.metrics = Metrics(path, journal.next_step, eval_data)
            self._forwards = self.metrics.forwards or exact.profile_forwards

    def begin(self) -> None:
        """Write the first files of a new run, unless they are there."""
        begin(self._journal, self._config)
        importance = self._exact.write_importance()
        if importance is not None:
            self.metrics.append({"step": 0, **importance})

    def note(self, measured: Measured) -> None:
        """Take a step into the averages, and count its forwards."""
        probes, losses, gradient = measured.probes, measured.losses, measured.note
        tried = losses[len(probes) :]  # at the candidates of a conservative step
        shown = [x for probe, x in zip(probes, losses, strict=False) if not probe.is_tangent]
        shown += tried
        if gradient is not None and gradient.loss is not None:
            shown.append(gradient.loss)
        self._window.add(shown, measured.derivatives)
        config = self._config
        num_examples = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self._forwards += forwards_of(probes, num_examples, self._exact.backward) + len(tried)

    def after_step(self, step: int, seconds: float) -> None:
        """Log, evaluate and save where the recipe says so and it is not done.

        Args:
            step: The number of steps done.
            seconds: Time of the steps of this call.
        """
        config, is_first = self._config, self._ranks.is_first
        if step % FINGERPRINT_STEPS == 0:
            self.mark(step)
        is_due = step % config.logging_steps == 0 or step == config.max_steps
        if is_first and is_due and self.metrics.logged_step < step:
            self._log(step, seconds)
        if config.evaluates_at(step) and step < config.max_steps:
            self.evaluate(step)
        if is_first and step % config.save_steps == 0 and step < config.max_steps:
            self.save(step)

    def mark(self, step: int) -> None:
        """Put a fingerprint into the journal, and see that all processes have the same scales.

        Raises:
            QZOError: They have not.
        """
        fingerprint = self._scales.fingerprint()
        differing = self._ranks.differing(fingerprint)
        if differing:
            raise QZOError(
                f"step {step}: expected the same scales in all processes, but those of {differing} "
                "differ from process 0; a computer or its memory fails there. The journal is intact"
            )
        if self._ranks.is_first:
            self._journal.mark(fingerprint)

    def evaluate(self, step: int) -> Evaluation | None:
        """Evaluate, note it, and keep the scales if they are the best so far."""
        if self._run_evaluation is None:
            return None
        is_first = self._ranks.is_first
        if self._ranks.agree(is_first and self.metrics.has_evaluation(step)):
            return None
        result = self._run_evaluation()
        if not is_first:
            return result
        self.begin()
        best = self.best()
        cost = result.loss if result.reward is None else -result.reward
        if best is None or cost < best[1]:  # before it is noted: a stop repeats both
            self._journal.sync()  # no snapshot is ahead of it
            self._snapshots.write(BEST_NAME, step)
        line = {f"eval_{key}": value for key, value in result.to_dict().items()}
        self.metrics.append_evaluation(step, line)
        self._events.tell("evaluate", step, metrics=line)
        return result

    def best(self) -> tuple[int, float] | None:
        """Return step and cost of the scales that are kept, if evaluated on the data of now."""
        step = self._snapshots.best_step()
        if step is None:
            return None
        cost = self.metrics.cost(step, by_reward=self._config.objective != "loss")
        return None if cost is None else (step, cost)

    def save(self, step: int) -> None:
        """Write a snapshot, unless it is there."""
        self._journal.sync()
        if self._snapshots.write_numbered(step, limit=self._config.save_total_limit):
            self._events.tell("save", step)

    def _log(self, step: int, seconds: float) -> None:
        numbers = self._window.take()
        if self._config.objective != "loss" and numbers["loss"] is not None:
            numbers["reward"] = 0.0 - numbers["loss"]  # no negative zero
        numbers["learning_rate"] = self._config.rate_at(step - 1)
        line = {"step": step, **numbers, "forwards": self._forwards, "seconds": seconds}
        self.metrics.append(line)
        self._events.tell("log", step, logs=line)
