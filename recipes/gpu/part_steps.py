"""Steps and memory of Llama-2-7B and 13B: ``qzo bench step`` and ``qzo bench memory``.

Random codes, float16, two probes of row coordinates. 16 x 512 tokens, and 16 x 34 as the sentences
of SST-2. Memory of a contender is its weights and what its step adds. Caps limit what torch may
allocate on this card; they change no speed.
"""

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from check_part import Findings, run_part
from make_checkpoints import find

from qzo.bench.step import StepBench, StepSettings

ROWS = 16
LONG, SHORT = 512, 34
SECONDS_FOR_CAP = 35  # without so much time left a run under a cap is not begun


def ask(findings: Findings) -> str:
    """Measure both models, first what the goals ask for."""
    remarks: list[str] = []
    for name in ("7b", "13b"):
        with findings.guarded(f"{name}, steps"):
            _steps(findings, name)
        _free(findings)
    for cap in ("12GiB", "24GiB"):
        with findings.guarded(f"13b under {cap}"):
            remarks += _capped(findings, cap)
    return "; ".join(remarks)


def _free(findings: Findings) -> None:
    gc.collect()
    if findings.is_cuda:
        import torch

        torch.cuda.empty_cache()


def _steps(findings: Findings, name: str) -> None:
    checkpoint = find(name, findings)
    common: dict[str, Any] = {"mixed_lengths": (), "looks_inside": False}
    common |= {"device": findings.device, "against": ("mezo", "qlora")}
    if findings.is_tiny:
        lengths = {"short": (8, 4)}
        common |= {"repeats": 1}
    else:
        lengths = {"short": (SHORT, ROWS), "long": (LONG, ROWS)}
        common |= {"repeats": 3, "dtype": "float16"}
    bench = StepBench(checkpoint, StepSettings(tokens=(), **common), print)
    for kind, (length, rows) in lengths.items():
        folder = findings.work / f"{name}-{kind}"
        findings.note(f"{name} {kind}", bench.batch(length * rows, folder, length))


def _capped(findings: Findings, cap: str) -> list[str]:
    """Train in a process that may allocate so much."""
    if findings.is_cuda and findings.seconds_left < SECONDS_FOR_CAP:
        return [f"13b under {cap} not run: {findings.seconds_left:.0f} s left"]
    checkpoint = find("13b", findings)
    found = _memory(findings, checkpoint, cap)
    findings.note(f"13b under {cap}", found)
    return []


def _memory(findings: Findings, checkpoint: Path, cap: str) -> dict[str, Any]:
    rows, length = (2, 16) if findings.is_tiny else (ROWS, LONG)
    command = [
        *(sys.executable, "-m", "qzo", "bench", "memory", "--model", str(checkpoint), "--json"),
        *("--batch-size", str(rows), "--seq-len", str(length), "--steps", "2"),
        *("--device", findings.device),
    ]
    if findings.is_cuda:
        command += ["--dtype", "float16", "--memory-cap", cap]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stderr, flush=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no reason"])[-1])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    run_part(ask)
