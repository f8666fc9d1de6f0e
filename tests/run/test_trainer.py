import json
import math
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import logits_of
from support.runs import (
    COMPLETIONS,
    ESTIMATORS,
    RECORDS,
    change_tensor,
    dense_equal,
    json_lines,
    tiny_checkpoint,
    tiny_recipe,
    tiny_trainer,
    write_lines,
)
from transformers import TrainerCallback

import qzo
from qzo.checkpoint.atomic import write_json
from qzo.errors import CheckpointError, ConfigError, DataError, QZOError
from qzo.method.optimizers.sgd import SGD
from qzo.method.trained_vector import Scales
from qzo.model.load import load_tokenizer
from qzo.objective.evaluate import evaluate
from qzo.objective.loss import Objective
from qzo.run import trainer as trainer_module
from qzo.run.launch import data_sets
from qzo.run.output import adapter as adapter_module
from qzo.run.output import snapshots as snapshots_module
from qzo.run.output.adapter import open_adapter
from qzo.run.output.metrics import evaluations
from qzo.run.output.snapshots import Snapshots, read_snapshot
from qzo.run.periodic import BetweenSteps
from qzo.run.recipe.read import recipe
from qzo.run.result import Result, StoppedError
from qzo.run.trainer import Trainer

EVALUATION = RECORDS[:4]
STEPS = 6


class StopError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("trainer") / "base")


@pytest.fixture(autouse=True)
def fingerprints() -> Iterator[None]:
    """Write a fingerprint every three steps, so that short runs have some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qzo.run.periodic.FINGERPRINT_STEPS", 3)
        yield


@pytest.fixture
def eval_losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Give evaluations the losses of the test, one after the other."""

    def give(losses: list[float]) -> None:
        queue = iter(losses)
        monkeypatch.setattr(
            trainer_module,
            "evaluate",
            lambda *given, **named: replace(evaluate(*given, **named), loss=next(queue)),
        )

    return give


# Those that differ in what is trained, and those whose optimizer remembers something.
COORDINATES = ("row", "column", "rank_one", "relative", "absolute")
STATEFUL = ("momentum", "adam", "lozo_momentum", "meazo", "hizoo", "conmezo")


def test_every_estimator_is_under_test() -> None:
    assert {*COORDINATES, *STATEFUL, "conservative", "sign"} == set(ESTIMATORS)


def saved(folder: Path) -> dict[str, Any]:
    """Return what a run leaves behind and what must not depend on how often it was stopped."""
    names = ("adapter_model.safetensors", "adapter_config.json", "reference.json")
    header, lines = (folder / "journal.jsonl").read_bytes().split(b"\n", 1)
    values = {**json.loads(header), "recipe": None}  # it names the folder
    return {"header": values, "lines": lines, **{n: (folder / n).read_bytes() for n in names}}


def journal_steps(folder: Path) -> list[dict[str, Any]]:
    return [line for line in json_lines(folder / "journal.jsonl") if "derivatives" in line]


def logged(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics without times, which differ between runs."""
    lines = json_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def after_calls(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Return the function, with an exception in the place of call number ``count``."""
    calls = iter(range(10**6))

    def run(*arguments: Any, **named: Any) -> Any:
        if next(calls) == count:
            raise StopError
        return function(*arguments, **named)

    return run


def with_bad_losses(trainer: Trainer, bad: Callable[[int, int], float | None]) -> None:
    """Let ``bad(step, place)`` replace a loss, where it is not None."""
    measure, batch_of, steps = trainer.objective.losses, trainer.objective.batch, [0]

    def batch(step: int) -> Any:
        steps.append(step)
        return batch_of(step)

    def losses(probes: Any, batch: Any) -> list[float]:
        values = measure(probes, batch)
        replaced = [bad(steps[-1], place) for place in range(len(values))]
        return [v if r is None else r for v, r in zip(values, replaced, strict=True)]

    trainer.objective.batch = batch  # type: ignore[method-assign]
    trainer.objective.losses = losses  # type: ignore[method-assign]  # a fault is injected


# --- a run ----------------------------------------------------------------------------------


def test_a_run_folder_holds_what_the_design_names(base: Path, tmp_path: Path) -> None:
    tiny_trainer(base, tmp_path / "run", evaluation=EVALUATION, save_steps=4).train()

    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "best", "checkpoint-4"),
        *("checkpoint-6", "journal.jsonl", "metrics.jsonl", "recipe.yaml", "reference.json"),
    ]


def test_the_journal_header_names_what_a_replay_needs(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path / "run", seed=5)
    trainer.train()

    header = json_lines(tmp_path / "run" / "journal.jsonl")[0]

    assert header["base"] == base.name
    assert header["layers"] == sorted(header["layers"])
    assert (header["num_values"], header["seed"]) == (len(trainer.scales), 5)
    assert (header["coordinates"], header["direction"]) == ("row", "rademacher")
    assert header["generator"] == "philox4x32-10/v1"
    assert header["recipe"]["max_steps"] == 6


@pytest.mark.parametrize("name", COORDINATES)
def test_the_adapter_holds_the_trained_scales_in_the_dtype_of_the_file(
    base: Path, tmp_path: Path, name: str
) -> None:
    trainer = tiny_trainer(base, tmp_path / "run", max_steps=2, zo=ESTIMATORS[name])
    trainer.train()

    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")

    stored = load_file(base / "model.safetensors")
    assert set(adapter) == {key for key in stored if key.endswith(".scales")}
    assert len(adapter) == 7
    for index, name in enumerate(trainer.scales.names):
        tensor = adapter[f"{name}.scales"]
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, trainer.scales.tuned(index).T.half())
        assert not torch.equal(tensor, stored[f"{name}.scales"])


