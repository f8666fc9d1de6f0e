"""loss.png: training and evaluation loss of a run, or its reward."""

import json
from pathlib import Path

from qzo.checkpoint.atomic import new_file
from qzo.run.output.metrics import evaluations


def plot_run(folder: Path) -> Path:
    """Draw ``metrics.jsonl`` of a run folder into ``loss.png``."""
    from matplotlib.figure import Figure

    lines = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    name = "reward" if any("reward" in line for line in lines) else "loss"
    for key, label, style in (
        (name, "training batches, at the probes", "-"),
        (f"eval_{name}", "evaluation set", "o-"),
    ):
        drawn = evaluations(lines) if key.startswith("eval_") else lines
        points = [(line["step"], line[key]) for line in drawn if line.get(key) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, style, label=label, linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)" if name == "loss" else name)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    target = folder / "loss.png"
    with new_file(target) as partial:
        figure.savefig(partial, format="png", dpi=120)
    return target
