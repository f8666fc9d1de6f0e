import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs import (
    COMPLETIONS,
    RECORDS,
    dense_candidate_scores,
    dense_equal,
    tiny_checkpoint,
    tiny_trainer,
)
from transformers import PreTrainedModel

from qzo.data.examples import ExampleSet
from qzo.data.tokenize import EncodedExample
from qzo.errors import ConfigError, DataError
from qzo.method.coordinates import Coordinates
from qzo.method.estimators import PerExampleSPSA
from qzo.method.probes import Probe
from qzo.method.trained_vector import Scales
from qzo.model.stacked import build_stack
from qzo.objective import loss as module
from qzo.objective.loss import Objective, example_loss, needed_rows, stratified

COORDINATES: tuple[Coordinates, ...] = ("absolute", "relative", "row")
# fp32 forwards, summed in another order, of losses near 1
TOLERANCE = 3e-6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("objective") / "base")


def objective(base: Path, out: Path, records: Any = RECORDS, **keys: Any) -> Objective:
    return tiny_trainer(base, out, train=records, **keys).objective


def zo(coordinates: Coordinates) -> dict[str, Any]:
    return {"estimator": "spsa", "coordinates": coordinates}


def order(made: Objective, num_steps: int) -> list[EncodedExample]:
    """Return the examples of the first steps in the order of training."""
    return [e for step in range(num_steps) for part in made.batch(step) for e in part]


def test_batches_are_a_function_of_data_seed_and_step(base: Path, tmp_path: Path) -> None:
    first = objective(base, tmp_path, data_seed=3)
    again = objective(base, tmp_path, data_seed=3)
    other = objective(base, tmp_path, data_seed=4)

    later = [first.batch(step) for step in (5, 0, 17, 5)]

    assert later == [again.batch(step) for step in (5, 0, 17, 5)]
    assert later[0] == later[3]
    assert order(first, 8) != order(other, 8)


def test_batches_do_not_depend_on_the_run_seed(base: Path, tmp_path: Path) -> None:
    assert order(objective(base, tmp_path, seed=1), 8) == order(
        objective(base, tmp_path, seed=2), 8
    )


@pytest.mark.parametrize(("batch_size", "num_micro_batches"), [(1, 1), (3, 1), (2, 2), (5, 3)])
def test_every_epoch_covers_every_example_once(
    base: Path, tmp_path: Path, batch_size: int, num_micro_batches: int
) -> None:
    made = objective(
        base,
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=num_micro_batches,
    )
    count = len(RECORDS)

    examples = order(made, 3 * count)

    for epoch in range(3):
        covered = Counter(examples[epoch * count : (epoch + 1) * count])
        assert len(covered) == count
        assert set(covered.values()) == {1}
    assert examples[:count] != examples[count : 2 * count]


def test_a_batch_has_the_asked_number_and_size_of_micro_batches(base: Path, tmp_path: Path) -> None:
    made = objective(base, tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=4)

    assert [len(part) for part in made.batch(0)] == [3, 3, 3, 3]


@pytest.mark.parametrize("records", [RECORDS, COMPLETIONS], ids=["classes", "completions"])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_stacked_losses_are_those_of_separate_dense_forwards(
    base: Path, tmp_path: Path, coordinates: Coordinates, records: Any
) -> None:
    trainer = tiny_trainer(base, tmp_path, train=records, zo=zo(coordinates))
    epsilon = 1e-3 if coordinates == "absolute" else 0.05
    probes = [Probe(5, epsilon), Probe(6, epsilon), Probe(5, -epsilon), Probe(0, 0.0)]
    batch = trainer.objective.batch(0)

    losses = trainer.objective.losses(probes, batch)

    assert len(losses) == 4
    for probe, loss in zip(probes, losses, strict=True):
        dense = dense_at(base, trainer.scales, probe)
        want = [dense_loss(dense, example) for example in batch[0]]
        assert loss == pytest.approx(sum(want) / len(want), abs=TOLERANCE)


