"""QZO: fine-tune 4-bit language models with forward passes only.

The names below are imported when they are first used, so that ``import qzo`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qzo.version import __version__

if TYPE_CHECKING:
    from qzo.model.load import load
    from qzo.model.wrap import wrap
    from qzo.run.output.export import export
    from qzo.run.output.replay import replay
    from qzo.run.recipe.read import recipe
    from qzo.run.trainer import Trainer

__all__ = ["Trainer", "__version__", "export", "load", "recipe", "replay", "wrap"]

_MODULES = {
    "Trainer": "qzo.run.trainer",
    "export": "qzo.run.output.export",
    "load": "qzo.model.load",
    "recipe": "qzo.run.recipe.read",
    "replay": "qzo.run.output.replay",
    "wrap": "qzo.model.wrap",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'qzo' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
