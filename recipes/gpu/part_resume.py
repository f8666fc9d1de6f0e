"""A run that is killed and continued: bitwise the journal and adapter of one that was not."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from check_part import Findings, run_part
from short_run import small_checkpoint, steps_of, train

SCRIPT = Path(__file__).with_name("short_run.py")
STEPS, KILLED_AFTER = 6, 3
KEYS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"preset": "paper"},
    "adam": {"preset": "none", "zo": {"optimizer": "adam", "estimator": "spsa"}},
}


def ask(findings: Findings) -> str:
    """Kill and continue runs of some recipes in half precision."""
    checkpoint = small_checkpoint(findings.work, "gptq", is_tiny=findings.is_tiny)
    dtype = "float16" if findings.is_cuda else "float32"
    recipes = {"default": {}} if findings.is_tiny else KEYS
    for name, extra in recipes.items():
        keys = {**extra, "device": findings.device, "dtype": dtype, "max_steps": STEPS}
        keys |= {"save_steps": 2}
        with findings.guarded(name):
            whole, killed = findings.work / f"{name}-whole", findings.work / f"{name}-killed"
            train(checkpoint, whole, keys)
            _kill(checkpoint, killed, keys)
            num_before = len(steps_of(killed))
            findings.require(
                KILLED_AFTER <= num_before < STEPS,
                f"{name}: expected the kill between two steps, got {num_before} of {STEPS}",
            )
            train(checkpoint, killed, {**keys, "resume_from_checkpoint": True})
            findings.note(name, {"steps_before_the_kill": num_before})
            findings.require(steps_of(killed) == steps_of(whole), f"{name}: the journals differ")
            same = _adapter(killed) == _adapter(whole)
            findings.require(same, f"{name}: the adapters differ")
    return f"{len(recipes)} killed after step {KILLED_AFTER}, {dtype}: bitwise the same"


def _kill(checkpoint: Path, run: Path, keys: dict[str, Any]) -> None:
    """Train in a process that is killed.

    Raises:
        RuntimeError: It ended in another way.
    """
    command = [sys.executable, str(SCRIPT), str(checkpoint), str(run), json.dumps(keys)]
    done = subprocess.run([*command, str(KILLED_AFTER)], check=False)
    if done.returncode != -signal.SIGKILL:
        raise RuntimeError(f"expected the run to be killed, got status {done.returncode}")


def _adapter(run: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(run.glob("*.safetensors")))


if __name__ == "__main__":
    run_part(ask)
