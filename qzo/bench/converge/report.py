"""What ``qzo bench converge`` leaves to read: tables in Markdown, plots, and one page of HTML."""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzo.checkpoint.atomic import new_file, write_bytes, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; }
td, th { border: 1px solid #bbb; padding: .2em .6em; text-align: left; }
img { max-width: 100%; }
pre { background: #f4f4f4; padding: 1em; overflow: auto; }
"""
_TITLE = "Loss reached per forward"
_DIVERGED = "diverged"
_NUM_COLOURS = 10  # of the colours that matplotlib takes by itself


def write_report(results: Mapping[str, Any], folder: Path) -> str:
    """Write ``results.json``, ``results.md``, ``loss-TASK.png`` and ``index.html``.

    Args:
        results: From ``converge``.
        folder: Where to.

    Returns:
        The Markdown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    markdown = _markdown(results)
    write_bytes(folder / "results.md", markdown.encode("utf-8"))
    plots = {name: plot_path(folder, name) for name in results["tasks"]}
    for name, task in results["tasks"].items():
        _plot(task, name, plots[name])
    write_bytes(folder / "index.html", _page(results, plots).encode("utf-8"))
    return markdown


def plot_path(folder: Path, task: str) -> Path:
    """Return where the plot of a task lies."""
    return folder / f"loss-{task}.png"


def table(task: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of a task's table, the lowest loss first."""
    methods = task["methods"]
    columns = {
        "loss": "loss",
        "accuracy": "accuracy",
        "accuracy_bias_corrected": "bias-corrected",
        "f1": "F1",
    }
    shown = {
        key: name
        for key, name in columns.items()
        if key == "loss" or any(method[key] for method in methods.values())
    }
    has_target = task["target_loss"] is not None
    target = [f"forwards to {task['target_loss']:g}"] if has_target else []
    head = ["method", "grid point", *shown.values(), *target, "seconds per forward"]
    rows = [_row(name, method, list(shown), has_target) for name, method in _ranked(methods)]
    return head, rows


def _row(name: str, method: Mapping[str, Any], keys: Sequence[str], has_target: bool) -> list[str]:
    if method["point"] is None:
        return [name, f"all {_DIVERGED}", *[""] * (len(keys) + has_target + 1)]
    cells = [_number(method[key]) for key in keys]
    if method["num_diverged"]:
        cells[0] = f"{method['num_diverged']} of {method['num_seeds']} {_DIVERGED}"
    if has_target:
        reached = f"{method['num_reached']} of {method['num_seeds']} reached it"
        cells.append(_number(method["forwards_to_target"], ".0f") or reached)
    return [name, method["point"], *cells, _number(method["seconds_per_forward"], ".3g")]


def _number(value: Mapping[str, float | None] | None, form: str = ".4f") -> str:
    if value is None:
        return ""
    error = value["se"]
    return f"{value['mean']:{form}}" + ("" if error is None else f" ± {error:{form}}")


def _markdown(results: Mapping[str, Any]) -> str:
    parts = [f"# {_TITLE}", *_notes(results)]
    for name, task in results["tasks"].items():
        head, rows = table(task)
        lines = [head, ["---"] * len(head), *rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts += [f"## {name}", *_task_notes(task), text, *_messages(task)]
    return "\n\n".join(parts) + "\n"


def _notes(results: Mapping[str, Any]) -> list[str]:
    seeds = ", ".join(map(str, results["seeds"]))
    return [
        f"{results['forwards']} forwards a run, one being a pass over a batch of the task's size. "
        f"Mean ± standard error over seeds {seeds}, after the last step.",
        _machine(results),
    ]


def _machine(results: Mapping[str, Any]) -> str:
    computer, numbers = results["hardware"], results["versions"]
    where = computer.get("gpu") or f"{computer['processor']}, {computer['threads']} threads"
    return f"{where}; " + ", ".join(f"{name} {number}" for name, number in numbers.items())


def _task_notes(task: Mapping[str, Any]) -> list[str]:
    methods = list(task["methods"].values())
    notes = []
    before = next((m["before"] for m in methods if m["before"] is not None), None)
    cell = next((c for m in methods for c in m["cells"] if c["curve"]), None)
    if before is not None and cell is not None:
        number = cell["curve"][0]["num_examples"]
        notes.append(f"Loss before training: {before:.4f}, on {number} examples.")
    if task["tuning_set"] is not None:
        points = len(methods[0]["tuning"])
        seeds = methods[0]["tuning"][0]["num_seeds"]
        notes.append(
            f"Grid points: {points} a method, {seeds} run(s) each, chosen by the loss at the end "
            f"on another set than the table's: {task['tuning_set']}."
        )
    if task["target_loss"] is not None:
        notes.append(
            f"Forwards to {task['target_loss']:g}: where the line from the evaluation before to "
            "the first one at or below it crosses it."
        )
    return [" ".join(notes)] if notes else []


def _messages(task: Mapping[str, Any]) -> list[str]:
    """Say what became of the runs that diverged."""
    lines = []
    for method in task["methods"].values():
        tuning = [cell for entry in method["tuning"] for cell in entry["cells"]]
        for cell in [*tuning, *method["cells"]]:
            if cell["message"] is not None:
                where = f"{cell['method']}, {cell['point']}, seed {cell['seed']}"
                lines.append(f"- {_DIVERGED}: {where}: {cell['message']}")
    return ["\n".join(lines)] if lines else []


def _plot(task: Mapping[str, Any], name: str, path: Path) -> None:
    with new_file(path) as partial:
        loss_figure(task, name).savefig(partial, format="png", dpi=120)


def loss_figure(task: Mapping[str, Any], name: str) -> "Figure":
    """Draw the loss of every method against forwards; the band is one standard error.

    The legend has the best first. The methods after the first ten are grey lines, named by the
    table alone; they do not stretch the axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    drawn = [(name, method) for name, method in _ranked(task["methods"]) if method["curve"]]
    for method_name, method in drawn[:_NUM_COLOURS]:
        label = f"{method_name} ({_DIVERGED})" if method["num_diverged"] else method_name
        _draw(axes, method["curve"], label)
    if len(drawn) > _NUM_COLOURS:
        limits = axes.get_ylim()
        for _, method in drawn[_NUM_COLOURS:]:
            forwards, means = [p["forwards"] for p in method["curve"]], _means(method["curve"])
            axes.plot(forwards, means, color="lightgrey", linewidth=0.8, zorder=1)
        axes.plot([], [], color="lightgrey", label=f"{len(drawn) - _NUM_COLOURS} others")
        axes.set_ylim(limits)
    if task["target_loss"] is not None:
        axes.axhline(task["target_loss"], color="grey", linestyle=":", label="target")
    axes.set(title=name, xlabel="forwards", ylabel="loss (nats)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw(axes: "Axes", curve: Sequence[Mapping[str, Any]], label: str) -> None:
    forwards = [p["forwards"] for p in curve]
    (line,) = axes.plot(forwards, _means(curve), "o-", label=label, linewidth=1.2, markersize=3)
    low = [p["mean"] - (p["se"] or 0.0) for p in curve]
    high = [p["mean"] + (p["se"] or 0.0) for p in curve]
    axes.fill_between(forwards, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _means(curve: Sequence[Mapping[str, Any]]) -> list[float]:
    return [point["mean"] for point in curve]


def _ranked(methods: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the methods by their loss, the lowest first; those without one last."""

    def loss(item: tuple[str, Mapping[str, Any]]) -> float:
        mean = item[1]["loss"]
        return math.inf if mean is None else float(mean["mean"])

    return sorted(methods.items(), key=loss)


def _page(results: Mapping[str, Any], plots: Mapping[str, Path]) -> str:
    """Return a page that needs no other file."""
    parts = [f"<h1>{_TITLE}</h1>", *map(_paragraph, _notes(results))]
    for name, task in results["tasks"].items():
        image = base64.b64encode(plots[name].read_bytes()).decode("ascii")
        parts += [f"<h2>{escape(name)}</h2>", *map(_paragraph, _task_notes(task))]
        parts.append(_html_table(*table(task)))
        source = f"data:image/png;base64,{image}"
        parts.append(f'<p><img alt="loss against forwards" src="{source}"></p>')
        parts += [f"<h3>Tuning of {escape(name)}</h3>", _tuning_table(task)] if _tuned(task) else []
        parts += [f"<pre>{escape(text)}</pre>" for text in _messages(task)]
    parts += ["<h2>Computer</h2>", _html_table(["", ""], _pairs(results["hardware"]))]
    parts += ["<h2>Suite</h2>", f"<pre>{escape(results['suite'])}</pre>"]
    head = f'<meta charset="utf-8"><title>{_TITLE}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _pairs(values: Mapping[str, Any]) -> list[list[str]]:
    return [[key, str(value)] for key, value in values.items()]


def _tuned(task: Mapping[str, Any]) -> bool:
    return any(method["tuning"] for method in task["methods"].values())


def _tuning_table(task: Mapping[str, Any]) -> str:
    rows = [
        [name, entry["point"], _number(entry["loss"]) or _DIVERGED]
        for name, method in task["methods"].items()
        for entry in method["tuning"]
    ]
    return _html_table(["method", "grid point", "loss on the tuning set"], rows)


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [_html_row(head, "th"), *(_html_row(row, "td") for row in rows)]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
