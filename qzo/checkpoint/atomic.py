"""Files and folders that are either complete or absent.

Everything is written to a temporary name beside its target, synced to disk and renamed.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qzo.errors import CheckpointError

LOCK_NAME = ".lock"
_PARTIAL = ".partial-"
_JSON_BYTES_MAX = 64 * 2**20


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file by new content in one step."""
    with new_file(path) as partial:
        partial.write_bytes(data)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Give a temporary name that replaces ``target`` when the block ends without an error.

    Raises:
        WriteError: The folder cannot be written, or the disk is full.
    """
    partial = _partial(target)
    try:
        yield partial
        sync(partial)
        partial.replace(target)
        sync(target.parent)
    except OSError as error:
        raise WriteError(target, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}{_PARTIAL}{os.getpid()}")


def is_partial(path: Path) -> bool:
    """Tell whether this is what a killed process left of something that it wrote."""
    return path.name.startswith(".") and _PARTIAL in path.name


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode("utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file is missing, too large, or no JSON object.
    """
    try:
        if path.stat().st_size > _JSON_BYTES_MAX:
            raise CheckpointError(f"{path}: expected at most {_JSON_BYTES_MAX} bytes of JSON")
        value = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: expected this file, not found") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def parse_json(data: bytes) -> Any:
    """Parse JSON of anybody.

    Raises:
        ValueError: It is not UTF-8, not JSON, nested too deeply, or has a key twice in an object.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("values nested too deeply") from error


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} twice")
    return result


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes ``target`` when the block ends without an error.

    Raises:
        CheckpointError: The target exists and is not empty, or cannot be written.
        WriteError: The folder cannot be written, or the disk is full.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: expected a new or empty folder; choose another --out")
    partial = _partial(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        if target.exists():
            target.rmdir()
        put_in_place(partial, target)
    except WriteError as error:  # of a file in the temporary folder, whose name nobody knows
        raise WriteError(target, error.error) from error
    except OSError as error:
        raise WriteError(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(folder: Path, target: Path) -> None:
    """Flush a folder to disk and rename it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
    folder.rename(target)
    sync(target.parent)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder that takes the place of ``target`` when it is complete.

    Where a process was killed meanwhile, ``settle`` finishes what it began.

    Raises:
        WriteError: It cannot be written; what was there before is intact.
    """
    complete = _complete(target)
    remove(complete)
    try:
        with new_folder(complete) as partial:
            yield partial
        settle(target)
    except WriteError as error:
        raise WriteError(target, error.error) from error
    except OSError as error:
        raise WriteError(target, error) from error


def settle(target: Path) -> None:
    """Put a folder in its place that a killed process completed and did not put there."""
    complete = _complete(target)
    if complete.exists():
        remove(target)  # or what is left of it
        complete.rename(target)
        sync(target.parent)


def _complete(target: Path) -> Path:
    return target.with_name(f".{target.name}.complete")


def remove(folder: Path) -> None:
    """Remove a folder if it exists."""
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder if need be, and keep other processes that lock it out while the block runs.

    The lock goes with the process, however that ends.

    Raises:
        CheckpointError: Another process holds it, or there is a file in the place of the folder.
        WriteError: The folder cannot be written.
    """
    if folder.is_file():
        raise CheckpointError(
            f"{folder}: expected a new or empty folder, found a file; choose another output_dir"
        )
    lock = FileLock(folder / LOCK_NAME)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CheckpointError(
            f"{folder}: expected a folder of one run, but another process is at work in it; wait "
            "for its end, or choose another output_dir"
        ) from error
    except OSError as error:
        raise WriteError(folder, error) from error
    try:
        yield
    finally:
        (folder / LOCK_NAME).unlink(missing_ok=True)  # filelock does not take a removed file
        lock.release()


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class WriteError(CheckpointError):
    """A file or folder could not be written; what was there before is intact.

    Args:
        path: The target.
        error: Why.
    """

    def __init__(self, path: Path, error: OSError) -> None:
        self.error = error
        reason = error.strerror or error
        super().__init__(f"{path}: cannot be written: {reason}; nothing was left half-written")
