"""Numbers that a refactoring leaves alone: losses, fingerprints and tuned scales of short runs.

On a machine that rounds like the one that wrote ``golden/runs.json`` they are equal bit for bit. On
others only the losses of the first step are compared, with a tolerance: what an optimizer makes of
the last bits of a difference of losses need not agree.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from support.golden import CASES, COMMANDS, FILE, arithmetic, measure, write_bases

pytestmark = pytest.mark.slow  # some fifty runs; half a minute

GOLDEN: dict[str, Any] = json.loads(FILE.read_text())
ROUNDING = 1e-4  # nats; products of other machines differ by some 1e-6


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("golden"))


def test_every_run_is_kept() -> None:
    assert set(GOLDEN["runs"]) == {*CASES, *COMMANDS}
    assert len(GOLDEN["runs"]) > 45


@pytest.mark.parametrize("name", [*CASES, *COMMANDS])
def test_the_numbers_are_those_that_were_kept(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    kept = GOLDEN["runs"][name]

    got = measure(name, bases, tmp_path / "run")

    if arithmetic() == GOLDEN["arithmetic"]:
        assert got == kept
    else:
        assert got["losses"][0] == pytest.approx(kept["losses"][0], abs=ROUNDING)
        assert len(got["losses"]) == len(kept["losses"])
