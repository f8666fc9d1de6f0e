"""What is installed, what this computer can do, and which known traps it has.

Every check answers with a status (``ok``, ``warn`` or ``fail``), what was found, and what to do.
Packages are looked up without importing them; what must be imported to be known (bitsandbytes'
library, the reason why auto-gptq does not import) runs in a process of its own, so that a broken
installation becomes an answer and not a crash.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qzo.console.checks import (
    Check,
    Status,
    described,
    installed_version,
    is_older,
    last_line,
    one_line,
    run_python,
)
from qzo.console.known_issues import trap_checks

# Smallest versions, as in pyproject.toml.
REQUIRED = {
    "torch": "2.8",
    "transformers": "5.0",
    "bitsandbytes": "0.49",
    "safetensors": "0.6",
    "numpy": "2.0",
    "datasets": "4.0",
    "gguf": "0.17",
    "accelerate": "1.10",
}
OPTIONAL = ("gptqmodel", "optimum", "auto-gptq", "peft", "triton", "kernels")

_BNB_PROBE = """
import torch, bitsandbytes, bitsandbytes.functional as F
packed, state = F.quantize_4bit(torch.linspace(-1, 1, 64), blocksize=64, quant_type="nf4")
F.dequantize_4bit(packed, state)
library = type(bitsandbytes.cextension.lib).__name__
print("RESULT", library, int(bool(F.has_avx512bf16())))
"""


@dataclass(frozen=True)
class Report:
    """All checks.

    Attributes:
        checks: In the order of the sections.
    """

    checks: tuple[Check, ...]

    @property
    def status(self) -> Status:
        """The worst status of all checks."""
        found = {check.status for check in self.checks}
        return "fail" if "fail" in found else "warn" if "warn" in found else "ok"

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dictionaries and strings, ready for JSON."""
        return {"status": self.status, **asdict(self)}


def doctor() -> Report:
    """Run every check; a check that cannot run says so and raises nothing."""
    probe = _bitsandbytes_probe() if installed_version("bitsandbytes") else ""
    groups: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("packages", package_checks),
        ("devices", device_checks),
        ("kernels", lambda: kernel_checks(probe)),
        ("traps", lambda: trap_checks((*REQUIRED, *OPTIONAL), probe, num_cores())),
    ]
    return Report(tuple(check for section, run in groups for check in _guarded(section, run)))


def _guarded(section: str, run: Callable[[], Iterable[Check]]) -> list[Check]:
    checks: list[Check] = []
    try:
        for check in run():
            checks.append(check)
    except Exception as error:  # a report about broken installations must survive them
        detail = f"stopped by {type(error).__name__}: {one_line(str(error))}"
        advice = "report it with the versions above"
        checks.append(Check(section, f"rest of {section}", "warn", detail, advice))
    return checks


def package_checks() -> Iterable[Check]:
    """Report Python, then every package with its version."""
    yield _python_check()
    for name, smallest in REQUIRED.items():
        yield _required_check(name, smallest)
    for name in OPTIONAL:
        version = installed_version(name)
        yield Check("packages", name, "ok", version or "not installed (optional)")


def _python_check() -> Check:
    found = ".".join(str(part) for part in sys.version_info[:3])
    if is_older(found, "3.11"):
        return Check("packages", "python", "fail", found, "install Python 3.11 or newer")
    return Check("packages", "python", "ok", found)


def _required_check(name: str, smallest: str) -> Check:
    version, install = installed_version(name), f"pip install '{name}>={smallest}'"
    if not version:
        return Check("packages", name, "fail", "not installed", install)
    older = is_older(version, smallest)
    if older is None:
        detail = f"{version}, a version without numbers"
        return Check("packages", name, "warn", detail, f"QZO expects {name} {smallest} or newer")
    if older:
        detail = f"{version}, older than {smallest}"
        return Check("packages", name, "fail", detail, install)
    return Check("packages", name, "ok", version)


