"""The prefixes that attention layers see: trained ones of every probe, or fixed ones."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from qzo.model.by_probe import probe_of_token
from qzo.model.linear import Live


def prefixes_of(live: Live, module: nn.Module) -> list[Float[Tensor, "probes heads n _"]] | None:
    """Return the keys and values that an attention layer sees at the moment, or None."""
    if live.effective is None:
        fixed = live.fixed_prefixes.get(module)
        return None if fixed is None else [tensor[None] for tensor in fixed]
    number = live.trained_prefixes.get(module)
    if number is None or live.sections is None:
        return None
    return [live.sections(number), live.sections(number + 1)]


def prefixes_of_texts(
    live: Live, module: nn.Module, first_tokens: Int[Tensor, " texts"]
) -> list[Float[Tensor, "texts heads n _"]] | None:
    """Return the keys and values in front of packed texts, given the place of each first token."""
    prefixes = prefixes_of(live, module)
    if prefixes is None:
        return None
    if len(prefixes[0]) == 1:
        return [state.expand(len(first_tokens), -1, -1, -1) for state in prefixes]
    assert live.bounds is not None
    probe = probe_of_token(tuple(live.bounds), first_tokens.device)[first_tokens]
    return [state[probe] for state in prefixes]
