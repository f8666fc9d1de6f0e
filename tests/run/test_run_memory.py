"""What a run is planned to need, from its recipe and its examples."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import RECORDS, tiny_checkpoint, tiny_recipe

from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.data.examples import ExampleSet, from_records
from qzo.model.load import load_tokenizer
from qzo.plan.budget import Planned
from qzo.plan.planner import plan
from qzo.run.memory import planned_bytes

SPSA = {"estimator": "spsa", "num_directions": 4, "epsilon": 0.1}
HYBRID = {"estimator": "spsa", "num_directions": 1, "first_order_blocks": 1}
QUESTION = {"prompt": "a good film . ", "completion": "great"}
TEXT = {"text": "a good film . it was great"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "model", num_layers=2)


def read(base: Path, records: list[dict[str, Any]]) -> ExampleSet:
    return from_records(records, load_tokenizer(base), max_length=60)


def planned(base: Path, sets: list[ExampleSet], **keys: Any) -> Planned:
    recipe = tiny_recipe(base, base.parent / "run", **{"per_device_eval_batch_size": 1, **keys})
    return planned_bytes(recipe, open_checkpoint(base), sets, torch.device("cpu"))


def test_as_many_evaluations_take_as_much_memory(base: Path) -> None:
    """Four losses of every example: whatever asks for them."""

    def of(**zo: Any) -> Planned:
        return planned(base, [read(base, RECORDS)], per_device_train_batch_size=4, zo=zo)

    want = of(estimator="spsa", num_directions=2)

    assert of(estimator="rloo", num_directions=4) == want
    assert of(estimator="one_sided", num_directions=3) == want
    assert of(estimator="per_example", num_directions=2) == want
    assert of(sides="leave_one_out", num_directions=4, examples_per_direction=2) == want
    assert of(estimator="spsa_1_5", num_directions=2) > want
    assert of(estimator="rloo", num_directions=3) < want


def test_the_optimizer_and_what_is_trained_instead_of_scales_count(base: Path) -> None:
    def of(**zo: Any) -> int:
        return planned(base, [read(base, RECORDS)], zo={**SPSA, **zo})[1]

    plain = of()
    values = len(open_checkpoint(base).layers)  # of at least one value each
    assert of(optimizer="adam") - plain == 2 * (of(optimizer="momentum") - plain) > 8 * values
    assert of(tuned="lora", lora_rank=1) < of(tuned="lora", lora_rank=2)
    assert of(tuned="prefix", prefix_tokens=1) < of(tuned="prefix", prefix_tokens=2)


def test_the_reference_loss_of_a_run_without_an_evaluation_set_counts(base: Path) -> None:
    data = read(base, RECORDS)
    few, many = (planned(base, [data], per_device_eval_batch_size=n, zo=SPSA) for n in (1, 64))
    assert many[1] > few[1]
    assert many == planned(base, [data, data], per_device_eval_batch_size=64, zo=SPSA)


def test_keys_and_values_of_written_answers_count(base: Path) -> None:
    data = read(base, [QUESTION] * 4)
    keys: dict[str, Any] = {"zo": SPSA, "max_new_tokens": 8}
    plain = planned(base, [data], **keys)
    written = planned(base, [data], objective="f1", **keys)

    rows, width = 8 * 3, max(len(example.rows[0]) for example in data.examples) + 8
    # keys and values of two layers with two heads of 16 values, in float32
    assert written[1] - plain[1] >= rows * width * 2 * 2 * 2 * 16 * 4
    assert written[0] == plain[0]


@pytest.mark.parametrize("is_trained", [True, False])
def test_all_tokens_of_a_text_reach_the_head(base: Path, is_trained: bool) -> None:
    """In training or in evaluation: the longest answer counts."""
    text, question = read(base, [TEXT] * 4), read(base, [QUESTION] * 4)
    length = len(text.examples[0].rows[0])
    assert length > len(question.examples[0].rows[0])
    keys: dict[str, Any] = {"per_device_eval_batch_size": 1, "max_new_tokens": 1}

    found = planned(base, [text] if is_trained else [question, text], zo=HYBRID, **keys)

    plan_of = partial(plan, base, batch_size=3, num_probes=1, seq_len=length, first_order_blocks=1)
    assert (
        found.streaming + found.other
        == plan_of(answer_len=length).peak_bytes
        > plan_of(answer_len=1).peak_bytes
    )


@pytest.mark.parametrize(("num_directions", "is_backward"), [(1, True), (64, False)])
def test_the_larger_of_probes_and_backward_counts(
    base: Path, num_directions: int, is_backward: bool
) -> None:
    data = read(base, [TEXT] * 4)
    length = len(data.examples[0].rows[0])
    probes = 2 * num_directions
    plan_of = partial(plan, base, batch_size=3, seq_len=length, answer_len=length)
    forward = plan_of(num_probes=probes).peak_bytes
    backward = plan_of(num_probes=1, first_order_blocks=1).peak_bytes
    assert (backward > forward) is is_backward

    zo = {**HYBRID, "num_directions": num_directions}

    found = planned(base, [data], zo=zo)
    assert found.streaming + found.other == max(forward, backward)
