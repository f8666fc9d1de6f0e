"""Amounts of memory as a user writes them."""

import re

from qzo.errors import ConfigError

_UNITS = {"b": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
    for power, prefix in enumerate("kmgt")
}


def parse_memory(text: str, key: str = "memory") -> int:
    """Turn ``24GiB``, ``8 GB`` or ``500MiB`` into bytes.

    Args:
        text: What the user wrote.
        key: Where; an error names it.

    Raises:
        ConfigError: It is no number above 0 with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    size = float(match[1]) * _UNITS.get(match[2], 0) if match else 0.0
    if size < 1:
        raise ConfigError(
            f"{key}: expected a number with a unit, such as 24GiB, 8GB or 500MiB, got {text!r}"
        )
    return int(size)
