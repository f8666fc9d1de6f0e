"""From a recipe to a trained run: the only place where configuration meets data and model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from qzo.card import model_card
from qzo.checkpoint import Checkpoint, open_checkpoint
from qzo.config import Recipe
from qzo.errors import ConfigError
from qzo.examples import ExampleSet, read_set, split_records
from qzo.files import read_json, write_bytes
from qzo.model import load_checkpoint, load_tokenizer
from qzo.plot import plot_run
from qzo.trainer import Result, Trainer


def train(recipe: Recipe, callbacks: Sequence[TrainerCallback] = ()) -> Result:
    """Train as a recipe says, and write everything that belongs into the run folder."""
    checkpoint = base_checkpoint(recipe)
    tokenizer = load_tokenizer(checkpoint.folder)
    train_set, eval_set = data_sets(recipe, tokenizer)
    model = load_checkpoint(checkpoint, _dtype(recipe), device_of(recipe.device))
    trainer = Trainer(model, recipe, train_set, eval_set, callbacks, tokenizer)
    result = trainer.train()
    folder = Path(recipe.output_dir)
    card = model_card(folder, read_json(folder / "adapter_config.json"))
    write_bytes(folder / "README.md", card.encode("utf-8"))
    plot_run(folder)
    return result


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
        num_examples=recipe.num_train_examples,
        **common,
    )
    if recipe.num_eval_examples == 0:
        return train_set, None
    eval_set = read_set(
        task=recipe.task,
        data=recipe.eval_data or recipe.data,
        split="validation",
        num_examples=recipe.num_eval_examples,
        **common,
    )
    return train_set, eval_set


def device_of(name: str | None) -> torch.device:
    """Return the device of a name; a CUDA device where there is one unless named.

    Raises:
        ConfigError: There is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
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
    from qzo.adapter import apply_adapter, open_adapter

    checkpoint = open_checkpoint(base)
    model = load_checkpoint(checkpoint, None, device_of(device))
    if adapter is not None:
        apply_adapter(model, checkpoint, open_adapter(Path(adapter)))
    return model, checkpoint
