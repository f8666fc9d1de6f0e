"""The decoder blocks of any transformers model, visited one at a time.

For every batch of calibration tokens the model's own forward runs up to a block; the blocks in
front of it are replaced by what the last of them returned before. So every block gets the masks,
positions and other arguments that the model gives it, whatever its architecture, while only one
block computes, in small batches. What runs again is cheap: embeddings and masks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from qzo.errors import CheckpointError
from qzo.model.blocks import find_blocks
from qzo.model.fp32_compute import computing_in_fp32

BlockRun = Callable[[], None]
Visit = Callable[[int, nn.Module, BlockRun], None]


@torch.no_grad()
def visit_blocks(
    model: PreTrainedModel,
    tokens: Int[Tensor, "samples time"],
    visit: Visit,
    *,
    device: torch.device,
    batch_size: int,
) -> None:
    """Call ``visit(index, block, run)`` for each decoder block in order.

    ``run()`` computes the block over all samples in fp32 on the device; the outputs of its last
    call are the inputs of the next block. A block is moved to the device, in fp32, before its visit
    and its memory is released after it: the blocks are on the meta device in the end.

    Args:
        model: A float model; modified.
        tokens: Sequences of equal length, without padding.
        visit: Called once for each block.
        device: Where blocks compute.
        batch_size: Sequences that a block computes at once.

    A model whose forward leaves blocks out is a CheckpointError.
    """
    _, blocks = find_blocks(model)
    batches = list(tokens.split(batch_size))
    outputs: list[Any] = [None] * len(batches)  # of the block before
    inside = set(blocks.modules())
    outside = [module for module in model.modules() if module not in inside]
    with computing_in_fp32(outside):
        for index, block in enumerate(blocks):
            block.to(device=device, dtype=torch.float32)
            computed: list[Any] = []

            def run(
                index: int = index, inputs: list[Any] = outputs, computed: list[Any] = computed
            ) -> None:
                computed[:] = [
                    _output_of_block(model, blocks, index, batch, before, device)
                    for batch, before in zip(batches, inputs, strict=True)
                ]

            visit(index, block, run)
            block.to("meta")
            outputs = computed


def _output_of_block(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    index: int,
    tokens: Int[Tensor, "samples time"],
    before: Any,
    device: torch.device,
) -> Any:
    """Return what a block returns, in CPU memory; those in front of it return ``before``.

    Raises:
        CheckpointError: The model's forward does not reach the block.
    """
    message = (
        f"{type(model).__name__}: expected its forward to reach every decoder block, it did not"
    )

    def forward(number: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if number < index:
            return before
        if number > index:
            raise CheckpointError(message)
        args, kwargs = tree_map(partial(_moved, device=device), (args, kwargs))
        raise _BlockDoneError(_to_cpu(original(*args, **kwargs)))

    with _replaced_forwards(blocks, forward):
        try:
            model.base_model(input_ids=tokens, use_cache=False)
        except _BlockDoneError as done:
            return done.output
    raise CheckpointError(message)


@contextmanager
def captured_inputs(
    layers: dict[str, nn.Linear], capture: Callable[[str, Float[Tensor, "..."]], None]
) -> Iterator[None]:
    """Call ``capture(name, inputs)`` whenever one of the layers runs inside the ``with`` block."""
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: capture(name, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _BlockDoneError(Exception):
    """Leaves the model's forward; never seen outside this file."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


@contextmanager
def _replaced_forwards(blocks: nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    def replacement(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: forward(index, original, *args, **kwargs)

    for index, block in enumerate(blocks):
        block.forward = replacement(index, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is visible again


def _moved(value: Any, device: torch.device) -> Any:
    """Move a tensor; floats become fp32."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device=device, dtype=torch.float32 if value.is_floating_point() else None)


def _to_cpu(output: Any) -> Any:
    """Return the hidden states in CPU memory; attention weights beside them are not kept."""
    if not isinstance(output, tuple):
        return output.cpu()
    return (output[0].cpu(), *(None if isinstance(x, Tensor) else x for x in output[1:]))
