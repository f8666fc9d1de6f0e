"""Finding the base of a run again.

Journal and adapter name the base so that they can be shared: a repository on the hub with its
commit, or the last part of a path. Where a folder lies on this computer says ``recipe.yaml`` in the
run folder.
"""

from pathlib import Path
from typing import Any

import yaml

from qzo.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qzo.checkpoint.hub import Origin, is_hub_id
from qzo.errors import CheckpointError

BASE_NAME = "base"  # in a run folder: the checkpoint of a model that was quantized for the run
RECIPE_NAME = "recipe.yaml"


def shared_origin(checkpoint: Checkpoint, run: Path) -> Origin:
    """Return the name of a base for what is shared; one inside the run folder is named from there.

    Args:
        checkpoint: The base.
        run: The run folder.
    """
    if is_inside(checkpoint, run):
        return Origin(BASE_NAME)
    return Origin(checkpoint.origin.shared_name, checkpoint.origin.commit)


def is_inside(checkpoint: Checkpoint, run: Path) -> bool:
    """Tell whether a base was made for a run and lies in its folder."""
    return checkpoint.folder.resolve() == (run / BASE_NAME).resolve()


def open_base(
    recorded: Origin, run: Path, *, base: str | None = None, revision: str | None = None
) -> Checkpoint:
    """Open the base of a run.

    Args:
        recorded: What journal or adapter say; earlier versions wrote an absolute path.
        run: The run folder, or the file of a journal.
        base: Where the user says it is.
        revision: With ``base``: a branch, tag or commit.

    Raises:
        CheckpointError: It is not found.
    """
    if base is not None or revision is not None:
        return open_checkpoint(base or recorded.name, revision)
    for folder in _candidates(recorded.name, run if run.is_dir() else run.parent):
        if folder.is_dir():
            return open_checkpoint(folder)
    if recorded.commit is None and not ("/" in recorded.name and is_hub_id(recorded.name)):
        raise CheckpointError(
            f"{recorded.name}: expected a folder or a hub id, found neither; name the base of the "
            "run with --base"
        )
    return open_checkpoint(recorded.name, recorded.commit)


def _candidates(name: str, run: Path) -> list[Path]:
    """Return where a base may lie: in the run folder, where the recipe says, where its name says.

    Relative paths start in the current folder, or in that where the run was started.
    """
    if Path(name).is_absolute():
        return [Path(name)]
    recipe = read_run_recipe(run)
    model, out = recipe.get("model"), recipe.get("output_dir")
    found = [run / BASE_NAME] if name == BASE_NAME else []
    if isinstance(model, str) and isinstance(out, str) and not recipe.get("quantize"):
        found += [Path(model), *_from_start(Path(model), run.resolve(), Path(out))]
    return [*found, Path(name)]


def _from_start(model: Path, run: Path, output_dir: Path) -> list[Path]:
    """Return a relative path as seen from where the run was started."""
    parts = output_dir.parts
    if output_dir.is_absolute() or not parts or ".." in parts or run.parts[-len(parts) :] != parts:
        return []
    return [run.parents[len(parts) - 1] / model]


def read_run_recipe(run: Path) -> dict[str, Any]:
    """Return the recipe in a run folder; nothing where there is none that can be read."""
    try:
        values = yaml.safe_load((run / RECIPE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):  # it is a help, no more
        return {}
    return values if isinstance(values, dict) else {}
