"""What the parts of the GPU check have in common: their arguments, and what they found.

A part writes what it knows after every finding, so that nothing is lost where it is stopped.
"""

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MAX_WHY = 400  # characters of a verdict


class Skipped(Exception):  # noqa: N818  # not an error
    """The part cannot be answered here; the message says what is missing."""


class Findings:
    """What a part found so far.

    Attributes:
        device: ``cuda``, ``cuda:1`` or ``cpu``.
        is_tiny: Small shapes.
        work: A folder of the part's own.
        ends: When it will be stopped, in seconds since the epoch.
        results: What is known, by name.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.device: str = options.device
        self.is_tiny: bool = options.tiny
        self.work: Path = options.work
        self.ends: float = options.ends
        self.results: dict[str, Any] = {}
        self._target: Path = options.result
        self._failures: list[str] = []

    @property
    def is_cuda(self) -> bool:
        """Whether there is a GPU to ask."""
        return self.device.startswith("cuda")

    @property
    def seconds_left(self) -> float:
        """Until the part is stopped."""
        return self.ends - time.time()

    def note(self, name: str, value: Any) -> None:
        """Keep a result, also on disk."""
        self.results[name] = value
        print(f"{name}: {json.dumps(value, default=str)}", flush=True)
        self.write(None)

    def require(self, is_right: bool, why: str) -> None:
        """Let the part fail with this reason, at its end, unless it is right."""
        if not is_right:
            print(f"FAILED: {why}", flush=True)
            self._failures.append(why)
            self.write(None)

    @contextlib.contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Turn an error into a failure of the part, so that what follows still runs."""
        started = time.time()
        print(f"--- {name}", flush=True)
        try:
            yield
        except Exception as error:  # whatever it is, the next question is asked
            traceback.print_exc()
            self.require(False, f"{name}: {one_line(error)}")
        print(f"--- {name}: {time.time() - started:.1f} s", flush=True)

    def write(self, verdict: str | None, why: str = "") -> None:
        """Write the results, with the failures so far."""
        if verdict == "ok" and self._failures:
            verdict, why = "FAILED", "; ".join(self._failures)
        content = {
            "verdict": verdict,
            "why": why[:MAX_WHY],
            "failures": self._failures,
            "results": self.results,
        }
        partial = self._target.with_suffix(".partial")
        partial.write_text(json.dumps(content, default=str), "utf-8")
        os.replace(partial, self._target)


def one_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def run_part(ask: Callable[[Findings], str | None]) -> None:
    """Read the arguments, run a part and write its verdict.

    Args:
        ask: Does the work; may return a remark for the verdict.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--ends", type=float, default=time.time() + 600)
    findings = Findings(parser.parse_args())
    findings.write(None)
    try:
        if findings.is_cuda:
            _check_cuda(findings.device)
        remark = ask(findings)
    except Skipped as reason:
        findings.write("skipped", str(reason))
    except BaseException as error:  # the verdict names it
        traceback.print_exc()
        findings.write("FAILED", "; ".join([*findings._failures, one_line(error)]))
        sys.exit(1)
    else:
        findings.write("ok", remark or "")


def _check_cuda(device: str) -> None:
    """Use the device once, with a message of its own where that fails.

    Raises:
        RuntimeError: Torch cannot use it.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    found = torch.ones(2, device=device).sum().item()
    if found != 2:
        raise RuntimeError(f"1 + 1 = {found} on {device}")
