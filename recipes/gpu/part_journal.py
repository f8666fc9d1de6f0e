"""Short runs on the device: losses against the CPU, and each journal replayed on the CPU.

A loss is about ln(vocabulary) here, 10.8 nats. The losses of the first step are of the same scales
on both sides. Those of later steps are not: derivatives differ in their last digits, and so do the
scales that they move; in float32 by so little that all steps are compared.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from check_part import Findings, run_part
from short_run import losses_of, small_checkpoint, steps_of, train

TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Nats between the device in this dtype and the CPU in float32, of a loss of the first step."""
PAPER = {"preset": "paper"}
ALL_LAYERS = {"preset": "none", "zo": {"estimator": "spsa", "num_directions": 2}}
REPLAYS = Path(__file__).with_name("replay_runs.py")
RUNS: tuple[tuple[str, str, dict[str, Any], tuple[str, ...]], ...] = (
    ("gptq-default", "gptq", {}, ("float32", "float16", "bfloat16")),
    ("nf4-default", "nf4", {}, ("float32", "float16", "bfloat16")),
    ("gptq-paper", "gptq", PAPER, ("float32", "float16")),
    ("gptq-all-layers", "gptq", ALL_LAYERS, ("float32", "float16")),
)


def ask(findings: Findings) -> str:
    """Train on both, compare, and replay."""
    runs = []
    for name, format_name, keys, dtypes in RUNS:
        checkpoint = small_checkpoint(findings.work, format_name, is_tiny=findings.is_tiny)
        reference = findings.work / f"{name}-cpu"
        with findings.guarded(f"{name} on the CPU"):
            train(checkpoint, reference, {**keys, "device": "cpu", "dtype": "float32"})
        for dtype in dtypes[:1] if findings.is_tiny else dtypes:
            run = findings.work / f"{name}-{dtype}"
            with findings.guarded(f"{name} in {dtype}"):
                train(checkpoint, run, {**keys, "device": findings.device, "dtype": dtype})
                runs.append(run)
                _compare(findings, run, reference, dtype)
    with findings.guarded("replays"):
        _replay(findings, runs)
    return f"{len(runs)} runs; all journals replay bitwise on the CPU"


def _compare(findings: Findings, run: Path, reference: Path, dtype: str) -> None:
    got, want = losses_of(run), losses_of(reference)
    steps = range(len(want)) if dtype == "float32" else range(1)
    largest = max(abs(a - b) for step in steps for a, b in zip(got[step], want[step], strict=True))
    derivatives = [steps_of(one)[0].derivatives for one in (run, reference)]
    difference = sum((a - b) ** 2 for a, b in zip(*derivatives, strict=True)) ** 0.5
    size = sum(b**2 for b in derivatives[1]) ** 0.5
    findings.note(
        run.name,
        {
            "largest_difference_nats": largest,
            "tolerance_nats": TOLERANCES[dtype],
            "relative_error_of_derivatives": difference / size if size else None,
        },
    )
    findings.require(
        largest <= TOLERANCES[dtype],
        f"{run.name}: {largest:.2e} nats from the CPU's loss, over {TOLERANCES[dtype]}",
    )


def _replay(findings: Findings, runs: Sequence[Path]) -> None:
    """Replay all journals in a process that sees no GPU."""
    done = subprocess.run(
        [sys.executable, str(REPLAYS), *map(str, runs)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    replayed = json.loads(done.stdout)
    findings.note("replays", replayed)
    for run in runs:
        found = replayed.get(run.name)
        findings.require(found == "equal", f"replay of {run.name}: {found}")


if __name__ == "__main__":
    run_part(ask)
