"""What a process does that a test starts and may kill: a module of its own, to be imported."""

import os
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
