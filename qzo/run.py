"""From a recipe to a trained run: the only place where configuration meets data and model."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, TrainerCallback

from qzo.adapter import apply_adapter, open_adapter
from qzo.card import model_card
from qzo.checkpoint import Checkpoint, open_checkpoint
from qzo.config import Recipe
from qzo.errors import ConfigError
from qzo.estimators import evaluations_per_example, make_estimator
from qzo.examples import ExampleSet, read_set, split_records
from qzo.files import write_bytes
from qzo.interrupts import explained_bus_errors
from qzo.memory import parse_memory
from qzo.model import Progress, load_checkpoint, load_tokenizer
from qzo.planner import plan
from qzo.plot import plot_run
from qzo.probes import STACKED_TOKENS
from qzo.ranks import Ranks
from qzo.result import Result
from qzo.rewards import WRITTEN, RewardFunction, load_reward
from qzo.streaming import Budget, available_bytes
from qzo.trainer import Trainer

_SMALL = 0.5  # of the memory: a checkpoint that is smaller is not planned before it is loaded


def train(
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
) -> Result | None:
    """Train as a recipe says, and write everything that belongs into the run folder.

    Under ``torchrun`` all processes take part and the first one writes; after a restart by
    ``--max-restarts`` the run is continued.

    Args:
        recipe: What to do.
        callbacks: transformers callbacks.
        progress: See ``load_checkpoint``.

    Returns:
        What the run ended with; None in all processes but the first.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        recipe = recipe.model_copy(update={"resume_from_checkpoint": True})
    ranks = Ranks.join(device_of(recipe.device))
    try:
        checkpoint = _base(recipe, ranks)
        tensors = checkpoint.tensors
        with explained_bus_errors({checkpoint.folder / name for name in tensors.files.values()}):
            return _train(recipe, checkpoint, ranks, callbacks, progress)
    finally:
        ranks.leave()


def _base(recipe: Recipe, ranks: Ranks) -> Checkpoint:
    if recipe.quantize is not None and ranks.size > 1:
        raise ConfigError(
            "quantize: expected a 4-bit model where several processes train; run qzo quantize first"
        )
    return base_checkpoint(recipe)


def _train(
    recipe: Recipe,
    checkpoint: Checkpoint,
    ranks: Ranks,
    callbacks: Sequence[TrainerCallback],
    progress: Progress | None,
) -> Result | None:
    reward = reward_of(recipe)
    _ = checkpoint.digests  # read in the background; the journal will need them
    tokenizer = load_tokenizer(checkpoint.folder)
    train_set, eval_set = data_sets(recipe, tokenizer)
    sets = [data for data in (train_set, eval_set) if data is not None]
    model = load_model(recipe, checkpoint, sets, progress)
    trainer = Trainer(model, recipe, train_set, eval_set, callbacks, tokenizer, ranks, reward)
    result = trainer.train()
    if not ranks.is_first:
        return None
    folder = Path(recipe.output_dir)
    card = model_card(folder, open_adapter(folder).config)
    write_bytes(folder / "README.md", card.encode("utf-8"))
    plot_run(folder)
    return result


def reward_of(recipe: Recipe) -> RewardFunction | None:
    """Return the function that a recipe names; its file is run.

    Raises:
        ConfigError: It should name one and does not.
    """
    if recipe.objective == "reward" and recipe.reward is None:
        raise ConfigError(
            "reward: expected path/to/file.py:function with objective 'reward', found none"
        )
    return None if recipe.reward is None else load_reward(recipe.reward)


