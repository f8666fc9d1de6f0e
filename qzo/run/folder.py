"""The files of a run folder besides the scales: header, recipe, reference loss."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from qzo.checkpoint.atomic import LOCK_NAME, is_partial, read_json, write_bytes
from qzo.checkpoint.base import BASE_NAME, RECIPE_NAME, is_inside, shared_origin
from qzo.checkpoint.checkpoint import Checkpoint
from qzo.checkpoint.hub import shared_name
from qzo.data.examples import ExampleSet
from qzo.data.tokenize import Candidate, EncodedExample
from qzo.distributed import Ranks
from qzo.errors import CheckpointError, ConfigError
from qzo.method.directions.philox import GENERATOR
from qzo.method.extra.section import Section
from qzo.method.optimizers import RULES
from qzo.method.trained_vector import Scales
from qzo.model.placement import DTYPES
from qzo.objective.rewards import WRITTEN
from qzo.run.journal.journal import NAME as JOURNAL_NAME
from qzo.run.journal.journal import Journal
from qzo.run.output.adapter import unquantized_sha256
from qzo.run.recipe.keys import Recipe
from qzo.run.recipe.older import in_todays_words
from qzo.version import __version__

REFERENCE_NAME = "reference.json"
BASE_ORIGIN_NAME = "base_origin.json"  # what it was made from
_NOT_OF_A_RUN = {LOCK_NAME, BASE_NAME, BASE_ORIGIN_NAME}  # what may lie in the folder before a run


def header_of(
    config: Recipe,
    checkpoint: Checkpoint,
    scales: Scales,
    train_set: ExampleSet,
    eval_set: ExampleSet | None,
    stretch: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Return the header of the journal: everything that a replay needs and a resume compares.

    Waits for the digests of the checkpoint, which take a second or so a GB.
    """
    base = shared_origin(checkpoint, Path(config.output_dir))
    return {
        "qzo_version": __version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "generator": GENERATOR,
        "rules": RULES,
        "base": base.name,
        **({} if base.commit is None else {"base_commit": base.commit}),
        "codes_sha256": checkpoint.codes_sha256(),
        "scales_sha256": checkpoint.scales_sha256(),
        "data_sha256": train_set.sha256(),
        "eval_data_sha256": None if eval_set is None else eval_set.sha256(),
        "questions_sha256": train_set.questions_sha256() if config.objective in WRITTEN else None,
        "layers": scales.names,
        "num_values": len(scales),
        **_sections(checkpoint, scales.sections),
        "coordinates": config.zo.coordinates,
        "direction": config.zo.direction,
        "direction_settings": config.zo.direction_settings.to_dict(),
        "basis_steps": config.zo.basis_steps,
        "optimizer": config.zo.optimizer,
        "optimizer_settings": config.zo.optimizer_settings,
        **({} if stretch is None else {"stretch": stretch}),
        "seed": config.seed,
        "recipe": shared_recipe(config.model_dump(mode="json")),
    }


def shared_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe without what its paths say of the user's computer."""
    return {k: shared_name(v) if k in _PATHS and v else v for k, v in values.items()}


def with_base(config: Recipe, checkpoint: Checkpoint) -> Recipe:
    """Return the recipe for the run folder: it says where the base is, in whatever way it came."""
    is_named = Path(config.model).is_dir() and checkpoint.folder.samefile(config.model)
    if is_named or is_inside(checkpoint, Path(config.output_dir)):
        return config
    origin = checkpoint.origin
    return config.model_copy(update={"model": origin.name, "revision": origin.commit})


def _sections(checkpoint: Checkpoint, sections: Sequence[Section]) -> dict[str, Any]:
    if not sections:
        return {}
    digest = unquantized_sha256(checkpoint, sections)
    return {"sections": [s.to_dict() for s in sections], "unquantized_sha256": digest}


