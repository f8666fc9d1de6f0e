"""How many answers are generated together, in a plan and in a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import COMPLETIONS, json_lines, tiny_checkpoint, tiny_recipe, write_lines
from transformers import AutoConfig, LlamaConfig

from qzo.bench.model_shapes import SHAPES
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.data.examples import from_records
from qzo.model.load import load_checkpoint, load_tokenizer
from qzo.plan.answer_memory import tokens_at_once, tokens_within
from qzo.plan.planner import Plan, plan
from qzo.run import launch as run
from qzo.run.memory import planned_bytes

GIB = 2**30
SPSA = {"estimator": "spsa", "num_directions": 4, "epsilon": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "model", num_layers=2)


def seven(tmp_path: Path, **keys: Any) -> Plan:
    """Plan a reward on a 7B model: 16 examples of 512 tokens along 16 directions."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama-2-7b"]))
    sizes: dict[str, Any] = {"batch_size": 16, "seq_len": 512, "evaluations": 32}
    return plan(tmp_path, device="cuda", max_new_tokens=50, **sizes, **keys)


@pytest.mark.slow
def test_a_reward_on_a_7b_model_fits_24_gib(tmp_path: Path) -> None:
    planned = seven(tmp_path, memory_bytes=24 * GIB)

    assert planned.verdict == "yes"
    assert planned.peak_bytes < 24 * GIB
    rows = planned.generation_batch_size
    assert rows is not None
    assert 16 <= rows < 512
    cache = next(part for part in planned.parts if part.name == "keys and values")
    assert cache.bytes == rows * 562 * 2 * 32 * 4096 * 2  # of 32 layers, in float16


@pytest.mark.slow
def test_a_reward_on_a_7b_model_fits_no_card_in_one_piece(tmp_path: Path) -> None:
    assert seven(tmp_path, generation_batch_size=512).peak_bytes > 150 * 10**9
    assert seven(tmp_path).peak_bytes == seven(tmp_path, generation_batch_size=512).peak_bytes
    small = seven(tmp_path, memory_bytes=8 * GIB)
    assert (small.verdict, small.generation_batch_size) == ("yes", 3)


def test_tokens_are_a_power_of_two_that_fits() -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4
    )
    of_token = (2 * 3 * 64 + 8 * 64 + 4 * 96) * 2

    assert tokens_within(100 * of_token / 0.75, config, 2) == 64
    assert tokens_within(64 * of_token / 0.75, config, 2) == 64
    assert tokens_within(64 * of_token / 0.75 - 1, config, 2) == 32
    assert tokens_within(0, config, 2) == tokens_within(-1, config, 2) == 1


def test_a_model_without_a_budget_takes_what_is_free(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_checkpoint(open_checkpoint(base))
    config = AutoConfig.from_pretrained(base)
    monkeypatch.setattr("qzo.plan.answer_memory.available_bytes", lambda _: 2**24)
    want = tokens_within(2**24, config, 4)
    assert tokens_at_once(model) == want
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert tokens_at_once(model) == want // 4


def test_a_run_with_a_limit_generates_what_fits_into_it(base: Path) -> None:
    data = from_records(COMPLETIONS, load_tokenizer(base), max_length=60)
    recipe = tiny_recipe(base, base.parent / "run", objective="f1", max_new_tokens=8, zo=SPSA)
    device, checkpoint = torch.device("cpu"), open_checkpoint(base)
    free = planned_bytes(recipe, checkpoint, [data], device)
    width = max(len(example.rows[0]) for example in data.examples) + 8

    assert free.generated_tokens == 32 * width  # of an evaluation; a step has 8 probes of 3
    limit = free.streaming + free.other - 10_000
    limited = planned_bytes(recipe, checkpoint, [data], device, limit)
    assert 0 < limited.generated_tokens < free.generated_tokens
    assert limited.streaming + limited.other <= limit
    given = recipe.model_copy(update={"generation_batch_size": 2})
    assert planned_bytes(given, checkpoint, [data], device).generated_tokens == 2 * width


@pytest.mark.slow
def test_a_run_does_not_depend_on_what_is_generated_together(base: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", COMPLETIONS)
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def letters(prompt, output, example):\n    return sum(c < 'm' for c in output) / 8\n"
    )

    def losses(name: str, **keys: Any) -> list[Any]:
        common: dict[str, Any] = {"objective": "reward", "reward": f"{reward}:letters"}
        common |= {"max_new_tokens": 6, "max_steps": 2}
        common |= {"num_eval_examples": 0, "generation_stop": None, "zo": SPSA}
        run.train(tiny_recipe(base, tmp_path / name, data=str(data), **common, **keys))
        lines = json_lines(tmp_path / name / "journal.jsonl")
        return [line["losses"] for line in lines if "losses" in line]

    want = losses("together")
    assert len(want) == 2
    assert any(loss != want[0][0] for of_step in want for loss in of_step)
    assert losses("apart", generation_batch_size=2) == want
    assert losses("limited", memory_limit="2GiB") == want
