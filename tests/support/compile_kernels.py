"""Compile the Triton kernels for NVIDIA GPUs on a machine without one, and name what came out.

Run as a script: in a process whose Triton interprets kernels there is nothing to compile.
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qzo import triton_product

LAYOUTS = {
    "plain": {"HAS_ZEROS": False, "HAS_INDEX": False},
    "zeros": {"HAS_ZEROS": True, "HAS_INDEX": False},
    "index": {"HAS_ZEROS": True, "HAS_INDEX": True},
}
TARGETS = (("fp16", 75), ("bf16", 80), ("fp32", 90))


def compile_kernel(kernel: Any, dtype: str, capability: int, constants: dict[str, Any]) -> Any:
    """Compile a kernel whose tensors of activations have a dtype."""
    names = kernel.arg_names
    pointers = {
        **dict.fromkeys(("x", "y", "dense"), dtype),
        **dict.fromkeys(("qweight", "probe_of_token"), "i32"),
        "scales": "fp32",
        "zeros": "u8" if constants["HAS_ZEROS"] else "i32",
        "index": "i64" if constants["HAS_INDEX"] else "i32",
    }

    def argument(name: str) -> str:
        if name in constants:
            return "constexpr"
        return f"*{pointers[name]}" if name in pointers else "i32"

    signature = {name: argument(name) for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def main() -> None:
    """Print one line per kernel, layout and dtype."""
    blocks = {"BLOCK_OUT": 64, "BLOCK_IN": 64}
    for layout, has in LAYOUTS.items():
        for dtype, capability in TARGETS:
            common = {"BITS": 4, "ZERO": 8, **has, **blocks}
            fused = {**common, "BLOCK_TOKENS": 16, "UPCAST": False}
            for name, constants in (("_fused_kernel", fused), ("_dense_kernel", common)):
                kernel = getattr(triton_product, name)
                compiled = compile_kernel(kernel, dtype, capability, constants)
                assert compiled.asm["cubin"], name
                uses_tensor_cores = "mma.sync" in compiled.asm["ptx"]
                print(name, layout, dtype, capability, uses_tensor_cores)  # noqa: T201  # its result


if __name__ == "__main__":
    main()
