"""Packed tokens against every text alone, in many architectures."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qzo.data.tokenize import Candidate, EncodedExample
from qzo.model.attention import can_pack, pack_rows
from qzo.model.linear import Live
from qzo.model.stacked import answer_scores, build_stack

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}
# name: config, whether its tokens can be packed; None: that depends on the version of transformers
MODELS: dict[str, tuple[dict[str, Any], bool | None]] = {
    "llama": (SMALL, True),
    "mistral": (SMALL | {"sliding_window": 5}, True),
    "qwen2": (SMALL, True),
    "qwen3": (SMALL | {"head_dim": 8}, True),
    "phi3": (SMALL | {"sliding_window": 5}, True),
    "gemma3_text": (SMALL | {"head_dim": 8, "sliding_window": 5}, True),
    "olmo2": (SMALL, True),
    "starcoder2": (SMALL | {"sliding_window": 5}, True),
    "gpt_neox": (SMALL, True),
    "gpt2": (OLD | {"n_positions": 64}, True),
    "phi": (SMALL, True),
    "opt": (SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}, True),
    "gemma2": (SMALL | {"head_dim": 8, "sliding_window": 5}, False),
    "stablelm": (SMALL, False),
    "bloom": (OLD | {"hidden_size": 32}, False),
    "falcon": (SMALL | {"alibi": True}, False),
    "mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 50}, False),
    "gptj": (OLD | {"n_positions": 64, "rotary_dim": 4}, None),
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    factory: Any = AutoModelForCausalLM
    model: PreTrainedModel = factory.from_config(AutoConfig.for_model(name, **MODELS[name][0]))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)  # so that tokens matter to each other
    nn.Module.eval(model)
    return model


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def texts(seed: int) -> list[tuple[int, ...]]:
    """Return texts of 2 to 40 tokens; some begin alike, are alike, or begin another one."""
    draw = random.Random(seed)
    rows = [tuple(draw.randrange(3, 50) for _ in range(n)) for n in (2, 3, 7, 9, 19, 21, 40)]
    rows += [(*rows[4][:11], *rows[3]), rows[2], rows[6][:5], (*rows[2], 7)]
    draw.shuffle(rows)
    return rows


def example(row: Sequence[int]) -> EncodedExample:
    """Score every token of a text but the first."""
    candidate = Candidate(0, tuple(range(len(row) - 1)), tuple(row[1:]))
    return EncodedExample((tuple(row),), (candidate,), 0)


def alone(model: PreTrainedModel, row: Sequence[int]) -> float:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].double()
    chosen = logits.log_softmax(-1)[range(len(row) - 1), row[1:]]
    return float(chosen.mean())


@pytest.mark.parametrize("num_probes", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_texts_together_score_what_each_scores_alone(name: str, num_probes: int) -> None:
    model = build(name)
    rows = texts(seed=num_probes)
    assert MODELS[name][1] in {can_pack(model), None}
    stack = build_stack(
        [[example(row) for row in rows]] * num_probes, CPU, is_packed=can_pack(model)
    )
    got = answer_scores(model, Live(forked=blocks(model)), stack)
    want = [alone(model, row) for row in rows] * num_probes
    assert max(want) - min(want) > 0.1
    # float32 roundings of logits below 100, summed in another order
    assert [score for (score,) in got] == pytest.approx(want, abs=2e-4)


def test_the_attention_of_the_model_is_back_after_an_error() -> None:
    model = build("llama")
    before = model.config._attn_implementation
    stack = build_stack([[example((1, 2, 3))]], CPU)

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    live = Live(forked=blocks(model))
    handle = model.get_output_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match=r"^stop$"):
        answer_scores(model, live, stack)
    handle.remove()
    assert model.config._attn_implementation == before
    assert (live.bounds, live.attention) == (None, None)
    got = answer_scores(model, live, stack)[0][0]
    assert got == pytest.approx(alone(model, (1, 2, 3)), abs=2e-4)


def test_no_mask_of_all_packed_tokens_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    seen: list[int] = []
    plain = nn.functional.scaled_dot_product_attention

    def note(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        assert options.get("attn_mask") is None
        seen.append(query.shape[2])
        return plain(query, *arguments, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", note)
    stack = build_stack([[example(row) for row in texts(0)]], CPU)
    answer_scores(model, Live(forked=blocks(model)), stack)
    assert max(seen) == 40  # the longest text


@pytest.mark.parametrize("seed", range(30))
def test_every_token_finds_its_result_and_no_bucket_pads_to_more_than_double(seed: int) -> None:
    draw = random.Random(seed)
    rows: list[list[int]] = []
    count = 0
    for _ in range(draw.randrange(1, 12)):
        common = draw.choice(rows)[: draw.randrange(20)] if rows and draw.random() < 0.4 else []
        length = draw.randrange(0 if common else 1, 30)
        rows.append([*common, *range(count, count + length)])
        count += length
    packed = pack_rows(rows, count, CPU)
    flat = [token for bucket in packed.buckets for token in bucket.flatten().tolist()]
    assert [flat[place] for place in packed.places.tolist()] == list(range(count))
    assert packed.is_plain == (flat == list(range(count)) and len(packed.buckets) == 1)
    lengths = sorted(map(len, rows), reverse=True)
    for bucket in packed.buckets:
        own, lengths = lengths[: len(bucket)], lengths[len(bucket) :]
        assert bucket.shape[1] == own[0] <= 2 * own[-1]
    assert not lengths
