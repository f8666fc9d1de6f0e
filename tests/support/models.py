"""Tiny transformers models with fixed weights."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 64
HIDDEN = 64
INTERMEDIATE = 96  # one and a half blocks of 64: ragged groups, blocks that cross rows

ARCHITECTURES = ("llama", "mistral", "qwen2", "opt")
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_model(
    architecture: str = "llama",
    *,
    tied: bool = False,
    num_layers: int = 1,
    intermediate: int = INTERMEDIATE,
    seed: int = 0,
) -> PreTrainedModel:
    """Return a model in float32 whose values all fit float16."""
    sizes = {"num_hidden_layers": num_layers, "tie_word_embeddings": tied}
    model = _build(architecture, {**_SIZES, **sizes, "intermediate_size": intermediate})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_((1 + 0.1 * values if is_norm else 0.1 * values).half().float())
    model.eval()
    return model


def _build(architecture: str, sizes: dict[str, Any]) -> PreTrainedModel:
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    if architecture == "mistral":
        return MistralForCausalLM(MistralConfig(**sizes))
    if architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes))
    own = {"ffn_dim": sizes["intermediate_size"], "word_embed_proj_dim": HIDDEN}
    kept = {k: v for k, v in sizes.items() if k not in {"intermediate_size", "num_key_value_heads"}}
    return OPTForCausalLM(OPTConfig(**kept, **own))


def block_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear layers that quantizers touch: all but the head."""
    head = model.get_output_embeddings()
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, nn.Linear) and m is not head}


def some_tokens(rows: int = 2, width: int = 7) -> Tensor:
    """Return fixed token ids without special tokens."""
    return torch.arange(rows * width).view(rows, width) * 7 % (VOCABULARY - 3) + 3


def logits_of(model: nn.Module, tokens: Tensor | None = None) -> Tensor:
    """Return the logits of a model."""
    with torch.inference_mode():
        logits: Tensor = model(input_ids=some_tokens() if tokens is None else tokens).logits
    return logits


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, in units of the largest wanted value."""
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())
