"""How the Triton kernels are launched, by compute capability: a table to edit from measurements.

The first values are not yet timed on a GPU. They keep a program within the shared memory of its
card (64 KiB on 7.5, 99 KiB on 8.6, 8.9 and 12.0), and choose the way of a product where
bitsandbytes' calibrated dispatch does: at about 64 tokens on 9.0, 32 to 128 on 8.0 and 128 to 256
on 8.9.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

Capability = tuple[int, int]

_LEAST: Capability = (7, 5)


@dataclass(frozen=True)
class FusedTile:
    """What a program of the fused kernel multiplies at a time.

    Attributes:
        outputs: Columns of the result.
        inputs: Columns of the activations; never more than a group has.
        num_warps: Of the program.
        num_stages: Steps whose codes and activations are on their way at the same time.
    """

    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DenseTile:
    """What a program of the dense kernel writes.

    Attributes:
        outputs: Columns of the transposed matrix.
        words: Rows of packed codes; each becomes 32 / bits rows of the matrix.
        num_warps: Of the program.
    """

    outputs: int
    words: int
    num_warps: int


@dataclass(frozen=True)
class KernelSettings:
    """The settings of one kind of GPU.

    Attributes:
        fused_tokens_max: With more tokens for a set of scales, a dense matrix is written first.
        dense_elements: Of that matrix, which exist at one time.
        programs_per_processor: Where the outputs give fewer programs to each multiprocessor,
            several programs share the inputs of an output tile.
        fused: By the tokens of a tile, in ascending order.
        dense: Of the dense kernel.
    """

    fused_tokens_max: int
    dense_elements: int
    programs_per_processor: int
    fused: Mapping[int, FusedTile]
    dense: DenseTile

    def token_tile(self, num_tokens: int) -> int:
        """Return the smallest tile that holds so many tokens, or the largest one."""
        return min((size for size in self.fused if size >= num_tokens), default=max(self.fused))


_SMALL = {
    16: FusedTile(outputs=32, inputs=32, num_warps=4, num_stages=2),
}  # Triton has no matrix instructions for 7.5: only the fewest tokens are worth it there
_MIDDLE = {
    16: FusedTile(outputs=64, inputs=128, num_warps=4, num_stages=3),
    32: FusedTile(outputs=64, inputs=128, num_warps=4, num_stages=3),
    64: FusedTile(outputs=64, inputs=64, num_warps=4, num_stages=3),
}
_LARGE = {
    16: FusedTile(outputs=64, inputs=128, num_warps=4, num_stages=4),
    32: FusedTile(outputs=64, inputs=128, num_warps=4, num_stages=4),
    64: FusedTile(outputs=128, inputs=128, num_warps=8, num_stages=3),
}
_DENSE = DenseTile(outputs=128, words=4, num_warps=4)
_MI = 2**20

# From the first capability on that a row names. 7.5: T4; 8.0: A100; 8.6: 3090; 8.9: 4090; 9.0: H100
# and H200; 10.0: B200; 12.0: 5090.
TABLE: dict[Capability, KernelSettings] = {
    (7, 5): KernelSettings(16, 16 * _MI, 2, _SMALL, _DENSE),
    (8, 0): KernelSettings(64, 32 * _MI, 2, _LARGE, _DENSE),
    (8, 6): KernelSettings(128, 16 * _MI, 2, _MIDDLE, _DENSE),
    (8, 9): KernelSettings(192, 32 * _MI, 2, _MIDDLE, _DENSE),
    (9, 0): KernelSettings(64, 32 * _MI, 2, _LARGE, _DENSE),
    (10, 0): KernelSettings(64, 32 * _MI, 2, _LARGE, _DENSE),
    (12, 0): KernelSettings(128, 32 * _MI, 2, _MIDDLE, _DENSE),
}


@cache
def has_triton(device: torch.device) -> bool:
    """Return whether Triton is installed and knows the device; its interpreter runs on a CPU."""
    if find_spec("triton") is None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _LEAST


def settings_for(capability: Capability) -> KernelSettings:
    """Return the row of a capability: its own, or that of the nearest lower one."""
    return TABLE[max((known for known in TABLE if known <= capability), default=min(TABLE))]


@cache
def settings_of(device: torch.device) -> KernelSettings:
    """Return the settings of a device; elsewhere than on CUDA those of the newest GPU."""
    if device.type != "cuda":
        return TABLE[max(TABLE)]
    return settings_for(torch.cuda.get_device_capability(device))


@cache
def num_processors(device: torch.device) -> int:
    """Return the multiprocessors of a device; elsewhere than on CUDA 1."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
