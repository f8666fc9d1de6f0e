"""Attention over packed tokens: no padding in the model, common prefixes once.

The tokens of a batch follow one another in one row, ``(1, tokens)``. Only attention has to know
which of them form a text. It gathers the texts, those of like length together, lets the model's own
attention run over them, and puts the results back. Right padding needs no mask there: under causal
attention a token never sees what follows it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PLAIN_LAYERS = {"full_attention", "sliding_attention"}
_SMALLEST_SHARE = 0.5  # of the longest text of a bucket; shorter ones go into the next

Attend = Callable[..., tuple[Tensor, Any]]
Prefixes = Callable[[nn.Module, Tensor], Sequence[Tensor] | None]


@dataclass(frozen=True)
class PackedRows:
    """Which packed tokens form a text.

    Attributes:
        buckets: Tokens of texts of like length; padding repeats the last token of a text.
        places: Where each token's result lies among the places of all buckets.
        is_plain: The tokens lie as the only bucket has them, so nothing has to be gathered.
    """

    buckets: tuple[Int[Tensor, "_ _"], ...]  # texts, width
    places: Int[Tensor, " tokens"]
    is_plain: bool


def pack_rows(texts: Sequence[Sequence[int]], num_tokens: int, device: torch.device) -> PackedRows:
    """Sort texts into buckets by length.

    Args:
        texts: The tokens of every text, as places in the packed row; prefixes may be common.
        num_tokens: Tokens of the packed row, each in at least one text.
        device: Where the tensors go.
    """
    buckets: list[list[Sequence[int]]] = []
    for text in sorted(texts, key=len, reverse=True):
        if not buckets or len(text) < _SMALLEST_SHARE * len(buckets[-1][0]):
            buckets.append([])
        buckets[-1].append(text)
    padded = [
        [[*text, *[text[-1]] * (len(bucket[0]) - len(text))] for text in bucket]
        for bucket in buckets
    ]
    flat = [token for bucket in padded for text in bucket for token in text]
    places = [0] * num_tokens
    for place in range(len(flat) - 1, -1, -1):
        places[flat[place]] = place
    return PackedRows(
        tuple(torch.tensor(bucket, device=device) for bucket in padded),
        torch.tensor(places, device=device),
        is_plain=len(padded) == 1 and flat == list(range(num_tokens)),
    )


def can_pack(model: PreTrainedModel) -> bool:
    """Return whether a model's only operation across tokens is torch's causal attention."""
    config = model.config.get_text_config()
    return (
        model._supports_attention_backend
        and not model._is_stateful
        and config._attn_implementation == "sdpa"
        and set(getattr(config, "layer_types", None) or ()) <= _PLAIN_LAYERS
    )


@contextmanager
def packed_attention(
    model: PreTrainedModel,
    rows: Callable[[], PackedRows | None],
    prefixes: Prefixes | None = None,
) -> Iterator[None]:
    """Let a model compute on packed tokens while the block runs.

    Args:
        model: A model that ``can_pack``.
        rows: Tells which tokens form a text at the moment.
        prefixes: Gives keys and values to put in front of texts, by the places of their first
            tokens.
    """
    attend = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]

    def attend_packed(
        module: nn.Module,
        query: Float[Tensor, "1 heads tokens width"],
        key: Float[Tensor, "1 kv_heads tokens width"],
        value: Float[Tensor, "1 kv_heads tokens width"],
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Float[Tensor, "1 tokens heads width"], None]:
        packed = rows()
        assert packed is not None
        return _attend(attend, packed, module, (query, key, value), options, prefixes), None

    with attending(model, f"qzo_packed_{id(model)}", attend_packed):
        yield


@contextmanager
def attending(model: PreTrainedModel, name: str, attend: Attend) -> Iterator[None]:
    """Let a model attend in another way, which transformers knows by a name meanwhile."""
    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[name] = attend
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[name]


def _attend(
    attend: Attend,
    packed: PackedRows,
    module: nn.Module,
    states: Sequence[Float[Tensor, "1 _ tokens _"]],  # queries may have more heads
    options: dict[str, Any],
    prefixes: Prefixes | None,
) -> Float[Tensor, "1 tokens heads width"]:
    by_token = [state[0].transpose(0, 1) for state in states]
    results = []
    for bucket in packed.buckets:
        shape = bucket.shape
        parts = [
            (state if packed.is_plain else state.index_select(0, bucket.view(-1)))
            .unflatten(0, shape)
            .transpose(1, 2)
            for state in by_token
        ]
        mask = _window_mask(shape[1], options.get("sliding_window"), bucket.device)
        prefix = None if prefixes is None else prefixes(module, bucket[:, 0])
        if prefix is not None:
            parts, mask = with_prefix(parts, prefix, mask)
        result, _ = attend(module, *parts, mask, **options)
        results.append(result.flatten(0, 1))
    flat = results[0] if len(results) == 1 else torch.cat(results)
    return (flat if packed.is_plain else flat.index_select(0, packed.places))[None]


def _window_mask(
    width: int, window: int | None, device: torch.device
) -> Bool[Tensor, "1 1 width width"] | None:
    """Return the mask of a sliding window, where it hides something from a text of this width."""
    if window is None or width <= window:
        return None
    place = torch.arange(width, device=device)
    distance = place[:, None] - place[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


def with_prefix(
    states: Sequence[Float[Tensor, "texts _ _ _"]],
    prefix: Sequence[Float[Tensor, "texts heads n _"]],
    mask: Tensor | None,
) -> tuple[list[Float[Tensor, "texts _ _ _"]], Tensor | None]:
    """Put keys and values in front of those of texts, visible to every token.

    Args:
        states: Queries, keys and values.
        prefix: Keys and values.
        mask: What tokens see of each other (bool, or float to be added); None: what is before them.

    Returns:
        The states, and the mask that goes with them.
    """
    query, *behind = states
    joined = [
        torch.cat((front.to(state.dtype), state), dim=2)
        for front, state in zip(prefix, behind, strict=True)
    ]
    width = query.shape[2]
    if mask is None and width > 1:
        mask = torch.ones(width, width, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None:
        shape = (*mask.shape[:3], prefix[0].shape[2])
        seen = mask.new_ones(shape) if mask.dtype == torch.bool else mask.new_zeros(shape)
        mask = torch.cat((seen, mask), dim=3)
    return [query, *joined], mask
