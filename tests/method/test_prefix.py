import inspect
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.gptq_files import write_gptq
from support.models import logits_of, some_tokens, tiny_model
from support.runs import COMPLETIONS, tiny_checkpoint, tiny_trainer
from support.training import examples, short_run, tuned_logits
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import qzo
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.data.tokenize import EncodedExample
from qzo.errors import CheckpointError, ConfigError
from qzo.method.directions.philox import directions
from qzo.method.extra.prefix import fixing_prefixes
from qzo.method.probes import Probe, start_seed
from qzo.model.generate import generate
from qzo.model.load import load_tokenizer, quant_linears
from qzo.model.stacked import answer_scores, build_stack
from qzo.run.journal.compact import open_record, write_compact
from qzo.run.output.adapter import apply_adapter, open_adapter
from qzo.run.recipe.keys import ZOConfig
from qzo.run.trainable import trained_vector
from qzo.run.trainer import Trainer

CPU = torch.device("cpu")
PREFIX: dict[str, Any] = {"tuned": "prefix", "prefix_tokens": 3}


def behind_prefix(dense: PreTrainedModel, states: list[Tensor], row: Tensor) -> Tensor:
    """Return logits of transformers' own model with keys and values in its cache.

    Args:
        dense: The model.
        states: Keys and values of each layer in turn.
        row: Token ids, whose positions count from 0.
    """
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(states[::2], states[1::2], strict=True)):
        cache.update(key[None].clone(), value[None].clone(), layer)
    has_new_name = "cache" in inspect.signature(type(dense).forward).parameters
    given: dict[str, Any] = {"cache" if has_new_name else "past_key_values": cache}
    with torch.inference_mode():
        positions = torch.arange(row.numel())[None]
        logits: Tensor = dense(input_ids=row[None], position_ids=positions, **given).logits[0]
    return logits


def dense_score(dense: PreTrainedModel, states: list[Tensor], example: EncodedExample) -> float:
    (candidate,) = example.candidates
    logits = behind_prefix(dense, states, torch.tensor(example.rows[0]))
    (position,), (target,) = candidate.positions, candidate.targets
    return float(logits[position].double().log_softmax(-1)[target])


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
def test_each_probe_equals_a_dense_model_with_its_prefix(tmp_path: Path, architecture: str) -> None:
    dense = write_gptq(tmp_path, tiny_model(architecture, num_layers=2))
    model = qzo.load(tmp_path)
    live, scales = trained_vector(model, ZOConfig(**PREFIX), 0)
    assert scales.names == []
    assert [section.shape for section in scales.sections] == [(2, 3, 16)] * 4
    probes = [Probe(1, 0.5), Probe(2, 0.5), Probe(1, -0.5)]
    items = [examples(), examples()[:2], examples()]

    with scales.shifted(live, probes):
        got = [row[0] for row in answer_scores(model, live, build_stack(items, CPU))]

    want: list[float] = []
    for probe, of_probe in zip(probes, items, strict=True):
        (z,) = directions("rademacher", [probe.seed], 0, len(scales))
        parts = (scales.values + probe.offset * z).split([s.size for s in scales.sections])
        states = [part.view(2, 3, 16) for part in parts]
        want += [dense_score(dense, states, example) for example in of_probe]
    assert len({round(value, 5) for value in want}) == len(want)
    assert got == pytest.approx(want, abs=1e-4)  # float32 roundings of logits below 10


def test_a_prefix_starts_as_random_tokens_in_front_of_the_text(tmp_path: Path) -> None:
    dense = write_gptq(tmp_path, tiny_model(num_layers=2))
    model = qzo.load(tmp_path)
    live, scales = trained_vector(model, ZOConfig(**PREFIX), 5)
    with scales.shifted(live, [Probe(0, 0.0)]):
        got = logits_of(model)

    draw = np.random.Generator(np.random.Philox(key=start_seed(5, 0)))
    tokens = torch.tensor(draw.integers(64, size=3))
    whole = torch.cat((tokens.expand(2, -1), some_tokens()), dim=1)
    want = logits_of(dense, whole)[:, 3:]
    assert not torch.allclose(logits_of(dense), want, atol=0.05)
    assert torch.allclose(got, want, atol=5e-3)  # the start is rounded to fp16


@pytest.mark.parametrize(("depth", "block"), [((0.5, 1.0), 1), ((0.0, 0.5), 0)])
def test_only_trained_blocks_have_a_prefix(
    tmp_path: Path, depth: tuple[float, float], block: int
) -> None:
    write_gptq(tmp_path, tiny_model(num_layers=2))
    model = qzo.load(tmp_path)
    live, scales = trained_vector(model, ZOConfig(**PREFIX, depth=depth), 0)
    names = [section.name for section in scales.sections]
    assert names == [f"model.layers.{block}.self_attn.prefix_{role}" for role in ("key", "value")]

    probes = [Probe(1, 0.5), Probe(2, 0.5)]
    with scales.shifted(live, probes):
        stack = build_stack([examples()] * 2, CPU)
        together = [row[0] for row in answer_scores(model, live, stack)]
    alone = []
    for probe in probes:
        with scales.shifted(live, [probe]):
            stack = build_stack([examples()], CPU)
            alone += [row[0] for row in answer_scores(model, live, stack)]
    assert together == pytest.approx(alone, abs=1e-5)  # a few float32 roundings


