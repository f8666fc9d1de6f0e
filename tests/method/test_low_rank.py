import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import command as commands
from support.gptq_files import write_gptq
from support.models import logits_of, relative_error, tiny_model
from support.runs import (
    COMPLETIONS,
    dense_candidate_scores,
    tiny_checkpoint,
    tiny_trainer,
    write_lines,
)
from support.training import examples, short_run, tuned_logits
from torch import nn

import qzo
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.errors import CheckpointError, ConfigError
from qzo.method.directions.philox import directions
from qzo.method.extra.lora import add_low_rank, adding_low_rank
from qzo.method.probes import Probe
from qzo.model.load import quant_linears
from qzo.model.stacked import answer_scores, build_stack
from qzo.run.journal.compact import open_record, write_compact
from qzo.run.output.adapter import apply_adapter, open_adapter
from qzo.run.recipe.keys import ZOConfig
from qzo.run.trainable import trained_vector
from qzo.run.trainer import Trainer

CPU = torch.device("cpu")
LORA: dict[str, Any] = {"tuned": "lora", "lora_rank": 3, "lora_alpha": 6.0}
ADAPTED = 4  # q_proj and v_proj of two blocks


def add_as_peft_does(dense: nn.Module, folder: Path) -> None:
    """Merge a PEFT adapter, read by PEFT's documented formula, into a dense model."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(config["target_modules"])
    for name in config["target_modules"]:
        a = tensors[f"base_model.model.{name}.lora_A.weight"]
        b = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert (a.shape[0], b.shape[1]) == (config["r"], config["r"])
        assert (a.dtype, b.dtype) == (torch.float32, torch.float32)
        with torch.no_grad():
            dense.get_parameter(f"{name}.weight").add_(config["lora_alpha"] / config["r"] * b @ a)


def test_products_of_probes_equal_products_one_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 8, generator=generator), torch.randn(12, 5, generator=generator)
    a, b = torch.randn(3, 2, 8, generator=generator), torch.randn(3, 5, 2, generator=generator)
    for bounds in ((0, 4, 8, 12), (0, 3, 4, 12)):
        got = y.clone()
        add_low_rank(x, a, b, bounds, got)
        for token in range(12):
            probe = sum(token >= bound for bound in bounds[1:])
            want = y[token] + b[probe] @ (a[probe] @ x[token])
            assert torch.allclose(got[token], want, atol=1e-5)  # sums of ten float32 numbers


@pytest.mark.parametrize("same_length", [True, False])
def test_each_probe_equals_a_dense_model_with_its_factors(
    tmp_path: Path, same_length: bool
) -> None:
    dense = write_gptq(tmp_path, tiny_model(num_layers=2))
    model = qzo.load(tmp_path)
    live, scales = trained_vector(model, ZOConfig(**LORA), 0)
    assert scales.names == []
    assert len(scales.sections) == 2 * ADAPTED
    probes = [Probe(1, 0.05), Probe(2, 0.05), Probe(1, -0.05)]
    items = [examples() if same_length or i else examples()[:2] for i in range(3)]

    stack = build_stack(items, CPU)
    with scales.shifted(live, probes):
        got = [row[0] for row in answer_scores(model, live, stack)]

    want: list[float] = []
    before = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    for probe, of_probe in zip(probes, items, strict=True):
        dense.load_state_dict(before)
        (z,) = directions("rademacher", [probe.seed], 0, len(scales))
        moved = scales.values + probe.offset * z
        parts = moved.split([section.size for section in scales.sections])
        for a, b, section in zip(parts[::2], parts[1::2], scales.sections[::2], strict=True):
            name = section.name.removesuffix(".lora_A.weight")
            weight = dense.get_parameter(f"{name}.weight")
            with torch.no_grad():
                weight.add_(6.0 / 3 * b.view(-1, 3) @ a.view(3, -1))
        want += [dense_candidate_scores(dense, example)[0] for example in of_probe]
    assert len({round(value, 5) for value in want}) == len(want)
    assert got == pytest.approx(want, abs=1e-4)  # float32 roundings of logits below 10


def test_a_start_has_pefts_variance_and_its_own_numbers_per_layer_and_seed(tmp_path: Path) -> None:
    write_gptq(tmp_path, tiny_model(num_layers=2))
    model = qzo.load(tmp_path)
    starts = []
    for seed in (0, 0, 1):
        _, scales = trained_vector(model, ZOConfig(tuned="lora", lora_rank=32), seed)
        starts.append([scales.tuned_section(i).clone() for i in range(2 * ADAPTED)])
    assert all(map(torch.equal, starts[0], starts[1]))
    for a, b, other in zip(starts[0][::2], starts[0][1::2], starts[2][::2], strict=True):
        assert not b.any()
        # 2,048 normal numbers: the standard error of a variance is 3 percent
        assert float(a.var()) == pytest.approx(1 / (3 * 64), rel=0.15)
        assert not torch.equal(a, other)
    assert len({float(a[0, 0]) for a in starts[0][::2]}) == ADAPTED


# --- runs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    base: Path
    folder: Path
    trainer: Trainer
    dense: nn.Module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("lora")
    dense = write_gptq(folder / "base", tiny_model(num_layers=2))
    trainer = short_run(qzo.load(folder / "base"), folder / "run", **LORA)
    return Run(folder / "base", folder / "run", trainer, dense)


def test_a_reader_of_pefts_format_computes_the_trained_logits(run: Run) -> None:
    before = logits_of(run.dense)
    state = {key: tensor.clone() for key, tensor in run.dense.state_dict().items()}
    add_as_peft_does(run.dense, run.folder)
    got = logits_of(run.dense)
    run.dense.load_state_dict(state)
    tuned = tuned_logits(run.trainer)
    assert relative_error(tuned, before) > 1e-3
    assert relative_error(got, tuned) < 1e-5  # nothing is rounded but float32 sums


def test_a_model_with_the_adapter_computes_the_trained_logits(run: Run) -> None:
    model = qzo.load(run.base)
    plain = logits_of(model)
    apply_adapter(model, open_checkpoint(run.base), open_adapter(run.folder))
    assert torch.equal(logits_of(model), tuned_logits(run.trainer))
    assert not torch.equal(logits_of(model), plain)
    assert torch.equal(logits_of(run.trainer.model), logits_of(model))


def test_an_adapter_of_scales_takes_the_place_of_one_of_factors(run: Run, tmp_path: Path) -> None:
    model, checkpoint = qzo.load(run.base), open_checkpoint(run.base)
    short_run(qzo.load(run.base), tmp_path / "other")
    other = open_adapter(tmp_path / "other")
    apply_adapter(model, checkpoint, other)
    want = logits_of(model)
    apply_adapter(model, checkpoint, open_adapter(run.folder))
    apply_adapter(model, checkpoint, other)
    assert torch.equal(logits_of(model), want)


def test_a_replay_needs_no_model(run: Run, tmp_path: Path) -> None:
    assert qzo.replay(run.folder).adapter == "equal"
    write_compact(open_record(run.folder), tmp_path / "journal.safetensors")
    qzo.replay(tmp_path / "journal.safetensors", out=tmp_path / "again", base=str(run.base))
    for name in ("adapter_model.safetensors", "adapter_config.json", "qzo_adapter.json"):
        assert (tmp_path / "again" / name).read_bytes() == (run.folder / name).read_bytes()


@pytest.mark.parametrize("estimator", ["per_example", "spsa"])
def test_a_resumed_run_ends_bitwise_where_one_without_a_stop_ends(
    tmp_path: Path, estimator: str
) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    keys: dict[str, Any] = {
        "lr_scheduler_type": "constant",
        "resume_from_checkpoint": True,
        "zo": {**LORA, "estimator": estimator, "optimizer": "momentum"},
    }
    tiny_trainer(base, tmp_path / "run", max_steps=3, **keys).train()
    tiny_trainer(base, tmp_path / "run", max_steps=6, **keys).train()
    tiny_trainer(base, tmp_path / "straight", max_steps=6, **keys).train()
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("run", "straight"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_training_by_factors_lowers_the_loss(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", gain=4.0)
    trainer = tiny_trainer(
        base,
        tmp_path / "run",
        train=COMPLETIONS,
        evaluation=COMPLETIONS,
        max_steps=40,
        learning_rate=2e-2,
        zo={"tuned": "lora"},
    )
    result = trainer.train()
    assert result.before is not None
    assert result.after is not None
    assert result.after.loss < result.before.loss - 0.1


def test_a_run_of_the_command_is_evaluated_and_its_card_says_lora(
    capsys: Any, tmp_path: Path
) -> None:
    command = commands.command(capsys)
    base = tiny_checkpoint(tmp_path / "base")
    data, out = write_lines(tmp_path / "data.jsonl", COMPLETIONS), tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                **{"model": str(base), "data": str(data), "eval_data": str(data), "max_steps": 4},
                **{"output_dir": str(out), "max_length": 40, "zo": {"tuned": "lora"}},
            }
        )
    )
    done = command("train", str(recipe), "--json")
    loss = done.value["after"]["loss"]
    done = command("eval", str(base), "--adapter", str(out), "--data", str(data), "--json")
    assert done.value["loss"] == pytest.approx(loss, abs=1e-6)  # other batches
    assert "LoRA factors of rank 8" in (out / "README.md").read_text()


# --- refusals -------------------------------------------------------------------------------


def test_an_export_of_factors_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=f"^{re.escape(str(run.folder))}: expected trained scales, got LoRA factors, which do "
        "not fold into 4-bit codes; load the run with peft, or with qzo eval and generate "
        "--adapter$",
    ):
        qzo.export(run.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("zo", "message"),
    [
        (
            {"unquantized": ["norms"]},
            "zo.unquantized cannot be combined with zo.tuned: lora: norms, biases and head are "
            "trained beside scales; remove zo.unquantized or set zo.tuned: scales",
        ),
        (
            {"modules": ["k_proj"]},
            "zo.modules has no effect with zo.tuned: lora; remove it or set zo.lora_modules "
            "instead",
        ),
    ],
)
def test_keys_that_do_not_go_with_factors_are_refused(zo: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        qzo.recipe({"model": "m", "output_dir": "o", "zo": {"tuned": "lora", **zo}})


def test_modules_that_a_model_does_not_have_are_refused(tmp_path: Path) -> None:
    write_gptq(tmp_path, tiny_model())
    with pytest.raises(
        ConfigError,
        match=r"^zo.lora_modules: expected names of layers, such as "
        r"'model.layers.0.self_attn.v_proj', or how they end behind a dot, got \['nothing'\]; the "
        r"ends here are down_proj, .*, v_proj$",
    ):
        trained_vector(qzo.load(tmp_path), ZOConfig(tuned="lora", lora_modules=["nothing"]), 0)


def test_an_adapter_of_peft_alone_is_refused(run: Run, tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_bytes((run.folder / name).read_bytes())
    with pytest.raises(
        CheckpointError,
        match=f"^{re.escape(str(tmp_path))}/adapter_config.json: expected peft_type 'QZO', got "
        "'LORA'$",
    ):
        open_adapter(tmp_path)


def test_factors_of_another_model_are_refused(run: Run, tmp_path: Path) -> None:
    write_gptq(tmp_path, tiny_model(num_layers=1))
    model = qzo.load(tmp_path)
    adapter = open_adapter(run.folder)
    layer = quant_linears(model)[0]
    tensors = {key: adapter.tensors[key] for key in adapter.tensors.files}
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    with pytest.raises(
        CheckpointError,
        match=f"^{key}: expected a quantized layer of the model with factors of its sizes, found "
        "none; the adapter belongs to another base$",
    ):
        adding_low_rank(model, layer.live, tensors, 2.0)


@pytest.mark.parametrize("lora", [None, {"rank": 0, "alpha": 1.0}, {"rank": 3}])
def test_a_damaged_configuration_is_refused(run: Run, tmp_path: Path, lora: Any) -> None:
    for path in run.folder.glob("*adapter*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "qzo_adapter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora": lora}))
    with pytest.raises(
        CheckpointError,
        match=f"^{re.escape(str(path))}: expected lora with rank and alpha above 0, got "
        f"{re.escape(repr(lora))}$",
    ):
        open_adapter(tmp_path)
