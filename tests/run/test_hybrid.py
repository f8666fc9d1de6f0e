"""Runs with exact derivatives: first-order steps for the last blocks, and forward gradients."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import relative_error
from support.runs import RECORDS, dense_equal, json_lines, tiny_checkpoint, tiny_trainer
from torch.func import functional_call

import qzo
from qzo.distributed import Ranks
from qzo.errors import CheckpointError, ConfigError
from qzo.method.directions.philox import directions
from qzo.method.first_order import FirstOrder, block_importance, num_last_blocks
from qzo.method.probes import Probe
from qzo.method.trained_vector import Scales
from qzo.run.journal.compact import write_compact
from qzo.run.journal.gradients import Gradients
from qzo.run.journal.journal import Journal
from qzo.run.output.snapshots import Snapshots
from qzo.run.recipe.read import recipe
from qzo.run.trainer import Trainer

pytestmark = pytest.mark.slow  # whole runs; the file takes half a minute

NUM_LAYERS = 3
STEPS = 4

RUNS: dict[str, dict[str, Any]] = {
    "hybrid": {"first_order_blocks": 1, "optimizer": "momentum"},
    "relative": {
        **{"first_order_blocks": 2, "estimator": "spsa", "coordinates": "relative"},
        **{"first_order_optimizer": "sgd", "first_order_learning_rate": 1e-2},
    },
    "all": {"first_order_blocks": 3},
    "profile": {"first_order_layers": "profile", "first_order_share": 0.3, "optimizer": "adam"},
    "forward": {"estimator": "forward_gradient", "num_directions": 2},
}


class StopError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid") / "base"
    return tiny_checkpoint(folder, num_layers=NUM_LAYERS)


def run_of(base: Path, folder: Path, zo: dict[str, Any], **keys: Any) -> Trainer:
    given = {"max_steps": STEPS, "save_steps": 3, "per_device_train_batch_size": 2, **keys}
    return tiny_trainer(base, folder, resume_from_checkpoint=True, zo=zo, **given)


@pytest.fixture(scope="module")
def straight(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight")
    for name, zo in RUNS.items():
        run_of(base, folder / name, zo).train()
    return {name: folder / name for name in RUNS}


def saved(folder: Path) -> dict[str, Any]:
    """Return what a run leaves behind, without times and what names the folder."""
    header, *lines = json_lines(folder / "journal.jsonl")
    metrics = json_lines(folder / "metrics.jsonl")
    names = ("adapter_model.safetensors", "gradients.f32", "importance.json")
    return {
        **{name: (folder / name).read_bytes() for name in names if (folder / name).exists()},
        "journal": [{**header, "recipe": None}, *lines],
        "metrics": [{k: v for k, v in line.items() if k != "seconds"} for line in metrics],
    }


@pytest.mark.parametrize("name", RUNS)
def test_a_replay_without_the_model_is_exact(straight: dict[str, Path], name: str) -> None:
    result = qzo.replay(straight[name])
    assert (result.steps, result.num_fingerprints, result.adapter) == (STEPS, 1, "equal")


@pytest.mark.parametrize(
    ("name", "means"),
    [
        (
            "hybrid",
            "with exact gradients for [0-9]+ of them and forward passes only for the others",
        ),
        ("all", "with exact gradients"),
        ("forward", "with forward passes only"),
    ],
)
def test_the_card_says_what_was_moved_by_exact_gradients(
    straight: dict[str, Path], tmp_path: Path, name: str, means: str
) -> None:
    qzo.export(straight[name], tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(rf" values were trained in row coordinates for {STEPS} steps {means} \(", card)


def stopped_at(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(10**6))

    def call(*given: Any, **named: Any) -> Any:
        if next(calls) == count:
            raise StopError
        return function(*given, **named)

    return call


@pytest.mark.parametrize(
    ("name", "owner", "method", "count"),
    [
        ("hybrid", Journal, "append", 0),  # the first gradient is on disk, and no step
        ("hybrid", Scales, "move", 9),  # steps are on disk that the scales made in part
        ("hybrid", Snapshots, "write", 0),
        *((name, Journal, "append", 3) for name in RUNS),  # the last one is on disk, its step not
    ],
)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    base: Path,
    tmp_path: Path,
    straight: dict[str, Path],
    name: str,
    owner: Any,
    method: str,
    count: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, stopped_at(count, getattr(owner, method)))
        with pytest.raises(StopError):
            run_of(base, tmp_path, RUNS[name]).train()

    run_of(base, tmp_path, RUNS[name]).train()

    assert saved(tmp_path) == saved(straight[name])


def test_a_torn_gradient_is_replaced(base: Path, tmp_path: Path, straight: dict[str, Path]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", stopped_at(2, Journal.append))
        with pytest.raises(StopError):
            run_of(base, tmp_path, RUNS["hybrid"]).train()
    side = tmp_path / "gradients.f32"
    side.write_bytes(side.read_bytes()[:-7])

    run_of(base, tmp_path, RUNS["hybrid"]).train()

    assert saved(tmp_path) == saved(straight["hybrid"])


def test_both_parts_move_from_the_same_point(base: Path, tmp_path: Path) -> None:
    zo = {
        **{"estimator": "spsa", "coordinates": "row", "first_order_blocks": 1},
        **{"first_order_optimizer": "sgd", "first_order_learning_rate": 0.5},
    }
    trainer = run_of(base, tmp_path, zo, max_steps=1, lr_scheduler_type="constant")
    scales, objective = trainer.scales, trainer.objective
    last = [i for i, name in enumerate(scales.names) if "layers.2." in name]
    parts = scales.parts(last)
    _, gradient = objective.gradient(objective.batch(0), last)
    [plus, minus] = trainer.estimator.ask(0)
    z = directions("rademacher", [plus.seed], 0, len(scales))[0]
    z[parts[0][0] : parts[-1][1]] = 0  # the layers of a block follow one another

    def loss(offset: float) -> float:
        scales.reset()
        scales.move(0, len(scales), z * offset)
        return objective.losses([Probe(0, 0.0)], objective.batch(0))[0]

    slope = (loss(plus.offset) - loss(minus.offset)) / (plus.offset - minus.offset)
    trainer.train()

    want = 1 - trainer.config.learning_rate * slope * z
    want[parts[0][0] : parts[-1][1]] -= 0.5 * gradient
    torch.testing.assert_close(trainer.scales.values, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_all_blocks_first_order_is_training_by_torch(
    base: Path, tmp_path: Path, optimizer: str
) -> None:
    # A large adam_epsilon: where a slope is near 0, Adam would turn its rounding into a step.
    zo = {
        **{"first_order_blocks": NUM_LAYERS, "first_order_optimizer": optimizer},
        **{"first_order_learning_rate": 0.01},
        **({"adam_epsilon": 1e-3} if optimizer == "adam" else {}),
    }
    trainer = run_of(base, tmp_path, zo, lr_scheduler_type="constant")
    want = naive_training(base, trainer, optimizer)

    trainer.train()

    got = trainer.scales.values
    assert all(line["losses"] == [] for line in json_lines(tmp_path / "journal.jsonl")[1:-1])
    assert relative_error(got - 1, want - 1) < 1e-3  # steps in float32, against float64


def naive_training(base: Path, trainer: Trainer, optimizer: str) -> torch.Tensor:
    """Train row multipliers of a dense float64 model with torch's optimizer."""
    dense = dense_equal(base).double().requires_grad_(False)
    names = trainer.scales.names
    weights = {name: dense.get_parameter(f"{name}.weight") for name in names}
    values = torch.nn.Parameter(torch.ones(len(trainer.scales), dtype=torch.float64))
    rule: torch.optim.Optimizer = (
        torch.optim.Adam([values], lr=0.01, eps=1e-3)
        if optimizer == "adam"
        else torch.optim.SGD([values], lr=0.01)
    )
    for step in range(STEPS):
        rows = dict(zip(names, values.split([len(w) for w in weights.values()]), strict=True))
        made = {f"{n}.weight": weights[n] * rows[n][:, None] for n in names}
        [batch] = trainer.objective.batch(step)
        losses = []
        for example in batch:
            scores = []
            for candidate in example.candidates:
                ids = torch.tensor([example.rows[candidate.row]])
                logits = functional_call(dense, made, (ids,)).logits[0].log_softmax(-1)
                picked = logits[list(candidate.positions), list(candidate.targets)]
                scores.append(picked.mean())
            losses.append(-torch.stack(scores).log_softmax(0)[example.label])
        rule.zero_grad()
        torch.stack(losses).mean().backward()
        rule.step()
    return values.detach()


