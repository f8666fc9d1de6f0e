"""The Triton kernels compile for the GPUs that people have, on a machine without one.

All of them take minutes: ``pytest -m compile``.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; it comes for Linux on x86-64"
)

SCRIPT = Path(__file__).parents[1] / "support" / "compile_kernels.py"
# KiB that a program may have on a GPU of a capability: CUDA programming guide, table of technical
# specifications.
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
MATRIX = {75: "-", 80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "mma", 120: "mma"}
LAYOUTS = ("plain", "zeros", "index")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_of_a_layout_compile_and_fit_the_gpu(capability: int, tmp_path: Path) -> None:
    _check(capability, "zeros", tmp_path)


@pytest.mark.compile
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_every_kernel_compiles_and_fits_the_gpu(
    capability: int, layout: str, tmp_path: Path
) -> None:
    _check(capability, layout, tmp_path)


def _check(capability: int, layout: str, folder: Path) -> None:
    """Compile the kernels of a layout, and compare what came out with what the GPU has."""
    lines = _compiled(folder, str(capability), layout)
    num_tiles = 1 if capability == 75 else 3
    dtypes = {"fp16"}
    if layout == "plain":
        dtypes |= {"fp32"} if capability == 75 else {"fp32", "bf16"}
    num_kernels = num_tiles + (2 if layout == "plain" else 1)  # dense, and sums of one layout
    assert len(lines) == len(dtypes) * num_kernels + 2  # directions of two laws
    assert max(int(line[4]) for line in lines) <= SHARED_KIB[capability] * 1024
    kinds = {(line[2], line[5]) for line in lines if line[0] == "fused_kernel"}
    assert kinds == {(dtype, "-" if dtype == "fp32" else MATRIX[capability]) for dtype in dtypes}


def _compiled(folder: Path, *arguments: str) -> list[list[str]]:
    """Return kernel, variant, dtype, capability, shared bytes and kind of product of each."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]
