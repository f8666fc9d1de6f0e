import subprocess
import sys
from pkgutil import iter_modules

import pytest

import qzo

NAMES = ("Trainer", "export", "load", "recipe", "replay", "wrap")


def test_the_public_names_are_these() -> None:
    assert sorted(qzo.__all__) == sorted([*NAMES, "__version__"])


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_callable_every_time(name: str) -> None:
    first, second = getattr(qzo, name), getattr(qzo, name)
    assert callable(first)
    assert first is second


def test_no_module_takes_the_place_of_a_public_name() -> None:
    modules = {module.name for module in iter_modules(qzo.__path__)}
    assert "run" in modules
    assert not modules & set(NAMES)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, qzo; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "set()\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'qzo' has no attribute 'train'$"):
        _ = qzo.train
