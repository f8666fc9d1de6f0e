"""The files of a run folder besides the scales: header, recipe, reference loss."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from qzo.checkpoint import Checkpoint
from qzo.config import Recipe
from qzo.directions import GENERATOR
from qzo.encoding import Candidate, EncodedExample
from qzo.errors import CheckpointError, ConfigError
from qzo.examples import ExampleSet
from qzo.files import WriteError, read_json, write_bytes
from qzo.journal import NAME as JOURNAL_NAME
from qzo.journal import Journal
from qzo.scales import Scales
from qzo.version import __version__

REFERENCE_NAME = "reference.json"


def header_of(config: Recipe, checkpoint: Checkpoint, scales: Scales) -> dict[str, Any]:
    """Return the header of the journal: everything that a replay needs and a resume compares.

    Waits for the digests of the checkpoint, which take a second or so a GB.
    """
    return {
        "qzo_version": __version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "generator": GENERATOR,
        "base": str(checkpoint.folder.resolve()),
        "codes_sha256": checkpoint.codes_sha256(),
        "scales_sha256": checkpoint.scales_sha256(),
        "layers": scales.names,
        "num_values": len(scales),
        "coordinates": config.zo.coordinates,
        "direction": config.zo.direction,
        "optimizer": config.zo.optimizer,
        "seed": config.seed,
        "recipe": config.model_dump(mode="json"),
    }


# Keys that may change when a run continues: they do not change the numbers.
_FREE = {
    *("output_dir", "resume_from_checkpoint", "report_to", "max_steps", "device", "model", "data"),
    *("logging_steps", "save_steps", "save_total_limit", "per_device_eval_batch_size"),
    *("eval_steps", "eval_data", "num_eval_examples", "load_best_model_at_end"),
    "memory_limit",
}
_COMPARED = ("codes_sha256", "scales_sha256", "generator")


def open_journal(config: Recipe, make_header: Callable[[], Mapping[str, Any]]) -> Journal:
    """Prepare the journal of a new run, or continue one.

    Args:
        config: The recipe.
        make_header: Called at once where a run is continued, else when the journal begins.

    Raises:
        CheckpointError: The folder is not empty, cannot be written, or holds another run.
        WriteError: The folder cannot be written.
    """
    folder = Path(config.output_dir)
    path = folder / JOURNAL_NAME
    if config.resume_from_checkpoint and path.exists():
        journal = Journal.open(path)
        _check_same(journal, make_header())
        _write_recipe(folder, config)
        return journal
    others = (
        [entry for entry in folder.iterdir() if entry.name != "base"] if folder.is_dir() else []
    )
    if others or folder.is_file():
        raise CheckpointError(
            f"{folder}: expected a new or empty folder; choose another output_dir, or set "
            "resume_from_checkpoint: true"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(folder, error) from error
    return Journal.create(path, make_header)


def begin(journal: Journal, config: Recipe) -> None:
    """Write the first files of a new run; the journal first: with it, a run can be continued."""
    if not journal.is_on_disk:
        journal.begin()
        _write_recipe(journal.path.parent, config)


def _write_recipe(folder: Path, config: Recipe) -> None:
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_bytes(folder / "recipe.yaml", text.encode("utf-8"))


def _check_same(journal: Journal, header: Mapping[str, Any]) -> None:
    for key in _COMPARED:
        if journal.header.get(key) != header[key]:
            raise CheckpointError(
                f"{journal.path}: {key} differs from the run that is to be continued; was the "
                "base changed?"
            )
    old, new = journal.header["recipe"], header["recipe"]
    free = _FREE if new["lr_scheduler_type"] == "constant" else _FREE - {"max_steps"}
    for key in sorted(set(new) - free):
        if old.get(key) != new[key]:
            raise ConfigError(
                f"{key}: expected {old.get(key)!r} as in the run that is to be continued, got "
                f"{new[key]!r}"
            )


def write_reference(folder: Path, data: ExampleSet, loss: float) -> None:
    """Write a few examples and the trained model's loss on them; an export is compared with it."""
    value = {
        "loss": loss,
        "loss_name": data.loss,
        "examples": [asdict(example) for example in data.examples],
    }
    write_bytes(folder / REFERENCE_NAME, json.dumps(value).encode("utf-8"))


def read_reference(folder: Path) -> tuple[ExampleSet, float] | None:
    """Read what ``write_reference`` wrote, or None where there is none.

    Raises:
        CheckpointError: The file is damaged.
    """
    if not (folder / REFERENCE_NAME).is_file():
        return None
    value = read_json(folder / REFERENCE_NAME)
    try:
        examples = [_example(entry) for entry in value["examples"]]
        return ExampleSet(examples, value["loss_name"]), float(value["loss"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / REFERENCE_NAME}: damaged: {error!r}") from error


def _example(entry: Mapping[str, Any]) -> EncodedExample:
    candidates = tuple(
        Candidate(c["row"], tuple(c["positions"]), tuple(c["targets"])) for c in entry["candidates"]
    )
    return EncodedExample(tuple(tuple(row) for row in entry["rows"]), candidates, entry["label"])
