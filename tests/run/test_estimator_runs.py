"""Real runs with every estimator: stopped, continued, replayed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.runs import ESTIMATORS, MORE_ESTIMATORS, json_lines, tiny_checkpoint, tiny_trainer

import qzo
from qzo.errors import ConfigError
from qzo.run.journal.compact import write_compact
from qzo.run.journal.journal import Journal
from qzo.run.recipe.keys import ZOConfig
from qzo.run.trainer import Trainer

pytestmark = pytest.mark.slow  # whole runs; the file takes half a minute

STEPS = 4
FILES = ("adapter_model.safetensors", "adapter_config.json")


class StopError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("estimators") / "base")


@pytest.fixture(autouse=True)
def fingerprints() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qzo.run.periodic.FINGERPRINT_STEPS", 2)
        yield


@pytest.fixture(params=MORE_ESTIMATORS)
def zo(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MORE_ESTIMATORS[request.param]


def trainer_of(base: Path, folder: Path, zo: dict[str, Any], **keys: Any) -> Trainer:
    given = {"max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 2, **keys}
    return tiny_trainer(base, folder, zo=zo, resume_from_checkpoint=True, **given)


def lines(folder: Path) -> list[bytes]:
    """Return the journal without its header, which names the folder."""
    return (folder / "journal.jsonl").read_bytes().split(b"\n")[1:]


def stopped(trainer: Trainer, after: int) -> None:
    """Train, and end in the forward after so many steps."""
    measure, calls = trainer.objective.losses, iter(range(STEPS))

    def losses(*arguments: Any) -> list[float]:
        if next(calls) == after:
            raise StopError
        return measure(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.objective, "losses", losses)
        with pytest.raises(StopError):
            trainer.train()


def test_all_estimators_of_a_recipe_run() -> None:
    blocks = [*ESTIMATORS.values(), *MORE_ESTIMATORS.values()]
    names = get_args(ZOConfig.model_fields["estimator"].annotation)

    assert {zo.get("estimator", "per_example") for zo in blocks} == set(names)
    assert len(names) == 7


def test_a_stopped_run_ends_like_a_straight_one_and_replays(
    base: Path, tmp_path: Path, zo: dict[str, Any]
) -> None:
    straight = trainer_of(base, tmp_path / "straight", zo)
    before = straight.scales.values.clone()
    straight.train()
    stopped(trainer_of(base, tmp_path / "stopped", zo, save_steps=2), after=3)
    trainer_of(base, tmp_path / "stopped", zo, save_steps=2).train()

    assert not torch.equal(straight.scales.values, before)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "straight")
    write_compact(Journal.open(tmp_path / "straight" / "journal.jsonl"), tmp_path / "c.safetensors")
    qzo.replay(tmp_path / "c.safetensors", out=tmp_path / "compact", base=str(base))
    for name in FILES:
        want = (tmp_path / "straight" / name).read_bytes()
        assert (tmp_path / "stopped" / name).read_bytes() == want
        assert (tmp_path / "compact" / name).read_bytes() == want
    result = qzo.replay(tmp_path / "straight")
    assert (result.steps, result.num_fingerprints, result.adapter) == (STEPS, 2, "equal")


def test_the_journal_of_1_5_spsa_holds_curvatures(base: Path, tmp_path: Path) -> None:
    trainer_of(base, tmp_path, MORE_ESTIMATORS["spsa_1_5"], max_steps=1).train()

    line = json_lines(tmp_path / "journal.jsonl")[1]

    center, *losses = line["losses"]
    second = [(a + b - 2 * center) / 1e-4 for a, b in zip(losses[:2], losses[2:], strict=True)]
    assert line["curvatures"] == pytest.approx(second)  # epsilon is 0.01


def test_the_header_holds_basis_steps(base: Path, tmp_path: Path) -> None:
    for zo in ({}, {"basis_steps": 2}):
        folder = tmp_path / str(len(zo))
        trainer_of(base, folder, zo, max_steps=1).train()
        assert json_lines(folder / "journal.jsonl")[0]["basis_steps"] == zo.get("basis_steps")


def without_new_keys(journal: Path) -> None:
    """Take away what a journal of an earlier version does not have."""
    header, rest = journal.read_text().split("\n", 1)
    values = json.loads(header)
    del values["basis_steps"]
    for key in ("basis_steps", "examples_per_direction", "sides"):
        del values["recipe"]["zo"][key]
    journal.write_text(f"{json.dumps(values)}\n{rest}")


def test_a_journal_without_the_new_keys_is_continued(base: Path, tmp_path: Path) -> None:
    zo = ESTIMATORS["row"]
    straight = trainer_of(base, tmp_path / "straight", zo)
    straight.train()
    stopped(trainer_of(base, tmp_path / "stopped", zo), after=3)
    without_new_keys(tmp_path / "stopped" / "journal.jsonl")

    reason = r"zo\.basis_steps: expected None as in the run that is to be continued, got 2"
    with pytest.raises(ConfigError, match=f"^{reason}$"):
        trainer_of(base, tmp_path / "stopped", {**zo, "basis_steps": 2}).train()
    trainer_of(base, tmp_path / "stopped", zo).train()

    assert lines(tmp_path / "stopped") == lines(tmp_path / "straight")
    assert qzo.replay(tmp_path / "stopped").adapter == "equal"
