import subprocess
import sys
from importlib import import_module

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


@pytest.mark.parametrize("name", ["export", "replay", "wrap"])
def test_a_function_goes_before_the_module_of_its_name(name: str) -> None:
    module = import_module(f"qzo.{name}")
    assert getattr(qzo, name) is getattr(module, name)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, qzo; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "set()\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'qzo' has no attribute 'train'$"):
        _ = qzo.train
