"""The trained vector of a recipe: scales and what goes with them, or LoRA or a prefix instead."""

from transformers import PreTrainedModel

from qzo.method.extra.lora import low_rank_sections, seeing_low_rank
from qzo.method.extra.prefix import prefix_sections, seeing_prefixes
from qzo.method.extra.unquantized import seeing_sections, unquantized_sections
from qzo.method.trained_vector import Scales
from qzo.model.linear import Live
from qzo.model.load import trained_layers
from qzo.run.recipe.keys import ZOConfig

_OWNER = "training"  # of the hooks


def trained_vector(model: PreTrainedModel, zo: ZOConfig, run_seed: int) -> tuple[Live, Scales]:
    """Choose what is trained, and let the modules of the model see it.

    Args:
        model: Model with quantized layers.
        zo: The block of the recipe.
        run_seed: Of the run.

    Returns:
        What the layers see, and the vector.
    """
    is_lora, is_frozen = zo.tuned == "lora", zo.tuned != "scales"
    key, parts = ("lora_modules", zo.lora_modules) if is_lora else ("modules", zo.modules)
    layers = trained_layers(model, zo.num_blocks, parts, depth=zo.depth, key=f"zo.{key}")
    live = layers[0].live
    live.trained_prefixes = {}
    if is_lora:
        modules = low_rank_sections(model, layers, zo.lora_rank, zo.lora_alpha, run_seed)
        hooks = seeing_low_rank(live, modules)
    elif zo.tuned == "prefix":
        modules = prefix_sections(model, live, zo.prefix_tokens, run_seed)
        hooks = seeing_prefixes(model, live, modules)
    else:
        modules = unquantized_sections(model, layers, zo.unquantized, zo.unquantized_factor)
        hooks = seeing_sections(live, modules)
    live.renew_hooks(_OWNER, hooks)
    scales = Scales.of_layers(
        [] if is_frozen else layers,
        coordinates=zo.coordinates,
        direction=zo.direction,
        direction_settings=zo.direction_settings,
        sections=tuple(modules),
        device=model.device,
    )
    return live, scales
