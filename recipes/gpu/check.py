"""Run the parts of the GPU check, each in a process of its own, and write the report.

``check.sh`` prepares the environment and starts this; it needs nothing but the standard library, so
that a report is written whatever is broken. Parts that ask whether results are right run side by
side; parts that measure time come after them, one at a time. The report is written anew after
every part, so that whatever ends the check leaves what was known by then.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import check_report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LOG_CHARACTERS = 40_000  # of a part, at the end of its output
GRACE_SECONDS = 3  # to write where it stands, for a part that ran out of time


@dataclasses.dataclass(frozen=True)
class Part:
    """One question to the GPU.

    Attributes:
        name: For ``--only``; its script is ``part_NAME.py``.
        title: For the report.
        seconds: How long it may take.
        is_timed: It measures time, so nothing else runs beside it.
    """

    name: str
    title: str
    seconds: int
    is_timed: bool = False

    @property
    def script(self) -> Path:
        """What it runs."""
        return HERE / f"part_{self.name}.py"


PARTS = (
    Part("tests", "tests that need a GPU", 120),
    Part("multipliers", "multipliers and directions in half precision", 100),
    Part("journal", "losses against the CPU, and the journal replayed there", 110),
    Part("resume", "kill and resume", 120),
    Part("export", "export of a half-precision run", 120),
    Part("limit", "memory_limit at half of the checkpoint", 120),
    Part("kernels", "one layer: fused and dense against others", 80, is_timed=True),
    Part("steps", "steps and memory of Llama-2-7B and 13B", 230, is_timed=True),
    Part("profile", "a profile of a step of each preset", 45, is_timed=True),
)
CHECKPOINTS = "checkpoints"  # of the parts that measure time: made in the background
FEW_THREADS = {"OMP_NUM_THREADS": "4"}  # of each process, where several run side by side
MAKING = "making"  # a file that is there while they are made
TOTAL_SECONDS = 470  # under eight minutes, with the installation


@dataclasses.dataclass
class Running:
    """A part that runs, and the end that is set to it."""

    part: Part
    process: "subprocess.Popen[bytes]"
    started: float
    ends: float
    is_stopped: bool = False


class Check:
    """The parts, what is known of them, and the report."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out
        self.work: Path = options.work
        self.ends = options.started + options.seconds
        self.known: dict[str, dict[str, Any]] = {}
        self.machine = machine(options)
        self._making = self.work / MAKING
        self._maker: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Run what was asked for; return the exit status."""
        self.out.mkdir(parents=True, exist_ok=True)
        parts = [part for part in PARTS if self.options.only in (None, part.name)]
        self.write()
        with self._background(parts):
            self._side_by_side([part for part in parts if not part.is_timed])
            for part in parts:
                if part.is_timed:
                    self._side_by_side([part])
        self.write()
        print(f"\n{self.out / 'report.md'}", flush=True)
        failed = [name for name, found in self.known.items() if found["verdict"] == "FAILED"]
        return 1 if failed else 0

    @contextlib.contextmanager
    def _background(self, parts: Sequence[Part]) -> Iterator[None]:
        """Make the checkpoints of the timed parts while the others run."""
        if not any(part.is_timed for part in parts):
            yield
            return
        self._making.touch()  # before the parts look for it
        with (self.work / f"{CHECKPOINTS}.log").open("wb") as log:
            script = HERE / "make_checkpoints.py"
            self._maker = self._start(script, CHECKPOINTS, self.ends, log)
            try:
                yield
            finally:
                stop(self._maker, signal.SIGKILL)

    def _side_by_side(self, parts: Sequence[Part]) -> None:
        waiting, running = list(parts), list[Running]()
        try:
            while waiting or running:
                while waiting and len(running) < self.options.jobs:
                    running.append(self._begin(waiting.pop(0)))
                time.sleep(0.1)
                if self._maker is not None and self._maker.poll() is not None:
                    self._making.unlink(missing_ok=True)
                for one in list(running):
                    if self._has_ended(one):
                        running.remove(one)
                        self._note(one)
        finally:
            for one in running:
                stop(one.process, signal.SIGKILL)

    def _begin(self, part: Part) -> Running:
        now = time.time()
        ends = min(now + part.seconds * self.options.patience, self.ends)
        with (self.work / f"{part.name}.log").open("wb") as log:
            process = self._start(part.script, part.name, ends, log)
        return Running(part, process, now, ends)

    def _start(self, script: Path, name: str, ends: float, log: Any) -> "subprocess.Popen[bytes]":
        options = self.options
        folder = self.work / name
        folder.mkdir(exist_ok=True)
        command = [
            *(sys.executable, "-X", "faulthandler", str(script), "--work", str(folder)),
            *("--device", options.device),
            *("--result", str(self.work / f"{name}.json"), "--ends", f"{ends:.0f}"),
            *(["--tiny"] if options.tiny else []),
        ]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **({} if self._is_timed(name) else FEW_THREADS)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _is_timed(self, name: str) -> bool:
        return any(part.is_timed for part in PARTS if part.name == name)

    def _has_ended(self, one: Running) -> bool:
        if one.process.poll() is not None:
            return True
        now = time.time()
        if now > one.ends and not one.is_stopped:
            stop(one.process, signal.SIGABRT)  # Python's faulthandler writes where it stands
            one.is_stopped = True
        if now > one.ends + GRACE_SECONDS:
            stop(one.process, signal.SIGKILL)
            one.process.wait()
            return True
        return False

    def _note(self, one: Running) -> None:
        """Read what a part found, print its verdict and write the report."""
        stop(one.process, signal.SIGKILL)  # what it may have left running
        found = self._found(one)
        found["seconds"] = round(time.time() - one.started, 1)
        self.known[one.part.name] = found
        print(f"{one.part.name}: {check_report.verdict_line(found)}", flush=True)
        self.write()

    def _found(self, one: Running) -> dict[str, Any]:
        try:
            found = json.loads((self.work / f"{one.part.name}.json").read_text("utf-8"))
        except (OSError, ValueError):
            found = {"results": {}}
        if one.is_stopped:
            seconds = round(one.ends - one.started)
            return {**found, "verdict": "FAILED", "why": f"it was not done after {seconds} s"}
        if found.get("verdict") is None:
            lines = [line for line in self._log(one.part.name).splitlines() if line.strip()]
            why = lines[-1].strip() if lines else f"status {one.process.returncode}"
            return {**found, "verdict": "FAILED", "why": why}
        return dict(found)

    def _log(self, name: str) -> str:
        try:
            text = (self.work / f"{name}.log").read_text("utf-8", "replace")
        except OSError:
            return ""
        return text[-LOG_CHARACTERS:]

    def write(self) -> None:
        """Write report.json, report.md and log.txt."""
        parts = [
            {"name": part.name, "title": part.title, **self.known[part.name]}
            for part in PARTS
            if part.name in self.known
        ]
        seconds = round(time.time() - self.options.started, 1)
        report = {"machine": self.machine, "seconds": seconds, "parts": parts}
        text = json.dumps(report, indent=1, default=str)
        (self.out / "report.json").write_text(text + "\n", "utf-8")
        try:
            markdown = check_report.markdown(report)
        except Exception as error:  # the numbers are in report.json all the same
            markdown = f"report.md could not be written: {type(error).__name__}: {error}\n"
        (self.out / "report.md").write_text(markdown, "utf-8")
        logs = [f"===== {name}\n{self._log(name)}\n" for name in (*self.known, CHECKPOINTS)]
        (self.out / "log.txt").write_text("\n".join(logs), "utf-8")


def stop(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Send a signal to a process and to everything that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Describe the machine and the code, by commands that may fail."""
    query = "import json, check_machine; print(json.dumps(check_machine.describe()))"
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"}
    described = _output([sys.executable, "-c", query], environment)
    try:
        found = json.loads(described.splitlines()[-1])
    except (IndexError, ValueError):
        found = {"error": described[-500:] or "torch could not be asked"}
    commit = _output(["git", "rev-parse", "HEAD"]).strip() or os.environ.get("QZO_COMMIT", "")
    changes = _output(["git", "status", "--porcelain", "--untracked-files=no"]).strip()
    return {
        "commit": (commit or "unknown") + (" with changes" if changes else ""),
        "device": options.device,
        "is_tiny": options.tiny,
        "nvidia_smi": _output(
            [
                "nvidia-smi",
                "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm",
                "--format=csv,noheader",
            ]
        ).strip(),
        **found,
    }


def _output(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """Return what a command prints; nothing where it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="check.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="takes the report")
    parser.add_argument("--only", choices=names, help="repeat one part")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--tiny", action="store_true", help="small shapes, as on a CPU")
    parser.add_argument("--seconds", type=int, default=TOTAL_SECONDS, help="for everything")
    parser.add_argument("--jobs", type=int, help="untimed parts at a time; by cores unless given")
    parser.add_argument("--work", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    cores = len(os.sched_getaffinity(0))
    options.jobs = options.jobs or min(max(cores // 2, 2), 6)
    options.patience = 1 if cores > 4 else 3  # few cores take longer
    options.out = options.out.resolve()
    return options


def main() -> int:
    """Run the check."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return Check(parse(sys.argv[1:])).run()


if __name__ == "__main__":
    sys.exit(main())