# Keys that may name a place on the user's computer.
_PATHS = {"model", "output_dir", "data", "eval_data", "reward"}
# Keys that may change when a run continues: they do not change the numbers.
_FREE = {
    *("output_dir", "resume_from_checkpoint", "report_to", "max_steps", "device", "model", "data"),
    "revision",  # the commit is compared
    *("logging_steps", "save_steps", "save_total_limit", "per_device_eval_batch_size"),
    *("eval_steps", "eval_data", "num_eval_examples", "load_best_model_at_end"),
    *("memory_limit", "journal_sync_steps", "generation_batch_size"),
}
# Keys in which the processes of one run may differ.
_OWN = {"output_dir", "resume_from_checkpoint", "device", "model", "data", "eval_data", "report_to"}
_OWN |= {"memory_limit", "generation_batch_size", "revision"}
# Keys of ``zo`` that choose by name what the header holds: other names may choose the same.
_BY_NAME = {"layers": "modules", "sections": "lora_modules"}
# What else has to be the same, and what may be wrong if it is not.
_COMPARED = {
    "codes_sha256": "model: codes_sha256 of the base differs from",
    "scales_sha256": "model: scales_sha256 of the base differs from",
    "data_sha256": "data: the digest of the training examples differs from",
    "questions_sha256": "data: the digest of prompts, answers or other columns differs from",
    "generator": "qzo_version: the generator of directions differs from",
    "unquantized_sha256": "model: unquantized_sha256 of the base differs from",
}


def open_journal(
    config: Recipe, make_header: Callable[[], Mapping[str, Any]], ranks: Ranks
) -> Journal:
    """Prepare the journal of a new run, or continue one.

    Only the first process of a run keeps a journal. The others get a copy of what it holds, which
    takes them to where the run is.

    Args:
        config: The recipe.
        make_header: Called at once where a run is continued or has several processes, else when the
            journal begins.
        ranks: The processes of the run.

    Returns:
        The journal; a folder that is not empty or holds another run, and processes that differ, are
        errors.
    """
    journal = _open_own(config, make_header) if ranks.is_first else None
    if ranks.size == 1:
        assert journal is not None
        return journal
    header = make_header()
    if journal is not None:
        begin(journal, config)
        ranks.from_first(json.dumps(header).encode("utf-8"))
        ranks.from_first(journal.path.read_bytes())
        return journal
    _check_same(
        json.loads(ranks.from_first(b"")),
        header,
        {
            **_COMPARED,
            "eval_data_sha256": "eval_data: the digest of the evaluation examples differs from",
        },
        _OWN,
        "process 0",
    )
    return Journal.copy_of(Path(config.output_dir) / JOURNAL_NAME, ranks.from_first(b""))


def _open_own(config: Recipe, make_header: Callable[[], Mapping[str, Any]]) -> Journal:
    folder = Path(config.output_dir)
    path = folder / JOURNAL_NAME
    if config.resume_from_checkpoint and path.exists():
        journal = Journal.open(path)
        header = make_header()
        is_constant = header["recipe"]["lr_scheduler_type"] in {"constant", "constant_with_warmup"}
        free = _FREE if is_constant else _FREE - {"max_steps"}
        _check_same(journal.header, header, _COMPARED, free, "the run that is to be continued")
        _write_recipe(folder, config)
    else:
        check_new(folder)
        journal = Journal.create(path, make_header)
    journal.sync_steps = config.journal_sync_steps
    return journal


def check_new(folder: Path) -> None:
    """Refuse a folder that holds more than a base.

    Raises:
        CheckpointError: It does.
    """
    entries = folder.iterdir() if folder.is_dir() else ()
    if any(entry.name not in _NOT_OF_A_RUN and not is_partial(entry) for entry in entries):
        raise CheckpointError(
            f"{folder}: expected a new or empty folder; choose another output_dir, or set "
            "resume_from_checkpoint: true"
        )


def begin(journal: Journal, config: Recipe) -> None:
    """Write the first files of a new run; the journal first: with it, a run can be continued."""
    if not journal.is_on_disk:
        journal.begin()
        _write_recipe(journal.path.parent, config)