def load_model(
    recipe: Recipe,
    checkpoint: Checkpoint,
    sets: Sequence[ExampleSet],
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load the model of a recipe; its blocks stream where memory says so.

    Args:
        recipe: What to do.
        checkpoint: Its base.
        sets: Training examples and, if there are any, those to evaluate on.
        progress: See ``load_checkpoint``.
    """
    device = device_of(recipe.device)
    budget = _budget(recipe, checkpoint, sets, device)
    return load_checkpoint(checkpoint, _dtype(recipe), device, budget=budget, progress=progress)


def _budget(
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
        streaming, other = _planned_bytes(recipe, checkpoint, sets, device)
    except ConfigError:
        if is_given:
            raise
        return None
    if not is_given and streaming + other <= limit:
        return None
    return Budget(limit, other, is_given)


def _planned_bytes(
    recipe: Recipe, checkpoint: Checkpoint, sets: Sequence[ExampleSet], device: torch.device
) -> tuple[int, int]:
    """Return what can stream, and all the other memory of a run with these examples."""
    zo = recipe.zo
    num_examples = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    probes = evaluations_per_example(
        make_estimator(zo.estimator, recipe.estimator_settings), num_examples
    )
    probes += recipe.zo.optimizer == "conservative"  # three candidates of a step
    lengths = [len(row) for data in sets for example in data.examples for row in example.rows]
    written = _written_tokens(recipe, sets)
    of_probe = _most_rows(sets[0]) * recipe.per_device_train_batch_size
    rows = probes * of_probe
    if recipe.objective not in WRITTEN:
        rows = min(rows, max(STACKED_TOKENS // max(lengths, default=1), of_probe))
    rows *= 1 + (zo.estimator == "forward_gradient")  # a tangent beside every activation
    for data in sets[1:]:
        rows = max(rows, _most_rows(data) * recipe.per_device_eval_batch_size)
    dtype = "float32" if device.type == "cpu" else recipe.dtype or "float16"
    plan_of = partial(
        plan,
        checkpoint.folder,
        seq_len=max(lengths, default=recipe.max_length) + written,
        coordinates=zo.coordinates,
        dtype=dtype,
    )
    planned = plan_of(batch_size=-(-rows // probes), num_probes=probes)
    if zo.has_first_order:  # a micro-batch by itself, when the probes are gone
        backward = plan_of(
            batch_size=of_probe,
            num_probes=1,
            answer_len=_most_scored(sets[0]),
            first_order_blocks=_first_order_blocks(recipe, checkpoint),
        )
        planned = max(planned, backward, key=lambda one: one.peak_bytes)
    streaming = sum(part.bytes for part in planned.parts if part.streams)
    cache = rows * (max(lengths) + written) * _cache_bytes(checkpoint, dtype) if written else 0
    return streaming, planned.peak_bytes - streaming + cache


def _written_tokens(recipe: Recipe, sets: Sequence[ExampleSet]) -> int:
    is_written = recipe.objective in WRITTEN or any(data.is_generation for data in sets)
    return recipe.max_new_tokens if is_written else 0


def _first_order_blocks(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """Return how many last blocks a backward goes through at most; a profile goes through all."""
    zo = recipe.zo
    total = int(AutoConfig.from_pretrained(checkpoint.folder).get_text_config().num_hidden_layers)
    ends_early = zo.depth is not None and zo.depth[1] < 1
    return total if zo.first_order_layers == "profile" or ends_early else zo.first_order_blocks


def _most_scored(data: ExampleSet) -> int:
    """Return the most predictions that are scored of an answer."""
    return max(len(c.positions) for example in data.examples for c in example.candidates)


def _cache_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Return the bytes of keys and values of one token."""
    config = AutoConfig.from_pretrained(checkpoint.folder).get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads)
    return 2 * int(pairs * width) * (4 if dtype == "float32" else 2)


def _most_rows(data: ExampleSet) -> int:
    return max((len(example.rows) for example in data.examples), default=1)


def base_checkpoint(recipe: Recipe) -> Checkpoint:
    """Open the base; with ``quantize`` it is made first, in ``output_dir/base``."""
    if recipe.quantize is None:
        return open_checkpoint(recipe.model)
    from qzo.quantize import quantize
    from qzo.quantize_settings import QuantizeSettings

    folder = Path(recipe.output_dir) / "base"
    if not folder.exists():
        quantize(recipe.model, folder, QuantizeSettings(format=recipe.quantize))
    return open_checkpoint(folder)


def data_sets(recipe: Recipe, tokenizer: Any) -> tuple[ExampleSet, ExampleSet | None]:
    """Read training and evaluation examples.

    Raises:
        ConfigError: The recipe names no data.
    """
    if recipe.data is None and recipe.task is None:
        raise ConfigError("data: expected 'data' or 'task' in the recipe, found neither")
    common: dict[str, Any] = {"tokenizer": tokenizer, "max_length": recipe.max_length}
    if recipe.eval_data is None and recipe.task is None and recipe.data is not None:
        train_set, eval_set = split_records(
            recipe.data,
            tokenizer,
            max_length=recipe.max_length,
            num_eval=recipe.num_eval_examples,
            seed=recipe.data_seed,
        )
        return train_set.first(recipe.num_train_examples), eval_set
    train_set = read_set(
        task=recipe.task,
        data=recipe.data,
        split="train",
        is_prompted=recipe.prompt == "template",
        num_examples=recipe.num_train_examples,
        **common,
    )
    if recipe.num_eval_examples == 0:
        return train_set, None
    eval_set = read_set(
        task=recipe.task,
        data=recipe.eval_data or recipe.data,
        split="validation",
        is_prompted=recipe.prompt == "template",
        num_examples=recipe.num_eval_examples,
        **common,
    )
    return train_set, eval_set


def device_of(name: str | None) -> torch.device:
    """Return the device of a name; a CUDA device where there is one unless named.

    Under ``torchrun`` every process of a computer takes a CUDA device of its own.

    Raises:
        ConfigError: There is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    kind, _, number = name.partition(":")
    if kind not in {"cpu", "cuda"} or not (number or "0").isdecimal():
        raise ConfigError(f"device: expected 'cpu' or 'cuda', got {name!r}")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: expected a device that exists, got {name!r}; use 'cpu'")
    return torch.device(name)


def _dtype(recipe: Recipe) -> torch.dtype | None:
    if recipe.dtype is None:
        return None
    dtype: torch.dtype = getattr(torch, recipe.dtype)
    return dtype


def evaluation_model(
    base: str, adapter: str | None, device: str | None
) -> tuple[PreTrainedModel, Checkpoint]:
    """Load a checkpoint, with the scales of a run if one is named."""
    checkpoint = open_checkpoint(base)
    model = load_checkpoint(checkpoint, None, device_of(device))
    if adapter is not None:
        apply_adapter(model, checkpoint, open_adapter(Path(adapter)))
    return model, checkpoint
