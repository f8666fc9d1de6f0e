"""``device``, ``dtype`` and ``memory_limit``: the same in every command that loads a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import Run, command
from support.runs import RECORDS, tiny_checkpoint, tiny_recipe, write_lines

from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.data.examples import ExampleSet
from qzo.errors import ConfigError
from qzo.model.load import decoder_blocks
from qzo.model.placement import Placement, default_dtype, placement
from qzo.plan.batch_shape import BatchShape
from qzo.plan.planner import plan
from qzo.run.inference import load_for_inference
from qzo.run.memory import planned_bytes


@pytest.fixture
def qzo(capsys: pytest.CaptureFixture[str]) -> Run:
    return command(capsys)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "model", num_layers=3)


CPU = torch.device("cpu")
SHAPE = BatchShape(rows=2, tokens=8)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.arange(8)[None]).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_for_inference_streams_within_a_limit(base: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(base)
    free = load_for_inference(checkpoint, Placement(CPU, dtype), SHAPE)
    limited = load_for_inference(checkpoint, Placement(CPU, dtype, 2**40), SHAPE)
    with pytest.raises(ConfigError) as caught:
        load_for_inference(checkpoint, Placement(CPU, dtype, 2**20), SHAPE)
    smallest = float(str(caught.value).split("at least ")[1].split("GiB")[0])
    tight = load_for_inference(checkpoint, Placement(CPU, dtype, int(smallest * 2**30)), SHAPE)

    assert str(caught.value).endswith("; raise it, or lower --batch-size or --max-length")
    assert [m.qzo_budget is None for m in (free, limited, tight)] == [True, False, False]
    assert logits(free).dtype is dtype
    assert torch.equal(logits(tight), logits(free))
    assert not any(block._forward_hooks for block in decoder_blocks(limited))


def test_a_model_for_inference_streams_by_itself_where_memory_is_short(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qzo.plan.budget.available_bytes", lambda _: 2**20)
    monkeypatch.setattr("qzo.plan.budget._SMALL", 0.0)
    model = load_for_inference(open_checkpoint(base), Placement(CPU), SHAPE)
    assert decoder_blocks(model)[-1]._forward_hooks


@pytest.mark.slow
def test_eval_and_generate_take_the_three_settings(qzo: Run, base: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", RECORDS)
    evaluate = ("eval", base, "--data", data, "--json")
    generate = ("generate", base, "--prompt", "a film", "--max-new-tokens", "4", "--json")
    limited = ("--device", "cpu", "--memory-limit", "2GiB")
    want = qzo(*evaluate).value

    assert qzo(*evaluate, *limited).value == want
    assert qzo(*generate, *limited).value == qzo(*generate).value
    half = qzo(*evaluate, "--dtype", "bfloat16").value["loss"]
    assert 0 < abs(half - want["loss"]) < 0.05
    for arguments in (evaluate, generate):
        refused = [
            qzo(*arguments, *setting).err
            for setting in (
                ("--device", "tpu"),
                ("--dtype", "int8"),
                ("--memory-limit", "4"),
                ("--memory-limit", "1MiB"),
            )
        ]
        starts = ["device: ", "dtype: ", "memory_limit: ", "memory_limit: expected at least 0."]
        for error, start in zip(refused, starts, strict=True):
            assert error.startswith(f"qzo: {start}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("tpu", None, None), r"^device: expected 'cpu' or 'cuda', got 'tpu'$"),
        ((None, "int8", None), r"^dtype: expected one of float32, float16, bfloat16, got 'int8'$"),
        ((None, None, "4"), r"^memory_limit: expected a number with a unit, .*, got '4'$"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        placement(*settings)


def test_a_plan_takes_device_and_dtype_apart(base: Path) -> None:
    def peaks(**keys: Any) -> dict[str, int]:
        return {part.name: part.bytes for part in plan(base, **keys).parts}

    cpu, half = peaks(), peaks(dtype="bfloat16")
    cuda, full = peaks(device="cuda"), peaks(device="cuda", dtype="float32")

    assert half["activations"] * 2 == cpu["activations"]
    assert full["activations"] == cpu["activations"]
    assert cuda["framework"] == full["framework"] > cpu["framework"] > half["framework"] - 2**27
    assert plan(base, device="cuda").workload.dtype == "float16"
    with pytest.raises(ConfigError, match=r"^device: expected 'cpu' or 'cuda', got 'tpu'$"):
        plan(base, device="tpu")


def test_a_run_on_a_cpu_is_planned_in_its_dtype(base: Path) -> None:
    sets = [ExampleSet([], "classification")]
    full, half = (
        planned_bytes(
            tiny_recipe(base, base.parent / "run", dtype=dtype), open_checkpoint(base), sets, CPU
        )[1]
        for dtype in (None, "bfloat16")
    )
    assert half < full


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16", "model_type": "llama"}, "float16"),
        ({"torch_dtype": "bfloat16", "model_type": "qwen2"}, "float16"),
        ({"dtype": "bfloat16", "model_type": "gemma3_text"}, "bfloat16"),
        ({"dtype": "bfloat16", "model_type": "recurrent_gemma"}, "bfloat16"),
        ({"dtype": "bfloat16", "model_type": "glm4"}, "bfloat16"),
        ({"dtype": "float16", "model_type": "opt"}, "float16"),
        ({"dtype": "float32", "model_type": "llama"}, "float32"),
        ({}, "float16"),
    ],
)
def test_cuda_computes_in_float16_unless_numbers_do_not_fit(
    config: dict[str, str], dtype: str
) -> None:
    assert default_dtype(config, "cuda") == dtype
    assert default_dtype(config, "cpu") == "float32"
