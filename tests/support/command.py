"""Commands of the command line, run in this process."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from transformers.utils.logging import disable_progress_bar

from qzo import cli


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def value(self) -> dict[str, Any]:
        """The one JSON object on standard output, strictly read."""
        value: dict[str, Any] = json.loads(self.out, parse_constant=_refuse)
        assert self.out == json.dumps(value) + "\n"
        return value


Run = Callable[..., Ran]


def command(capsys: Any) -> Run:
    """Return ``run(*arguments)``, which runs ``qzo`` with these arguments."""

    disable_progress_bar()  # as TQDM_DISABLE does in a fresh process

    def run(*arguments: str | Path) -> Ran:
        capsys.readouterr()
        with patch.object(sys, "argv", ["qzo", *map(str, arguments)]):
            code = _exit_code()
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


def _exit_code() -> int:
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _refuse(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def write_recipe(path: Path, base: Path, data: Path, out: Path, **keys: Any) -> Path:
    """Write a recipe of three small steps."""
    values = {
        **{"model": str(base), "data": str(data), "output_dir": str(out), "max_steps": 3},
        **{"per_device_train_batch_size": 2, "max_length": 40, "num_eval_examples": 0},
    }
    path.write_text(yaml.safe_dump({**values, **keys}), encoding="utf-8")
    return path