def test_a_forward_gradient_steps_along_its_directions(
    base: Path, straight: dict[str, Path]
) -> None:
    lines = json_lines(straight["forward"] / "journal.jsonl")[1:-1]
    assert len(lines) == STEPS
    assert all(line["losses"] == line["derivatives"] for line in lines)
    assert all(len(line["derivatives"]) == 2 for line in lines)


def test_the_profile_chooses_the_blocks_and_is_kept(straight: dict[str, Path]) -> None:
    folder = straight["profile"]
    part = json_lines(folder / "journal.jsonl")[0]["first_order"]
    found = json.loads((folder / "importance.json").read_text())
    [line] = [m for m in json_lines(folder / "metrics.jsonl") if "first_order_importance" in m]

    assert found["importance"] == part["importance"] == line["first_order_importance"]
    assert len(found["importance"]) == NUM_LAYERS
    assert sum(found["share"]) == pytest.approx(1)
    count = found["first_order_blocks"]
    assert part["num_blocks"] == line["first_order_num_blocks"] == count
    assert sum(found["share"][-count:]) >= 0.3 > sum(found["share"][NUM_LAYERS - count + 1 :])
    assert {name.split(".")[2] for name in part["layers"]} == {"1", "2"}


def test_a_resumed_run_takes_the_number_of_blocks_from_its_journal(
    base: Path, tmp_path: Path, straight: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(straight["profile"], tmp_path / "run"))
    monkeypatch.setattr(
        "qzo.run.first_order.first_order_header", lambda *_: pytest.fail("profiled again")
    )
    keys: dict[str, Any] = {"max_steps": STEPS}
    trainer = run_of(base, folder, RUNS["profile"], **keys)
    trainer.train()
    assert trainer._exact is not None
    assert trainer._exact.part is not None
    assert len(trainer._exact.part.layers) == 14


