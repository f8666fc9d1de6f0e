"""Known traps of installed packages, each with what to do about it.

Sources: auto-gptq 0.7.1 imports three names that transformers 5 and peft 0.21 removed; gptqmodel
7.7.0 metadata (torch) and 7.6.0 behaviour (workers, saving); bitsandbytes 0.50
``nn/modules.py``, ``Linear4bit.forward`` (repacking).
"""

import os
import re
from collections.abc import Iterable

from qzo.console.checks import Check, installed_version, is_older, last_line, run_python


def trap_checks(names: Iterable[str], bitsandbytes_probe: str, cores: int) -> Iterable[Check]:
    """Report what is known to go wrong with the installed packages on this computer.

    Args:
        names: Packages whose versions matter.
        bitsandbytes_probe: Output of the doctor's probe; empty if it is not installed.
        cores: Processor cores.
    """
    versions = {name: installed_version(name) for name in names}
    if versions["auto-gptq"]:
        yield auto_gptq_trap(versions, run_python("import auto_gptq\nprint('RESULT')"))
    if versions["gptqmodel"]:
        yield from gptqmodel_traps(versions, cores, os.environ.get("GPTQMODEL_CPU_WORKERS"))
    if versions["transformers"]:
        yield _loading_trap(versions)
    if bitsandbytes_probe:
        yield _repacking_trap(bitsandbytes_probe)


def auto_gptq_trap(versions: dict[str, str], output: str) -> Check:
    """Report why auto-gptq does not import.

    Args:
        versions: Installed versions by package.
        output: What a process printed that imports it, ``RESULT`` in the end if it could.
    """
    name, version = "auto-gptq", versions["auto-gptq"]
    if re.search(r"^RESULT", output, re.MULTILINE):
        return Check("traps", name, "ok", f"{version} imports")
    detail = f"{version} does not import beside transformers {versions['transformers']}: "
    advice = (
        "nothing for QZO, which reads and writes AutoGPTQ's files itself; other programs need "
        "gptqmodel, so: pip uninstall auto-gptq"
    )
    return Check("traps", name, "warn", detail + last_line(output), advice)


def gptqmodel_traps(versions: dict[str, str], cores: int, workers: str | None) -> Iterable[Check]:
    """Report the three traps of gptqmodel.

    Args:
        versions: Installed versions by package; ``gptqmodel`` and ``torch`` are used.
        cores: Processor cores.
        workers: The environment variable ``GPTQMODEL_CPU_WORKERS``.
    """
    version, torch_version = versions["gptqmodel"], versions["torch"]
    if is_older(version, "7.7") is False and is_older(torch_version, "2.14.1"):
        detail = f"gptqmodel {version} needs torch 2.14.1 or newer, torch is {torch_version}"
        advice = "pip install 'gptqmodel>=7.3,<7.7', or upgrade torch"
        yield Check("traps", "gptqmodel and torch", "warn", detail, advice)
    if cores <= 2 and not (workers and workers.isdigit() and int(workers) >= 2):
        detail = f"on {cores} cores gptqmodel gives itself 1 worker and stops: 'requests 2 workers'"
        advice = "export GPTQMODEL_CPU_WORKERS=4 before gptqmodel is imported"
        yield Check("traps", "gptqmodel workers", "warn", detail, advice)
    detail = "save_pretrained after a forward on a CPU writes repacked codes under the same keys"
    advice = "save from the original files; `qzo export` does"
    yield Check("traps", "gptqmodel saving", "warn", detail, advice)


def _loading_trap(versions: dict[str, str]) -> Check:
    missing = [name for name in ("optimum", "gptqmodel") if not versions[name]]
    if not missing:
        return Check("traps", "GPTQ in transformers", "ok", "optimum and gptqmodel are installed")
    detail = f"transformers cannot load GPTQ checkpoints here: no {' and no '.join(missing)}"
    advice = "nothing for QZO, which reads them itself; otherwise pip install 'qzo[gptq]'"
    return Check("traps", "GPTQ in transformers", "ok", detail, advice)


def _repacking_trap(probe: str) -> Check:
    name, found = "bitsandbytes repacking", re.search(r"^RESULT \w+ (\d)", probe, re.MULTILINE)
    if found is None:
        return Check("traps", name, "warn", "not known: bitsandbytes does not work here")
    if found[1] == "0":
        return Check("traps", name, "ok", "this CPU has no AVX512-BF16, so Linear4bit stays as is")
    detail = "on this CPU (AVX512-BF16) an eval-mode forward of Linear4bit on the CPU repacks "
    detail += "codes in place and rounds absmax to bf16"
    advice = "open the checkpoint with qzo.load; give a model to qzo.wrap before its first forward"
    return Check("traps", name, "warn", detail, advice)
