"""Where a model comes from: a folder, or a repository of the Hugging Face hub at a commit.

A downloaded repository lies in ``models--OWNER--NAME/snapshots/COMMIT`` of the hub's cache, which
is how its id and its commit are known again. What a run or an export shares (journal, adapter,
model card) names a model by its id and commit, or by ``shared_name`` of its path.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from huggingface_hub import snapshot_download

from qzo.errors import CheckpointError, ConfigError

# What a model needs besides its weights and config.json, wherever it is loaded.
SIDE_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *(
        "*.model",
        "*.tiktoken",
        "tekken.json",
        "chat_template*",
        "additional_chat_templates/*.jinja",
    ),
    *("generation_config.json", "*processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Origin:
    """How a user names a model.

    Attributes:
        name: The id of a repository, or the path as it was given.
        commit: Of the repository; None for a path.
    """

    name: str
    commit: str | None = None

    @property
    def shared_name(self) -> str:
        """The name for files that others will read."""
        return self.name if self.commit is not None else shared_name(self.name)


def shared_name(path: str) -> str:
    """Return a path without what it says of the user's computer.

    A relative path stays as it is; of any other one only the last name is left.
    """
    parts = PurePath(path)
    is_local = parts.is_absolute() or ".." in parts.parts or path.startswith("~")
    return parts.name if is_local and parts.name else path


def is_hub_id(source: str) -> bool:
    """Tell whether this can be the id of a repository."""
    return _HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def fetch(source: str, revision: str | None, patterns: Sequence[str], expected: str) -> Path:
    """Return the folder of a repository on the hub; what is not there yet is downloaded.

    Args:
        source: Its id.
        revision: A branch, tag or commit; the main branch if None.
        patterns: Names of the files that are wanted, at the top level. Folders often hold a second
            copy of the weights.
        expected: What the source could have been, for the error.

    Raises:
        CheckpointError: It cannot be had.
    """
    nested = [f"*/{pattern}" for pattern in patterns if "/" not in pattern]
    try:
        folder = snapshot_download(
            source,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=[*nested, "consolidated*"],
        )
    except (OSError, ValueError, RuntimeError) as error:
        name = source if revision is None else f"{source}, revision {revision}"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{name}: {expected}: {reason}") from error
    return Path(folder)


def checked_folder(folder: Path, revision: str | None) -> Path:
    """Return a folder or file that was named without a revision.

    Raises:
        ConfigError: There is a revision.
    """
    if revision is not None:
        raise ConfigError(
            f"revision cannot be combined with {folder}: only repositories on the hub have "
            "revisions; leave it out, or name the model by its hub id"
        )
    return folder


def origin_of(source: str | Path, folder: Path) -> Origin:
    """Return the name of a model that was found in a folder.

    Args:
        source: As the user gave it.
        folder: Where it is; in the hub's cache it says id and commit.
    """
    place = folder.absolute()
    repository = place.parent.parent.name
    if (
        place.parent.name == "snapshots"
        and repository.startswith("models--")
        and _COMMIT.fullmatch(place.name)
    ):
        return Origin(repository.removeprefix("models--").replace("--", "/"), place.name)
    return Origin(str(source))


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat templates, generation settings and licence into another folder."""
    for pattern in SIDE_FILES:
        for path in source.glob(pattern):
            if path.is_file():
                copy = target / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