@pytest.mark.parametrize(
    ("name", "per_step", "start"),
    [
        ("hybrid", 2 + 1 + 2 / 3, 0),
        ("relative", 2 + 1 + 4 / 3, 0),
        ("all", 3, 0),
        ("profile", 2 + 1 + 4 / 3, 12),
        ("forward", 4, 0),
    ],
)
def test_metrics_count_forwards(
    straight: dict[str, Path], name: str, per_step: float, start: float
) -> None:
    lines = json_lines(straight[name] / "metrics.jsonl")
    counts = [line["forwards"] for line in lines if "forwards" in line]
    assert counts == pytest.approx([start + per_step * step for step in (2, 4)])


def test_a_step_without_a_finite_gradient_moves_the_other_part_alone(
    base: Path, tmp_path: Path
) -> None:
    trainer = run_of(base, tmp_path, RUNS["hybrid"])
    measure, calls = trainer.objective.gradient, iter(range(99))

    def gradient(batch: Any, layers: Sequence[int]) -> tuple[float, torch.Tensor]:
        loss, slopes = measure(batch, layers)
        return loss, slopes * float("nan") if next(calls) == 1 else slopes

    trainer.objective.gradient = gradient  # type: ignore[method-assign]
    result = trainer.train()

    lines = json_lines(tmp_path / "journal.jsonl")[1:-1]
    assert [line["gradient"]["loss"] is None for line in lines] == [i == 1 for i in range(STEPS)]
    assert result.skipped_steps == 0
    assert trainer.scales.values.isfinite().all()
    assert qzo.replay(tmp_path).adapter == "equal"


# --- the parts alone ------------------------------------------------------------------------


