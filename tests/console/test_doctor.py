"""The doctor on healthy, odd and broken installations."""

import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from qzo.console import checks, doctor
from qzo.console import known_issues as traps
from qzo.console.checks import Check

ROOT = Path(__file__).parents[2]
NO_VERSIONS = dict.fromkeys((*doctor.REQUIRED, *doctor.OPTIONAL), "")


def by_name(found: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in found}


def pretend_installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)


def test_required_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = dict(line.split(">=") for line in project["dependencies"])

    assert len(doctor.REQUIRED) == 8
    assert {name: stated[name] for name in doctor.REQUIRED} == doctor.REQUIRED


@pytest.mark.parametrize(
    ("version", "than", "answer"),
    [
        ("2.13.0+cpu", "2.14.1", True),
        ("2.14.1", "2.14.1", False),
        ("2.14", "2.14.0", False),
        ("10.0", "9.9", False),
        ("7.7.0.dev3", "7.7", False),
        ("unknown", "1.0", None),
        ("", "1.0", None),
    ],
)
def test_versions_compare_by_their_numbers(version: str, than: str, answer: bool | None) -> None:
    assert checks.is_older(version, than) is answer


def test_missing_old_and_odd_packages_get_a_status_and_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_installed(monkeypatch, {"torch": "2.1", "numpy": "main", "gguf": "0.19.0"})

    found = by_name(list(doctor.package_checks()))

    assert found["torch"] == Check(
        "packages", "torch", "fail", "2.1, older than 2.8", "pip install 'torch>=2.8'"
    )
    assert found["numpy"].status == "warn"
    assert found["gguf"] == Check("packages", "gguf", "ok", "0.19.0")
    assert found["datasets"].detail == "not installed"
    assert found["datasets"].status == "fail"
    assert found["peft"] == Check("packages", "peft", "ok", "not installed (optional)")


