"""Which decoder blocks take first-order steps: a given number of the last ones, or by importance.

The choice goes into the journal's header, so that a run continues with it and a replay knows it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qzo.checkpoint.atomic import write_json
from qzo.errors import ConfigError
from qzo.method.first_order import block_importance, num_last_blocks
from qzo.method.trained_vector import Scales
from qzo.model.linear import QuantLinear
from qzo.model.load import decoder_blocks
from qzo.objective.loss import Objective
from qzo.run.recipe.keys import ZOConfig

IMPORTANCE_NAME = "importance.json"
PROFILE_BATCHES = 4  # the first ones of the run
PROFILE_FORWARDS = 3.0 * PROFILE_BATCHES  # a forward and a backward through all blocks


def first_order_header(
    zo: ZOConfig, model: PreTrainedModel, scales: Scales, objective: Objective
) -> dict[str, Any] | None:
    """Choose the blocks of a new run; None where all steps are zeroth-order.

    Args:
        zo: What the recipe says.
        model: The model, as it starts.
        scales: Its trained vector, as it starts.
        objective: Gives the gradients of the profile.

    Raises:
        ConfigError: Fewer blocks are trained than there should be.
    """
    if not zo.has_first_order:
        return None
    blocks = _block_numbers(model, scales.names)
    num_trained, importance = max(blocks) + 1, None
    if zo.first_order_blocks > num_trained:
        raise ConfigError(
            f"zo.first_order_blocks: expected at most the {num_trained} trained blocks, got "
            f"{zo.first_order_blocks}"
        )
    count = zo.first_order_blocks
    if zo.first_order_layers == "profile":
        importance = _profile(scales, objective, blocks)
        count = num_last_blocks(importance, zo.first_order_share)
    pairs = zip(scales.names, blocks, strict=True)
    names = [name for name, block in pairs if block >= num_trained - count]
    places = [scales.names.index(name) for name in names]
    return {
        "num_blocks": count,
        "layers": names,
        "num_values": sum(stop - start for start, stop in scales.parts(places)),
        "optimizer": zo.first_order_optimizer,
        "optimizer_settings": zo.first_order_settings,
        "importance": importance,
    }


def _profile(scales: Scales, objective: Objective, blocks: Sequence[int]) -> list[float]:
    layers = range(len(blocks))
    gradients = (objective.gradient(objective.batch(i), layers)[1] for i in range(PROFILE_BATCHES))
    return block_importance(scales.values, gradients, scales.parts(layers), blocks)


def _block_numbers(model: PreTrainedModel, names: Sequence[str]) -> list[int]:
    """Return the decoder block of every trained layer, from 0 for the first trained block."""
    numbers = _blocks_of(model, names)
    return [number - min(numbers) for number in numbers]


def backward_part(model: PreTrainedModel, names: Sequence[str]) -> float:
    """Return the part of the model that a backward goes through, down to the first of some layers.

    Args:
        model: The model.
        names: Of its quantized layers.
    """
    num_blocks = len(decoder_blocks(model))
    return 1 - min(_blocks_of(model, names)) / num_blocks


def _blocks_of(model: PreTrainedModel, names: Sequence[str]) -> list[int]:
    """Return the decoder block of some layers; a quantized head goes with the last one."""
    blocks = decoder_blocks(model)
    place = {
        layer.name: number
        for number, block in enumerate(blocks)
        for layer in block.modules()
        if isinstance(layer, QuantLinear)
    }
    return [place.get(name, len(blocks) - 1) for name in names]


def write_importance(folder: Path, header: Mapping[str, Any]) -> bool:
    """Write what the profile found into the run folder, once.

    Args:
        folder: Of the run.
        header: Of the first-order part.

    Returns:
        Whether it was written now.
    """
    path = folder / IMPORTANCE_NAME
    importance = header.get("importance")
    if importance is None or path.exists():
        return False
    total = sum(importance)
    value = {
        "measure": "mean over batches of sum |gradient * value|",
        "num_batches": PROFILE_BATCHES,
        "importance": importance,
        "share": [of_block / total for of_block in importance],
        "first_order_blocks": header["num_blocks"],
    }
    write_json(path, value)
    return True
