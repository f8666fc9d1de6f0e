"""The memory of a run, planned from its recipe and its examples before the model is loaded."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig

from qzo.checkpoint.checkpoint import Checkpoint
from qzo.data.examples import ExampleSet
from qzo.method.estimators import evaluations_per_example, make_estimator
from qzo.method.probes import STACKED_TOKENS
from qzo.model.memory import parse_memory
from qzo.model.placement import device_of
from qzo.model.streaming.blocks import Budget
from qzo.model.streaming.free_memory import available_bytes
from qzo.objective.rewards import WRITTEN
from qzo.plan.batch_shape import longest_row, most_rows, most_scored
from qzo.plan.budget import Planned, memory_budget, planned_of
from qzo.plan.planner import plan
from qzo.run.recipe.keys import Recipe


def run_budget(
    recipe: Recipe, checkpoint: Checkpoint, sets: Sequence[ExampleSet], device: torch.device
) -> Budget | None:
    """Return the memory of a run; see ``memory_budget``."""
    limit = recipe.memory_limit
    return memory_budget(
        None if limit is None else parse_memory(limit, "memory_limit"),
        checkpoint,
        device,
        partial(planned_bytes, recipe, checkpoint, sets, device),
        lower="per_device_train_batch_size, per_device_eval_batch_size or max_length",
    )


def planned_bytes(
    recipe: Recipe,
    checkpoint: Checkpoint,
    sets: Sequence[ExampleSet],
    device: torch.device,
    limit: int | None = None,
) -> Planned:
    """Return what can stream, and all the other memory of a run with these examples.

    Losses, exact gradients and generated answers take turns: what needs most counts.

    Args:
        recipe: What to do.
        checkpoint: Its base; only its configuration is read.
        sets: Training examples and, if there are any, those to evaluate on.
        device: Where the model is.
        limit: The memory there is; it decides how many answers are generated together.
    """
    longest, written = longest_row(sets, default=recipe.max_length), _written_tokens(recipe, sets)
    plan_of = partial(
        plan,
        checkpoint.folder,
        seq_len=longest,
        answer_len=most_scored(sets),
        coordinates=recipe.zo.coordinates,
        dtype=recipe.dtype,
        device=device.type,
        optimizer=recipe.zo.optimizer,
        lora_rank=recipe.zo.lora_rank if recipe.zo.tuned == "lora" else 0,
        prefix_tokens=recipe.zo.prefix_tokens if recipe.zo.tuned == "prefix" else 0,
        modules=recipe.zo.lora_modules if recipe.zo.tuned == "lora" else recipe.zo.modules,
        num_blocks=recipe.zo.num_blocks,
        depth=recipe.zo.depth,
    )
    probes = _evaluations(recipe)
    rows = _stacked_rows(recipe, sets, probes, longest)
    plans = [plan_of(batch_size=-(-rows // probes), num_probes=probes)]
    if recipe.zo.has_first_order:
        plans.append(
            plan_of(
                batch_size=_rows_of_batch(recipe, sets[0]),
                num_probes=1,
                first_order_blocks=_first_order_blocks(recipe, checkpoint),
            )
        )
    if written:
        rows = _generated_rows(recipe, probes)
        plans.append(
            plan_of(
                batch_size=-(-rows // probes),
                num_probes=probes,
                max_new_tokens=written,
                generation_batch_size=recipe.generation_batch_size,
                memory_bytes=limit,
            )
        )
    needed = planned_of(max(plans, key=lambda one: one.peak_bytes))
    return needed._replace(generated_tokens=planned_of(plans[-1]).generated_tokens)


def less_memory(recipe: Recipe, checkpoint: Checkpoint, sets: Sequence[ExampleSet]) -> str:
    """Say which keys to lower, and to what, so that the plan of a run fits into its memory."""
    device = device_of(recipe.device)
    limit = _total_bytes(recipe, device)
    factor, fits, smaller = 1, False, recipe
    while not fits and smaller != _divided(recipe, factor * 2):
        factor *= 2
        smaller = _divided(recipe, factor)
        needed = planned_bytes(smaller, checkpoint, sets, device, limit)
        fits = limit is None or needed.streaming + needed.other <= limit
    keys = ("per_device_train_batch_size", "per_device_eval_batch_size", "generation_batch_size")
    changed = {key: getattr(smaller, key) for key in keys}
    words = [
        f"{key} from {getattr(recipe, key) or 'all that fit'} to {value}"
        for key, value in changed.items()
        if value != getattr(recipe, key)
    ]
    steps = smaller.gradient_accumulation_steps
    same = f" (gradient_accumulation_steps={steps} keeps the batch of a step)"
    lowered = f"lower {', '.join(words)}{same}, or max_length" if words else "lower max_length"
    return f"{lowered}; or set memory_limit, so that the model streams"


def _total_bytes(recipe: Recipe, device: torch.device) -> int | None:
    """Return the memory that a run may take: its limit, or all that the device has."""
    if recipe.memory_limit is not None:
        return parse_memory(recipe.memory_limit, "memory_limit")
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return available_bytes(device)


def _divided(recipe: Recipe, factor: int) -> Recipe:
    """Return a recipe whose forwards have fewer rows, as often as needed for the same batch."""
    size = recipe.per_device_train_batch_size
    divisor = max(d for d in range(1, min(factor, size) + 1) if size % d == 0)
    update = {
        "per_device_train_batch_size": size // divisor,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps * divisor,
        "per_device_eval_batch_size": max(recipe.per_device_eval_batch_size // factor, 1),
    }
    if recipe.objective in WRITTEN:
        together = recipe.generation_batch_size or recipe.per_device_train_batch_size
        update["generation_batch_size"] = max(together // factor, 1)
    return recipe.model_copy(update=update)


def _generated_rows(recipe: Recipe, probes: int) -> int:
    """Return the most answers that could be generated together, in training or evaluation."""
    of_step = probes * recipe.per_device_train_batch_size if recipe.objective in WRITTEN else 0
    return max(of_step, recipe.per_device_eval_batch_size)


def _evaluations(recipe: Recipe) -> int:
    """Return how often a step evaluates an example."""
    num_examples = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    estimator = make_estimator(recipe.zo.estimator, recipe.estimator_settings)
    is_conservative = recipe.zo.optimizer == "conservative"  # three tries of a step at once
    return evaluations_per_example(estimator, num_examples) + is_conservative


def _stacked_rows(recipe: Recipe, sets: Sequence[ExampleSet], probes: int, longest: int) -> int:
    """Return the most rows of a forward, in training or evaluation."""
    of_probe = _rows_of_batch(recipe, sets[0])
    rows = 0
    if recipe.objective not in WRITTEN:
        rows = min(probes * of_probe, max(STACKED_TOKENS // longest, of_probe))
    rows *= 1 + (recipe.zo.estimator == "forward_gradient")  # a tangent beside every activation
    evaluated = sets[1:] or sets  # without a set of its own, the reference loss is of training's
    of_evaluation = [most_rows(data) * recipe.per_device_eval_batch_size for data in evaluated]
    return max([rows, *of_evaluation])


def _rows_of_batch(recipe: Recipe, data: ExampleSet) -> int:
    return most_rows(data) * recipe.per_device_train_batch_size


def _written_tokens(recipe: Recipe, sets: Sequence[ExampleSet]) -> int:
    is_written = recipe.objective in WRITTEN or any(data.is_generation for data in sets)
    return recipe.max_new_tokens if is_written else 0


def _first_order_blocks(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """Return how many last blocks a backward goes through at most; a profile goes through all."""
    zo = recipe.zo
    total = int(_model_config(checkpoint).get_text_config().num_hidden_layers)
    ends_early = zo.depth is not None and zo.depth[1] < 1
    return total if zo.first_order_layers == "profile" or ends_early else zo.first_order_blocks


def _model_config(checkpoint: Checkpoint) -> Any:
    return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
