"""All Triton kernels compile for the GPUs that people have, on a machine without one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; it comes for Linux on x86-64"
)

SCRIPT = Path(__file__).parent / "support" / "compile_kernels.py"
# Bytes that a program may have on a GPU of a capability: CUDA programming guide, table of
# technical specifications.
SHARED_BYTES = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TENSOR_CORES = {75: "-", 80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "mma", 120: "mma"}


def compiled(folder: Path, *arguments: str) -> list[list[str]]:
    """Return kernel, variant, dtype, capability, shared bytes and kind of product of each."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_kernel_compiles_and_fits_the_gpu(capability: int, tmp_path: Path) -> None:
    lines = compiled(tmp_path, str(capability))
    num_tiles = 1 if capability == 75 else 3
    num_dtypes = 4 if capability == 75 else 5  # layouts and dtypes; no bfloat16 on 7.5
    # fused and dense, sums of the plain layout, directions of two laws
    assert len(lines) == num_dtypes * (num_tiles + 1) + num_dtypes - 2 + 2
    assert max(int(line[4]) for line in lines) <= SHARED_BYTES[capability] * 1024
    kinds = {
        (line[2], line[5]) for line in lines if line[0] == "fused_kernel" and line[1] != "index"
    }
    halves = {"fp16"} if capability == 75 else {"fp16", "bf16"}
    assert kinds == {*((half, TENSOR_CORES[capability]) for half in halves), ("fp32", "-")}


@pytest.mark.slow
def test_the_kernel_of_directions_compiles(tmp_path: Path) -> None:
    lines = compiled(tmp_path, "90", "directions")
    assert [line[:2] for line in lines] == [
        ["directions_kernel", "rademacher"],
        ["directions_kernel", "gaussian"],
    ]
