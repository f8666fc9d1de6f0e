"""Compile the Triton kernels for NVIDIA GPUs on a machine without one, and name what came out.

Run as a script, with a capability (90), and perhaps a layout (zeros): in a process whose Triton
interprets kernels there is nothing to compile.
"""

import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qzo.method.directions import triton_kernel as triton_directions
from qzo.model.kernels import triton_kernels
from qzo.model.kernels.settings import settings_for

DTYPES = {"plain": ("fp16", "bf16", "fp32"), "zeros": ("fp16",), "index": ("fp16",)}
LAYOUTS = {
    "plain": {"HAS_ZEROS": False, "HAS_INDEX": False, "BY_INPUT": False},
    "zeros": {"HAS_ZEROS": True, "HAS_INDEX": False, "BY_INPUT": False},
    "index": {"HAS_ZEROS": True, "HAS_INDEX": True, "BY_INPUT": True},
}
POINTERS = {
    **dict.fromkeys(("qweight", "probe_of_token", "tiles"), "i32"),
    **dict.fromkeys(("rows", "parts", "out", "base", "weights", "quantiles"), "fp32"),
    "scales": "fp16",
    "seeds": "i64",
}
SIZES = {
    **dict.fromkeys(("in_features", "out_features", "num_out", "group_stride"), 4096),
    **dict.fromkeys(("span", "group_size"), 128),
    **dict.fromkeys(("steps_per_span", "num_steps", "steps_per_split", "num_parts"), 2),
    **dict.fromkeys(("first_word", "skipped", "length"), 33),
    "num_tokens": 64,
    "num_words": 512,
    "set_stride": 2**17,
    "first_out": 0,
}
Kernel = tuple[Any, str, dict[str, Any], dict[str, Any]]  # function, variant, constants, options


def compile_kernel(
    kernel: Any,
    dtype: str,
    capability: tuple[int, int],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """Compile a kernel as a launch would for a layer of 4096 x 4096 in groups of 128."""
    names = kernel.arg_names
    pointers = {
        **POINTERS,
        **dict.fromkeys(("x", "y", "dense"), dtype),
        "zeros": "u8" if constants.get("HAS_ZEROS") else "i32",
        "index": "i64" if constants.get("HAS_INDEX") else "i32",
    }
    constants = {name: value for name, value in constants.items() if name in names}
    types = {name: f"*{dtype}" for name, dtype in pointers.items()} | dict.fromkeys(SIZES, "i32")
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    divisible = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if name not in constants and (name in pointers or SIZES[name] % 16 == 0)
    }
    places = {(names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton.compile(
        ASTSource(kernel, signature, places, divisible), target=target, options=options
    )


def kernels(capability: tuple[int, int], layout: str) -> Iterator[Kernel]:
    """Yield the kernels of a product with a layout, with the settings of a GPU."""
    settings = settings_for(capability)
    common = {"BITS": 4, "ZERO": 8, "out_stride": 1, **LAYOUTS[layout]}
    for tokens, tile in settings.fused.items():
        blocks = {"BLOCK_TOKENS": tokens, "BLOCK_OUT": tile.outputs, "BLOCK_IN": tile.inputs}
        constants = {**common, **blocks, "HAS_ROWS": True, "UPCAST": False}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        yield triton_kernels.fused_kernel, f"{layout}-{tokens}", constants, options
    dense = settings.dense
    blocks = {"BLOCK_OUT": dense.outputs, "BLOCK_WORDS": dense.words}
    options = {"num_warps": dense.num_warps}
    yield triton_kernels.dense_kernel, layout, {**common, **blocks}, options
    if layout == "plain":
        yield triton_kernels.sum_kernel, layout, {"HAS_ROWS": True, "BLOCK": 256}, {}


def direction_kernels() -> Iterator[Kernel]:
    """Yield the kernel of both laws, as a sum of two directions."""
    for name, per_word in (("rademacher", 32), ("gaussian", 2)):
        constants = {
            "NUM_TERMS": 2,
            "STREAM": 0,
            "HAS_BASE": True,
            "IS_GAUSSIAN": name == "gaussian",
            "BLOCK_WORDS": triton_directions.BLOCK_ELEMENTS // per_word,
        }
        yield triton_directions.directions_kernel, name, constants, triton_directions.COMPILED


def report(kernel: Kernel, dtype: str, capability: tuple[int, int]) -> None:
    """Compile and print: kernel, variant, dtype, capability, shared bytes, matrix instructions."""
    function, variant, constants, options = kernel
    made = compile_kernel(function, dtype, capability, constants, options)
    assert made.asm["cubin"], variant
    ptx = made.asm["ptx"]
    matrix = "wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx or "tcgen05" in ptx else "-"
    number = 10 * capability[0] + capability[1]
    line = (function.__name__, variant, dtype, number, made.metadata.shared, matrix)
    print(*line, flush=True)  # noqa: T201  # its result


def main(capability: tuple[int, int], only: str | None = None) -> None:
    """Compile what people run on a GPU, or only the kernels of one layout."""
    for layout, dtypes in DTYPES.items():
        for dtype in dtypes:
            if only not in {None, layout} or (dtype == "bf16" and capability < (8, 0)):
                continue
            for kernel in kernels(capability, layout):
                report(kernel, dtype, capability)
    for kernel in direction_kernels():
        report(kernel, "fp32", capability)


if __name__ == "__main__":
    number = int(sys.argv[1])
    main((number // 10, number % 10), *sys.argv[2:])