def test_importance_is_the_mean_of_absolute_products_by_block() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    gradients = [torch.tensor([1.0, -1.0, 0.0, 2.0]), torch.tensor([-3.0, 1.0, 1.0, 0.0])]
    parts, blocks = [(0, 1), (1, 3), (3, 4)], [0, 1, 0]
    # block 0: (1 + 8 + 3 + 0) / 2; block 1: (2 + 0 + 2 + 3) / 2
    assert block_importance(values, gradients, parts, blocks) == [6.0, 3.5]


@pytest.mark.parametrize(("share", "want"), [(0.2, 1), (0.25, 1), (0.26, 2), (0.5, 2), (1.0, 4)])
def test_the_smallest_number_of_last_blocks_with_the_share(share: float, want: int) -> None:
    assert num_last_blocks([3.0, 1.0, 2.0, 2.0], share) == want


def test_gradients_are_little_endian_floats_one_after_another(tmp_path: Path) -> None:
    side = Gradients(tmp_path / "gradients.f32", 2)
    for step in range(3):
        side.append(step, torch.tensor([step + 0.5, -1.0]))
    side.append(1, torch.tensor([9.0, 8.0]))  # what lies behind is cut off

    assert (tmp_path / "gradients.f32").read_bytes().hex() == "0000003f000080bf0000104100000041"
    assert side.read(1).tolist() == [9.0, 8.0]


# --- refused --------------------------------------------------------------------------------


def refusal(error: type[Exception], message: str) -> Any:
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def test_a_cut_or_missing_side_file_is_named(tmp_path: Path, straight: dict[str, Path]) -> None:
    folder = Path(shutil.copytree(straight["hybrid"], tmp_path / "run"))
    side = folder / "gradients.f32"
    size = side.stat().st_size // STEPS
    side.write_bytes(side.read_bytes()[:-4])
    with refusal(
        CheckpointError,
        f"{side}: expected {size} bytes of step 3, got {size - 4}; the file was cut, or belongs to "
        "another run",
    ):
        qzo.replay(folder)
    side.unlink()
    with refusal(
        CheckpointError,
        f"{side}: expected the gradients of the run beside its journal: No such file or directory",
    ):
        qzo.replay(folder)


def test_a_changed_gradient_fails_the_fingerprint(
    tmp_path: Path, straight: dict[str, Path]
) -> None:
    folder = Path(shutil.copytree(straight["all"], tmp_path / "run"))
    data = bytearray((folder / "gradients.f32").read_bytes())
    data[3] ^= 0x80  # a sign
    (folder / "gradients.f32").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"^step 4: expected scales with sha256 "):
        qzo.replay(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ["other"]}, "first_order: expected trained layers, got ['other']"),
        ({"layers": []}, "first_order: expected trained layers, got none"),
        ({"optimizer": "lion"}, "first_order: expected 'adam' or 'sgd', got 'lion'"),
        ({"num_values": 5}, "journal: first_order: expected 448 values of its layers, got 5"),
        ({"optimizer_settings": None}, "journal: first_order: expected optimizer_settings of type "
         "dict, got None"),
        ({"optimizer_settings": {"adam_beta1": 1.5}}, "first_order: expected ['adam_beta1', "
         "'adam_beta2', 'adam_epsilon'] from 0 to below 1 for 'adam', got {'adam_beta1': 1.5}"),
    ],
)  # fmt: skip
def test_a_damaged_header_is_refused(
    tmp_path: Path, straight: dict[str, Path], change: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(straight["hybrid"], tmp_path / "run"))
    header, *lines = json_lines(folder / "journal.jsonl")
    header["first_order"] |= change
    text = "".join(json.dumps(line) + "\n" for line in [header, *lines])
    (folder / "journal.jsonl").write_text(text)
    with refusal(CheckpointError, message):
        qzo.replay(folder)


