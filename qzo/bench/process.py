"""Memory of a Linux process, from /proc.

- ``resident``: VmHWM, the most the process ever had in memory, pages of mapped files included;
- ``anonymous``: RssAnon, what is not backed by a file: it cannot be dropped and read again.

Source: proc_pid_status(5).
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from qzo.errors import ConfigError, QZOError

SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Peaks:
    """The largest values that were seen, in bytes.

    Attributes:
        resident: Exact: the kernel keeps it.
        anonymous: Of samples.
        file_backed: Of samples.
    """

    resident: int = 0
    anonymous: int = 0
    file_backed: int = 0


def run_watched(arguments: Sequence[str]) -> Peaks:
    """Run a Python module in a fresh process and watch its memory until it ends.

    Args:
        arguments: What follows ``python -m``.

    Raises:
        ConfigError: This is no Linux.
        QZOError: The process failed; the message is its last line.
    """
    if not Path("/proc/self/status").exists():
        raise ConfigError("memory: expected Linux, whose /proc tells it, got another system")
    with TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=errors, stderr=subprocess.STDOUT
        )
        try:
            peaks = _watch(process)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode("utf-8", "replace").strip().splitlines()
            reason = lines[-1] if lines else f"it ended with status {process.returncode}"
            raise QZOError(f"measured run: expected it to finish, got: {reason}")
    return peaks


def _watch(process: "subprocess.Popen[bytes]") -> Peaks:
    path = Path(f"/proc/{process.pid}/status")
    peaks = Peaks()
    while process.poll() is None:
        values = _sizes(path)
        peaks = Peaks(
            max(peaks.resident, values.get("VmHWM", 0)),
            max(peaks.anonymous, values.get("RssAnon", 0)),
            max(peaks.file_backed, values.get("RssFile", 0)),
        )
        time.sleep(SAMPLE_SECONDS)
    return peaks


def _sizes(path: Path) -> dict[str, int]:
    """Return the sizes in a status file in bytes; none of a process that has ended."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    sizes = (line.split() for line in lines if line.endswith(" kB"))
    return {name.removesuffix(":"): int(value) * 1024 for name, value, _ in sizes}


def seconds_since_start() -> float:
    """Return how long ago this process was started, to a hundredth of a second."""
    fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # starttime, field 22 of the line
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
