"""Layers by name, as PEFT's ``target_modules`` means it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from support.runs import tiny_checkpoint
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
)
from transformers.pytorch_utils import Conv1D

import qzo
from qzo.errors import ConfigError
from qzo.model.layer_names import is_named, none_named
from qzo.model.load import trained_layers
from qzo.run.recipe.presets import PRESETS

LAYER = "model.layers.0.self_attn.v_proj"


@pytest.mark.parametrize(
    ("name", "entry", "is_one"),
    [
        (LAYER, "v_proj", True),
        (LAYER, "self_attn.v_proj", True),
        (LAYER, LAYER, True),
        (LAYER, "proj", False),
        (LAYER, "attn.v_proj", False),
        (LAYER, "self_attn", False),
        (LAYER, "model.layers.0", False),
        (LAYER, "", False),
        ("model.layers.0.self_attn.qkv_proj", "v_proj", False),
        ("transformer.h.0.self_attention.query_key_value", "value", False),
        ("model.layers.10.mlp.up_proj", "0.mlp.up_proj", False),
        ("lm_head", "lm_head", True),
    ],
)
def test_an_entry_names_a_layer_in_full_or_by_its_end(name: str, entry: str, is_one: bool) -> None:
    assert is_named(name, ["another", entry]) is is_one


def test_no_entry_names_nothing() -> None:
    assert not is_named(LAYER, [])


SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 8,
}
# Of every architecture the layers that the preset `default` means: values where they have a matrix
# of their own, and outputs of the attention.
CONFIGS: dict[str, tuple[PreTrainedConfig, set[str]]] = {
    "llama": (LlamaConfig(**SMALL), {"self_attn.v_proj", "self_attn.o_proj"}),
    "opt": (
        OPTConfig(**SMALL, ffn_dim=8, word_embed_proj_dim=8),
        {"self_attn.v_proj", "self_attn.out_proj"},
    ),
    "gptj": (
        GPTJConfig(vocab_size=32, n_embd=8, n_layer=1, n_head=2, rotary_dim=4),
        {"attn.v_proj", "attn.out_proj"},
    ),
    "phi": (PhiConfig(**SMALL), {"self_attn.v_proj", "self_attn.dense"}),
    "phi3": (Phi3Config(**SMALL, pad_token_id=0), {"self_attn.o_proj"}),
    "gpt2": (GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2), {"attn.c_proj"}),
    "gpt_bigcode": (
        GPTBigCodeConfig(vocab_size=32, n_embd=8, n_layer=1, n_head=2),
        {"attn.c_proj"},
    ),
    "gpt_neox": (GPTNeoXConfig(**SMALL), {"attention.dense"}),
    "falcon": (FalconConfig(**SMALL), {"self_attention.dense"}),
    "bloom": (
        BloomConfig(vocab_size=32, hidden_size=8, n_layer=1, n_head=2),
        {"self_attention.dense"},
    ),
    "mpt": (MptConfig(vocab_size=32, d_model=8, n_layers=1, n_heads=2), {"attn.out_proj"}),
    "codegen": (
        CodeGenConfig(vocab_size=32, n_embd=8, n_layer=1, n_head=4, rotary_dim=2),
        {"attn.out_proj"},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_preset_names_values_and_outputs_of_the_attention(name: str) -> None:
    config, want = CONFIGS[name]
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]

    found = [n for n in linears if is_named(n, PRESETS["default"]["zo"]["modules"])]

    assert {".".join(n.split(".")[-2:]) for n in found} == want


def test_a_name_of_no_layer_is_refused_with_the_ends_that_there_are(tmp_path: Path) -> None:
    model = qzo.load(tiny_checkpoint(tmp_path / "base"))

    with pytest.raises(
        ConfigError,
        match=r"^zo\.modules: expected names of layers, such as '.*self_attn\.v_proj', or how they "
        r"end behind a dot, got \['proj'\]; the ends here are down_proj, gate_proj, k_proj, "
        r"o_proj, q_proj, up_proj, v_proj$",
    ):
        trained_layers(model, None, ["proj"])


def test_the_message_names_what_there_is() -> None:
    assert none_named("modules", [LAYER, "lm_head"], "query") == (
        "modules: expected names of layers, such as 'lm_head', or how they end behind a dot, got "
        "'query'; the ends here are lm_head, v_proj"
    )