# --- runs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    base: Path
    folder: Path
    trainer: Trainer
    dense: PreTrainedModel


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("prefix")
    base = tiny_checkpoint(folder / "base", num_layers=2)
    dense = write_gptq(folder / "same", tiny_model(num_layers=2))
    trainer = short_run(qzo.load(base), folder / "run", **PREFIX)
    return Run(base, folder / "run", trainer, dense)


def test_a_model_with_the_adapter_computes_the_trained_logits(run: Run) -> None:
    model = qzo.load(run.base)
    plain = logits_of(model)
    apply_adapter(model, open_checkpoint(run.base), open_adapter(run.folder))
    assert torch.equal(logits_of(model), tuned_logits(run.trainer))
    assert torch.equal(logits_of(run.trainer.model), logits_of(model))
    assert not torch.allclose(logits_of(model), plain, atol=0.05)
    assert model.config._attn_implementation == "sdpa"


def test_packed_texts_see_the_prefix_that_plain_ones_see(run: Run) -> None:
    model = qzo.load(run.base)
    apply_adapter(model, open_checkpoint(run.base), open_adapter(run.folder))
    live = quant_linears(model)[0].live
    scores = [row[0] for row in answer_scores(model, live, build_stack([examples()], CPU))]
    for score, example in zip(scores, examples(), strict=True):
        logits = logits_of(model, torch.tensor([example.rows[0]]))[0, -1]
        assert score == pytest.approx(float(logits.log_softmax(-1)[5]), abs=1e-5)


def test_generated_tokens_follow_the_prefix(run: Run) -> None:
    model, tokenizer = qzo.load(run.base), load_tokenizer(run.base)
    plain = generate(model, tokenizer, "say 1:", max_new_tokens=8)
    apply_adapter(model, open_checkpoint(run.base), open_adapter(run.folder))
    got = generate(model, tokenizer, "say 1:", max_new_tokens=8)

    tokens = tokenizer("say 1:")["input_ids"]
    start = len(tokens)
    for _ in range(8):  # without a cache
        tokens.append(int(logits_of(model, torch.tensor([tokens]))[0, -1].argmax()))
    want = tokenizer.decode(tokens[start:], skip_special_tokens=True)
    assert got == want[: len(got)]
    assert len(got) > 0
    assert got != plain


def test_an_adapter_of_scales_takes_the_place_of_a_prefix(run: Run, tmp_path: Path) -> None:
    model, checkpoint = qzo.load(run.base), open_checkpoint(run.base)
    short_run(qzo.load(run.base), tmp_path / "other")
    other = open_adapter(tmp_path / "other")
    apply_adapter(model, checkpoint, other)
    want = logits_of(model)
    apply_adapter(model, checkpoint, open_adapter(run.folder))
    apply_adapter(model, checkpoint, other)
    assert torch.equal(logits_of(model), want)


@pytest.mark.parametrize("zo", [{"unquantized": ["norms"]}, {"tuned": "lora"}, PREFIX], ids=str)
def test_a_prefix_starts_from_the_base_under_an_adapter(tmp_path: Path, zo: Any) -> None:
    write_gptq(tmp_path / "base", tiny_model(num_layers=2))
    model = qzo.load(tmp_path / "base")
    _, want = trained_vector(model, ZOConfig(**PREFIX), 0)
    short_run(model, tmp_path / "run", **zo)
    _, got = trained_vector(model, ZOConfig(**PREFIX), 0)
    assert torch.equal(got.values, want.values)


def test_an_adapter_holds_the_master(run: Run) -> None:
    tensors = load_file(run.folder / "adapter_model.safetensors")
    assert len(tensors) == 4
    for number, section in enumerate(run.trainer.scales.sections):
        assert torch.equal(tensors[section.name], run.trainer.scales.tuned_section(number))


def test_a_replay_needs_no_model(run: Run, tmp_path: Path) -> None:
    assert qzo.replay(run.folder).adapter == "equal"
    write_compact(open_record(run.folder), tmp_path / "journal.safetensors")
    qzo.replay(tmp_path / "journal.safetensors", out=tmp_path / "again", base=str(run.base))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (run.folder / name).read_bytes()


@pytest.mark.parametrize("estimator", ["per_example", "spsa"])
def test_a_resumed_run_ends_bitwise_where_one_without_a_stop_ends(
    tmp_path: Path, estimator: str
) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    keys: dict[str, Any] = {
        "lr_scheduler_type": "constant",
        "resume_from_checkpoint": True,
        "zo": {**PREFIX, "estimator": estimator, "optimizer": "momentum"},
    }
    tiny_trainer(base, tmp_path / "run", max_steps=3, **keys).train()
    tiny_trainer(base, tmp_path / "run", max_steps=6, **keys).train()
    tiny_trainer(base, tmp_path / "straight", max_steps=6, **keys).train()
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("run", "straight"))
    assert first.read_bytes() == second.read_bytes()


