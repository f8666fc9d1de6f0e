"""transformers' callback events for our loop, so that its integrations work unchanged."""

from collections.abc import Sequence
from typing import Any

from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from qzo.errors import ConfigError
from qzo.model.kernels.current_device import on_device
from qzo.run.recipe.keys import Recipe


class Events:
    """Tells callbacks what happens and hears whether to stop.

    Args:
        recipe: Gives the arguments that callbacks read.
        model: The model that callbacks are handed.
        callbacks: transformers callbacks, besides those of ``report_to``.

    Raises:
        ConfigError: ``report_to`` names an unknown or missing integration.
    """

    def __init__(
        self, recipe: Recipe, model: PreTrainedModel, callbacks: Sequence[TrainerCallback]
    ) -> None:
        with on_device(model.device):  # the arguments make cuda:0 the current device
            self._arguments = _arguments(recipe, use_cpu=model.device.type == "cpu")
        try:
            reporting = [make() for make in get_reporting_integration_callbacks(recipe.report_to)]
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"report_to: {error}") from error
        everyone = [DefaultFlowCallback(), *reporting, *callbacks]
        self._handler = CallbackHandler(everyone, model, None, None, None)
        self._state = TrainerState(max_steps=recipe.max_steps)
        self._control = TrainerControl()

    def tell(self, event: str, step: int, **details: Any) -> None:
        """Send one event: ``train_begin``, ``step_begin``, ``step_end``, ``log``, ..."""
        self._state.global_step = step
        handle = getattr(self._handler, f"on_{event}")
        self._control = handle(self._arguments, self._state, self._control, **details)

    def evaluated(self, done: int, total: int) -> None:
        """Tell how many examples of an evaluation are done, and of how many."""
        self._control = self._handler.call_event(
            "on_prediction_step",
            self._arguments,
            self._state,
            self._control,
            done=done,
            total=total,
        )

    @property
    def wants_stop(self) -> bool:
        """A callback asked for the end of training."""
        return bool(self._control.should_training_stop)


def _arguments(recipe: Recipe, *, use_cpu: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=recipe.output_dir,
        max_steps=recipe.max_steps,
        learning_rate=recipe.learning_rate,
        per_device_train_batch_size=recipe.per_device_train_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        seed=recipe.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        use_cpu=use_cpu,
    )
