"""What every command prints with: a plain console, and one JSON object where that is asked for."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

AsJSON = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
PrintJSON = Callable[[Any], None]


def console() -> Console:
    """Return a console that prints text as it is: ``qzo[gptq]`` is no markup."""
    return Console(highlight=False, markup=False, emoji=False)


def stderr_console() -> Console:
    """Return the same for what is no result."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


@contextmanager
def stdout_for(as_json: bool) -> Iterator[PrintJSON]:
    """Give a function that prints the result; under ``--json`` nothing else reaches stdout."""
    real = sys.stdout
    if as_json:
        sys.stdout = sys.stderr
    try:
        yield lambda value: _write_line(json.dumps(_json(value), default=str), real)
    finally:
        sys.stdout = real


def _write_line(text: str, stream: Any) -> None:
    stream.write(f"{text}\n")
    stream.flush()


def _json(value: Any) -> Any:
    """Return a value without NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
