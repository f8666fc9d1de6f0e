"""Prefix tuning: keys and values in front of every text, in the attention of every trained block.

They start as the keys and values that the model itself computes for a few random tokens. The
positions of the texts stay as they are. Where positions are rotations of keys, those of the prefix
are -n to -1, so that training starts from the model that has read those tokens first; elsewhere
they are 0 to n - 1. The prefix is always visible, whatever a sliding window hides.

Source: prefix tuning, arXiv 2101.00190; the start and zeroth order: MeZO, arXiv 2305.17333.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qzo.errors import CheckpointError, ConfigError
from qzo.method.extra.section import Section
from qzo.method.probes import start_seed
from qzo.model.attention import attending, can_pack, with_prefix
from qzo.model.linear import Live
from qzo.model.prefixes import prefixes_of

_VALUES_MAX = 2**22  # the header of a journal holds the start: 11 MB of text


def prefix_sections(
    model: PreTrainedModel, live: Live, num_tokens: int, run_seed: int
) -> dict[Section, nn.Module]:
    """Return two sections for every attention layer that is trained: its keys and its values.

    Raises:
        ConfigError: The model's attention is not known, or its prefix is too large.
    """
    if not can_pack(model):
        raise ConfigError(
            f"zo.tuned: expected 'scales' or 'lora' for {type(model).__name__}, whose attention "
            "takes no prefix, got 'prefix'"
        )
    trained = {part for block in live.trained for part in block.modules()}
    names = {module: name for name, module in model.named_modules()}
    found: dict[Section, nn.Module] = {}
    for module, states in _activations(model, live, num_tokens, run_seed).items():
        if module in trained:
            for role, state in zip(("key", "value"), states, strict=True):
                data = base64.b64encode(state.half().cpu().numpy().tobytes()).decode("ascii")
                name, shape = f"{names[module]}.prefix_{role}", tuple(state.shape)
                kind: Any = f"prefix_{role}"
                found[Section(name, kind, shape, data=data)] = module
    size = sum(section.size for section in found)
    if size > _VALUES_MAX:
        raise ConfigError(
            f"zo.prefix_tokens: expected at most {_VALUES_MAX} keys and values, got {size}; take "
            "fewer tokens"
        )
    return found


def _activations(
    model: PreTrainedModel, live: Live, num_tokens: int, run_seed: int
) -> dict[nn.Module, tuple[Float[Tensor, "heads n _"], Float[Tensor, "heads n _"]]]:
    """Return keys and values of random tokens by attention layer, in the order of the layers."""
    draw = np.random.Generator(np.random.Philox(key=start_seed(run_seed, 0)))
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.tensor([draw.integers(vocabulary, size=num_tokens).tolist()])
    is_rotary = any("rotary" in name.lower() for name, _ in model.named_modules())
    first = -num_tokens if is_rotary else 0
    positions = torch.arange(first, first + num_tokens)[None]
    attend = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        found[module] = (key[0], value[0])
        result: tuple[Tensor, Any] = attend(module, query, key, value, None, **options)
        return result

    with (
        torch.inference_mode(),
        _at_base(live),
        attending(model, f"qzo_recorded_{id(model)}", record),
    ):
        model(
            input_ids=tokens.to(model.device),
            position_ids=positions.to(model.device),
            use_cache=False,
        )
    return found


@contextmanager
def _at_base(live: Live) -> Iterator[None]:
    """Let a model that trains no scales compute as its files say while the block runs."""

    def scales_of_file(_: int) -> Any:
        raise AssertionError  # no layer has an index

    live.effective = scales_of_file
    try:
        yield
    finally:
        live.effective = None


def seeing_prefixes(
    model: PreTrainedModel, live: Live, modules: Mapping[Section, nn.Module]
) -> list[RemovableHandle]:
    """Let attention layers see their sections, keys in front of values."""
    live.trained_prefixes = {module: at for at, module in list(enumerate(modules.values()))[::2]}
    return _hooks(model, live)


def fixing_prefixes(
    model: PreTrainedModel, live: Live, tensors: Mapping[str, Tensor]
) -> list[RemovableHandle]:
    """Let attention layers see the prefixes of an adapter, except while training looks.

    Raises:
        CheckpointError: The model has no such layers.
    """
    modules = dict(model.named_modules())
    fixed: dict[nn.Module, Sequence[Tensor]] = {}
    for key in [key for key in tensors if key.endswith(".prefix_key")]:
        module = modules.get(key.removesuffix(".prefix_key"))
        value = tensors.get(key.replace(".prefix_key", ".prefix_value"))
        if module is None or value is None:
            raise CheckpointError(
                f"{key}: expected an attention layer of the model with keys and values, found "
                "none; the adapter belongs to another base"
            )
        fixed[module] = [tensor.to(model.device) for tensor in (tensors[key], value)]
    live.fixed_prefixes = fixed
    return _hooks(model, live)


def _hooks(model: PreTrainedModel, live: Live) -> list[RemovableHandle]:
    """Let forward passes of rows as they are (generation, for one) see the prefixes too."""
    own = "sdpa"  # can_pack says so
    name = f"qzo_prefixed_{id(model)}"
    attend = ALL_ATTENTION_FUNCTIONS[own]

    def attend_prefixed(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        states, prefixes = [query, key, value], prefixes_of(live, module)
        if prefixes is not None:
            prefixes = [state.expand(len(query), -1, -1, -1) for state in prefixes]
            states, attention_mask = with_prefix(states, prefixes, attention_mask)
        result: tuple[Tensor, Any] = attend(module, *states, attention_mask, **options)
        return result

    def before(_: nn.Module, _inputs: Any) -> None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        if live.attention is None and model.config._attn_implementation == own:
            ALL_ATTENTION_FUNCTIONS[name] = attend_prefixed
            # its keys are looked up in what all instances share
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
            model.config._attn_implementation = name

    def after(_: nn.Module, _inputs: Any, _output: Any) -> None:
        if model.config._attn_implementation == name:
            model.config._attn_implementation = own

    return [
        model.register_forward_pre_hook(before),
        model.register_forward_hook(after, always_call=True),
    ]
