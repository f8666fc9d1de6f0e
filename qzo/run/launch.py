"""From a recipe to a trained run: the only place where configuration meets data and model."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from qzo.checkpoint.atomic import read_json, write_bytes, write_json
from qzo.checkpoint.base import BASE_NAME
from qzo.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qzo.data.examples import ExampleSet, read_set, split_records
from qzo.data.load import is_file
from qzo.distributed import Ranks
from qzo.errors import CheckpointError, ConfigError
from qzo.model.load import load_checkpoint, load_tokenizer
from qzo.model.placement import device_of, placement
from qzo.objective.rewards import RewardFunction, load_reward
from qzo.run.folder import BASE_ORIGIN_NAME, check_new
from qzo.run.hardware_errors import hardware_errors
from qzo.run.journal.journal import NAME as JOURNAL_NAME
from qzo.run.memory import less_memory, run_budget
from qzo.run.output.adapter import open_adapter
from qzo.run.output.card import model_card
from qzo.run.output.plot import plot_run
from qzo.run.recipe.keys import Recipe
from qzo.run.result import Result
from qzo.run.signals import explained_bus_errors
from qzo.run.trainer import Trainer

LayerProgress = Callable[..., None]


def train(
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
    progress: LayerProgress | None = None,
) -> Result | None:
    """Train as a recipe says, and write everything that belongs into the run folder.

    Under ``torchrun`` all processes take part and the first one writes; after a restart by
    ``--max-restarts`` the run is continued.

    Args:
        recipe: What to do.
        callbacks: transformers callbacks.
        progress: Told how many layers are quantized or in place, of how many, and, unless a model
            is loaded, what is done.

    Returns:
        What the run ended with; None in all processes but the first.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        recipe = recipe.model_copy(update={"resume_from_checkpoint": True})
    ranks = Ranks.join(device_of(recipe.device))
    try:
        checkpoint = _base(recipe, ranks, progress)
        tensors = checkpoint.tensors
        with explained_bus_errors({checkpoint.folder / name for name in tensors.files.values()}):
            return _train(recipe, checkpoint, ranks, callbacks, progress)
    finally:
        ranks.leave()


def _base(recipe: Recipe, ranks: Ranks, progress: LayerProgress | None) -> Checkpoint:
    if recipe.quantize is not None and ranks.size > 1:
        raise ConfigError(
            "quantize: expected a 4-bit model where several processes train; run qzo quantize first"
        )
    run = Path(recipe.output_dir)
    if recipe.quantize is not None and not (
        recipe.resume_from_checkpoint and (run / JOURNAL_NAME).exists()
    ):
        check_new(run)  # before it takes minutes
    return base_checkpoint(recipe, progress)


def _train(
    recipe: Recipe,
    checkpoint: Checkpoint,
    ranks: Ranks,
    callbacks: Sequence[TrainerCallback],
    progress: LayerProgress | None,
) -> Result | None:
    reward = reward_of(recipe)
    _ = checkpoint.digests  # read in the background; the journal will need them
    tokenizer = load_tokenizer(checkpoint.folder)
    train_set, eval_set = data_sets(recipe, tokenizer)
    sets = [data for data in (train_set, eval_set) if data is not None]
    with hardware_errors(partial(less_memory, recipe, checkpoint, sets)):
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
    progress: LayerProgress | None = None,
) -> PreTrainedModel:
    """Load the model of a recipe; its blocks stream where memory says so.

    Args:
        recipe: What to do.
        checkpoint: Its base.
        sets: Training examples and, if there are any, those to evaluate on.
        progress: See ``load_checkpoint``.
    """
    place = placement(recipe.device, recipe.dtype, recipe.memory_limit)
    budget = run_budget(recipe, checkpoint, sets, place.device)
    return load_checkpoint(checkpoint, place.dtype, place.device, budget=budget, progress=progress)


