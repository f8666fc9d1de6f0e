"""QZO: fine-tune 4-bit language models with forward passes only.

The names below are imported when they are first used, so that ``import qzo`` costs nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qzo.version import __version__

if TYPE_CHECKING:
    from qzo.export import export
    from qzo.model import load
    from qzo.recipe_file import recipe
    from qzo.replay import replay
    from qzo.trainer import Trainer
    from qzo.wrap import wrap

__all__ = ["Trainer", "__version__", "export", "load", "recipe", "replay", "wrap"]

_MODULES = {
    "Trainer": "qzo.trainer",
    "export": "qzo.export",
    "load": "qzo.model",
    "recipe": "qzo.recipe_file",
    "replay": "qzo.replay",
    "wrap": "qzo.wrap",
}


class _Package(ModuleType):
    """Keeps ``qzo.wrap`` the function when Python imports the module of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'qzo' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
