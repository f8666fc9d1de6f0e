"""``memory_limit`` from the recipe to the model, and what loading must not wait for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import RECORDS, json_lines, tiny_checkpoint, tiny_recipe, write_lines

from qzo.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qzo.data.examples import ExampleSet
from qzo.errors import ConfigError
from qzo.model.streaming.free_memory import available_bytes
from qzo.run import launch as run
from qzo.run.journal.journal import Journal
from qzo.run.recipe.keys import Recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "model", num_layers=2)


def short_recipe(base: Path, out: Path, **keys: Any) -> Recipe:
    data = write_lines(out.parent / f"{out.name}.jsonl", RECORDS)
    return tiny_recipe(base, out, data=str(data), max_steps=2, num_eval_examples=0, **keys)


def losses(out: Path) -> list[Any]:
    return [line["losses"] for line in json_lines(out / "journal.jsonl") if "losses" in line]


def test_a_limited_run_has_the_losses_of_an_unlimited_one(base: Path, tmp_path: Path) -> None:
    run.train(short_recipe(base, tmp_path / "free"))
    run.train(short_recipe(base, tmp_path / "limited", memory_limit="2GiB"))
    assert len(losses(tmp_path / "free")) == 2
    assert losses(tmp_path / "limited") == losses(tmp_path / "free")


def test_a_run_may_continue_under_another_limit(base: Path, tmp_path: Path) -> None:
    recipe = short_recipe(base, tmp_path / "run", lr_scheduler_type="constant")
    run.train(recipe)
    more = {"max_steps": 3, "resume_from_checkpoint": True, "memory_limit": "2GiB"}
    result = run.train(recipe.model_copy(update=more))
    assert result is not None
    assert result.steps == 3


@pytest.mark.parametrize("value", ["4", "much", "-1GiB"])
def test_a_limit_without_number_and_unit_is_refused(base: Path, tmp_path: Path, value: str) -> None:
    message = (
        "^memory_limit: expected a number with a unit, such as 24GiB, 8GB or 500MiB, got "
        f"'{value}'$"
    )
    with pytest.raises(ConfigError, match=message):
        tiny_recipe(base, tmp_path, memory_limit=value)


def test_a_limit_below_what_the_run_needs_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^memory_limit: expected at least 0\.\d\dGiB for this"):
        run.train(short_recipe(base, tmp_path / "run", memory_limit="1MiB"))


@pytest.mark.parametrize(("available", "streams"), [(2**20, True), (2**40, False)])
def test_a_model_streams_by_itself_where_memory_is_short(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: int, streams: bool
) -> None:
    monkeypatch.setattr("qzo.plan.budget.available_bytes", lambda _: available)
    monkeypatch.setattr("qzo.plan.budget._SMALL", 0.0)
    recipe = short_recipe(base, tmp_path / "run")
    model = run.load_model(recipe, open_checkpoint(base), [ExampleSet([], "classification")])
    assert (model.qzo_budget is not None) is streams


def test_the_system_tells_how_much_memory_is_there() -> None:
    available = available_bytes(torch.device("cpu"))
    assert available is not None
    assert 2**20 < available < 2**50


def test_the_first_step_does_not_wait_for_the_digest_of_the_codes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    begin = Journal.begin
    codes_sha256 = Checkpoint.codes_sha256

    def noted_begin(journal: Journal) -> None:
        events.extend(["journal"] * (not journal.is_on_disk))
        begin(journal)

    def noted_digest(checkpoint: Checkpoint) -> str:
        events.append("digest")
        return codes_sha256(checkpoint)

    monkeypatch.setattr(Journal, "begin", noted_begin)
    monkeypatch.setattr(Checkpoint, "codes_sha256", noted_digest)
    monkeypatch.setattr("qzo.objective.loss.answer_scores", _noted("forward", events, run_scores()))
    run.train(short_recipe(base, tmp_path / "run"))
    assert events[:3] == ["forward", "journal", "digest"]


def _noted(name: str, events: list[str], function: Any) -> Any:
    def noted(*args: Any, **kwargs: Any) -> Any:
        events.append(name)
        return function(*args, **kwargs)

    return noted


def run_scores() -> Any:
    from qzo.model.stacked import answer_scores

    return answer_scores


def test_a_run_that_is_stopped_before_its_first_step_can_start_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = short_recipe(base, tmp_path / "run")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qzo.objective.loss.answer_scores", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.train(recipe)
    result = run.train(recipe)
    assert result is not None
    assert result.steps == 2


def test_what_is_left_of_a_share_of_a_gpu_is_its_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gib = 2**30

    def fraction(device: int) -> float:
        assert type(device) is int  # torch refuses a device without a number here
        return 0.25

    monkeypatch.setattr("torch.cuda.memory._lazy_init", lambda: None)
    monkeypatch.setattr("torch._C._cuda_getMemoryFraction", fraction, raising=False)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (70 * gib, 80 * gib))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 3 * gib)
    for name in ("cuda", "cuda:0"):
        assert available_bytes(torch.device(name)) == (20 - 3) * gib
