"""What a process does that a test starts and may kill: a module of its own, to be imported."""

import os
import resource
import sys
from pathlib import Path
from typing import Any


def train(values: dict[str, Any], errors: str) -> None:
    """Train in a process of its own, as the command line does."""
    from qzo import cli

    with open(errors, "a") as file:
        os.dup2(file.fileno(), 2)
    path = Path(errors).with_suffix(".yaml")
    path.write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
    sys.argv = ["qzo", "train", str(path), "--json"]
    cli.main()


def read_bomb(path: Path, limit: int) -> tuple[str, int]:
    """Return the refusal of a data file, and the bytes by which reading raised the peak."""
    import pyarrow.parquet  # noqa: F401  # before the measurement

    from qzo.data import records
    from qzo.errors import DataError

    records._PARQUET_BYTES_MAX = limit
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        records.read_records(path)
    except DataError as error:
        return str(error), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return "it was read", 0
