"""The decoder blocks of any transformers model, visited one at a time.

The model's own forward runs once over all calibration tokens, with the forward of each block
replaced by a visit. So every block gets the masks, positions and other arguments that the model
gives it, whatever its architecture, while only one block computes at a time and in small batches.
The forward is left after the last block; the head never runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from qzo.errors import CheckpointError
from qzo.precision import computing_in_fp32

BlockRun = Callable[[], None]
Visit = Callable[[int, nn.Module, BlockRun], None]


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the list of decoder blocks and its dotted name: the largest list in the model.

    Raises:
        CheckpointError: There is no such list with linear layers inside.
    """
    sizes = {
        name: sum(linear.weight.numel() for linear in linear_layers(module).values())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    name = max(sizes, key=lambda name: sizes[name], default="")
    if not sizes.get(name):
        raise CheckpointError(
            f"{type(model).__name__}: expected a list of decoder blocks with nn.Linear layers, "
            "found none; this architecture cannot be quantized"
        )
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    return name, blocks


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers inside a module by their dotted names."""
    return {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}


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

    Raises:
        CheckpointError: The model's forward leaves blocks out.
    """
    _, blocks = find_blocks(model)
    num_samples, num_heads = len(tokens), model.config.get_text_config().num_attention_heads

    def forward(index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        block = blocks[index].to(device=device, dtype=torch.float32)
        last_outputs: list[Any] = []

        def run() -> None:
            last_outputs.clear()
            for start in range(0, num_samples, batch_size):
                rows = slice(start, start + batch_size)
                batch = _select((args, kwargs), rows, num_samples, num_heads, device)
                last_outputs.append(_to_cpu(original(*batch[0], **batch[1])))

        visit(index, block, run)
        block.to("meta")
        if index == len(blocks) - 1:
            raise _LastBlockDoneError
        return _join(last_outputs)

    inside = set(blocks.modules())
    outside = [module for module in model.modules() if module not in inside]
    with computing_in_fp32(outside), _replaced_forwards(blocks, forward):
        try:
            model.base_model(input_ids=tokens, use_cache=False)
        except _LastBlockDoneError:
            return
    raise CheckpointError(
        f"{type(model).__name__}: expected its forward to reach every decoder block, it did not"
    )


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


class _LastBlockDoneError(Exception):
    """Leaves the model's forward; never seen outside this file."""


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


def _select(tree: Any, rows: slice, num_samples: int, num_heads: int, device: torch.device) -> Any:
    """Take some samples of every tensor that has an axis for them; floats become fp32.

    Bloom's ALiBi has one axis for samples and heads.
    """

    def select(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        part = value
        if value.dim() > 1 and len(value) == num_samples:
            part = value[rows]
        elif value.dim() > 2 and len(value) == num_samples * num_heads:
            part = value[rows.start * num_heads : rows.stop * num_heads]
        return part.to(device=device, dtype=torch.float32 if part.is_floating_point() else None)

    return tree_map(select, tree)


def _to_cpu(output: Any) -> Any:
    hidden = output[0] if isinstance(output, tuple) else output
    return (hidden.cpu(), *output[1:]) if isinstance(output, tuple) else hidden.cpu()


def _join(outputs: list[Any]) -> Any:
    """Put batches together again: a tensor, or a tuple that starts with one."""
    if isinstance(outputs[0], tuple):
        return (torch.cat([output[0] for output in outputs]), *outputs[-1][1:])
    return torch.cat(outputs)