def test_training_is_reproducible(base: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny_trainer(base, tmp_path / name, max_steps=3).train()

    first = json_lines(tmp_path / "a" / "journal.jsonl")
    second = json_lines(tmp_path / "b" / "journal.jsonl")
    assert first[1:] == second[1:]
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert adapters[0] == adapters[1]


def test_training_lowers_the_loss(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(
        base,
        tmp_path / "run",
        evaluation=RECORDS,
        max_steps=25,
        per_device_train_batch_size=8,
        learning_rate=0.1,
    )

    result = trainer.train()

    assert result.before is not None
    assert result.after is not None
    assert result.after.loss < result.before.loss - 0.03


def test_training_leaves_the_global_generator_alone(base: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()

    tiny_trainer(base, tmp_path / "run").train()

    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_model_computes_with_the_kept_scales_after_training(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path / "run", zo=ESTIMATORS["row"])
    trainer.train()
    tuned = load_file(tmp_path / "run" / "adapter_model.safetensors")

    got = logits_of(trainer.model)

    scales = {key.removesuffix(".scales"): tensor for key, tensor in tuned.items()}
    # fp32 sums in another order
    torch.testing.assert_close(got, logits_of(dense_equal(base, scales)), rtol=1e-4, atol=1e-5)
    assert (got - logits_of(dense_equal(base))).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["row", "conmezo"])
def test_another_trainer_of_the_same_model_starts_from_the_base(
    base: Path, tmp_path: Path, name: str
) -> None:
    model, keys = qzo.load(base), {"max_steps": 2, "zo": ESTIMATORS[name]}
    for folder in (tmp_path / "a", tmp_path / "b"):
        Trainer(model, tiny_recipe(base, folder, **keys), RECORDS).train()

    assert journal_steps(tmp_path / "a") == journal_steps(tmp_path / "b")
    assert qzo.replay(tmp_path / "b").adapter == "equal"


@pytest.mark.parametrize("name", COORDINATES)
def test_the_last_blocks_alone_can_be_trained(tmp_path: Path, name: str) -> None:
    base = tiny_checkpoint(tmp_path / "base", num_layers=3)
    given = {**ESTIMATORS[name], "num_blocks": 2}
    trainer = tiny_trainer(base, tmp_path / "run", max_steps=3, zo=given)

    trainer.train()

    stored = load_file(base / "model.safetensors")
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    for key in (key for key in stored if key.endswith(".scales")):
        is_trained = not key.startswith("model.layers.0.")
        assert (key in adapter and not torch.equal(adapter[key], stored[key])) == is_trained
    assert len(json_lines(tmp_path / "run" / "journal.jsonl")[0]["layers"]) == 14
    assert qzo.replay(tmp_path / "run").adapter == "equal"
    exported = qzo.export(tmp_path / "run", tmp_path / "out")
    # rounding the scales to fp16
    assert exported.exported_loss == pytest.approx(exported.trained_loss, abs=5e-3)


# --- resume ---------------------------------------------------------------------------------


def resumable(base: Path, folder: Path, **keys: Any) -> Trainer:
    """Return the trainer of all runs of this section."""
    given = {"max_steps": STEPS, "logging_steps": 2, "eval_steps": 2, **keys}
    return tiny_trainer(base, folder, evaluation=EVALUATION, resume_from_checkpoint=True, **given)


@pytest.fixture(scope="module")
def straight(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a run that was never stopped, by its name."""
    folder = tmp_path_factory.mktemp("straight")

    @cache
    def run(name: str) -> Path:
        resumable(base, folder / name, zo=ESTIMATORS[name]).train()
        return folder / name

    return run


PLACES: list[tuple[Any, str, int]] = [
    (Objective, "losses", 0),  # in the first forward
    (SGD, "step", 3),  # in the journal, but not in the scales
    (Scales, "fingerprint", 1),  # before a fingerprint
    (BetweenSteps, "after_step", 3),  # before a line of metrics
    (Trainer, "evaluate", 2),  # before an evaluation
    (Snapshots, "write", 1),  # before a snapshot
    (Trainer, "_finish", 0),  # before the adapter
]


@pytest.mark.parametrize(
    ("name", "owner", "method", "count", "save_steps"),
    [
        *(("row", *place, 3) for place in PLACES),
        ("row", Objective, "losses", 4, 500),  # without a snapshot to go on from
        *((name, Objective, "losses", 4, 3) for name in ("row", "conservative", *STATEFUL)),
    ],
)
def test_a_run_that_was_stopped_anywhere_ends_like_one_that_was_not(
    base: Path,
    tmp_path: Path,
    straight: Callable[[str], Path],
    name: str,
    owner: Any,
    method: str,
    count: int,
    save_steps: int,
) -> None:
    keys: dict[str, Any] = {"zo": ESTIMATORS[name], "save_steps": save_steps}
    first = resumable(base, tmp_path, **keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, after_calls(getattr(owner, method), count))
        with pytest.raises(StopError):
            first.train()

    resumable(base, tmp_path, **keys).train()

    assert saved(tmp_path) == saved(straight(name))
    assert logged(tmp_path) == logged(straight(name))
    assert qzo.replay(tmp_path).adapter == "equal"


@pytest.mark.parametrize("name", ["row", *STATEFUL])
def test_a_trainer_that_was_interrupted_can_train_on(
    base: Path, tmp_path: Path, straight: Callable[[str], Path], name: str
) -> None:
    trainer = resumable(base, tmp_path, zo=ESTIMATORS[name])
    with pytest.MonkeyPatch.context() as patch:
        losses = after_calls(trainer.objective.losses, 4)
        patch.setattr(trainer.objective, "losses", losses)
        with pytest.raises(StopError):
            trainer.train()

    trainer.train()

    assert saved(tmp_path) == saved(straight(name))


def test_a_finished_run_can_be_continued(base: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"lr_scheduler_type": "constant", "resume_from_checkpoint": True}
    tiny_trainer(base, tmp_path / "run", max_steps=4, **keys).train()
    first = journal_steps(tmp_path / "run")

    result = tiny_trainer(base, tmp_path / "run", max_steps=7, **keys).train()

    tiny_trainer(base, tmp_path / "straight", max_steps=7, **keys).train()
    assert result.steps == 7
    assert journal_steps(tmp_path / "run")[:4] == first
    assert journal_steps(tmp_path / "run") == journal_steps(tmp_path / "straight")
    assert [line["step"] for line in logged(tmp_path / "run")] == [2, 4, 6, 7, 7]


def test_finishing_a_finished_run_changes_nothing(base: Path, tmp_path: Path) -> None:
    resumable(base, tmp_path).train()
    want, metrics = saved(tmp_path), logged(tmp_path)

    resumable(base, tmp_path).train()

    assert saved(tmp_path) == want
    assert logged(tmp_path) == metrics


def test_a_decaying_learning_rate_does_not_allow_another_length(base: Path, tmp_path: Path) -> None:
    tiny_trainer(base, tmp_path / "run", max_steps=4).train()
    longer = tiny_trainer(base, tmp_path / "run", max_steps=7, resume_from_checkpoint=True)

    with pytest.raises(
        ConfigError,
        match=r"^max_steps: expected 4 as in the run that is to be continued, got 7$",
    ):
        longer.train()


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("seed", 0, 1),
        ("data_seed", 0, 1),
        ("learning_rate", 0.01, 0.1),
        ("per_device_train_batch_size", 3, 4),
    ],
)
def test_what_would_change_the_numbers_cannot_change_in_a_run(
    base: Path, tmp_path: Path, key: str, old: Any, new: Any
) -> None:
    tiny_trainer(base, tmp_path / "run", **{key: old}).train()
    other = tiny_trainer(base, tmp_path / "run", resume_from_checkpoint=True, **{key: new})

    with pytest.raises(
        ConfigError,
        match=f"^{key}: expected {old} as in the run that is to be continued, got {new}$",
    ):
        other.train()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"modules": ["v_proj", "of_another_model"]}, {"modules": ["self_attn.v_proj"]}),
        ({"tuned": "lora"}, {"tuned": "lora", "lora_modules": ["v_proj", "self_attn.q_proj"]}),
    ],
)
def test_a_run_goes_on_with_other_names_of_the_same_layers(
    base: Path, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    keys: dict[str, Any] = {"lr_scheduler_type": "constant"}
    tiny_trainer(base, tmp_path / "run", max_steps=1, zo=first, **keys).train()

    again = tiny_trainer(
        base, tmp_path / "run", max_steps=2, zo=second, resume_from_checkpoint=True, **keys
    )

    assert again.train().steps == 2


def test_a_run_does_not_go_on_with_other_layers(base: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"max_steps": 1}
    tiny_trainer(base, tmp_path / "run", zo={"modules": ["v_proj"]}, **keys).train()
    keys["resume_from_checkpoint"] = True

    with pytest.raises(
        ConfigError,
        match=r"^zo.modules: expected \['v_proj'\] as in the run that is to be continued, got "
        r"\['k_proj'\]$",
    ):
        tiny_trainer(base, tmp_path / "run", zo={"modules": ["k_proj"]}, **keys).train()


def test_no_factor_of_a_layer_can_be_dropped_in_a_run(base: Path, tmp_path: Path) -> None:
    zo = {"estimator": "spsa", "stretch": {"o_proj": 2.0, "v_proj": 3.0}}
    tiny_trainer(base, tmp_path, zo=zo).train()
    other = {**zo, "stretch": {"o_proj": 2.0}}

    with pytest.raises(
        ConfigError,
        match=r"^zo.stretch.v_proj: expected 3.0 as in the run that is to be continued, got None$",
    ):
        tiny_trainer(base, tmp_path, resume_from_checkpoint=True, zo=other).train()


def test_sizes_of_layers_are_measured_once_in_a_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"zo": ESTIMATORS["hizoo"], "lr_scheduler_type": "constant"}
    tiny_trainer(base, tmp_path, max_steps=2, **keys).train()
    monkeypatch.setattr("qzo.method.layer_scaling.gradient_norms", None)

    result = tiny_trainer(base, tmp_path, max_steps=3, resume_from_checkpoint=True, **keys).train()

    assert result.steps == 3


@pytest.mark.parametrize(
    ("role", "digest"), [("qweight", "codes_sha256"), (".scales", "scales_sha256")]
)
def test_another_base_cannot_continue_a_run(
    base: Path, tmp_path: Path, role: str, digest: str
) -> None:
    tiny_trainer(base, tmp_path / "run").train()
    other = tiny_checkpoint(tmp_path / "other")
    change_tensor(other / "model.safetensors", role)

    with pytest.raises(
        CheckpointError,
        match=f"^model: {digest} of the base differs from that of the run that is to be continued$",
    ):
        tiny_trainer(other, tmp_path / "run", resume_from_checkpoint=True).train()


def test_other_data_cannot_continue_a_run(base: Path, tmp_path: Path) -> None:
    tiny_trainer(base, tmp_path / "run").train()
    other = [{**RECORDS[0], "prompt": "another film."}, *RECORDS[1:]]

    with pytest.raises(
        CheckpointError,
        match=r"^data: the digest of the training examples differs from that of the run that is to "
        "be continued$",
    ):
        tiny_trainer(base, tmp_path / "run", train=other, resume_from_checkpoint=True).train()


def test_a_folder_that_is_not_empty_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")

    with pytest.raises(
        CheckpointError,
        match=f"^{re.escape(str(tmp_path / 'run'))}: expected a new or empty folder; choose "
        "another output_dir, or set resume_from_checkpoint: true$",
    ):
        tiny_trainer(base, tmp_path / "run").train()

    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_damaged_snapshot_is_noticed(base: Path, tmp_path: Path) -> None:
    tiny_trainer(base, tmp_path / "run").train()
    file = tmp_path / "run" / "checkpoint-6" / "scales.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(bytes(data))

    with pytest.raises(
        CheckpointError,
        match=r"^step 6: expected scales with sha256 .{15}, got .{15}; the journal or the base was "
        "changed$",
    ):
        tiny_trainer(base, tmp_path / "run", resume_from_checkpoint=True).train()


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_a_damaged_state_of_the_optimizer_is_noticed(
    base: Path, tmp_path: Path, optimizer: str
) -> None:
    keys: dict[str, Any] = {"zo": {"optimizer": optimizer}}
    tiny_trainer(base, tmp_path / "run", **keys).train()
    snapshot = tmp_path / "run" / "checkpoint-6"
    tensors = load_file(snapshot / "scales.safetensors")
    name = {"momentum": "optimizer.velocity", "adam": "optimizer.moments"}[optimizer]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, snapshot / "scales.safetensors")

    reason = f"{snapshot}: what the optimizer remembers was changed; remove the folder to replay "
    with pytest.raises(CheckpointError, match=f"^{re.escape(reason)}from an earlier one$"):
        tiny_trainer(base, tmp_path / "run", resume_from_checkpoint=True, **keys).train()


def test_damaged_metrics_name_the_line(base: Path, tmp_path: Path) -> None:
    tiny_trainer(base, tmp_path / "run").train()
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text("\0\0\0\n" + path.read_text())

    with pytest.raises(
        CheckpointError,
        match=f"^{re.escape(str(path))}: line 1: expected a JSON object with a step, got something "
        "else; remove the file to go on without earlier metrics$",
    ):
        tiny_trainer(base, tmp_path / "run", resume_from_checkpoint=True).train()


# --- losses that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bad"),
    [("row", math.inf), *((name, math.nan) for name in ("row", "conservative", *STATEFUL))],
)
def test_a_step_without_a_finite_loss_moves_nothing_and_is_counted(
    base: Path, tmp_path: Path, name: str, bad: float
) -> None:
    trainer = tiny_trainer(base, tmp_path / "run", max_steps=4, zo=ESTIMATORS[name])
    with_bad_losses(trainer, lambda step, _: bad if step in (1, 3) else None)
    moved: list[torch.Tensor] = []
    move = trainer.optimizer.step

    def watched(*given: Any) -> None:
        move(*given)
        moved.append(trainer.scales.values.clone())

    trainer.optimizer.step = watched  # type: ignore[assignment, method-assign]

    result = trainer.train()

    assert result.skipped_steps == 2
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[1], moved[2])
    assert torch.equal(moved[2], moved[3])
    assert all(torch.isfinite(values).all() for values in moved)
    lines = journal_steps(tmp_path / "run")
    assert [line["losses"][0] is None for line in lines] == [False, True, False, True]
    assert [line["derivatives"][0] is None for line in lines] == [False, True, False, True]
    assert qzo.replay(tmp_path / "run").adapter == "equal"


def test_one_bad_loss_leaves_out_one_direction(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path / "run", max_steps=1, zo=ESTIMATORS["row"])
    with_bad_losses(trainer, lambda _, place: math.nan if place == 4 else None)

    result = trainer.train()

    (line,) = journal_steps(tmp_path / "run")
    assert [d is None for d in line["derivatives"]] == [False, True, False]
    assert [loss is None for loss in line["losses"]] == [False] * 4 + [True, False]
    assert result.skipped_steps == 0


def test_training_stops_after_too_many_skipped_steps_in_a_row(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path / "run", max_steps=20, zo={"max_skipped_steps": 3})
    with_bad_losses(trainer, lambda step, _: None if step in (0, 3) else math.nan)

    with pytest.raises(
        QZOError,
        match=r"^loss: expected finite values, got none in 3 steps in a row up to step 6; lower "
        r"learning_rate or zo\.epsilon\. The journal and the scales are intact$",
    ):
        trainer.train()

    assert len(journal_steps(tmp_path / "run")) == 7
    assert torch.isfinite(trainer.scales.values).all()


def test_a_diverged_run_in_float16_names_the_other_dtypes(base: Path, tmp_path: Path) -> None:
    settings = tiny_recipe(base, tmp_path / "run", zo={"max_skipped_steps": 1})
    trainer = Trainer(qzo.load(base, torch.float16), settings, RECORDS)
    with_bad_losses(trainer, lambda *_: math.nan)
    message = r"epsilon, or set dtype: bfloat16 or float32: nothing above 65,504 fits float16\. "
    with pytest.raises(QZOError, match=message):
        trainer.train()


def test_averages_leave_out_what_is_not_finite(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path / "run", max_steps=2, logging_steps=1)
    with_bad_losses(trainer, lambda step, _: math.nan if step == 1 else None)

    trainer.train()

    first, second = logged(tmp_path / "run")[:2]
    assert math.isfinite(first["loss"])
    assert (second["loss"], second["derivative"], second["clip_rate"]) == (None, None, None)


# --- metrics, best scales and warnings --------------------------------------------------------


@pytest.mark.parametrize(("logging_steps", "steps"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5])])
def test_metrics_have_a_line_every_few_steps_and_one_at_the_end(
    base: Path, tmp_path: Path, logging_steps: int, steps: list[int]
) -> None:
    tiny_trainer(base, tmp_path / "run", max_steps=5, logging_steps=logging_steps).train()

    *lines, last = logged(tmp_path / "run")

    assert [line["step"] for line in lines] == steps
    assert last == {"step": 5, "best_step": 5, "changed_fraction": last["changed_fraction"]}


def test_metrics_are_averages_over_the_steps_since_the_last_line(
    base: Path, tmp_path: Path
) -> None:
    zo = {**ESTIMATORS["absolute"], "max_loss_difference": 0.002}
    tiny_trainer(base, tmp_path / "run", max_steps=6, logging_steps=3, zo=zo).train()

    line = logged(tmp_path / "run")[1]

    steps = journal_steps(tmp_path / "run")[3:6]
    losses = [loss for step in steps for loss in step["losses"]]
    slopes = [abs(s["losses"][0] - s["losses"][1]) / 2e-3 for s in steps]
    assert line["loss"] == pytest.approx(sum(losses) / 6)
    assert line["derivative"] == pytest.approx(sum(slopes) / 3)
    assert line["clip_rate"] == sum(slope > 1.0 for slope in slopes) / 3
    assert line["learning_rate"] == steps[-1]["learning_rate"]


def test_the_best_scales_are_kept(
    base: Path, tmp_path: Path, eval_losses: Callable[[list[float]], None]
) -> None:
    recorder = Recorder()
    trainer = tiny_trainer(
        base, tmp_path / "run", evaluation=EVALUATION, eval_steps=2, callbacks=[recorder]
    )
    recorder.watched = trainer.scales
    eval_losses([3.0, 2.0, 1.0, 2.5, 1.0, 0.5])  # at 0, 2, 4 and 6, at the end, of the reference

    result = trainer.train()

    assert (result.steps, result.best_step) == (6, 4)
    assert trainer.scales.fingerprint() == recorder.fingerprints[2]
    assert result.after is not None
    assert result.after.loss == 1.0
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["step"] == 4
    assert qzo.replay(tmp_path / "run").steps == 4


def test_evaluations_on_other_data_are_not_compared_with(
    base: Path, tmp_path: Path, eval_losses: Callable[[list[float]], None]
) -> None:
    keys: dict[str, Any] = {"lr_scheduler_type": "constant", "eval_steps": 2}
    eval_losses([3.0, 0.5, 0.5, 0.5])  # at 0, 2, at the end, of the reference
    tiny_trainer(base, tmp_path / "run", evaluation=EVALUATION, max_steps=2, **keys).train()
    keys |= {"resume_from_checkpoint": True, "max_steps": 6}
    other = tiny_trainer(base, tmp_path / "run", evaluation=RECORDS[4:], **keys)
    eval_losses([2.5, 2.0, 3.0, 2.0, 2.0])  # at 2 again, 4 and 6, at the end, of the reference

    result = other.train()

    assert result.best_step == 4  # worse than 0.5, on other data
    evaluated = [line for line in logged(tmp_path / "run") if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [0, 2, 2, 4, 6]
    assert len({line["evaluated_on"] for line in evaluated[:2]}) == 1
    assert len({line["evaluated_on"] for line in evaluated[1:]}) == 2


def test_the_best_of_other_data_is_not_taken_for_that_of_these(
    base: Path, tmp_path: Path, eval_losses: Callable[[list[float]], None]
) -> None:
    def run(steps: int, evaluation: Any, losses: list[float]) -> Result:
        keys: dict[str, Any] = {"lr_scheduler_type": "constant", "eval_steps": 2}
        keys |= {"resume_from_checkpoint": True, "max_steps": steps}
        eval_losses(losses)
        return tiny_trainer(base, tmp_path / "run", evaluation=evaluation, **keys).train()

    assert run(2, EVALUATION, [3.0, 1.0, 1.0]).best_step == 2
    assert run(4, RECORDS[4:], [2.5, 2.0, 2.0]).best_step == 4  # its snapshot is the one there is

    assert run(4, EVALUATION, [1.5, 1.5]).best_step == 4  # none of these data's own: the last
    assert run(6, EVALUATION, [1.2, 1.2]).best_step == 6

    own = evaluations(logged(tmp_path / "run"))
    assert [line["step"] for line in own] == [0, 2, 4, 6]
    assert len(logged(tmp_path / "run")) > len(own)


def test_a_snapshot_that_is_ahead_of_the_journal_is_set_aside(base: Path, tmp_path: Path) -> None:
    """The disk lost the end of the journal, and not the snapshot."""
    keys: dict[str, Any] = {"lr_scheduler_type": "constant", "save_steps": 2, "max_steps": 4}
    tiny_trainer(base, tmp_path / "run", **keys).train()
    want = saved(tmp_path / "run")["adapter_model.safetensors"]
    path = tmp_path / "run" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [n for n, line in enumerate(lines) if json.loads(line).get("step", 0) < 3]
    path.write_bytes(b"".join(lines[n] for n in kept))
    snapshot = tmp_path / "run" / "checkpoint-4"
    (snapshot / "trainer_state.json").write_text("damaged")

    again = tiny_trainer(base, tmp_path / "run", resume_from_checkpoint=True, **keys).train()

    assert saved(tmp_path / "run")["adapter_model.safetensors"] == want
    assert read_snapshot(snapshot).step == 4
    aside = tmp_path / "run" / "checkpoint-4.ahead"
    assert (aside / "trainer_state.json").read_text() == "damaged"
    assert again.warnings[-1] == (
        "checkpoint-4.ahead: set aside, because journal.jsonl ended before these snapshots; the "
        "missing steps were taken again. Delete the folders when nothing in them is needed"
    )

    path.write_bytes(b"".join(lines[n] for n in kept))  # and once more
    tiny_trainer(base, tmp_path / "run", resume_from_checkpoint=True, **keys).train()
    assert (tmp_path / "run" / "checkpoint-4.ahead1").is_dir()
    assert (aside / "trainer_state.json").read_text() == "damaged"


@pytest.mark.parametrize("failing", ["write_safetensors", "write_reference", "write_json"])
def test_an_adapter_is_never_a_mixture_of_two(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    folder, keys = tmp_path / "run", {"lr_scheduler_type": "constant"}
    tiny_trainer(base, folder, max_steps=2, **keys).train()
    before = saved(folder)
    module = trainer_module if failing == "write_reference" else adapter_module

    def stop(*_: object) -> None:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(module, failing, stop)
        with pytest.raises(StopError):
            tiny_trainer(base, folder, max_steps=4, resume_from_checkpoint=True, **keys).train()

    names = ("adapter_config.json", "adapter_model.safetensors", "reference.json")
    if failing == "write_safetensors":
        assert all(saved(folder)[name] == before[name] for name in names)
        return
    with pytest.raises(
        CheckpointError, match=r"adapter_config.json: expected this file, not found"
    ):
        open_adapter(folder)
    replayed = qzo.replay(folder)
    assert (replayed.steps, replayed.adapter) == (4, "written")
    tiny_trainer(base, tmp_path / "straight", max_steps=4, **keys).train()
    for name in names[:2]:
        assert saved(folder)[name] == saved(tmp_path / "straight")[name]


def test_a_best_snapshot_that_was_complete_is_put_in_its_place(
    base: Path, tmp_path: Path, eval_losses: Callable[[list[float]], None]
) -> None:
    folder = tmp_path / "run"
    keys: dict[str, Any] = {"eval_steps": 2, "evaluation": EVALUATION}
    eval_losses([3.0, 2.0, 2.5, 2.5, 2.5, 2.0])
    assert tiny_trainer(base, folder, **keys).train().best_step == 2
    (folder / "best").rename(folder / ".best.complete")  # killed between two calls

    eval_losses([2.0, 2.0])
    again = tiny_trainer(base, folder, resume_from_checkpoint=True, **keys)
    assert again.train().best_step == 2
    assert (folder / "best").exists()


def test_the_best_is_chosen_again_where_its_snapshot_was_lost(
    base: Path, tmp_path: Path, eval_losses: Callable[[list[float]], None]
) -> None:
    keys: dict[str, Any] = {"lr_scheduler_type": "constant", "eval_steps": 2}
    keys |= {"evaluation": EVALUATION, "resume_from_checkpoint": True}
    eval_losses([3.0, 1.0, 1.0])
    tiny_trainer(base, tmp_path / "run", max_steps=2, **keys).train()
    shutil.rmtree(tmp_path / "run" / "best")

    eval_losses([1.5, 1.2, 1.9, 1.2, 1.2])
    assert tiny_trainer(base, tmp_path / "run", max_steps=8, **keys).train().best_step == 6


def test_a_best_snapshot_that_was_half_removed_is_replaced(
    base: Path, tmp_path: Path, eval_losses: Callable[[list[float]], None]
) -> None:
    folder = tmp_path / "run"
    keys: dict[str, Any] = {"lr_scheduler_type": "constant", "evaluation": EVALUATION}
    eval_losses([3.0, 1.0, 1.0])
    tiny_trainer(base, folder, max_steps=2, **keys).train()
    shutil.copytree(folder / "best", folder / ".best.complete")
    (folder / "best" / "trainer_state.json").unlink()

    eval_losses([1.2, 1.0, 1.0])
    again = tiny_trainer(base, folder, max_steps=4, resume_from_checkpoint=True, **keys)
    assert again.train().best_step == 2


def test_a_run_that_said_what_nothing_reads_goes_on_without_it(base: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
    keys["zo"] = {"estimator": "spsa"}
    tiny_trainer(base, tmp_path / "run", max_steps=2, **keys).train()
    path = tmp_path / "run" / "journal.jsonl"
    header, *lines = path.read_text().splitlines(keepends=True)
    values = json.loads(header)
    values["recipe"]["zo"] |= {"momentum": 0.5, "lora_rank": 4, "normalize": False}
    values["recipe"] |= {"lr_scheduler_type": "constant", "warmup_steps": 2}
    path.write_text("".join([json.dumps(values) + "\n", *lines]))

    again = tiny_trainer(base, tmp_path / "run", max_steps=3, resume_from_checkpoint=True, **keys)

    assert again.train().steps == 3


def test_the_best_snapshot_stays_where_a_better_one_cannot_be_written(
    base: Path, tmp_path: Path, eval_losses: Callable[[list[float]], None]
) -> None:
    folder = tmp_path / "run"
    trainer = tiny_trainer(base, folder, evaluation=EVALUATION, eval_steps=2)
    eval_losses([3.0, 2.0, 1.0, 1.5, 1.0, 1.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots_module, "write_json", after_calls(write_json, 2))
        with pytest.raises(StopError):
            trainer.train()
    assert read_snapshot(folder / "best").step == 2

    again = tiny_trainer(
        base, folder, evaluation=EVALUATION, eval_steps=2, resume_from_checkpoint=True
    )
    eval_losses([1.0, 1.5, 1.0, 1.0])
    assert again.train().best_step == 4
    assert not list(folder.glob(".best*"))


def test_a_run_is_evaluated_after_the_steps_of_a_list(base: Path, tmp_path: Path) -> None:
    tiny_trainer(base, tmp_path / "run", evaluation=EVALUATION, eval_steps=[1, 4]).train()

    lines = json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 1, 4, 6]


def test_the_last_scales_are_kept_where_the_recipe_says_so(
    base: Path, tmp_path: Path, eval_losses: Callable[[list[float]], None]
) -> None:
    trainer = tiny_trainer(
        base, tmp_path / "run", evaluation=EVALUATION, load_best_model_at_end=False
    )
    eval_losses([1.0, 2.0, 2.0])

    result = trainer.train()

    assert result.best_step == 6
    assert result.after is not None
    assert result.after.loss == 2.0


def test_only_the_newest_snapshots_are_kept(base: Path, tmp_path: Path) -> None:
    tiny_trainer(base, tmp_path / "run", max_steps=9, save_steps=2, save_total_limit=2).train()

    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-8", "checkpoint-9"]


def test_updates_that_the_file_cannot_hold_are_warned_about(base: Path, tmp_path: Path) -> None:
    zo = {**ESTIMATORS["absolute"], "max_loss_difference": None}
    result = tiny_trainer(base, tmp_path / "run", learning_rate=1e-9, zo=zo).train()

    share = f"{result.changed_fraction:.1%}"
    assert result.changed_fraction < 0.5
    assert result.warnings == (
        f"only {share} of the scales differ from the base once rounded to float16, the dtype of "
        "the file: the other updates are too small to survive the export; raise learning_rate, or "
        "train longer",
    )
    assert logged(tmp_path / "run")[-1]["changed_fraction"] == result.changed_fraction


def test_updates_that_the_file_can_hold_are_not_warned_about(base: Path, tmp_path: Path) -> None:
    result = tiny_trainer(base, tmp_path / "run").train()

    assert result.changed_fraction > 0.8
    assert result.warnings == ()


def test_the_changed_fraction_is_that_of_the_adapter(base: Path, tmp_path: Path) -> None:
    zo = {**ESTIMATORS["absolute"], "max_loss_difference": None}
    result = tiny_trainer(base, tmp_path / "run", learning_rate=3e-6, zo=zo).train()

    stored, adapter = (
        load_file(base / "model.safetensors"),
        load_file(tmp_path / "run" / "adapter_model.safetensors"),
    )
    changed = sum(int((tensor != stored[key]).sum()) for key, tensor in adapter.items())
    total = sum(tensor.numel() for tensor in adapter.values())
    assert 0 < changed < total
    assert result.changed_fraction == pytest.approx(changed / total)


def test_a_base_that_stays_the_best_is_warned_about(
    base: Path, tmp_path: Path, eval_losses: Callable[[list[float]], None]
) -> None:
    trainer = tiny_trainer(base, tmp_path / "run", evaluation=EVALUATION)
    eval_losses([1.0, 2.0, 1.0, 1.0])

    result = trainer.train()

    assert result.best_step == 0
    assert result.changed_fraction == 0
    assert result.warnings == (
        "no evaluation had a smaller loss than the base's, so the base's scales were kept; train "
        "longer, or change learning_rate",
    )


# --- callbacks --------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """Notes events and their steps; asks for a stop after ``last`` steps."""

    def __init__(self, last: int | None = None) -> None:
        self.events: list[tuple[str, int]] = []
        self.logs: list[dict[str, Any]] = []
        self.watched: Scales | None = None
        self.fingerprints: list[str] = []  # of what is watched, at evaluations
        self._last = last

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("train_begin", state.global_step))
        assert state.max_steps == args.max_steps
        assert kwargs["model"] is not None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("step_begin", state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("step_end", state.global_step))
        if state.global_step == self._last:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.events.append(("log", state.global_step))
        self.logs.append(logs)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        self.events.append(("evaluate", state.global_step))
        if self.watched is not None:
            self.fingerprints.append(self.watched.fingerprint())
        assert "eval_loss" in metrics

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("save", state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("train_end", state.global_step))


def test_callbacks_hear_what_happens_in_order(base: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    tiny_trainer(
        base,
        tmp_path / "run",
        evaluation=EVALUATION,
        callbacks=[recorder],
        max_steps=2,
        logging_steps=1,
        eval_steps=1,
        save_steps=1,
    ).train()

    assert recorder.events == [
        *[("train_begin", 0), ("evaluate", 0)],
        *[("step_begin", 0), ("step_end", 1), ("log", 1), ("evaluate", 1), ("save", 1)],
        *[("step_begin", 1), ("step_end", 2), ("log", 2), ("save", 2), ("evaluate", 2)],
        ("train_end", 2),
    ]
    assert {"loss", "derivative", "clip_rate", "learning_rate"} <= set(recorder.logs[0])


def test_a_callback_can_stop_the_run(base: Path, tmp_path: Path) -> None:
    result = tiny_trainer(base, tmp_path / "run", callbacks=[Recorder(last=2)]).train()

    assert result.steps == 2
    assert len(journal_steps(tmp_path / "run")) == 2
    assert qzo.replay(tmp_path / "run").steps == 2


def test_a_run_that_a_callback_stopped_can_be_continued(base: Path, tmp_path: Path) -> None:
    tiny_trainer(base, tmp_path / "run", callbacks=[Recorder(last=3)]).train()
    tiny_trainer(base, tmp_path / "run", resume_from_checkpoint=True).train()

    tiny_trainer(base, tmp_path / "straight").train()
    assert journal_steps(tmp_path / "run") == journal_steps(tmp_path / "straight")


class Interrupt(TrainerCallback):
    """Presses Ctrl-C once, in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Send the signal to this process."""
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


def test_a_trainer_that_was_asked_to_stop_can_train_on(base: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"resume_from_checkpoint": True, "callbacks": [Interrupt(2)]}
    trainer = tiny_trainer(base, tmp_path / "run", **keys)
    with pytest.raises(StoppedError, match=r"^stopped by a signal after step 2 of 6; "):
        trainer.train()

    assert trainer.train().steps == STEPS

    tiny_trainer(base, tmp_path / "straight").train()
    assert journal_steps(tmp_path / "run") == journal_steps(tmp_path / "straight")


def test_an_unknown_integration_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^report_to: nowhere is not supported, only .*\.$"):
        tiny_trainer(base, tmp_path / "run", report_to="nowhere")


# --- data and evaluation ----------------------------------------------------------------------


def test_completions_are_trained_too(base: Path, tmp_path: Path) -> None:
    result = tiny_trainer(
        base, tmp_path / "run", train=COMPLETIONS, evaluation=COMPLETIONS[:3]
    ).train()

    assert result.after is not None
    assert result.after.accuracy is None


def test_gradient_accumulation_gives_every_example_its_own_direction(
    base: Path, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"max_steps": 1, "zo": ESTIMATORS["row"]}
    keys["gradient_accumulation_steps"] = 2
    tiny_trainer(base, tmp_path / "run", **keys).train()

    (line,) = journal_steps(tmp_path / "run")
    assert (len(line["derivatives"]), len(line["losses"])) == (6, 12)


def test_evaluation_without_data_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^eval_dataset: expected evaluation examples, got none$"
    ):
        tiny_trainer(base, tmp_path / "run").evaluate()


def test_the_numbers_of_a_result_are_plain(base: Path, tmp_path: Path) -> None:
    result = tiny_trainer(base, tmp_path / "run", evaluation=EVALUATION).train()

    values = json.loads(json.dumps(result.to_dict()))

    assert values["steps"] == 6
    assert values["before"]["num_examples"] == 4
    assert "example_losses" not in values["after"]
    assert values["warnings"] == list(result.warnings)


def test_a_task_in_one_file_is_not_evaluated_on_what_it_trains_on(
    base: Path, tmp_path: Path
) -> None:
    data = tmp_path / "train.tsv"
    data.write_text("sentence\tlabel\n" + "a fine film\t1\na bad one\t0\n" * 4)
    keys: dict[str, Any] = {"task": "sst2", "data": str(data), "output_dir": str(tmp_path / "run")}
    made = recipe({"model": str(base), **keys})

    with pytest.raises(ConfigError, match=r"^eval_data: expected data to evaluate on, got none: "):
        data_sets(made, load_tokenizer(base))
    train_set, _ = data_sets(made.model_copy(update={"num_eval_examples": 0}), load_tokenizer(base))
    assert len(train_set.examples) == 8


def test_data_and_eval_data_may_lie_in_the_home_folder(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "train.jsonl", RECORDS)
    write_lines(tmp_path / "eval.jsonl", RECORDS[:3])
    keys = {"data": "~/train.jsonl", "eval_data": "~/eval.jsonl"}

    sets = data_sets(tiny_recipe(base, tmp_path / "run", **keys), load_tokenizer(base))

    assert [len(data.examples) for data in sets if data is not None] == [8, 3]


@pytest.mark.parametrize("key", ["train_dataset", "eval_dataset"])
def test_an_empty_set_is_called_by_its_name(base: Path, tmp_path: Path, key: str) -> None:
    values = {"model": str(base), "output_dir": str(tmp_path / "run")}
    sets: dict[str, Any] = {"train_dataset": RECORDS, "eval_dataset": RECORDS, key: []}
    with pytest.raises(DataError, match=rf"^{key}: expected at least one example, got none$"):
        Trainer(qzo.load(base), recipe(values), **sets)
