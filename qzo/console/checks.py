"""What a check of this computer answers, and how it looks at packages without importing them."""

import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

Status = Literal["ok", "warn", "fail"]
_IMPORT_SECONDS = 60


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        section: ``packages``, ``devices``, ``kernels`` or ``traps``.
        name: What was looked at.
        status: ``ok``; ``warn`` where something is slower, missing or surprising; ``fail`` where
            QZO cannot work.
        detail: What was found.
        advice: What to do; empty if nothing.
    """

    section: str
    name: str
    status: Status
    detail: str
    advice: str = ""


def installed_version(name: str) -> str:
    """Return the version of an installed package, or an empty string."""
    try:
        return str(metadata.version(name) or "unknown")
    except metadata.PackageNotFoundError:
        return ""


def is_older(version: str, than: str) -> bool | None:
    """Compare versions by their leading numbers; None if one of them has none.

    Pre-release and local marks are ignored: ``2.13.0+cpu`` counts as ``2.13.0``.
    """
    left, right = _numbers(version), _numbers(than)
    if not left or not right:
        return None
    width = max(len(left), len(right))
    return _padded(left, width) < _padded(right, width)


def _numbers(version: str) -> list[int]:
    match = re.match(r"v?(\d+(?:\.\d+)*)", version)
    return [int(part) for part in match[1].split(".")] if match else []


def _padded(numbers: list[int], width: int) -> list[int]:
    return numbers + [0] * (width - len(numbers))


def run_python(code: str) -> str:
    """Run code in a fresh Python process and return its output and errors, never raising."""
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {_IMPORT_SECONDS} seconds"
    except OSError as error:
        return described(error)
    died = f"\nkilled by signal {-done.returncode}" if done.returncode < 0 else ""
    return f"{done.stdout}\n{done.stderr}{died}".strip() or "no output"


def described(error: Exception) -> str:
    """Return the type and message of an error in one line."""
    return f"{type(error).__name__}: {one_line(str(error))}"


def one_line(text: str) -> str:
    """Join lines and shorten to 300 characters."""
    return " ".join(text.split())[:300]


def last_line(text: str) -> str:
    """Return the last line that is not empty: a traceback ends with its error."""
    lines = [line for line in text.splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else ""