def dense_at(base: Path, scales: Scales, probe: Probe) -> PreTrainedModel:
    """Return a dense model with the weights of one probe."""
    stored = scales._file_scales
    moved = Scales(
        scales.names,
        stored,
        coordinates=scales.coordinates,
        direction=scales.directions.law.direction,
    )
    z = moved.directions.draw([probe], 0, len(scales))[0]
    moved.move(0, len(moved), z * probe.offset)
    return dense_equal(base, {name: moved.tuned(i).T for i, name in enumerate(moved.names)})


def dense_loss(dense: PreTrainedModel, example: EncodedExample) -> float:
    """Return the loss of one example by a dense model."""
    scores = dense_candidate_scores(dense, example)
    if len(scores) == 1:
        return -scores[0]
    total = sum(math.exp(score) for score in scores)
    return -math.log(math.exp(scores[example.label]) / total)


@pytest.mark.parametrize("records", [RECORDS, COMPLETIONS], ids=["classes", "completions"])
def test_gradient_accumulation_is_one_big_batch(base: Path, tmp_path: Path, records: Any) -> None:
    whole = objective(base, tmp_path, records, per_device_train_batch_size=6)
    parts = objective(
        base, tmp_path, records, per_device_train_batch_size=2, gradient_accumulation_steps=3
    )
    probes = [Probe(1, 0.02), Probe(1, -0.02)]

    # the same products, but padded and summed over other batches
    assert parts.losses(probes, parts.batch(1)) == pytest.approx(
        whole.losses(probes, whole.batch(1)), abs=TOLERANCE
    )


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_a_probe_per_example_is_a_loop_over_the_examples(
    base: Path, tmp_path: Path, num_micro_batches: int
) -> None:
    made = objective(
        base,
        tmp_path,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=num_micro_batches,
    )
    batch = made.batch(0)
    examples = [example for part in batch for example in part]
    probes = PerExampleSPSA(0.02, 0, num_examples=len(examples)).ask(0)

    losses = made.losses(probes, batch)

    for probe, loss in zip(probes, losses, strict=True):
        assert probe.examples is not None
        alone = made.losses([Probe(probe.seed, probe.offset)], [[examples[probe.examples[0]]]])
        assert loss == pytest.approx(alone[0], abs=TOLERANCE)


def test_losses_of_a_mixed_set_of_probes_keep_their_places(base: Path, tmp_path: Path) -> None:
    made = objective(base, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    batch = made.batch(0)
    one, every = Probe(3, 0.02, examples=(3, 4)), Probe(4, 0.02)

    first, second = made.losses([one, every], batch)

    alone = made.losses([Probe(3, 0.02)], [[batch[1][1]]])
    assert first == pytest.approx(alone[0], abs=TOLERANCE)
    assert second == pytest.approx(made.losses([every], batch)[0], abs=TOLERANCE)


@pytest.mark.parametrize(("limit", "num_forwards"), [(1, 6), (10**6, 1)])
def test_probes_of_many_tokens_take_several_forwards(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    num_forwards: int,
) -> None:
    made = objective(base, tmp_path, per_device_train_batch_size=3)
    batch = made.batch(0)
    probes = [Probe(seed, 0.02, (first, first + 1)) for seed in (5, 6) for first in range(3)]
    want = made.losses(probes, batch)
    stacks = []
    build = build_stack

    def counted(items: Any, *rest: Any, **options: Any) -> Any:
        stacks.append(items)
        return build(items, *rest, **options)

    monkeypatch.setattr(module, "build_stack", counted)
    monkeypatch.setattr(module, "STACKED_TOKENS", limit)

    assert made.losses(probes, batch) == pytest.approx(want, abs=TOLERANCE)
    assert len(stacks) == num_forwards


@pytest.mark.parametrize("label", [0, 1, 2])
def test_the_classification_loss_is_a_softmax_over_the_candidates(label: int) -> None:
    scores = [-1.5, -0.25, -3.0]

    exponentials = [math.exp(score) for score in scores]
    want = -math.log(exponentials[label] / sum(exponentials))
    assert example_loss(scores, label, "classification") == pytest.approx(want)


def test_the_classification_loss_does_not_underflow() -> None:
    assert example_loss([-2000.0, -2001.0], 0, "classification") == pytest.approx(0.3132616875)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_the_classification_loss_of_broken_scores_is_not_finite(bad: float) -> None:
    assert not math.isfinite(example_loss([bad, bad], 0, "classification"))
    assert not math.isfinite(example_loss([-1.0, math.nan], 0, "classification"))


def test_the_language_modelling_loss_is_minus_the_score_of_the_answer() -> None:
    assert example_loss([-1.5, -0.25], 1, "language_modeling") == 0.25


def test_language_modelling_reads_only_the_right_candidate(base: Path, tmp_path: Path) -> None:
    made = objective(base, tmp_path)
    example = made.batch(0)[0][0]
    right = example.candidates[example.label]

    kept = needed_rows(example, "language_modeling")

    assert kept.rows == (example.rows[right.row],)
    assert [(c.positions, c.targets) for c in kept.candidates] == [(right.positions, right.targets)]
    assert kept.label == 0
    assert needed_rows(example, "classification") is example


def test_no_examples_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^data: expected at least one training example, got none$"
    ):
        objective(base, tmp_path, ExampleSet([], "classification"))


