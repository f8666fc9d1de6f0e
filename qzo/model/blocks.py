"""Where the decoder blocks of a float model are, and the linear layers inside."""

from torch import nn
from transformers import PreTrainedModel

from qzo.errors import CheckpointError


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
