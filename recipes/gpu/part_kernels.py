"""``qzo bench kernels``: one layer, ours beside cuBLAS, bitsandbytes, humming and GemLite.

Our kernels are measured in this process; each library that compiles its own kernels has a process
and a limit of its own, so that it can neither break nor delay ours.
"""

import json
import subprocess
import sys
from typing import Any

from check_part import Findings, run_part

from qzo.bench.kernels import OTHERS, KernelSettings, bench_kernels

OWN = ("probes", "plain", "scales", "fused", "tiles", "nf4", "bitsandbytes")
OTHERS_SHARE = 0.5  # of the time that is left, for each


def ask(findings: Findings) -> str:
    """Measure all layers."""
    if findings.is_tiny:
        settings = KernelSettings(
            shapes=((96, 128),), tokens=(16, 64), repeats=2, dtype="float32", device="cpu",
            group_size=64, contenders=("probes", "plain", "scales", "nf4", "bitsandbytes"),
        )  # fmt: skip
    else:
        settings = KernelSettings(device=findings.device, contenders=OWN)
    measured = bench_kernels(settings, print, lambda found: _keep(findings, "own", found))
    _keep(findings, "own", measured)
    for shape, counts in measured["shapes"].items():
        for count, entries in counts.items():
            _check(findings, f"{shape}, {count} tokens", entries)
    remarks = [] if findings.is_tiny else [_other(findings, name) for name in OTHERS]
    return "; ".join(remark for remark in remarks if remark)


def _keep(findings: Findings, name: str, found: Any) -> None:
    findings.results[name] = found
    findings.write(None)


def _check(findings: Findings, where: str, entries: dict[str, dict[str, Any]]) -> None:
    """Our kernels run, and compute the product."""
    for name in ("dense", "probes", "plain", "scales", "fused", "tiles", "nf4"):
        if name not in entries:
            continue
        why = entries[name].get("failed")
        findings.require(why is None, f"{name}, {where}: {why}")
        error = entries[name].get("error", 0.0)
        findings.require(error < 5e-3, f"{name}, {where}: differs by {error:.1e}")


def _other(findings: Findings, name: str) -> str:
    """Measure one library in a process of its own; return what went wrong."""
    target = findings.work / f"{name}.json"
    limit = max(findings.seconds_left * OTHERS_SHARE - 2, 1)
    command = [sys.executable, "-m", "qzo", "bench", "kernels", "--contenders", name]
    command += ["--device", findings.device, "--repeats", "5", "--json"]
    command += ["--tokens", "64,256,512,1024,2048,8192"]
    try:
        with target.open("w") as out:
            subprocess.run(command, stdout=out, timeout=limit, check=True)
        _keep(findings, name, json.loads(target.read_text("utf-8")))
    except subprocess.TimeoutExpired:
        return f"{name} skipped: not done after {limit:.0f} s"
    except (subprocess.CalledProcessError, ValueError) as error:
        return f"{name} skipped: {error}"
    entry = next(iter(findings.results[name]["shapes"].values()))["1024"][name]
    return f"{name} skipped: {entry['failed']}" if "failed" in entry else ""


if __name__ == "__main__":
    run_part(ask)