def test_a_step_without_its_gradient_is_refused(tmp_path: Path, straight: dict[str, Path]) -> None:
    folder = Path(shutil.copytree(straight["hybrid"], tmp_path / "run"))
    lines = json_lines(folder / "journal.jsonl")
    del lines[3]["gradient"]
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with refusal(
        CheckpointError,
        f"{folder / 'journal.jsonl'}: step 2: expected a gradient in every step where the header "
        "has first_order, and in no other",
    ):
        qzo.replay(folder)
    lines[3]["gradient"] = {"loss": "a"}
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with refusal(
        CheckpointError,
        f"{folder / 'journal.jsonl'}: line 4: expected a gradient with loss and learning_rate, got "
        "something else",
    ):
        qzo.replay(folder)


def test_gradients_have_no_compact_form(tmp_path: Path, straight: dict[str, Path]) -> None:
    journal = Journal.open(straight["hybrid"] / "journal.jsonl")
    with refusal(
        CheckpointError,
        f"{journal.path}: expected a run of forward passes only, got one with exact gradients, "
        "which are vectors and have no compact form; keep journal.jsonl and gradients.f32",
    ):
        write_compact(journal, tmp_path / "small.safetensors")


@pytest.mark.parametrize(
    ("zo", "keys", "message"),
    [
        (
            {"first_order_blocks": 1},
            {"memory_limit": "4GiB"},
            "memory_limit cannot be combined with first-order blocks: exact derivatives need more "
            "memory than forward passes; remove memory_limit, or remove the keys zo.first_order_*",
        ),
        (
            {"first_order_blocks": 1, "first_order_layers": "profile"},
            {},
            "zo.first_order_blocks has no effect with zo.first_order_layers: profile; remove it or "
            "set zo.first_order_layers: last",
        ),
        (
            {"first_order_blocks": 3, "num_blocks": 2},
            {},
            "zo.first_order_blocks: expected at most zo.num_blocks, 2, got 3",
        ),
        (
            {"first_order_blocks": 1, "first_order_optimizer": "sgd"},
            {},
            "zo.first_order_learning_rate: expected a number with zo.first_order_optimizer: sgd, "
            "which has no default, got null; set it",
        ),
        (
            {"estimator": "forward_gradient", "max_loss_difference": 0.2},
            {},
            "zo.max_loss_difference has no effect with zo.estimator: forward_gradient, which "
            "measures slopes and no loss differences; remove it or set another zo.estimator",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    zo: dict[str, Any], keys: dict[str, Any], message: str
) -> None:
    values = {"model": "m", "data": "d", "output_dir": "o", "zo": zo, **keys}
    with refusal(ConfigError, message):
        recipe(values)


def test_more_blocks_than_are_trained_are_refused(base: Path, tmp_path: Path) -> None:
    trainer = run_of(base, tmp_path, {"first_order_blocks": 4})
    with refusal(
        ConfigError, "zo.first_order_blocks: expected at most the 3 trained blocks, got 4"
    ):
        trainer.train()


def test_several_processes_are_refused(base: Path, tmp_path: Path) -> None:
    trainer = run_of(base, tmp_path, {"first_order_blocks": 1})
    with refusal(
        ConfigError,
        "zo.first_order_blocks: expected one process, got 2: exact gradients are not summed over "
        "processes; run without torchrun, or without first-order blocks",
    ):
        Trainer(trainer.model, trainer.config, RECORDS, ranks=Ranks(0, 2))


def test_streaming_blocks_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = run_of(base, tmp_path, {"estimator": "forward_gradient"})
    monkeypatch.setattr(trainer.model, "qzo_budget", object())
    with refusal(
        ConfigError,
        "model: expected one that fits into memory with exact derivatives, got one that streams "
        "its blocks; choose another zo.estimator and no first-order blocks, or a smaller model",
    ):
        Trainer(trainer.model, trainer.config, RECORDS)


def test_a_rule_starts_again_from_nothing(base: Path, tmp_path: Path) -> None:
    scales = run_of(base, tmp_path, {}).scales
    settings = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    part = FirstOrder(scales, scales.names[-2:], "adam", settings)
    part.step(scales, torch.ones(part.size), 0.1)
    assert set(part.state()) == {"moments", "num_steps"}
    part.restore({})
    assert part.state() == {}
