"""Shapes of published models: their config.json without what changes no shape and no arithmetic.

``small`` and ``tiny`` are nobody's: ``small`` is what ``qzo bench scaling`` grows, ``tiny`` is for
tests.
"""

from typing import Any

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}


def _llama(hidden: int, intermediate: int, layers: int, heads: int, **others: Any) -> Any:
    """Return the config of a Llama; heads of keys and values as many as heads, unless given."""
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    return {**_LLAMA, **sizes, **others}


_SMOLLM2_135M = {
    "num_key_value_heads": 3,
    "initializer_range": 0.041666666666666664,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}

_QWEN2_5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(4096, 11008, 32, 32),
    "llama-2-13b": _llama(5120, 13824, 40, 40),
    "llama-2-70b": _llama(8192, 28672, 80, 64, num_key_value_heads=8),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=128256),
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, **{**_QWEN2_5, "num_key_value_heads": 4}),
    "qwen2.5-14b": _llama(5120, 13824, 48, 40, **_QWEN2_5),
    "qwen2.5-32b": _llama(5120, 27648, 64, 40, **_QWEN2_5),
    "smollm2-135m": _llama(576, 1536, 30, 9, **_SMOLLM2_135M),
    "small": _llama(512, 1408, 8, 8, vocab_size=2048),
    "tiny": _llama(64, 128, 2, 4, num_key_value_heads=2, vocab_size=96),
}
