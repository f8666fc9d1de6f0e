"""The check for GPUs: one part's failure loses nothing of the others; goals are read right."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

GPU = Path(__file__).parents[2] / "recipes" / "gpu"

GOOD = """
from check_part import run_part

def ask(findings):
    findings.note("answer", 42)
    return "all well"

run_part(ask)
"""
RAISES = """
from check_part import run_part

def ask(findings):
    findings.note("before", 1)
    with findings.guarded("first"):
        raise ValueError("first line\\nsecond line")
    findings.note("after", 2)
    raise RuntimeError("last")

run_part(ask)
"""
SKIPS = """
from check_part import Skipped, run_part

def ask(findings):
    raise Skipped("no such card")

run_part(ask)
"""
HANGS = """
import time
from check_part import run_part

def ask(findings):
    findings.note("known", 3)
    time.sleep(600)

run_part(ask)
"""
DIES = """
import os, signal
print("about to die", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
SCRIPTS = {"good": GOOD, "raises": RAISES, "skips": SKIPS, "hangs": HANGS, "dies": DIES}
DRIVER = """
import sys
sys.path.insert(0, {gpu!r})
import check
from pathlib import Path
check.HERE = Path({folder!r})
check.PARTS = tuple(
    check.Part(name, "a part", 2 if name == "hangs" else 60, is_timed=name == "dies")
    for name in {names!r}
)
sys.exit(check.main())
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, GPU / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_check(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the driver with parts of our own; return its status and the report by part."""
    for name, script in SCRIPTS.items():
        place = f"import sys\nsys.path.insert(0, {str(GPU)!r})\n"
        (folder / f"part_{name}.py").write_text(place + script)
    (folder / "make_checkpoints.py").write_text("")
    (folder / "work").mkdir()
    driver = folder / "driver.py"
    driver.write_text(DRIVER.format(gpu=str(GPU), folder=str(folder), names=list(SCRIPTS)))
    common = ["--work", str(folder / "work"), "--out", str(folder / "out"), "--device", "cpu"]
    done = subprocess.run([sys.executable, str(driver), *common, *arguments], check=False)
    report = json.loads((folder / "out" / "report.json").read_text())
    return done.returncode, report


@pytest.mark.slow
def test_a_part_that_fails_loses_nothing_of_itself_or_the_others(tmp_path: Path) -> None:
    status, report = run_check(tmp_path, "--jobs", "4")

    parts = {part["name"]: part for part in report["parts"]}
    assert status == 1
    assert list(parts) == list(SCRIPTS)
    assert {name: part["verdict"] for name, part in parts.items()} == {
        "good": "ok",
        "raises": "FAILED",
        "skips": "skipped",
        "hangs": "FAILED",
        "dies": "FAILED",
    }
    assert parts["good"]["results"] == {"answer": 42}
    assert parts["good"]["why"] == "all well"
    assert parts["raises"]["results"] == {"before": 1, "after": 2}
    assert parts["raises"]["why"] == "first: ValueError: first line; RuntimeError: last"
    assert parts["skips"]["why"] == "no such card"
    assert parts["hangs"]["results"] == {"known": 3}
    assert parts["hangs"]["why"].startswith("it was not done after ")
    assert parts["dies"]["why"] == "about to die"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "Traceback" in log
    assert "time.sleep" not in log  # faulthandler names files and lines, not source
    assert 'part_hangs.py", line' in log
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "log.txt",
        "report.json",
        "report.md",
    ]


def test_goals_are_compared_with_what_was_measured() -> None:
    report = load("check_report")
    entry = {"seconds": 2e-5, "vs_dense": 0.7, "is_graph": True}
    counts = {"512": {"dense": {"seconds": 1.4e-5, "vs_dense": 1.0}, "probes": entry}}
    counts["512"]["plain"] = {"seconds": 1.8e-5, "vs_dense": 0.8, "is_graph": True}
    steps = {
        "7b long": {
            "seconds": {"qzo": 0.5, "mezo": 1.0},
            "fastest": {"qzo": 0.4, "mezo": 0.9},
            "peak_bytes": {"qzo": 5 * 2**30, "mezo": 20 * 2**30},
            "vs_mezo": 0.5,
            "failed": {"qlora": "peft is not installed"},
        }
    }
    kernels = {"own": {"shapes": {"4x4": counts}}}
    parts = [
        {"name": "kernels", "title": "k", "verdict": "ok", "results": kernels},
        {"name": "steps", "title": "s", "verdict": "FAILED", "why": "w", "results": steps},
    ]
    text = report.markdown({"machine": {"commit": "abc"}, "seconds": 1.0, "parts": parts})

    lines = text.splitlines()
    assert "| layer 4x4, 512 tokens, times dense | >= 0.64 | 0.700 | met |" in lines
    assert "| layer 4x4, 64 tokens, times dense | >= 1.2 | - | not measured |" in lines
    assert "| layer 4x4, 512 tokens, probes to plain | >= 0.95 | 0.900 | 95% of the goal |" in lines
    assert (
        "| seconds of a step, 7b, 16 x 512 tokens | <= 0.4 | 0.5 | 1.25 times the goal |" in lines
    )
    assert "| peak GiB, 7b, 16 x 512 tokens | <= 6 | 5 | met |" in lines
    assert (
        "| against mezo, 7b, 16 x 512 tokens | measured | 0.50 of its time, 0.25 of its memory | |"
        in [line.replace("  |", " |") for line in lines]
    )
    assert "cannot be shown" not in text
