"""What commands print with: a plain console, tables, one JSON object where that is asked for."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from qzo.objective.evaluate import Evaluation
    from qzo.plan.planner import Plan
    from qzo.run.recipe.keys import Recipe
    from qzo.run.result import Result

AsJSON = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N (default: cuda if there is one).")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, float16 or bfloat16 (default: float32 on a CPU, else that of config.json)."
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(help="Stream the decoder blocks that do not fit into this much, e.g. 4GiB."),
]
PrintJSON = Callable[[Any], None]

_CHOSEN = ("loss", "accuracy", "accuracy_bias_corrected")
_WRITTEN = ("f1", "exact_match", "reward")


def console() -> Console:
    """Return a console that prints text as it is: ``qzo[gptq]`` is no markup."""
    return Console(highlight=False, markup=False, emoji=False)


def stderr_console() -> Console:
    """Return the same for what is no result."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


@contextmanager
def stdout_for(as_json: bool) -> Iterator[PrintJSON]:
    """Give a function that prints the result; under ``--json`` nothing else reaches stdout."""
    real = sys.stdout
    if as_json:
        sys.stdout = sys.stderr
    try:
        yield lambda value: _write_line(json.dumps(_json(value), default=str), real)
    finally:
        sys.stdout = real


def show(value: dict[str, Any], as_json: bool, print_json: PrintJSON) -> None:
    """Print a result: a line each key, or as JSON."""
    if as_json:
        print_json(value)
        return
    table = Table(show_header=False, box=None)
    for key, entry in value.items():
        table.add_row(key, f"{entry:.4f}" if isinstance(entry, float) else str(entry))
    console().print(table)


def show_training(config: "Recipe", result: "Result") -> None:
    """Print what a training run ended with, and what to do next."""
    out, folder, is_scales = console(), config.output_dir, config.zo.tuned == "scales"
    evaluations = {"before": result.before, "after": result.after}
    done = {name: e for name, e in evaluations.items() if e is not None}
    written = [k for k in _WRITTEN if any(getattr(e, k) is not None for e in done.values())]
    table = Table("", "loss", "accuracy", "bias-corrected", *written)
    for name, evaluation in done.items():
        table.add_row(name, *_evaluation_cells(evaluation, (*_CHOSEN, *written)))
    if table.row_count:
        out.print(table)
    changed = f"; {result.changed_fraction:.1%} of the scales differ from the base"
    out.print(
        f"{result.steps} steps in {result.seconds:.0f} s; kept step {result.best_step}"
        f"{changed if is_scales else ''}"
    )
    for warning in result.warnings:
        out.print(f"warning: {warning}", soft_wrap=True)
    following = f"export {folder} --out NEW_FOLDER"
    if not is_scales:  # LoRA and prefixes do not fold into codes
        following = f"{_evaluation_of(config)} --adapter {folder}"
    out.print(f"next: qzo {following}", soft_wrap=True)


def _evaluation_of(config: "Recipe") -> str:
    """Return the command that evaluates the base of a run."""
    from qzo.checkpoint.base import BASE_NAME

    if config.quantize is not None:
        return f"eval {config.output_dir}/{BASE_NAME}"
    return f"eval {config.model}" + (f" --revision {config.revision}" if config.revision else "")


def show_plan(plan: "Plan", memory: str | None) -> None:
    """Print the table of a plan, its notes, and whether it fits into so much memory."""
    table = Table("part", "MiB", "how")
    for part in plan.parts:
        table.add_row(part.name, f"{part.bytes / 2**20:,.1f}", part.formula)
    table.add_row("peak", f"{plan.peak_bytes / 2**20:,.1f}", f"{plan.peak_bytes / 2**30:.2f} GiB")
    out = console()
    out.print(table)
    for note in plan.notes:
        out.print(f"- {note}")
    if plan.verdict is not None:
        out.print(f"fits in {memory}: {plan.verdict}")


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[..., None]]:
    """Show a bar on stderr, if that is a terminal, while the block runs.

    Args:
        what: Is being done.

    Yields:
        Takes how much is done, of how much, and what is at work now if that is worth a word.
    """
    from rich.progress import Progress

    stderr = stderr_console()
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def progress(done: int, total: int, name: str = what) -> None:
            bar.update(task, completed=done, total=total, description=name)

        yield progress


def _evaluation_cells(evaluation: "Evaluation", keys: Sequence[str]) -> list[str]:
    """Return numbers of an evaluation with their standard errors, as text."""
    cells = []
    for key in keys:
        value, error = getattr(evaluation, key), getattr(evaluation, f"{key}_se")
        cells.append("" if value is None else f"{value:.4f} ± {error:.4f}")
    return cells


def _write_line(text: str, stream: Any) -> None:
    stream.write(f"{text}\n")
    stream.flush()


def _json(value: Any) -> Any:
    """Return a value without NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
