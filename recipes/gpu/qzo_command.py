"""Commands of qzo in a process of their own."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def qzo(*arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a command with ``--json`` and return what it prints.

    Raises:
        RuntimeError: It failed; the message is its last line.
    """
    print(f"$ qzo {' '.join(arguments)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "qzo", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=None if environment is None else dict(environment),
    )
    print(done.stderr, flush=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
