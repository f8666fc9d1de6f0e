"""What the recipe files mean: BENCHMARKS.md has numbers that were measured with them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qzo.bench.converge.suite import read_suite
from qzo.run.recipe.keys import Recipe
from qzo.run.recipe.read import read_keys, read_recipe, recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SMALLEST: dict[str, Any] = {"model": "m", "output_dir": "o"}
# As cb10e01 read the files that it had; the preset `default` has names of more architectures since.
GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden" / "recipes.json").read_text(encoding="utf-8")
)


def recipes() -> Iterator[tuple[str, Recipe]]:
    """Yield every recipe, every file of a method, and the methods that suites hold themselves."""
    for path in sorted(RECIPES.glob("*.yaml")):
        yield path.name, read_recipe(path)
    for path in sorted((RECIPES / "converge" / "methods").glob("*.yaml")):
        keys = read_keys(path)
        yield path.stem, recipe({**SMALLEST, **{k: keys[k] for k in keys if k != "grid"}})
    for path in sorted((RECIPES / "converge").glob("*.yaml")):
        given = read_keys(path)["methods"]
        for method in read_suite(path).methods:
            if "zo" in given[method.name]:
                yield f"{path.stem}: {method.name}", recipe({**SMALLEST, **method.fragment})


FOUND = dict(recipes())


def not_default(found: Recipe) -> dict[str, Any]:
    """Return the keys that have other values than ``Recipe`` gives them, but for names of files."""
    default, values = (x.model_dump(mode="json") for x in (Recipe(**SMALLEST), found))
    left_out = {*SMALLEST, "data", "eval_data", "preset"}
    zo = {key: x for key, x in values.pop("zo").items() if x != default["zo"][key]}
    rest = {key: values[key] for key in values.keys() - left_out if values[key] != default[key]}
    return {**rest, "zo": zo}


def test_every_recipe_is_under_test() -> None:
    assert FOUND.keys() == GOLDEN.keys()
    assert len(FOUND) >= 45


@pytest.mark.parametrize("name", GOLDEN)
def test_a_recipe_file_means_what_its_numbers_were_measured_with(name: str) -> None:
    assert not_default(FOUND[name]) == GOLDEN[name]
