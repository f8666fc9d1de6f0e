"""Make the checkpoints of the timed parts, in the background of the others."""

import multiprocessing
import os
import time
from pathlib import Path

from check_part import Findings, run_part

from qzo.bench.synthetic import Synthetic, synthetic_checkpoint

PROFILED_LAYERS = 4


def shapes(*, is_tiny: bool) -> dict[str, Synthetic]:
    """Return the checkpoints by the names under which the parts ask for them."""
    if is_tiny:
        return {
            "profile": Synthetic("tiny", "gptq"),
            "7b": Synthetic("tiny", "gptq", seed=1),
            "13b": Synthetic("tiny", "gptq", seed=2),
        }
    return {
        "profile": Synthetic("llama-2-7b", "gptq", num_layers=PROFILED_LAYERS),
        "7b": Synthetic("llama-2-7b", "gptq"),
        "13b": Synthetic("llama-2-13b", "gptq"),
    }


def place(work: Path) -> Path:
    """Return where they are: in memory where ``check.sh`` found enough of it."""
    return Path(os.environ.get("QZO_CHECKPOINTS") or work.parent / "made")


def find(name: str, findings: Findings) -> Path:
    """Return the folder of a checkpoint, once it is made; make it if nobody does.

    Raises:
        RuntimeError: It is not made in time.
    """
    what = shapes(is_tiny=findings.is_tiny)[name]
    parent = place(findings.work)
    while (findings.work.parent / "making").exists() and not (
        parent / what.name / "synthetic.json"
    ).exists():
        if findings.seconds_left < 20:
            raise RuntimeError(f"{what.name}: the checkpoint was not ready in time")
        time.sleep(0.2)
    return synthetic_checkpoint(what, parent)


def make(what: Synthetic, parent: Path) -> None:
    """Make one, in a process of its own."""
    started = time.time()
    synthetic_checkpoint(what, parent)
    print(f"{what.name}: {time.time() - started:.1f} s", flush=True)


def ask(findings: Findings) -> None:
    """Make the small one, then the large ones side by side."""
    parent = place(findings.work)
    parent.mkdir(parents=True, exist_ok=True)
    small, *large = shapes(is_tiny=findings.is_tiny).values()
    make(small, parent)
    if findings.is_tiny:
        for what in large:
            make(what, parent)
        return
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=make, args=(what, parent)) for what in large]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    run_part(ask)