def device_checks() -> Iterable[Check]:
    """Report processor, memory and CUDA devices."""
    yield Check("devices", "CPU", "ok", f"{num_cores()} cores")
    yield _memory_check()
    try:
        import torch
    except Exception as error:  # any error of a broken installation is the answer here
        yield Check("devices", "CUDA", "fail", f"torch: {described(error)}", "reinstall torch")
        return
    yield from _cuda_checks(torch)


def num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_check() -> Check:
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return Check("devices", "RAM", "ok", "unknown on this system")
    detail = f"{_gib(size)}"
    limit = _container_limit(Path("/sys/fs/cgroup/memory.max"))
    if limit is not None and limit < size:
        detail += f", of which this container may use {_gib(limit)}"
    return Check("devices", "RAM", "ok", detail)


def _container_limit(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such file, or the word "max"
        return None


def _cuda_checks(torch: Any) -> Iterable[Check]:
    if not torch.cuda.is_available():
        yield _no_cuda(torch.version.cuda, has_driver=Path("/proc/driver/nvidia/version").exists())
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        detail = f"{device.name}, {_gib(device.total_memory)}, capability "
        detail += f"{device.major}.{device.minor}, CUDA {torch.version.cuda}"
        yield Check("devices", f"CUDA {index}", "ok", detail)


def _no_cuda(built_for: str | None, *, has_driver: bool) -> Check:
    if not has_driver:
        return Check("devices", "CUDA", "ok", "no device; QZO runs on the CPU")
    build = f"built for CUDA {built_for}" if built_for else "built without CUDA"
    advice = "install a torch build for the driver's CUDA version, see https://pytorch.org"
    return Check("devices", "CUDA", "warn", f"NVIDIA driver found, but torch is {build}", advice)


def kernel_checks(bitsandbytes_probe: str) -> Iterable[Check]:
    """Report which 4-bit kernels answer a call.

    Args:
        bitsandbytes_probe: What ``_BNB_PROBE`` printed; empty if bitsandbytes is not installed.
    """
    yield _bitsandbytes_check(bitsandbytes_probe)
    yield _int4_check()
    yield _triton_check(installed_version("triton"))


def _bitsandbytes_probe() -> str:
    return run_python(_BNB_PROBE)


def _bitsandbytes_check(probe: str) -> Check:
    name = "bitsandbytes library"
    if not probe:
        return Check("kernels", name, "fail", "not installed", "pip install bitsandbytes")
    library = re.search(r"^RESULT (\w+)", probe, re.MULTILINE)
    if library is None:
        advice = "pip install --force-reinstall bitsandbytes; NF4 checkpoints need it"
        return Check("kernels", name, "fail", last_line(probe), advice)
    kind = "CUDA" if "Cuda" in library[1] else "CPU"
    return Check("kernels", name, "ok", f"{kind} library; quantized and read back 64 numbers")


def _int4_check() -> Check:
    name, advice = "torch int4 CPU product", "QZO dequantizes tile by tile instead"
    try:
        import torch

        codes = torch.full((16, 64), 9, dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.stack((torch.ones(1, 16), torch.zeros(1, 16)), dim=-1).bfloat16()
        ones = torch.ones(1, 64, dtype=torch.bfloat16)
        result = torch.ops.aten._weight_int4pack_mm_for_cpu(ones, packed, 64, scales)
    except Exception as error:  # missing operator, missing torch, missing instruction set: absent
        return Check("kernels", name, "warn", described(error), advice)
    if result.float().unique().tolist() != [64.0]:  # 64 x (9 - 8)
        return Check("kernels", name, "warn", "gives a wrong product", advice)
    return Check("kernels", name, "ok", f"works ({torch.backends.cpu.get_cpu_capability()})")


def _triton_check(version: str) -> Check:
    if version:
        return Check("kernels", "triton", "ok", version)
    return Check("kernels", "triton", "ok", "not installed; only CUDA devices use it")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
