"""What the recipes of runs said before: a run of an older version goes on by its recipe.

The recipe in a run folder or in the header of a journal is resolved: it holds every key that its
version knew, with the values of its preset.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from qzo.run.recipe.compatibility import without_effect
from qzo.run.recipe.keys import ZOConfig


def in_todays_words(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resolved recipe of an older run as this version says it.

    - No preset is put under it: a key that it lacks was not there, and has the default of its own.
    - Keys that nothing reads have their defaults; they were not refused.
    - ``constant`` warmed up; that is ``constant_with_warmup`` now, as in transformers.
    """
    result = {**values, "preset": "none"}
    if isinstance(values.get("zo"), Mapping):
        result["zo"] = _without_unread(values["zo"])
    if values.get("lr_scheduler_type") == "constant" and values.get("warmup_steps", 0) != 0:
        result["lr_scheduler_type"] = "constant_with_warmup"
    return result


def _without_unread(zo: Mapping[str, Any]) -> dict[str, Any]:
    try:
        unread = without_effect(ZOConfig(**zo))
    except (ValidationError, TypeError):
        return dict(zo)  # whoever reads it says what is wrong
    return {**zo, **{key: ZOConfig.model_fields[key].default for key in unread}}
