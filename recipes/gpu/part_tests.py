"""The tests that are marked ``gpu``; without one they are only collected."""

import os
import re
import subprocess
import sys
from pathlib import Path

from check_part import Findings, run_part

ROOT = Path(__file__).resolve().parents[2]
MAX_WORKERS = 8  # each has a CUDA context of its own


def ask(findings: Findings) -> str:
    """Run them."""
    cores = len(os.sched_getaffinity(0))
    workers = max(min(cores // 2, MAX_WORKERS), 1) if findings.is_cuda else 0
    command = [
        *(sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-n", str(workers), "-q"),
        # what else is installed may warn, and a file that cannot be imported stops no other
        *("-W", "default", "-p", "no:cacheprovider", "--continue-on-collection-errors"),
        *("-p", "xdist", "--tb=short", "--durations=10", "-rfE", "--color=no"),
        *([] if findings.is_cuda else ["--collect-only"]),
    ]
    # plugins of the machine (benchmark, cov, mock) warn or start threads of their own
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, flush=True)
    counts = {
        name: int(count)
        for count, name in re.findall(
            r"(\d+) (passed|failed|errors?|skipped|deselected)", done.stdout[-4000:]
        )
    }
    failed = re.findall(r"^(?:FAILED|ERROR) (\S.*)$", done.stdout, re.MULTILINE)
    findings.note("counts", counts)
    findings.note("failed", failed[:100])
    findings.require(done.returncode == 0, f"{len(failed)} failed: {', '.join(failed[:3])}")
    if not findings.is_cuda:
        found = re.findall(r"(\d+)/\d+ tests collected|(\d+) tests collected", done.stdout)
        number = next((a or b for a, b in found), "0")
        return f"{number} tests collected; they run on a GPU"
    return f"{counts.get('passed', 0)} passed, {counts.get('skipped', 0)} skipped"


if __name__ == "__main__":
    run_part(ask)
