"""Repositories as huggingface_hub lays them out in its cache, for tests without a network."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def offline_hub(cache: Path) -> Iterator[Path]:
    """Let huggingface_hub read a cache of the test's own, and nothing from the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield cache


def add_commit(cache: Path, name: str, folder: Path, *, branch: str, commit: str) -> Path:
    """Put the files of a folder into the cache as a commit to which a branch points.

    Returns:
        The folder of the commit, whose files are links to blobs.
    """
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        relative = path.relative_to(folder)
        blob = blobs / f"{commit[:4]}-{'-'.join(relative.parts)}"
        shutil.copyfile(path, blob)
        link = snapshot / relative
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    point(repository, branch, commit)
    return snapshot


def point(repository: Path, branch: str, commit: str) -> None:
    """Let a branch point to a commit."""
    ref = repository / "refs" / branch
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)