def _write_recipe(folder: Path, config: Recipe) -> None:
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_bytes(folder / RECIPE_NAME, text.encode("utf-8"))


def _check_same(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    compared: Mapping[str, str],
    free: Set[str],
    whose: str,
) -> None:
    for key, message in compared.items():
        if old.get(key) != new.get(key):
            raise CheckpointError(f"{message} that of {whose}")
    _check_same_commit(old, new, whose)
    if new["recipe"]["objective"] not in WRITTEN:  # nothing is written that moves the scales
        free = {*free, "max_new_tokens", "generation_stop"}
    free = {*free, "preset"}  # its values are in the other keys
    free = {*free, *(key for held, key in _BY_NAME.items() if old.get(held) == new.get(held))}
    recipe = shared_recipe(_with_defaults(old["recipe"]))  # earlier versions wrote whole paths
    for key, want, got in differing(recipe, new["recipe"], free):
        raise ConfigError(f"{key}: expected {want!r} as in {whose}, got {got!r}")


def _check_same_commit(old: Mapping[str, Any], new: Mapping[str, Any], whose: str) -> None:
    """Refuse another commit of the same repository.

    Raises:
        ConfigError: It is another one.
    """
    want, got = (header.get("base_commit") for header in (old, new))
    if old.get("base") == new["base"] and want != got and None not in (want, got):
        raise ConfigError(
            f"revision: expected commit {want} of {new['base']} as in {whose}, got {got}; set "
            f"revision: {want}"
        )


def _with_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the keys that were not there yet when a journal was begun."""
    defaults = Recipe(model="", output_dir="").model_dump(mode="json")
    filled = {**defaults, **recipe}
    if isinstance(filled["zo"], dict):
        filled["zo"] = {**defaults["zo"], **filled["zo"]}
    return in_todays_words(filled)


def differing(
    old: Mapping[str, Any], new: Mapping[str, Any], free: Set[str], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the keys of two recipes that differ, with both values; ``free`` ones are left out."""
    for key in sorted((set(old) | set(new)) - free):
        want, got = old.get(key), new.get(key)
        if isinstance(want, dict) and isinstance(got, dict):
            yield from differing(want, got, free, f"{prefix}{key}.")
        elif want != got:
            yield prefix + key, want, got


@dataclass(frozen=True)
class Reference:
    """A few examples and what the trained model makes of them; an export is compared with it.

    Attributes:
        data: The examples.
        loss: Of the trained model.
        dtype: Of the model that the loss was measured with.
    """

    data: ExampleSet
    loss: float
    dtype: torch.dtype


def write_reference(folder: Path, reference: Reference) -> None:
    """Write the reference of a run."""
    value = {
        "loss": reference.loss,
        "loss_name": reference.data.loss,
        "dtype": str(reference.dtype).removeprefix("torch."),
        "examples": [asdict(example) for example in reference.data.examples],
    }
    write_bytes(folder / REFERENCE_NAME, json.dumps(value).encode("utf-8"))


def read_reference(folder: Path) -> Reference | None:
    """Read what ``write_reference`` wrote, or None where there is none.

    Raises:
        CheckpointError: The file is damaged.
    """
    if not (folder / REFERENCE_NAME).is_file():
        return None
    value = read_json(folder / REFERENCE_NAME)
    try:
        examples = [_example(entry) for entry in value["examples"]]
        data = ExampleSet(examples, value["loss_name"])
        dtype = DTYPES[value.get("dtype", "float32")]  # earlier versions did not say
        return Reference(data, float(value["loss"]), dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / REFERENCE_NAME}: damaged: {error!r}") from error


def _example(entry: Mapping[str, Any]) -> EncodedExample:
    candidates = tuple(
        Candidate(c["row"], tuple(c["positions"]), tuple(c["targets"])) for c in entry["candidates"]
    )
    return EncodedExample(tuple(tuple(row) for row in entry["rows"]), candidates, entry["label"])
