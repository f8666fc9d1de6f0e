"""Shapes of a model, read off its transformers class on the meta device: no weights, no device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qzo.checkpoint.config_counts import check_counts
from qzo.errors import ConfigError


@dataclass(frozen=True)
class LinearShape:
    """A linear layer by its dotted name and its two sizes."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class ModelShapes:
    """Counts of elements: quantized linear layers one by one, everything else summed.

    Attributes:
        linears: Layers that hold 4-bit codes.
        num_embedding: Elements of token and position embeddings.
        num_head: Elements of the output head; 0 when tied to the embeddings or quantized.
        num_other: All other elements: norms, biases, linear layers kept in floating point.
        vocab_size: Rows of the output head.
    """

    linears: tuple[LinearShape, ...]
    num_embedding: int
    num_head: int
    num_other: int
    vocab_size: int


def build_skeleton(config: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Build the causal language model of a ``config.json`` on the meta device.

    Args:
        config: Content of config.json; ``quantization_config`` is ignored. Not modified.
        dtype: Floating point type of every parameter, and so of the activations.

    Raises:
        ConfigError: transformers knows no such causal model, or its experts are fused.
    """
    ignored = ("quantization_config", "model_type", "dtype", "torch_dtype")
    settings = {key: value for key, value in config.items() if key not in ignored}
    check_counts(settings)
    factory: Any = AutoModelForCausalLM  # its methods are untyped
    try:
        model_config = AutoConfig.for_model(config.get("model_type", ""), **settings)
        with torch.device("meta"):
            model: PreTrainedModel = factory.from_config(
                model_config, dtype=dtype, trust_remote_code=False
            )
    except Exception as error:  # values of anybody, in the code of any architecture
        raise ConfigError(
            "config.json: expected a causal language model that transformers knows, got "
            f"model_type {config.get('model_type')!r}; {first_line(error)}"
        ) from error
    if _output_head(model) is None:
        raise ConfigError(
            "config.json: expected a causal language model with an output head, got "
            f"model_type {config.get('model_type')!r}"
        )
    _refuse_fused_experts(model)
    nn.Module.eval(model)
    return model


def values_of_token(config: Any) -> int:
    """Return how many keys and values all layers keep of one token.

    Args:
        config: A transformers config.

    Raises:
        ConfigError: It names no attention heads.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        raise ConfigError(
            f"config.json: expected attention heads, whose keys and values count, got model_type "
            f"{text.model_type!r} without"
        )
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    return 2 * int(text.num_hidden_layers * key_heads * width)


def model_shapes(model: PreTrainedModel, is_quantized: Callable[[str], bool]) -> ModelShapes:
    """Sort the elements of a skeleton into quantized layers, embeddings, head and the rest.

    Args:
        model: A skeleton on the meta device; not modified.
        is_quantized: Whether the linear layer of this dotted name holds codes.
    """
    head = _output_head(model)
    linears = tuple(shape for shape in linear_shapes(model) if is_quantized(shape.name))
    codes = {f"{shape.name}.weight" for shape in linears}
    tables = {id(table.weight) for table in model.modules() if isinstance(table, nn.Embedding)}
    counts = {"embedding": 0, "head": 0, "other": 0}
    for name, parameter in model.named_parameters():
        if name in codes:
            continue
        is_head = parameter is head.weight
        kind = "embedding" if id(parameter) in tables else "head" if is_head else "other"
        counts[kind] += parameter.numel()
    return ModelShapes(
        linears, counts["embedding"], counts["head"], counts["other"], head.weight.shape[0]
    )


def head_name(model: PreTrainedModel) -> str:
    """Return the dotted name of the output head."""
    head = _output_head(model)
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    return names[id(head)]


def linear_shapes(model: nn.Module) -> list[LinearShape]:
    """List every linear layer in the model's order."""
    return [
        LinearShape(name, module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def _output_head(model: Any) -> Any:
    return model.get_output_embeddings()


def _refuse_fused_experts(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "expert" in name:
            raise ConfigError(
                "config.json: expected a dense model, got a mixture of experts with the fused "
                f"tensor {name}; qzo plan cannot tell how a 4-bit checkpoint stores it"
            )


def first_line(error: Exception) -> str:
    """Shorten an error of transformers: one of them lists every architecture it knows."""
    return str(error).strip().split("\n", maxsplit=1)[0].split(". ", maxsplit=1)[0]