def test_without_any_package_the_doctor_still_answers() -> None:
    code = """
import sys
for name in ("torch", "transformers", "bitsandbytes", "numpy", "safetensors", "datasets"):
    sys.modules[name] = None
from importlib import metadata
def missing(name):
    raise metadata.PackageNotFoundError(name)
metadata.version = missing
import json
from qzo.console.doctor import doctor
print(json.dumps(doctor().to_dict()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["status"] == "fail"
    assert {check["section"] for check in report["checks"]} == {"packages", "devices", "kernels"}
    details = {check["name"]: check["detail"] for check in report["checks"]}
    assert details["CUDA"].startswith("torch: ModuleNotFoundError")


def test_doctor_lists_all_sections_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run_python", lambda code: "RESULT BNBNativeLibrary 0")
    monkeypatch.setattr(traps, "run_python", lambda code: "RESULT")

    report = doctor.doctor()

    sections = list(dict.fromkeys(check.section for check in report.checks))
    assert sections == ["packages", "devices", "kernels", "traps"]
    assert json.loads(json.dumps(report.to_dict()))["checks"][0]["name"] == "python"


def test_a_check_that_breaks_is_reported_and_the_others_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> int:
        raise OSError("no\naffinity")

    monkeypatch.setattr(doctor, "num_cores", broken)
    monkeypatch.setattr(doctor, "run_python", lambda code: "RESULT BNBNativeLibrary 0")

    found = by_name(list(doctor.doctor().checks))

    assert found["rest of devices"].detail == "stopped by OSError: no affinity"
    assert found["python"].status == "ok"


@pytest.mark.parametrize(
    ("statuses", "worst"),
    [(["ok", "ok"], "ok"), (["ok", "warn"], "warn"), (["fail", "warn", "ok"], "fail")],
)
def test_a_report_is_as_bad_as_its_worst_check(
    statuses: list[checks.Status], worst: checks.Status
) -> None:
    report = doctor.Report(tuple(Check("packages", "x", status, "") for status in statuses))

    assert report.status == worst


def test_a_driver_without_a_cuda_build_is_a_warning() -> None:
    found = doctor._no_cuda(None, has_driver=True)

    assert found.status == "warn"
    assert found.detail == "NVIDIA driver found, but torch is built without CUDA"
    assert doctor._no_cuda(None, has_driver=False).status == "ok"


def test_container_limit_reads_a_number_and_ignores_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "memory.max"

    assert doctor._container_limit(file) is None
    file.write_text("max\n")
    assert doctor._container_limit(file) is None
    file.write_text("1024\n")
    assert doctor._container_limit(file) == 1024


@pytest.mark.parametrize(
    ("probe", "status", "detail"),
    [
        ("", "fail", "not installed"),
        ("noise\nRESULT BNBNativeLibrary 1", "ok", "CPU library; quantized and read back"),
        ("RESULT CudaBNBNativeLibrary 0", "ok", "CUDA library; quantized and read back"),
        ("Traceback\n  x\nOSError: libcudart.so", "fail", "OSError: libcudart.so"),
    ],
)
def test_bitsandbytes_is_judged_by_a_round_trip(probe: str, status: str, detail: str) -> None:
    found = doctor._bitsandbytes_check(probe)

    assert found.status == status
    assert found.detail.startswith(detail)


@pytest.mark.parametrize(
    ("probe", "status", "detail"),
    [
        ("RESULT BNBNativeLibrary 1", "warn", "on this CPU (AVX512-BF16)"),
        ("RESULT BNBNativeLibrary 0", "ok", "this CPU has no AVX512-BF16"),
        ("killed by signal 11", "warn", "not known"),
    ],
)
def test_repacking_depends_on_the_processor(probe: str, status: str, detail: str) -> None:
    found = by_name(list(traps.trap_checks((*doctor.REQUIRED, *doctor.OPTIONAL), probe, 4)))

    assert found["bitsandbytes repacking"].status == status
    assert found["bitsandbytes repacking"].detail.startswith(detail)


def test_auto_gptq_is_tried_and_its_own_error_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    error = "cannot import name 'no_init_weights' from 'transformers.modeling_utils'"
    (tmp_path / "auto_gptq.py").write_text(f'raise ImportError("{error}")')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pretend_installed(monkeypatch, {"auto-gptq": "0.7.1", "transformers": "5.23.0"})

    (found, _) = traps.trap_checks((*doctor.REQUIRED, *doctor.OPTIONAL), "", 4)

    assert found.status == "warn"
    assert found.detail == (
        f"0.7.1 does not import beside transformers 5.23.0: ImportError: {error}"
    )
    assert found.advice.startswith("nothing for QZO, which reads and writes AutoGPTQ's files")


def test_an_auto_gptq_that_imports_is_no_trap(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "auto_gptq.py").write_text("print('banner')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pretend_installed(monkeypatch, {"auto-gptq": "0.7.1"})

    (found,) = traps.trap_checks((*doctor.REQUIRED, *doctor.OPTIONAL), "", 4)

    assert found == Check("traps", "auto-gptq", "ok", "0.7.1 imports")


@pytest.mark.parametrize(
    ("gptqmodel", "torch", "is_trap"),
    [
        ("7.7.0", "2.13.0+cpu", True),
        ("7.7.0", "2.14.1", False),
        ("7.6.0", "2.13.0", False),
        ("odd", "2.13.0", False),
        ("7.7.0", "", False),
    ],
)
def test_gptqmodel_needs_a_newer_torch_from_7_7(gptqmodel: str, torch: str, is_trap: bool) -> None:
    versions = NO_VERSIONS | {"gptqmodel": gptqmodel, "torch": torch}

    found = by_name(list(traps.gptqmodel_traps(versions, cores=8, workers=None)))

    assert ("gptqmodel and torch" in found) is is_trap


@pytest.mark.parametrize(
    ("cores", "workers", "is_trap"),
    [(2, None, True), (1, "1", True), (2, "many", True), (2, "4", False), (3, None, False)],
)
def test_gptqmodel_needs_workers_on_two_cores(
    cores: int, workers: str | None, is_trap: bool
) -> None:
    versions = NO_VERSIONS | {"gptqmodel": "7.6.0", "torch": "2.13.0"}

    found = by_name(list(traps.gptqmodel_traps(versions, cores=cores, workers=workers)))

    assert ("gptqmodel workers" in found) is is_trap


@pytest.mark.parametrize(
    ("installed", "detail"),
    [
        ({}, "transformers cannot load GPTQ checkpoints here: no optimum and no gptqmodel"),
        ({"optimum": "2.3"}, "transformers cannot load GPTQ checkpoints here: no gptqmodel"),
        ({"optimum": "2.3", "gptqmodel": "7.6.0"}, "optimum and gptqmodel are installed"),
    ],
)
def test_what_transformers_lacks_to_load_gptq_is_named(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], detail: str
) -> None:
    pretend_installed(monkeypatch, {"transformers": "5.23.0"} | installed)

    found = by_name(list(traps.trap_checks((*doctor.REQUIRED, *doctor.OPTIONAL), "", 8)))

    assert found["GPTQ in transformers"].detail == detail


def test_a_process_that_dies_says_how() -> None:
    assert checks.run_python("import os; os.kill(os.getpid(), 9)") == "killed by signal 9"
    assert checks.run_python("print('RESULT')") == "RESULT"
    assert checks.last_line(checks.run_python("raise ValueError('odd')")) == "ValueError: odd"


def test_a_process_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_IMPORT_SECONDS", 0.1)

    assert checks.run_python("import time; time.sleep(30)") == "no answer in 0.1 seconds"