@pytest.mark.parametrize("key", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_sizes_must_be_positive(base: Path, tmp_path: Path, key: str) -> None:
    made = tiny_trainer(base, tmp_path)
    sizes: dict[str, Any] = {"batch_size": 1, "num_micro_batches": 1}
    sizes["batch_size" if key.startswith("per") else "num_micro_batches"] = 0

    with pytest.raises(ConfigError, match=rf"^{key}: expected a number above 0, got 0$"):
        Objective(
            made.model,
            made._live,
            made.scales,
            ExampleSet(made.objective._examples, "classification"),
            **sizes,
        )


def test_stratified_order_keeps_all_examples_and_spreads_the_classes() -> None:
    labels = [0] * 30 + [1] * 20 + [2] * 10
    order = random.Random(3).sample(range(60), 60)

    result = stratified(order, labels)

    assert sorted(result) == list(range(60))
    for start in range(0, 60, 6):
        assert Counter(labels[i] for i in result[start : start + 6]) == {0: 3, 1: 2, 2: 1}
    for label in range(3):
        assert [i for i in result if labels[i] == label] == [i for i in order if labels[i] == label]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([0, 0, 0, 1], [0, 0, 1, 0]),  # at 1/6, 1/2, 5/6; and 1/2, where the smaller class is first
        ([0, 0, 0, 0, 0, 1, 1], [0, 1, 0, 0, 0, 1, 0]),  # .1 .3 .5 .7 .9; .25 .75
        ([2, 2, 1, 1, 1, 0], [1, 2, 0, 1, 2, 1]),  # .25 .75; 1/6 .5 5/6; .5
    ],
)
def test_an_example_stands_in_the_middle_of_its_share_of_the_way(
    labels: list[int], classes: list[int]
) -> None:
    order = list(range(len(labels)))

    assert [labels[i] for i in stratified(order, labels)] == classes
    assert stratified(order[::-1], labels) != stratified(order, labels)


@pytest.mark.parametrize("is_stratified", [True, False])
def test_an_epoch_is_a_permutation_of_its_own_whatever_was_asked_before(
    base: Path, tmp_path: Path, is_stratified: bool
) -> None:
    """The oracle is numpy's own generator, keyed by seed and epoch."""
    made = objective(
        base,
        tmp_path,
        data_seed=5,
        per_device_train_batch_size=3,
        stratified_batches=is_stratified,
    )
    labels = [RECORDS[i]["candidates"].index(RECORDS[i]["completion"]) for i in range(8)]
    want: list[int] = []
    for epoch in range(4):
        generator = np.random.Generator(np.random.Philox(key=[5, epoch]))
        order = generator.permutation(8).tolist()
        classes = [[i for i in order if labels[i] == label] for label in (0, 1)]
        pairs = zip(*classes, strict=True)
        want += [i for pair in pairs for i in pair] if is_stratified else order
    place = {example: i for i, example in enumerate(made._examples)}

    got = {step: [place[e] for e in made.batch(step)[0]] for step in (9, 0, 2, 5, 1, 9)}

    assert got == {step: want[3 * step : 3 * step + 3] for step in got}
