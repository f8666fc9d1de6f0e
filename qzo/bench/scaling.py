"""``qzo bench scaling``: how time and memory of a step grow with layers, tokens and probes.

One of the three is varied at a time; each point is a training run in a fresh process on a
synthetic checkpoint of shape ``small``. A line is fitted by least squares through the points:
``y = slope * x + intercept``, ``R^2 = 1 - sum (y - fit)^2 / sum (y - mean)^2``. A step that costs
two forwards is linear in all three.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from qzo.bench.machine import hardware, versions
from qzo.bench.synthetic import Synthetic, synthetic_checkpoint
from qzo.bench.training_run import RunSettings, run_apart
from qzo.checkpoint.atomic import new_file
from qzo.errors import ConfigError

ROW_TOKENS = 64
QUANTITIES = ("seconds_per_step", "peak_resident", "peak_anonymous")


@dataclass(frozen=True)
class Workload:
    """What a step is asked to do.

    Attributes:
        layers: Decoder blocks.
        tokens: Of the batch at one probe, in rows of 64.
        probes: Of the step; two for each direction.
    """

    layers: int = 8
    tokens: int = 256
    probes: int = 2

    def __post_init__(self) -> None:
        for name, unit in (("layers", 1), ("tokens", ROW_TOKENS), ("probes", 2)):
            value = getattr(self, name)
            if value < 1 or value % unit:
                raise ConfigError(f"{name}: expected a positive multiple of {unit}, got {value}")


@dataclass(frozen=True)
class Cost:
    """What the step took: seconds, and bytes of the process."""

    seconds_per_step: float
    peak_resident: int
    peak_anonymous: int


@dataclass(frozen=True)
class Fit:
    """A line through the points of a series."""

    slope: float
    intercept: float
    r_squared: float


SERIES: dict[str, tuple[int, ...]] = {
    "layers": (4, 8, 16, 32),
    "tokens": (128, 256, 512, 1024),
    "probes": (2, 4, 8, 16),
}

Measure = Callable[[Workload], Cost]
Progress = Callable[[str], None]


def measure_apart(parent: Path | None, steps: int) -> Measure:
    """Return a function that measures a workload by a run in a fresh process.

    Args:
        parent: Folder of the synthetic checkpoints; the user's cache if None.
        steps: Of each run; their median counts.
    """

    def measure(workload: Workload) -> Cost:
        checkpoint = synthetic_checkpoint(Synthetic("small", num_layers=workload.layers), parent)
        settings = RunSettings(
            str(checkpoint),
            batch_size=workload.tokens // ROW_TOKENS,
            seq_len=ROW_TOKENS,
            steps=steps,
            num_directions=workload.probes // 2,
        )
        result = run_apart(settings)
        peaks = result.peaks
        return Cost(median(result.step_seconds), peaks.resident, peaks.anonymous)

    return measure


def bench_scaling(
    measure: Measure,
    series: dict[str, tuple[int, ...]] | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Measure the series around one workload, which all of them share.

    Args:
        measure: Gives the cost of a workload.
        series: Values of each; ``SERIES`` if None.
        progress: Told what is measured next.

    Returns:
        ``base``, the workload that is varied; for each series the values ``x``, the quantities at
        them and their ``fit``; ``hardware`` and ``versions``.
    """
    base = Workload()
    known: dict[Workload, Cost] = {}

    def cost(workload: Workload) -> Cost:
        if workload not in known:
            progress(", ".join(f"{value} {name}" for name, value in asdict(workload).items()))
            known[workload] = measure(workload)
        return known[workload]

    found = {
        name: _series(values, [cost(replace(base, **{name: value})) for value in values])
        for name, values in (series or SERIES).items()
    }
    machine = {"hardware": hardware(torch.device("cpu")), "versions": versions()}
    return {"base": asdict(base), "series": found, **machine}


def _series(values: Sequence[int], costs: Sequence[Cost]) -> dict[str, Any]:
    columns = {name: [getattr(cost, name) for cost in costs] for name in QUANTITIES}
    fits = {name: asdict(fit_line(values, column)) for name, column in columns.items()}
    return {"x": list(values), **columns, "fit": fits}


def fit_line(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Fit a line by least squares; at least two different values of x.

    Raises:
        ConfigError: There are fewer.
    """
    if len(set(x)) < 2:
        raise ConfigError(f"series: expected two or more different values, got {list(x)}")
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    slope = float(((xs - xs.mean()) * (ys - ys.mean())).sum() / ((xs - xs.mean()) ** 2).sum())
    intercept = float(ys.mean() - slope * xs.mean())
    residual = float(((ys - slope * xs - intercept) ** 2).sum())
    total = float(((ys - ys.mean()) ** 2).sum())
    return Fit(slope, intercept, 1 - residual / total if total else 1.0)


def plot_scaling(result: dict[str, Any], target: Path) -> None:
    """Draw the points and the lines: seconds above, GiB below, a column for each series."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    columns = figure.subplots(2, len(result["series"]), squeeze=False).T
    for (name, series), (upper, lower) in zip(result["series"].items(), columns, strict=True):
        _draw(upper, series, "seconds_per_step", 1)
        _draw(lower, series, "peak_resident", 2**30)
        _draw(lower, series, "peak_anonymous", 2**30)
        upper.set_ylabel("seconds a step")
        lower.set_ylabel("GiB")
        lower.set_xlabel(name)
        for axes in (upper, lower):
            axes.set_ylim(bottom=0)
    with new_file(target) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _draw(axes: Any, series: dict[str, Any], quantity: str, unit: float) -> None:
    x, fit = np.asarray(series["x"]), series["fit"][quantity]
    points = axes.plot(x, np.asarray(series[quantity]) / unit, "o")[0]
    line = (fit["slope"] * x + fit["intercept"]) / unit
    label = f"{quantity.replace('_', ' ')}, R² = {fit['r_squared']:.3f}"
    axes.plot(x, line, "-", color=points.get_color(), linewidth=1.2, label=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
