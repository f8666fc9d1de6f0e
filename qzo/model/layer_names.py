"""Layers by name: the full name, or how it ends behind a dot, as PEFT's ``target_modules``.

``v_proj`` and ``self_attn.v_proj`` name ``model.layers.0.self_attn.v_proj``; neither names
``model.layers.0.self_attn.qkv_proj``.
"""

from collections.abc import Iterable


def is_named(name: str, entries: Iterable[str]) -> bool:
    """Tell whether one of the entries names a layer."""
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def none_named(key: str, names: Iterable[str], got: object) -> str:
    """Say that a key names no layer.

    Args:
        key: Of the recipe.
        names: Of the layers that there are.
        got: The value of the key.
    """
    *_, last = names = list(names)
    ends = sorted({name.rpartition(".")[2] for name in names})
    return (
        f"{key}: expected names of layers, such as {last!r}, or how they end behind a dot, got "
        f"{got!r}; the ends here are {', '.join(ends)}"
    )