def test_a_resumed_run_starts_from_the_prefix_in_its_journal(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    keys: dict[str, Any] = {"lr_scheduler_type": "constant", "zo": PREFIX, "save_steps": 1}
    tiny_trainer(base, tmp_path / "run", max_steps=2, **keys).train()
    again = tiny_trainer(base, tmp_path / "run", max_steps=3, resume_from_checkpoint=True, **keys)
    sections = again.scales.sections
    # as another computer may compute them
    again.scales.take_sections([replace(s, data="A" * len(s.data)) for s in sections])
    again.train()
    assert qzo.replay(tmp_path / "run").adapter == "equal"
    assert again.scales.sections == sections


@pytest.mark.slow
def test_training_by_a_prefix_lowers_the_loss(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", gain=4.0)
    result = tiny_trainer(
        base,
        tmp_path / "run",
        train=COMPLETIONS,
        evaluation=COMPLETIONS,
        max_steps=40,
        learning_rate=0.2,
        zo={"tuned": "prefix"},
    ).train()
    assert result.before is not None
    assert result.after is not None
    assert result.after.loss < result.before.loss - 0.1


# --- settings and refusals --------------------------------------------------------------------


def test_epsilon_is_mezos_unless_given() -> None:
    base = {"model": "m", "output_dir": "o"}
    assert qzo.recipe({**base, "zo": {"tuned": "prefix"}}).zo.epsilon == 0.1
    assert qzo.recipe({**base, "zo": {"tuned": "prefix", "epsilon": 0.02}}).zo.epsilon == 0.02
    assert qzo.recipe({**base, "zo": {"tuned": "lora"}}).zo.epsilon == 0.01


def test_an_export_of_a_prefix_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=f"^{re.escape(str(run.folder))}: expected trained scales, got a prefix, which no "
        "checkpoint holds; load the run with qzo eval and generate --adapter$",
    ):
        qzo.export(run.folder, tmp_path / "out")


def test_a_model_with_attention_of_its_own_is_refused(tmp_path: Path) -> None:
    write_gptq(tmp_path, tiny_model())
    model = qzo.load(tmp_path)
    model.config._attn_implementation = "eager"
    with pytest.raises(
        ConfigError,
        match=r"^zo.tuned: expected 'scales' or 'lora' for LlamaForCausalLM, whose attention takes "
        "no prefix, got 'prefix'$",
    ):
        trained_vector(model, ZOConfig(**PREFIX), 0)


def test_a_prefix_that_no_journal_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gptq(tmp_path, tiny_model())
    monkeypatch.setattr("qzo.method.extra.prefix._VALUES_MAX", 639)  # as 2**22 would take a minute
    zo = ZOConfig(tuned="prefix", prefix_tokens=10)
    with pytest.raises(
        ConfigError,
        match=r"^zo.prefix_tokens: expected at most 639 keys and values, got 640; take fewer "
        "tokens$",
    ):
        trained_vector(qzo.load(tmp_path), zo, 0)


def test_a_prefix_of_another_model_is_refused(run: Run, tmp_path: Path) -> None:
    write_gptq(tmp_path, tiny_model())
    model = qzo.load(tmp_path)
    tensors = load_file(run.folder / "adapter_model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"^model.layers.1.self_attn.prefix_key: expected an attention layer of the model "
        "with keys and values, found none; the adapter belongs to another base$",
    ):
        fixing_prefixes(model, quant_linears(model)[0].live, tensors)


def test_a_damaged_start_is_refused(run: Run, tmp_path: Path) -> None:
    lines = (run.folder / "journal.jsonl").read_text().splitlines()
    header = json.loads(lines[0])
    header["sections"][0]["data"] = header["sections"][0]["data"][4:]
    path = tmp_path / "journal.jsonl"
    path.write_text("\n".join([json.dumps(header), *lines[1:]]) + "\n")
    with pytest.raises(
        CheckpointError,
        match=r"^journal: line 1: expected sections with name, kind, shape, unit, factor, offset "
        "and seed, got something else: ",
    ):
        qzo.replay(path, out=tmp_path / "out", base=str(run.base))


def test_rows_padded_on_the_left_see_the_prefix_and_no_padding(run: Run) -> None:
    model = qzo.load(run.base)
    apply_adapter(model, open_checkpoint(run.base), open_adapter(run.folder))
    row = some_tokens(1, 5)
    with torch.inference_mode():
        got = model(
            input_ids=torch.cat((torch.zeros(1, 2, dtype=torch.long), row), dim=1),
            attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1]]),
            position_ids=torch.tensor([[0, 0, 0, 1, 2, 3, 4]]),
        ).logits[:, 2:]
    # a few float32 roundings of logits below 10
    assert torch.allclose(got, logits_of(model, row), atol=1e-5)
