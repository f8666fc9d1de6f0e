import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.gptq_files import write_gptq
from support.models import HIDDEN, VOCABULARY, logits_of, relative_error, tiny_model
from support.nf4_files import bnb_config, load_bnb
from support.runs import change_tensor, dense_candidate_scores, tiny_checkpoint, tiny_trainer
from support.training import examples, short_run, tuned_logits
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import qzo
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.errors import CheckpointError, ConfigError
from qzo.method.directions.philox import directions
from qzo.method.extra.section import Section, sections_of
from qzo.method.optimizers.sgd import SGD
from qzo.method.probes import DirectionalDerivative, Probe
from qzo.model.load import quant_linears
from qzo.model.stacked import answer_scores, build_stack
from qzo.run.journal.compact import open_record, write_compact
from qzo.run.output.adapter import apply_adapter, open_adapter
from qzo.run.recipe.keys import ZOConfig
from qzo.run.trainable import trained_vector
from qzo.run.trainer import Trainer

CPU = torch.device("cpu")
ALL: list[Any] = ["norms", "biases", "head"]
# What each model has; gemma3 multiplies by 1 + w, opt has biases in its norms, and both qwen3 and
# gemma3 have norms of queries and keys, before and after the heads are transposed.
MODELS: dict[str, list[Any]] = {
    "llama": ["norms", "head"],
    "qwen2": ALL,
    "opt": ["norms", "biases"],
    "qwen3": ["norms"],
    "gemma3": ["norms"],
}
NUM_NORMS = {"llama": 5, "qwen2": 5, "opt": 5, "qwen3": 9, "gemma3": 13}  # two blocks, final one


