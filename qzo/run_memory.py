"""The memory of a run, planned from its recipe and its examples before the model is loaded."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig

from qzo.checkpoint import Checkpoint
from qzo.config import Recipe
from qzo.errors import ConfigError
from qzo.estimators import evaluations_per_example, make_estimator
from qzo.examples import ExampleSet
from qzo.free_memory import available_bytes
from qzo.memory import parse_memory
from qzo.planner import plan
from qzo.probes import STACKED_TOKENS
from qzo.rewards import WRITTEN
from qzo.shapes import values_of_token
from qzo.streaming import Budget
from qzo.workload import DTYPES

_SMALL = 0.5  # of the memory: a checkpoint that is smaller is not planned before it is loaded


def memory_budget(
    recipe: Recipe, checkpoint: Checkpoint, sets: Sequence[ExampleSet], device: torch.device
) -> Budget | None:
    """Return the memory of a run where it is limited, or where the plan says that it is short.

    Raises:
        ConfigError: There is a limit, and the architecture cannot be planned.
    """
    if recipe.memory_limit is not None:
        limit, is_given = parse_memory(recipe.memory_limit, "memory_limit"), True
    else:
        available = available_bytes(device)
        if available is None or checkpoint.tensors.num_bytes < _SMALL * available:
            return None
        limit, is_given = available, False
    try:
        streaming, other = planned_bytes(recipe, checkpoint, sets, device)
    except ConfigError:
        if is_given:
            raise
        return None
    if not is_given and streaming + other <= limit:
        return None
    return Budget(limit, other, is_given)


def planned_bytes(
    recipe: Recipe, checkpoint: Checkpoint, sets: Sequence[ExampleSet], device: torch.device
) -> tuple[int, int]:
    """Return what can stream, and all the other memory of a run with these examples.

    Exact gradients are taken one micro-batch at a time when the probes are gone: what needs more
    counts.

    Args:
        recipe: What to do.
        checkpoint: Its base; only its configuration is read.
        sets: Training examples and, if there are any, those to evaluate on.
        device: Where the model is.
    """
    longest, written = _longest_row(recipe, sets), _written_tokens(recipe, sets)
    dtype = "float32" if device.type == "cpu" else recipe.dtype or "float16"
    plan_of = partial(
        plan,
        checkpoint.folder,
        seq_len=longest + written,
        answer_len=_most_scored(sets),
        coordinates=recipe.zo.coordinates,
        dtype=dtype,
        optimizer=recipe.zo.optimizer,
        lora_rank=recipe.zo.lora_rank if recipe.zo.tuned == "lora" else 0,
        prefix_tokens=recipe.zo.prefix_tokens if recipe.zo.tuned == "prefix" else 0,
        modules=recipe.zo.lora_modules if recipe.zo.tuned == "lora" else recipe.zo.modules,
        num_blocks=recipe.zo.num_blocks,
        depth=recipe.zo.depth,
    )
    probes = _evaluations(recipe)
    rows = _stacked_rows(recipe, sets, probes, longest)
    planned = plan_of(batch_size=-(-rows // probes), num_probes=probes)
    if recipe.zo.has_first_order:
        backward = plan_of(
            batch_size=_rows_of_batch(recipe, sets[0]),
            num_probes=1,
            first_order_blocks=_first_order_blocks(recipe, checkpoint),
        )
        planned = max(planned, backward, key=lambda one: one.peak_bytes)
    streaming = sum(part.bytes for part in planned.parts if part.streams)
    kept = rows * (longest + written) * values_of_token(_model_config(checkpoint)) if written else 0
    return streaming, planned.peak_bytes - streaming + kept * DTYPES[dtype].itemsize


def _evaluations(recipe: Recipe) -> int:
    """Return how often a step evaluates an example."""
    num_examples = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    estimator = make_estimator(recipe.zo.estimator, recipe.estimator_settings)
    is_conservative = recipe.zo.optimizer == "conservative"  # three tries of a step at once
    return evaluations_per_example(estimator, num_examples) + is_conservative


def _stacked_rows(recipe: Recipe, sets: Sequence[ExampleSet], probes: int, longest: int) -> int:
    """Return the most rows of a forward, in training or evaluation."""
    of_probe = _rows_of_batch(recipe, sets[0])
    rows = probes * of_probe
    if recipe.objective not in WRITTEN:
        rows = min(rows, max(STACKED_TOKENS // longest, of_probe))
    rows *= 1 + (recipe.zo.estimator == "forward_gradient")  # a tangent beside every activation
    evaluated = sets[1:] or sets  # without a set of its own, the reference loss is of training's
    of_evaluation = [_most_rows(data) * recipe.per_device_eval_batch_size for data in evaluated]
    return max([rows, *of_evaluation])


def _rows_of_batch(recipe: Recipe, data: ExampleSet) -> int:
    return _most_rows(data) * recipe.per_device_train_batch_size


def _most_rows(data: ExampleSet) -> int:
    return max((len(example.rows) for example in data.examples), default=1)


def _longest_row(recipe: Recipe, sets: Sequence[ExampleSet]) -> int:
    lengths = (len(row) for data in sets for example in data.examples for row in example.rows)
    return max(lengths, default=recipe.max_length)


def _most_scored(sets: Sequence[ExampleSet]) -> int:
    """Return the most predictions that are scored of an answer."""
    answers = (c for data in sets for example in data.examples for c in example.candidates)
    return max((len(answer.positions) for answer in answers), default=1)


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
    return AutoConfig.from_pretrained(checkpoint.folder)