def base_checkpoint(recipe: Recipe, progress: LayerProgress | None = None) -> Checkpoint:
    """Open the base; with ``quantize`` it is made first, in ``output_dir/base``.

    Args:
        recipe: What to do.
        progress: Told how many layers are quantized, of how many, and what is done.
    """
    if recipe.quantize is None:
        return open_checkpoint(recipe.model, recipe.revision)
    from qzo.quantize.quantize import quantize
    from qzo.quantize.settings import QuantizeSettings

    run = Path(recipe.output_dir)
    folder, origin_path = run / BASE_NAME, run / BASE_ORIGIN_NAME
    origin = _origin_of(recipe)
    if folder.exists():
        found = read_json(origin_path) if origin_path.exists() else None
        _check_origin(folder, found, origin, has_journal=(run / JOURNAL_NAME).exists())
    else:
        run.mkdir(parents=True, exist_ok=True)
        write_json(origin_path, origin)
        quantize(
            recipe.model,
            folder,
            QuantizeSettings(format=recipe.quantize),
            revision=recipe.revision,
            progress=None if progress is None else _named(progress),
        )
    return open_checkpoint(folder)


def _named(progress: LayerProgress) -> LayerProgress:
    return lambda done, total, _layer: progress(done, total, "quantizing")


def _check_origin(
    folder: Path, found: Mapping[str, Any] | None, origin: Mapping[str, Any], *, has_journal: bool
) -> None:
    """Refuse a base that was made from another model, or in another format.

    A journal has the digests of the base and its format; there a model may have moved.

    Raises:
        CheckpointError: It was.
    """
    if has_journal and (found is None or _is_same_model(found, origin)):
        return
    if found == origin:
        return
    made_from = "nothing that is known"
    if found is not None:
        made_from = f"{found.get('model')} as {found.get('quantize')}, or from other files of it"
    raise CheckpointError(
        f"{folder}: expected {origin['model']} as {origin['quantize']}, found what was made from "
        f"{made_from}; choose another output_dir, or remove this folder"
    )


def _origin_of(recipe: Recipe) -> dict[str, Any]:
    """Return what a base is made from; of a model on the hub nothing but its name and format."""
    path = Path(recipe.model)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    found = {file.name: file.stat() for file in files if file.is_file()}
    return {
        "quantize": recipe.quantize,
        "model": recipe.model,
        **({} if recipe.revision is None else {"revision": recipe.revision}),
        "sizes": {name: stat.st_size for name, stat in found.items()},
        "times": {name: stat.st_mtime_ns for name, stat in found.items()},
    }


def _is_same_model(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Tell whether two models have one name, or else files of the same names and sizes."""
    is_copy = bool(new["sizes"]) and old.get("sizes") == new["sizes"]
    is_named_so = all(old.get(key) == new.get(key) for key in ("model", "revision"))
    return is_copy or is_named_so


def data_sets(recipe: Recipe, tokenizer: Any) -> tuple[ExampleSet, ExampleSet | None]:
    """Read training and evaluation examples.

    Raises:
        ConfigError: The recipe names no data, or none to evaluate on.
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
            num_train=recipe.num_train_examples,
            labelling=recipe.labelling,
        )
        return train_set, eval_set
    train_set = read_set(
        task=recipe.task,
        data=recipe.data,
        split="train",
        is_prompted=recipe.prompt == "template",
        num_examples=recipe.num_train_examples,
        labelling=recipe.labelling,
        **common,
    )
    if recipe.num_eval_examples == 0:
        return train_set, None
    if recipe.eval_data is None and recipe.data is not None and is_file(recipe.data):
        raise ConfigError(
            f"eval_data: expected data to evaluate on, got none: {recipe.data} is one file, which "
            "is trained on; name eval_data, or set num_eval_examples: 0"
        )
    eval_set = read_set(
        task=recipe.task,
        data=recipe.eval_data or recipe.data,
        split="validation",
        is_prompted=recipe.prompt == "template",
        num_examples=recipe.num_eval_examples,
        labelling=train_set.labelling or recipe.labelling,
        **common,
    )
    return train_set, eval_set
