"""Progress on the terminal: loss, derivative, clip rate and time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_PATIENCE = 1.0  # seconds until a bar appears: what is over by then needs none


@contextmanager
def loading_progress(console: Console, *, is_silent: bool) -> Iterator[Callable[..., None]]:
    """Give a function that shows how many layers of a model are done, and of how many.

    Args:
        console: Where to; nothing is shown where it is no terminal.
        is_silent: Show nothing.
    """
    bar = Progress(console=console, transient=True)
    task = bar.add_task("loading", total=None)
    started = time.monotonic()

    def show(done: int, total: int, name: str = "loading") -> None:
        is_soon_over = time.monotonic() - started < _PATIENCE
        if is_silent or not console.is_terminal or is_soon_over:
            return
        bar.start()
        bar.update(task, completed=done, total=total, description=name)
        if done == total:  # a terminal has room for one bar: training's comes next
            bar.stop()

    try:
        yield show
    finally:
        if bar.live.is_started:  # after an error
            bar.stop()


class ProgressCallback(TrainerCallback):
    """Shows a run while it runs.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )

    def __enter__(self) -> "ProgressCallback":
        return self

    def __exit__(self, *_: object) -> None:
        """Give the terminal back, also after an error in the middle of training."""
        if self._progress.live.is_started:
            self._progress.stop()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Start the bar."""
        self._first = state.global_step  # of this call: a run may go on
        self._task = self._progress.add_task("training", total=state.max_steps, numbers="")
        self._evaluation = self._progress.add_task("evaluating", numbers="", visible=False)
        self._progress.update(self._task, completed=state.global_step)
        self._progress.start()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest averages; without a terminal, as a line."""
        shown = {key: value for key, value in (logs or {}).items() if value is not None}
        name = "reward" if "reward" in shown else "loss"
        numbers = (
            f"{name} {shown.get(name, float('nan')):.4f}  "
            f"derivative {shown.get('derivative', float('nan')):.3g}  "
            f"clipped {shown.get('clip_rate', 0):.0%}"
        )
        self._progress.update(self._task, numbers=numbers)
        if not self._console.is_terminal:
            done, seconds = state.global_step, shown.get("seconds", 0.0)
            left = seconds / max(done - self._first, 1) * (state.max_steps - done)
            self._console.print(f"step {done}/{state.max_steps}  {numbers}  {left:.0f} s left")

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        done: int = 0,
        total: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Show how many examples are evaluated."""
        self._progress.update(self._evaluation, completed=done, total=total, visible=done != total)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show an evaluation."""
        parts = [
            f"{key.removeprefix('eval_')} {value:.4f}"
            for key, value in (metrics or {}).items()
            if isinstance(value, float) and not key.endswith("_se")
        ]
        self._console.print(f"evaluation at step {state.global_step}: {'  '.join(parts)}")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Leave the bar."""
        self._progress.stop()
