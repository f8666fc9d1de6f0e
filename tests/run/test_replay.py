import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.runs import ESTIMATORS, change_tensor, json_lines, tiny_checkpoint, tiny_trainer

import qzo
from qzo.checkpoint.atomic import locked
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.errors import CheckpointError, ConfigError
from qzo.method.coordinates import Coordinates
from qzo.method.optimizers import OPTIMIZERS
from qzo.method.trained_vector import Scales
from qzo.run.journal.compact import write_compact
from qzo.run.journal.journal import Journal
from qzo.run.journal.lines import direction_settings_of
from qzo.run.output.replay import apply_journal, optimizer_of

STEPS = 6


@dataclass(frozen=True)
class Run:
    base: Path
    folder: Path
    values: torch.Tensor

    @property
    def journal(self) -> Path:
        return self.folder / "journal.jsonl"


def trained_run(folder: Path, zo: dict[str, Any]) -> Run:
    """Train with a fingerprint every two steps."""
    base = tiny_checkpoint(folder / "base")
    trainer = tiny_trainer(base, folder / "run", max_steps=STEPS, zo=zo)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qzo.run.periodic.FINGERPRINT_STEPS", 2)
        trainer.train()
    return Run(base, folder / "run", trainer.scales.values.clone())


@pytest.fixture(scope="module", params=sorted(ESTIMATORS))
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run for every kind of step; tests only read it."""
    return trained_run(tmp_path_factory.mktemp("each"), ESTIMATORS[request.param])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run; tests copy it before they change it."""
    return trained_run(tmp_path_factory.mktemp("replay"), ESTIMATORS["momentum"])


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A copy of the run, on a base of its own."""
    base = Path(shutil.copytree(trained.base, tmp_path / "base"))
    folder = Path(shutil.copytree(trained.folder, tmp_path / "run"))
    change_line(folder / "journal.jsonl", 0, base=str(base))
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    return Run(base, folder, trained.values)


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_line(path: Path, number: int, **values: Any) -> None:
    lines = json_lines(path)
    lines[number] |= values
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def refusal(message: str) -> Any:
    return pytest.raises(CheckpointError, match=f"^{message}$")


def rebuilt(run: Run, *, to_step: int | None = None) -> torch.Tensor:
    journal = Journal.open(run.journal)
    scales = Scales.of_checkpoint(
        open_checkpoint(run.base),
        journal.header["layers"],
        coordinates=journal.header["coordinates"],
        direction=journal.header["direction"],
        direction_settings=direction_settings_of(journal.header),
    )
    apply_journal(journal, scales, optimizer_of(journal.header), to_step=to_step)
    return scales.values


def test_all_coordinates_and_optimizers_are_under_test() -> None:
    zo = ESTIMATORS.values()
    assert {z.get("coordinates", "row") for z in zo} == set(get_args(Coordinates))
    assert {z.get("optimizer", "sgd") for z in zo} == set(OPTIMIZERS)


def test_the_journal_gives_bitwise_the_trained_scales(each: Run) -> None:
    assert torch.equal(rebuilt(each), each.values)
    assert not torch.equal(rebuilt(each, to_step=STEPS - 1), each.values)


def test_a_replay_agrees_with_the_adapter_and_all_fingerprints(each: Run) -> None:
    result = qzo.replay(each.folder)

    assert (result.steps, result.num_fingerprints, result.adapter) == (STEPS, 3, "equal")
    assert result.fingerprint == json_lines(each.journal)[-1]["fingerprint"]


def test_a_bare_journal_is_an_adapter(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(run.journal, tmp_path / "bare")

    assert qzo.replay(tmp_path / "bare").adapter == "written"

    written = (tmp_path / "bare" / "adapter_model.safetensors").read_bytes()
    assert written == (run.folder / "adapter_model.safetensors").read_bytes()
    assert qzo.replay(tmp_path / "bare").adapter == "equal"


def test_a_run_that_another_process_is_at_work_in_is_not_written_to(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(run.journal, tmp_path / "bare")
    with locked(tmp_path / "bare"):
        with pytest.raises(CheckpointError, match=r"but another process is at work in it; wait"):
            qzo.replay(tmp_path / "bare")
        assert qzo.replay(tmp_path / "bare", out=tmp_path / "out").adapter == "written"
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == ["journal.jsonl"]


def test_a_compact_journal_is_an_adapter(each: Run, tmp_path: Path) -> None:
    compact = tmp_path / "run.safetensors"
    write_compact(Journal.open(each.journal), compact)

    result = qzo.replay(compact, out=tmp_path / "out", base=str(each.base))

    assert (result.steps, result.num_fingerprints, result.adapter) == (STEPS, 3, "written")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (each.folder / name).read_bytes()


def test_a_compact_journal_replays_to_an_earlier_step(run: Run, tmp_path: Path) -> None:
    compact = tmp_path / "run.safetensors"
    write_compact(Journal.open(run.journal), compact)

    result = qzo.replay(compact, to_step=3, out=tmp_path / "a")

    assert (result.steps, result.num_fingerprints) == (3, 1)
    assert result == qzo.replay(run.folder, to_step=3, out=tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_folder_may_hold_the_compact_journal_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    write_compact(Journal.open(run.journal), tmp_path / "bare" / "journal.safetensors")

    assert qzo.replay(tmp_path / "bare").adapter == "written"

    written = (tmp_path / "bare" / "adapter_model.safetensors").read_bytes()
    assert written == (run.folder / "adapter_model.safetensors").read_bytes()


def test_a_journal_that_is_a_file_needs_a_folder_for_the_adapter(run: Run) -> None:
    reason = f"{run.journal}: name a folder for the adapter with --out"
    with pytest.raises(ConfigError, match=f"^{re.escape(reason)}$"):
        qzo.replay(run.journal)


def test_a_base_that_was_moved_can_be_named(run: Run, tmp_path: Path) -> None:
    moved = run.base.rename(tmp_path / "elsewhere")
    message = "expected a folder or a hub id, found neither; name the base of the run with --base"
    with refusal(f"{run.base}: {message}"):
        qzo.replay(run.folder)

    assert qzo.replay(run.folder, base=str(moved)).adapter == "equal"


def test_a_replay_writes_an_earlier_step_into_a_folder_of_its_own(run: Run, tmp_path: Path) -> None:
    before = (run.folder / "adapter_model.safetensors").read_bytes()

    result = qzo.replay(run.folder, to_step=3, out=tmp_path / "out")

    assert (result.steps, result.adapter) == (3, "written")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["step"] == 3
    assert (run.folder / "adapter_model.safetensors").read_bytes() == before
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before


def test_a_replay_never_overwrites_the_adapter_of_the_run(run: Run) -> None:
    before = (run.folder / "adapter_model.safetensors").read_bytes()

    with refusal(
        f"{run.folder}: expected the adapter of step 3, found that of step 6; name a folder for "
        "the other one with --out"
    ):
        qzo.replay(run.folder, to_step=3)

    assert (run.folder / "adapter_model.safetensors").read_bytes() == before


def test_a_replay_needs_as_many_steps_as_it_is_asked_for(run: Run, tmp_path: Path) -> None:
    with refusal(f"{run.journal}: expected 9 steps, found 6"):
        qzo.replay(run.folder, to_step=9, out=tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_a_replay_ignores_a_torn_last_line(run: Run, tmp_path: Path) -> None:
    with run.journal.open("a") as file:
        file.write('{"step":6,"losses":[1.0')
    before = run.journal.read_bytes()

    assert qzo.replay(run.folder).adapter == "equal"
    assert run.journal.read_bytes() == before


def test_a_replay_of_a_run_with_a_loss_that_was_not_finite_is_bitwise_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    trainer = tiny_trainer(
        base, tmp_path / "run", zo={"estimator": "per_example", "normalize": False}
    )
    measure = trainer.objective.losses
    steps = iter(range(STEPS))

    def losses(probes: Any, batch: Any) -> list[float]:
        values: list[float] = measure(probes, batch)
        if next(steps) == 2:
            values[0] = float("nan")  # the first of three directions: the others keep their seeds
        return values

    monkeypatch.setattr(trainer.objective, "losses", losses)
    result = trainer.train()

    line = json_lines(tmp_path / "run" / "journal.jsonl")[3]
    assert [d is None for d in line["derivatives"]] == [True, False, False]
    assert result.skipped_steps == 0
    assert qzo.replay(tmp_path / "run").adapter == "equal"
    run = Run(base, tmp_path / "run", trainer.scales.values)
    assert torch.equal(rebuilt(run), run.values)


@pytest.mark.parametrize(
    ("role", "digest"),
    [("qweight", "codes_sha256"), ("qzeros", "codes_sha256"), (".scales", "scales_sha256")],
)
def test_a_changed_base_is_noticed(run: Run, role: str, digest: str) -> None:
    change_tensor(run.base / "model.safetensors", role)

    with refusal(
        f"{run.base}: {digest} is not that of the journal; the base was changed since the run, or "
        "is another one"
    ):
        qzo.replay(run.folder)


def test_other_numbers_need_another_generator(run: Run) -> None:
    change_line(run.journal, 0, generator="philox4x32-10/v2")

    with refusal(r"journal: expected generator 'philox4x32-10/v1', got 'philox4x32-10/v2'"):
        qzo.replay(run.folder)


@pytest.mark.parametrize("key", ["derivatives", "learning_rate"])
def test_a_changed_step_is_noticed(run: Run, key: str) -> None:
    value = json_lines(run.journal)[2][key]
    change_line(
        run.journal, 2, **{key: [v + 0.5 for v in value] if isinstance(value, list) else 2 * value}
    )

    with refusal(
        r"step 2: expected scales with sha256 [0-9a-f]{12}\.\.\., got [0-9a-f]{12}\.\.\.; the "
        r"journal or the base was changed"
    ):
        qzo.replay(run.folder)


def test_a_changed_seed_is_noticed(run: Run) -> None:
    change_line(run.journal, 0, seed=1)

    with refusal(
        r"step 2: expected scales with sha256 .{15}, got .{15}; the journal or the base was changed"
    ):
        qzo.replay(run.folder)


def test_a_changed_adapter_is_noticed(run: Run) -> None:
    key = change_tensor(run.folder / "adapter_model.safetensors", "scales")

    with refusal(f"{re.escape(key)}: the adapter differs from the journal's scales"):
        qzo.replay(run.folder)


@pytest.mark.parametrize("key", ["base_model_name_or_path", "codes_sha256", "coordinates", "step"])
def test_an_adapter_config_without_what_is_read_is_refused(run: Run, key: str) -> None:
    change_json(run.folder / "adapter_config.json", **{key: None})

    kind = "int" if key == "step" else "str"
    with refusal(f"{run.folder / 'adapter_config.json'}: expected {key} of type {kind}, got None"):
        qzo.replay(run.folder)


def test_steps_of_adam_that_were_rounded_in_another_way_are_refused(tmp_path: Path) -> None:
    folder = trained_run(tmp_path, ESTIMATORS["adam"]).folder
    path = folder / "journal.jsonl"
    header, *lines = path.read_text().splitlines(keepends=True)
    values = json.loads(header)
    del values["rules"]
    path.write_text("".join([json.dumps(values) + "\n", *lines]))

    message = r"^journal: expected steps of adam by rules 2, got None, which round in another way; "
    with pytest.raises(CheckpointError, match=message):
        qzo.replay(folder)
