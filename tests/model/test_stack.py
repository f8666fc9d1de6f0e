from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gptq_files import write_gptq
from support.models import ARCHITECTURES, HIDDEN, VOCABULARY, tiny_model
from support.runs import dense_candidate_scores
from support.training import examples
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
)

import qzo
from qzo.data.tokenize import Candidate, EncodedExample
from qzo.method.coordinates import Coordinates
from qzo.method.probes import Probe
from qzo.method.trained_vector import Scales
from qzo.model import stacked as stacking
from qzo.model.attention import can_pack
from qzo.model.linear import Live
from qzo.model.load import quant_linears, trained_layers
from qzo.model.stacked import answer_scores, build_stack
from qzo.run.recipe.keys import ZOConfig
from qzo.run.trainable import trained_vector

CPU = torch.device("cpu")


def scores(
    model: PreTrainedModel, live: Live, scales: Scales, probes: list[Probe], *, together: bool
) -> list[float]:
    """Return the score of every example at every probe, in one forward or in one each."""
    if together:
        stack = build_stack([examples() for _ in probes], CPU)
        with scales.shifted(live, probes):
            return [row[0] for row in answer_scores(model, live, stack)]
    result = []
    for probe in probes:
        for example in examples():
            with scales.shifted(live, [probe]):
                result += answer_scores(model, live, build_stack([[example]], CPU))
    return [row[0] for row in result]


@pytest.mark.parametrize("num_blocks", [None, 1])
@pytest.mark.parametrize(("coordinates", "radius"), [("row", 0.05), ("absolute", 2e-3)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_stacked_forward_equals_a_forward_per_probe_and_example(
    tmp_path: Path,
    architecture: str,
    coordinates: Coordinates,
    radius: float,
    num_blocks: int | None,
) -> None:
    write_gptq(tmp_path, tiny_model(architecture, num_layers=2))
    model = qzo.load(tmp_path)
    layers = trained_layers(model, num_blocks)
    scales = Scales.of_layers(layers, coordinates=coordinates, direction="rademacher")
    probes = [Probe(1, radius), Probe(2, radius), Probe(1, -radius)]
    together, alone = (
        scores(model, layers[0].live, scales, probes, together=together)
        for together in (True, False)
    )
    assert len(set(alone)) == 9
    # a few float32 roundings of logits below 10
    assert together == pytest.approx(alone, abs=1e-5)


def long_answers() -> list[EncodedExample]:
    """Return examples with answers of several tokens; two share positions, in turned order."""
    rows = [tuple(range(start, start + 9)) for start in (3, 20, 11)]
    ends = [(5, 6, 7), (2, 3), (4, 5, 6, 7, 8)]
    answers = [Candidate(0, places, tuple(3 + p for p in places)) for places in ends]
    second = (answers[1], Candidate(0, (3, 2), (8, 9)))
    return [
        EncodedExample((rows[0],), (answers[0],), 0),
        EncodedExample((rows[1],), second, 1),
        EncodedExample((rows[2],), (answers[2],), 0),
    ]


def changing_logits(architecture: str) -> PreTrainedModel:
    """Return a model that changes what its head returns."""
    sizes: dict[str, Any] = {
        **{"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 96},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0},
        **{"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
    }
    models: dict[str, PreTrainedModel] = {
        "cohere": CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.5)),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=2.0)),
    }
    model = models[architecture]
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()  # the files have float16
    model.eval()
    return model


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "cohere", "gemma2"])
def test_logits_in_chunks_give_the_scores_of_a_dense_model(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_tiny = architecture in ARCHITECTURES
    plain = tiny_model(architecture, num_layers=2) if is_tiny else changing_logits(architecture)
    dense = write_gptq(tmp_path, plain)
    model = qzo.load(tmp_path)
    monkeypatch.setattr(stacking, "LOGITS_ELEMENTS", 4 * VOCABULARY)
    rows, decoded = [], []
    head, decoder = model.get_output_embeddings(), quant_linears(model)[0]
    head.register_forward_hook(lambda _m, _x, y: rows.append(y.shape[:-1].numel()))
    decoder.register_forward_hook(lambda *_: decoded.append(1))

    stack = build_stack([long_answers()], CPU, is_packed=can_pack(model))
    got = answer_scores(model, quant_linears(model)[0].live, stack)

    assert rows == [4, 4, 2]
    assert len(decoded) == 1
    for scores_of, example in zip(got, long_answers(), strict=True):
        # float32 roundings of logits below 10
        assert scores_of == pytest.approx(dense_candidate_scores(dense, example), abs=1e-5)


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_each_probe_sees_its_head_in_chunks(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gptq(tmp_path, tiny_model())
    model = qzo.load(tmp_path)
    live, scales = trained_vector(model, ZOConfig(unquantized=["head", "norms"]), 0)
    probes = [Probe(1, 0.05), Probe(2, 0.05), Probe(1, -0.05)]
    stack = build_stack([long_answers() for _ in probes], CPU)
    with scales.shifted(live, probes):
        want = answer_scores(model, live, stack)
        monkeypatch.setattr(stacking, "LOGITS_ELEMENTS", rows * VOCABULARY)
        got = answer_scores(model, live, stack)
    # sums of a product with fewer rows may be taken in another order
    torch.testing.assert_close([*chain(*got)], [*chain(*want)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_log_softmax_is_in_float32_whatever_the_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    write_gptq(tmp_path, tiny_model())
    model = qzo.load(tmp_path, dtype)
    logits: list[torch.Tensor] = []

    def keep(_: nn.Module, _inputs: Any, y: torch.Tensor) -> None:
        logits.append(y[0].double())

    model.get_output_embeddings().register_forward_hook(keep)
    got = answer_scores(model, quant_linears(model)[0].live, build_stack([examples()], CPU))
    want = logits[0].log_softmax(-1)[:, 5].tolist()
    # float16 has steps of 0.002 around 4, the size of these numbers
    assert [row[0] for row in got] == pytest.approx(want, abs=1e-5)


def test_only_a_forward_keeps_cuda_from_rounding_partial_sums(tmp_path: Path) -> None:
    write_gptq(tmp_path, tiny_model())
    model, settings = qzo.load(tmp_path), torch.backends.cuda.matmul
    seen: list[tuple[Any, Any]] = []

    def look(*_: Any) -> None:
        seen.append(flags())

    def flags() -> tuple[Any, Any]:
        return (
            settings.allow_fp16_reduced_precision_reduction,
            settings.allow_bf16_reduced_precision_reduction,
        )

    before = flags()
    model.get_output_embeddings().register_forward_hook(look)
    answer_scores(model, quant_linears(model)[0].live, build_stack([examples()], CPU))
    assert before == flags() == (True, True)
    assert seen == [(False, False)]