def model_of(architecture: str) -> PreTrainedModel:
    """Return a model of two blocks in float32 whose values fit float16."""
    if architecture in {"llama", "qwen2", "opt"}:
        return tiny_model(architecture, num_layers=2)
    sizes: dict[str, Any] = {
        **{"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 96},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0},
        **{"bos_token_id": 1, "eos_token_id": 2},
    }
    model: PreTrainedModel
    if architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    else:
        model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = 0.1 * torch.randn(parameter.shape, generator=generator)
            plain = architecture == "qwen3" and "norm" in name
            parameter.copy_((values + plain).half().float())
    model.train(False)
    return model


@dataclass(frozen=True)
class Given:
    """A 4-bit checkpoint and transformers' own model of it."""

    base: Path
    dense: PreTrainedModel


def given_model(folder: Path, architecture: str) -> Given:
    return Given(folder, write_gptq(folder, model_of(architecture)))


def set_by_hand(dense: nn.Module, before: dict[str, Tensor], key: str, values: Tensor) -> None:
    """Write one tensor of a dense model, given the values of a section."""
    stored = before[key]
    if key.endswith(".bias"):
        rms = (stored.double() ** 2).mean().sqrt().item()
        new = stored + values * rms
    elif key == "lm_head.weight":
        new = torch.stack([row * value for row, value in zip(stored, values, strict=True)])
    elif "Gemma" in type(dense).__name__:
        new = (1 + stored) * values - 1
    else:
        new = stored * values
    with torch.no_grad():
        dense.get_parameter(key).copy_(new)


@pytest.mark.parametrize("num_blocks", [None, 1])
@pytest.mark.parametrize("architecture", MODELS)
def test_each_probe_equals_a_dense_model_with_its_tensors(
    tmp_path: Path, architecture: str, num_blocks: int | None
) -> None:
    given = given_model(tmp_path, architecture)
    model = qzo.load(given.base)
    zo = ZOConfig(unquantized=MODELS[architecture], unquantized_factor=3.0, num_blocks=num_blocks)
    live, scales = trained_vector(model, zo, 0)
    start = len(scales) - sum(section.size for section in scales.sections)
    with torch.no_grad():
        scales.values[start:] += 0.1 * torch.randn(
            len(scales) - start, generator=torch.Generator().manual_seed(1)
        )
    probes = [Probe(1, 0.05), Probe(2, 0.05), Probe(1, -0.05)]

    stack = build_stack([examples() for _ in probes], CPU)
    with scales.shifted(live, probes):
        got = [row[0] for row in answer_scores(model, live, stack)]

    want: list[float] = []
    before = {key: tensor.clone() for key, tensor in given.dense.state_dict().items()}
    for probe in probes:
        given.dense.load_state_dict(before)
        (z,) = directions("rademacher", [probe.seed], 0, len(scales))
        moved = scales.values + probe.offset * z
        moved[start:] = scales.values[start:] + 3 * probe.offset * z[start:]
        for row_values, name in zip(
            moved[:start].split([before[f"{n}.weight"].shape[0] for n in scales.names]),
            scales.names,
            strict=True,
        ):
            with torch.no_grad():
                weight = given.dense.get_parameter(f"{name}.weight")
                weight.copy_(before[f"{name}.weight"] * row_values[:, None])
        place = start
        for section in scales.sections:
            values = moved[place : place + section.size]
            set_by_hand(given.dense, before, section.name, values)
            place += section.size
        want += [dense_candidate_scores(given.dense, example)[0] for example in examples()]
    assert len({round(value, 4) for value in want}) == 9
    assert got == pytest.approx(want, abs=1e-4)  # float32 roundings of logits below 10


@pytest.mark.parametrize("architecture", MODELS)
def test_the_sections_are_the_tensors_behind_the_fork(tmp_path: Path, architecture: str) -> None:
    model = qzo.load(given_model(tmp_path, architecture).base)
    kinds = MODELS[architecture]
    _, whole = trained_vector(model, ZOConfig(unquantized=kinds), 0)
    _, half = trained_vector(model, ZOConfig(unquantized=kinds, num_blocks=1), 0)

    norms, some = ({s.name for s in v.sections if s.kind == "norm"} for v in (whole, half))
    assert len(norms) == NUM_NORMS[architecture]
    assert some == {name for name in norms if ".0." not in name}
    _, front = trained_vector(model, ZOConfig(unquantized=["norms"], depth=(0.0, 0.5)), 0)
    assert {s.name for s in front.sections} == {name for name in norms if ".0." in name}
    biases = [section for section in whole.sections if section.kind == "bias"]
    assert len(biases) == {"qwen2": 6, "opt": 12}.get(architecture, 0)
    assert any(s.kind == "head" for s in whole.sections) == ("head" in kinds)


def test_a_norm_in_front_of_the_blocks_is_not_trained(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=1, n_head=4)
    write_gptq(tmp_path, BloomForCausalLM(config))
    _, scales = trained_vector(qzo.load(tmp_path), ZOConfig(unquantized=["norms"]), 0)
    names = [section.name.removeprefix("transformer.") for section in scales.sections]
    assert sorted(names) == [
        "h.0.input_layernorm.weight",
        "h.0.post_attention_layernorm.weight",
        "ln_f.weight",
    ]


def test_a_step_of_a_section_grows_by_the_square_of_its_factor(tmp_path: Path) -> None:
    model = qzo.load(given_model(tmp_path, "llama").base)
    moves = []
    for factor in (1.0, 2.0):
        zo = ZOConfig(unquantized=["norms"], unquantized_factor=factor)
        _, scales = trained_vector(model, zo, 0)
        start = len(scales) - sum(section.size for section in scales.sections)
        before = scales.values.clone()
        slope = 0.25 * factor  # a loss that falls along z alone falls faster along factor * z
        SGD().step(scales, [DirectionalDerivative(7, slope, slope)], 0.5)
        moves.append((scales.values - before)[start:])
    assert torch.equal(moves[1], 4 * moves[0])
    assert bool(moves[0].abs().eq(0.125).all())


def test_a_section_may_fall_below_zero_and_a_row_may_not(tmp_path: Path) -> None:
    model = qzo.load(given_model(tmp_path, "qwen2").base)
    _, scales = trained_vector(model, ZOConfig(unquantized=["biases"]), 0)
    start = len(scales) - sum(section.size for section in scales.sections)
    SGD().step(scales, [DirectionalDerivative(7, 3.0, 3.0)], 1.0)
    assert scales.values[:start].min() == 0
    assert scales.values[start:].min() == -3


# --- runs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    base: Path
    folder: Path
    out: Path
    trainer: Trainer
    exported: Any


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that trained all that the model has, and its export."""
    folder = tmp_path_factory.mktemp(request.param)
    given = given_model(folder / "base", request.param)
    zo: dict[str, Any] = {"unquantized": MODELS[request.param]}
    trainer = short_run(qzo.load(given.base), folder / "run", **zo)
    exported = qzo.export(folder / "run", folder / "out")
    return Run(given.base, folder / "run", folder / "out", trainer, exported)


def trained_keys(run: Run) -> list[str]:
    return [section.name for section in run.trainer.scales.sections]


def test_an_export_computes_the_trained_logits(run: Run) -> None:
    tuned = tuned_logits(run.trainer)
    assert relative_error(tuned, logits_of(qzo.load(run.base))) > 0.01
    # scales and tensors are rounded to fp16, 2**-11 of each
    assert relative_error(logits_of(qzo.load(run.out)), tuned) < 4e-3


def test_an_export_is_the_base_with_its_adapter(run: Run) -> None:
    model = qzo.load(run.base)
    apply_adapter(model, open_checkpoint(run.base), open_adapter(run.folder))
    assert torch.equal(logits_of(qzo.load(run.out)), logits_of(model))
    assert torch.equal(logits_of(run.trainer.model), logits_of(model))


def test_only_scales_and_the_named_tensors_differ(run: Run) -> None:
    before, after = (load_file(f / "model.safetensors") for f in (run.base, run.out))
    assert list(before) == list(after)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    keys = trained_keys(run)
    assert changed == {key for key in before if key.endswith(".scales")} | set(keys)
    for key in keys:
        assert after[key].dtype == before[key].dtype
        assert after[key].shape == before[key].shape
    assert run.exported.unquantized == tuple(keys)
    assert run.exported.num_changed == len(run.trainer.scales.names)
    card = (run.out / "README.md").read_text()
    assert all(f"`{key}`" in card for key in keys)
    config = json.loads((run.folder / "adapter_config.json").read_text())
    assert config["unquantized"] == keys


def test_a_replay_needs_no_model(run: Run, tmp_path: Path) -> None:
    assert qzo.replay(run.folder).adapter == "equal"
    write_compact(open_record(run.folder), tmp_path / "journal.safetensors")
    qzo.replay(tmp_path / "journal.safetensors", out=tmp_path / "again", base=str(run.base))
    first, second = (f / "adapter_model.safetensors" for f in (run.folder, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


def test_training_starts_from_the_base_under_an_adapter(run: Run, tmp_path: Path) -> None:
    first = (run.folder / "journal.jsonl").read_text().splitlines()[1:]
    kinds = run.trainer.config.zo.unquantized
    short_run(run.trainer.model, tmp_path / "again", unquantized=kinds)
    assert (tmp_path / "again" / "journal.jsonl").read_text().splitlines()[1:] == first


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_resumed_run_ends_bitwise_where_one_without_a_stop_ends(
    tmp_path: Path, optimizer: str
) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    keys: dict[str, Any] = {
        "lr_scheduler_type": "constant",
        "resume_from_checkpoint": True,
        "zo": {"unquantized": ["norms", "head"], "optimizer": optimizer},
    }
    tiny_trainer(base, tmp_path / "run", max_steps=3, **keys).train()
    tiny_trainer(base, tmp_path / "run", max_steps=6, **keys).train()
    tiny_trainer(base, tmp_path / "straight", max_steps=6, **keys).train()
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("run", "straight"))
    assert first.read_bytes() == second.read_bytes()


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "kind", "message"),
    [
        ("llama", "biases", "quantized layers with biases, found none; leave 'biases' out"),
        (
            "opt",
            "head",
            "a head with a matrix of its own, found one that shares it with the embeddings, which "
            "would change too; leave 'head' out",
        ),
    ],
)
def test_what_a_model_does_not_have_is_refused(
    tmp_path: Path, architecture: str, kind: Any, message: str
) -> None:
    write_gptq(tmp_path, tiny_model(architecture, tied=architecture == "opt"))
    with pytest.raises(ConfigError, match=f"^zo.unquantized: expected {re.escape(message)}$"):
        trained_vector(qzo.load(tmp_path), ZOConfig(unquantized=[kind]), 0)


def test_a_quantized_head_is_refused(tmp_path: Path) -> None:
    model = qzo.load(given_model(tmp_path, "llama").base)
    model.set_output_embeddings(quant_linears(model)[-1])
    with pytest.raises(
        ConfigError,
        match=r"^zo.unquantized: expected an unquantized head, found a quantized one, whose scales "
        "are trained with the others; leave 'head' out$",
    ):
        trained_vector(model, ZOConfig(unquantized=["head"]), 0)


def test_a_norm_that_does_something_else_is_refused(tmp_path: Path) -> None:
    class SquareNorm(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return x + self.weight**2

    model = qzo.load(given_model(tmp_path, "llama").base)
    model.set_submodule("model.norm", SquareNorm(model.get_parameter("model.norm.weight")))
    with pytest.raises(
        ConfigError,
        match=r"^zo.unquantized: expected norms that multiply by their weight, or by 1 plus it, "
        "found model.norm, a SquareNorm; leave 'norms' out$",
    ):
        trained_vector(model, ZOConfig(unquantized=["norms"]), 0)


@pytest.mark.parametrize("keys", ["model.norm.weight", [3]])
def test_a_damaged_list_of_tensors_is_refused(run: Run, tmp_path: Path, keys: Any) -> None:
    path = tmp_path / "adapter_config.json"
    config = json.loads((run.folder / path.name).read_text())
    path.write_text(json.dumps({**config, "unquantized": keys}))
    with pytest.raises(
        CheckpointError,
        match=f"^{re.escape(str(path))}: expected unquantized to be a list of keys, got "
        f"{re.escape(repr(keys))}$",
    ):
        open_adapter(tmp_path)


def test_another_norm_in_the_base_is_refused(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    tiny_trainer(base, tmp_path / "run", max_steps=2, zo={"unquantized": ["norms"]}).train()
    change_tensor(base / "model.safetensors", "norm.weight")
    with pytest.raises(
        CheckpointError,
        match=f"^{re.escape(str(base))}: unquantized_sha256 is not that of the journal; the base "
        "was changed since the run, or is another one$",
    ):
        qzo.replay(tmp_path / "run")


def test_a_number_that_does_not_fit_the_file_is_refused() -> None:
    section = Section("model.norm.weight", "norm", (2,))
    stored = torch.tensor([6e4, 1.0], dtype=torch.float16)
    with pytest.raises(
        CheckpointError,
        match=r"^model.norm.weight: expected trained numbers that fit torch.float16, got larger "
        "ones; lower learning_rate or zo.unquantized_factor$",
    ):
        section.tuned(stored, torch.tensor([1.2, 1.0]))


def test_sections_survive_the_header() -> None:
    sections = (Section("a.weight", "norm", (3,), 1.5, 2.0, 1.0, 2**63 + 1),)
    header = json.loads(json.dumps({"sections": [section.to_dict() for section in sections]}))
    assert sections_of(header) == sections
    assert sections_of({}) == ()


@pytest.mark.parametrize(
    "change",
    [{"kind": "x"}, {"shape": [0]}, {"shape": [2, 2]}, {"unit": None}, {"seed": -1}, {"more": 1}],
)
def test_a_damaged_section_is_refused(change: dict[str, Any]) -> None:
    entry = Section("a.weight", "norm", (3,)).to_dict() | change
    with pytest.raises(
        CheckpointError,
        match=r"^journal: line 1: expected sections with name, kind, shape, unit, factor, offset "
        "and seed, got something else: ",
    ):
        sections_of({"sections": [entry]})


# --- other ways to a model --------------------------------------------------------------------


@pytest.mark.usefixtures("natural_bitsandbytes")
def test_a_wrapped_model_is_trained_and_exported(tmp_path: Path) -> None:
    tiny_model("qwen2", intermediate=128).save_pretrained(tmp_path / "float")
    model = qzo.wrap(load_bnb(tmp_path / "float", bnb_config()))
    trainer = short_run(model, tmp_path / "run", unquantized=ALL)
    qzo.export(tmp_path / "run", tmp_path / "out")
    tuned = tuned_logits(trainer)
    assert relative_error(logits_of(qzo.load(tmp_path / "out")), tuned) < 1e-5  # float32 files
    assert qzo.replay(tmp_path / "run").adapter == "equal"
