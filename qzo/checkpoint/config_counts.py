"""Counts of a config.json that nothing could build."""

from collections.abc import Mapping
from typing import Any

from qzo.errors import ConfigError

_COUNT_MAX = 100_000


def check_counts(config: Mapping[str, Any]) -> None:
    """Refuse counts of layers, heads or experts that nothing could build.

    Raises:
        ConfigError: A count is too large.
    """
    for key, value in config.items():
        is_count = key.startswith(("num_", "n_")) and isinstance(value, int | float)
        if is_count and not value <= _COUNT_MAX:
            raise ConfigError(f"config.json: {key}: expected at most {_COUNT_MAX}, got {value}")
