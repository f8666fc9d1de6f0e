import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from transformers import SchedulerType, TrainingArguments

from qzo.errors import ConfigError
from qzo.method.coordinates import Coordinates
from qzo.method.estimators import ESTIMATORS
from qzo.method.schedules import ScheduleName
from qzo.run.recipe.keys import Recipe, ZOConfig
from qzo.run.recipe.presets import PRESETS
from qzo.run.recipe.read import read_recipe, recipe

SMALLEST = {"model": "base", "data": "reviews.jsonl", "output_dir": "runs/reviews"}


def made(**keys: Any) -> Recipe:
    return recipe({**SMALLEST, **keys})


def refusal(message: str) -> Any:
    return pytest.raises(ConfigError, match=f"^{re.escape(message)}$")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_smallest_recipe_takes_the_defaults() -> None:
    result = made()

    zo = ZOConfig(
        estimator="per_example",
        sides="leave_one_out",
        num_directions=8,
        examples_per_direction=2,
        modules=[
            *("v_proj", "o_proj", "out_proj", "value", "attn.c_proj"),
            *("attention.dense", "self_attention.dense", "self_attn.dense"),
        ],
        depth=(0.33, 1.0),
    )
    keys: dict[str, Any] = {**SMALLEST, "learning_rate": 0.3, "zo": zo}
    assert result == Recipe(**keys)
    assert (result.preset, result.zo.coordinates) == ("default", "row")


@pytest.mark.parametrize(
    ("zo", "scope"),
    [({}, "step"), ({"normalize_over": "group"}, "group"), ({"normalize": False}, None)],
)
def test_derivatives_are_normalised_over_a_step_a_group_or_not(
    zo: dict[str, Any], scope: str | None
) -> None:
    assert made(zo=zo).estimator_settings["normalized_over"] == scope


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_pairs_of_examples_share_directions_where_the_batch_has_pairs(batch: int) -> None:
    zo = made(per_device_train_batch_size=batch).zo

    assert zo.examples_per_direction == (2 if batch % 2 == 0 else 1)


CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"preset": "paper"},
    "none": {"preset": "none"},
    "other estimator": {"zo": {"estimator": "spsa"}},
    "other coordinates": {"zo": {"estimator": "rloo", "coordinates": "relative"}},
    "as measured": {"zo": {"normalize": False}},
    "lora": {"zo": {"tuned": "lora"}},
    "prefix": {"zo": {"tuned": "prefix", "estimator": "spsa"}},
    "last blocks": {"zo": {"num_blocks": 14}},
    "odd batch": {"per_device_train_batch_size": 3},
    "conservative": {"zo": {"estimator": "spsa", "optimizer": "conservative"}},
    "exact": {"preset": "paper", "zo": {"estimator": "forward_gradient"}},
    "adam": {"zo": {"optimizer": "adam", "direction": "gaussian", "sparsity": 0.5}},
}
"""Recipes whose presets and defaults differ."""


def written_out(keys: dict[str, Any], values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a recipe with every value written out by itself, and with all of them."""
    zo = keys.get("zo", {})
    for key, value in values.items():
        if key != "zo":
            yield {**keys, key: value}
    for key, value in values["zo"].items():
        yield {**keys, "zo": {**zo, key: value}}
    yield {**keys, **values, "zo": {**zo, **values["zo"]}}


@pytest.mark.parametrize("preset", PRESETS)
def test_writing_the_values_of_a_preset_changes_nothing(preset: str) -> None:
    keys, values = {"preset": preset}, {"zo": {}, **PRESETS[preset]}

    made_out = [made(**written) for written in written_out(keys, values)]

    assert made_out == [made(**keys)] * (len(values) + len(values["zo"]))


@pytest.mark.parametrize("name", CHOICES)
def test_writing_what_a_recipe_resolves_to_changes_nothing(name: str) -> None:
    """For every key, be it of the preset, a default, or one that follows from other keys."""
    keys = CHOICES[name]
    values = made(**keys).model_dump(mode="json")

    for written in written_out(keys, values):
        assert made(**written) == made(**keys), written


@pytest.mark.parametrize(
    ("zo", "key"),
    [
        ({"coordinates": "column"}, "coordinates"),
        ({"unquantized": ["norms"]}, "unquantized"),
        ({"first_order_blocks": 2}, "first_order_blocks"),
        ({"num_directions": 4}, "num_directions"),
        ({"sides": "two"}, "sides"),
        ({"modules": None}, "modules"),
        ({"depth": [0.5, 1.0]}, "depth"),
    ],
)
def test_a_key_replaces_the_preset_in_that_key_alone(zo: dict[str, Any], key: str) -> None:
    want, got = made().zo.model_dump(), made(zo=zo).zo.model_dump()

    assert {name for name in want if want[name] != got[name]} == {key}


@pytest.mark.parametrize(
    ("keys", "dropped"),
    [
        ({"zo": {"estimator": "spsa"}}, {"sides", "examples_per_direction"}),
        ({"zo": {"tuned": "lora"}}, {"modules"}),
        ({"zo": {"num_blocks": 3}}, {"depth"}),
        ({"zo": {"estimator": "spsa", "optimizer": "conservative"}},
            {"sides", "examples_per_direction", "num_directions"}),
        ({"preset": "paper", "zo": {"estimator": "forward_gradient"}}, {"max_loss_difference"}),
    ],
)  # fmt: skip
def test_what_a_preset_says_where_nothing_reads_it_is_dropped(
    keys: dict[str, Any], dropped: set[str]
) -> None:
    result, preset = made(**keys).zo.model_dump(), PRESETS[keys.get("preset", "default")]["zo"]
    kept = {key for key in preset if key not in keys["zo"]} - dropped

    assert {key: result[key] for key in dropped} == {
        key: ZOConfig.model_fields[key].default for key in dropped
    }
    assert {key: result[key] for key in kept} == {
        key: tuple(preset[key]) if key == "depth" else preset[key] for key in kept
    }


def test_preset_none_leaves_the_defaults_of_the_keys() -> None:
    assert made(preset="none") == Recipe(**SMALLEST, preset="none")  # type: ignore[arg-type]


def test_preset_paper_is_section_4_1_of_the_paper() -> None:
    result = made(preset="paper")

    assert result.learning_rate == 1e-7
    assert result.lr_scheduler_type == "constant"
    assert (result.warmup_steps, result.gradient_accumulation_steps) == (0, 1)
    assert result.per_device_train_batch_size == 16
    assert (result.zo.estimator, result.zo.num_directions) == ("spsa", 1)
    assert (result.zo.coordinates, result.zo.direction) == ("absolute", "gaussian")
    assert result.zo.epsilon == 1e-3
    assert result.zo.max_loss_difference is not None
    assert result.zo.max_loss_difference / (2 * result.zo.epsilon) == pytest.approx(100)  # C
    assert result.zo.optimizer == "sgd"


def test_every_choice_has_a_learning_rate_of_its_own() -> None:
    """What a step multiplies differs by orders of magnitude; no choice falls back to another's."""
    estimators: list[dict[str, Any]] = [{"estimator": name} for name in ESTIMATORS]
    estimators += [{"sides": "leave_one_out"}, {"normalize": False}]
    estimators += [{"sides": "leave_one_out", "normalize": False}]
    places: list[dict[str, Any]] = [{"coordinates": name} for name in get_args(Coordinates)]
    places += [{"tuned": "lora"}, {"tuned": "prefix"}]
    count = 0
    for zo in ({**estimator, **place} for estimator in estimators for place in places):
        try:
            rate = made(preset="none", zo={"num_directions": 2, **zo}).learning_rate
        except ConfigError:
            continue  # they do not go together
        count += 1
        is_step_of_one = zo.get("estimator") == "per_example" and "tuned" not in zo
        assert (rate == 5e-2) is is_step_of_one, zo
    assert count >= 45


@pytest.mark.parametrize(
    ("zo", "rate"),
    [
        ({}, 1e-7),
        ({"coordinates": "row"}, 3e-3),
        ({"coordinates": "relative"}, 1e-3),
        ({"tuned": "lora"}, 3e-3),
        ({"estimator": "fzoo", "num_directions": 2}, 1e-8),
    ],
)
def test_the_rate_of_preset_paper_is_that_of_its_scales(zo: dict[str, Any], rate: float) -> None:
    assert made(preset="paper", zo=zo).learning_rate == rate


UNREAD: list[tuple[dict[str, Any], str]] = [
    ({"momentum": 0.5}, "zo.momentum has no effect with zo.optimizer: sgd; remove it or set "
        "zo.optimizer: momentum or lozo_momentum"),
    ({"estimator": "spsa", "normalize": False}, "zo.normalize has no effect with zo.estimator: "
        "spsa; remove it or set zo.estimator: per_example"),
    ({"estimator": "spsa", "sides": "leave_one_out"}, "zo.sides has no effect with zo.estimator: "
        "spsa; remove it or set zo.estimator: per_example"),
    ({"estimator": "rloo", "normalize_over": "group"}, "zo.normalize_over has no effect with "
        "zo.estimator: rloo; remove it or set zo.estimator: per_example"),
    ({"estimator": "rloo", "examples_per_direction": 2}, "zo.examples_per_direction has no effect "
        "with zo.estimator: rloo; remove it or set zo.estimator: per_example"),
    ({"normalize": False, "normalize_over": "group"}, "zo.normalize_over has no effect with "
        "zo.normalize: false; remove it or set zo.normalize: true"),
    ({"layer_scaling_rule": "expectation"}, "zo.layer_scaling_rule has no effect with "
        "zo.layer_scaling: none; remove it or set zo.layer_scaling: param_norm or grad_norm"),
    ({"unquantized_factor": 3.0}, "zo.unquantized_factor has no effect without zo.unquantized; "
        "remove it or set zo.unquantized to what it is a factor of"),
    ({"first_order_learning_rate": 1e-2}, "zo.first_order_learning_rate has no effect without "
        "first-order blocks; remove it or set zo.first_order_blocks"),
    ({"first_order_share": 0.1, "first_order_blocks": 1}, "zo.first_order_share has no effect with "
        "zo.first_order_layers: last; remove it or set zo.first_order_layers: profile"),
    ({"first_order_blocks": 1, "first_order_layers": "profile"}, "zo.first_order_blocks has no "
        "effect with zo.first_order_layers: profile; remove it or set zo.first_order_layers: last"),
    ({"adam_beta1": 0.5, "first_order_blocks": 1, "first_order_optimizer": "sgd",
        "first_order_learning_rate": 1.0}, "zo.adam_beta1 has no effect without Adam, which reads "
        "it; remove it or set zo.optimizer: adam"),
    ({"lora_rank": 4}, "zo.lora_rank has no effect with zo.tuned: scales; remove it or set "
        "zo.tuned: lora"),
    ({"prefix_tokens": 4, "tuned": "lora"}, "zo.prefix_tokens has no effect with zo.tuned: lora; "
        "remove it or set zo.tuned: prefix"),
    ({"modules": ["k_proj"], "tuned": "lora"}, "zo.modules has no effect with zo.tuned: lora; "
        "remove it or set zo.lora_modules instead"),
    ({"modules": ["k_proj"], "tuned": "prefix"}, "zo.modules has no effect with zo.tuned: prefix; "
        "remove it or set zo.tuned: scales"),
    ({"tuned": "lora", "stretch": {"k_proj": 2.0}}, "zo.stretch has no effect with zo.tuned: lora; "
        "remove it or set zo.tuned: scales"),
    ({"num_blocks": 3, "depth": [0.5, 1.0]}, "zo.depth has no effect with zo.num_blocks: 3; remove "
        "it or set zo.num_blocks: null"),
    ({"estimator": "forward_gradient", "max_loss_difference": 0.2}, "zo.max_loss_difference has no "
        "effect with zo.estimator: forward_gradient, which measures slopes and no loss "
        "differences; remove it or set another zo.estimator"),
    ({"optimizer": "conservative", "estimator": "spsa", "num_directions": 2}, "zo.num_directions "
        "has no effect with zo.optimizer: conservative, which tries a step along one direction; "
        "remove it or set another zo.optimizer"),
]  # fmt: skip


@pytest.mark.parametrize(("zo", "message"), UNREAD)
def test_a_key_that_nothing_reads_is_refused(zo: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        made(zo=zo)


def test_adams_keys_are_read_by_its_first_order_part() -> None:
    assert made(zo={"adam_beta1": 0.5, "first_order_blocks": 1}).zo.first_order_settings == {
        **{"adam_beta1": 0.5, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    }


def test_all_presets_are_under_test() -> None:
    assert sorted(PRESETS) == ["default", "none", "paper"]
    assert {CHOICES[name].get("preset", "default") for name in CHOICES} == {*PRESETS}


def test_what_the_recipe_says_replaces_the_preset() -> None:
    result = made(preset="paper", learning_rate=1e-5, zo={"epsilon": 0.5})

    assert (result.learning_rate, result.zo.epsilon) == (1e-5, 0.5)
    assert (result.zo.coordinates, result.lr_scheduler_type) == ("absolute", "constant")


def test_a_recipe_is_not_changed_by_reading_it() -> None:
    values = {**SMALLEST, "preset": "paper", "zo": {"epsilon": 0.5}}
    copy = {**values, "zo": {"epsilon": 0.5}}

    recipe(values)

    assert values == copy
    assert PRESETS["paper"]["zo"]["epsilon"] == 1e-3


def test_a_resolved_recipe_reads_back_as_itself() -> None:
    for result in (made(), made(preset="paper", zo={"max_skipped_steps": 3})):
        assert recipe(result.model_dump(mode="json")) == result


@pytest.mark.parametrize("is_run_folder", [True, False])
def test_no_preset_is_put_under_the_recipe_of_a_run_folder(
    tmp_path: Path, is_run_folder: bool
) -> None:
    """One of an older version lacks the keys that it did not know."""
    values = made(preset="none").model_dump(mode="json")
    del values["preset"], values["zo"]["modules"], values["zo"]["depth"]
    path = write(tmp_path / "recipe.yaml", yaml.safe_dump(values))
    if is_run_folder:
        write(tmp_path / "journal.jsonl", "")

    result = read_recipe(path).zo

    assert (result.modules is None and result.depth is None) is is_run_folder


def test_the_recipe_of_a_run_folder_may_say_what_older_versions_read(tmp_path: Path) -> None:
    values = made(preset="none").model_dump(mode="json")
    values |= {"lr_scheduler_type": "constant", "warmup_steps": 3}
    values["zo"] |= {"momentum": 0.5, "lora_rank": 4}
    path = write(tmp_path / "recipe.yaml", yaml.safe_dump(values))
    write(tmp_path / "journal.jsonl", "")

    result = read_recipe(path)

    assert (result.lr_scheduler_type, result.warmup_steps) == ("constant_with_warmup", 3)
    assert (result.zo.momentum, result.zo.lora_rank) == (0.9, 8)


def test_names_of_transformers_have_its_defaults() -> None:
    theirs = TrainingArguments(output_dir="out")

    for key in ("load_best_model_at_end", "gradient_accumulation_steps", "warmup_steps"):
        assert Recipe.model_fields[key].default == getattr(theirs, key)
    names = get_args(ScheduleName)
    assert set(names) <= {kind.value for kind in SchedulerType}


def test_a_recipe_is_read_from_yaml(tmp_path: Path) -> None:
    path = write(
        tmp_path / "recipe.yaml",
        "# a comment\nmodel: base\ndata: a.jsonl\noutput_dir: out\nlearning_rate: 1e-7\n"
        "max_steps: 12\nreport_to: [tensorboard]\nzo:\n  epsilon: 1e-3\n",
    )

    result = read_recipe(path)

    assert (result.model, result.max_steps, result.report_to) == ("base", 12, ["tensorboard"])
    assert (result.learning_rate, result.zo.epsilon) == (1e-7, 1e-3)  # YAML reads 1e-7 as text


@pytest.mark.parametrize(
    ("override", "want"),
    [
        ("max_steps=7", {"max_steps": 7}),
        ("learning_rate=1e-3", {"learning_rate": 1e-3}),
        ("zo.epsilon=0.25", {"zo": {"epsilon": 0.25}}),
        ("data=b=c.jsonl", {"data": "b=c.jsonl"}),
        ("eval_data=null", {"eval_data": None}),
        ("resume_from_checkpoint=true", {"resume_from_checkpoint": True}),
        ("preset=paper", {"preset": "paper"}),
    ],
)
def test_overrides_replace_keys(tmp_path: Path, override: str, want: dict[str, Any]) -> None:
    path = write(
        tmp_path / "r.yaml", "model: base\ndata: reviews.jsonl\noutput_dir: runs/reviews\n"
    )

    assert read_recipe(path, [override]) == made(**want)


def test_later_overrides_win(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "model: a\ndata: b\noutput_dir: c\n")

    assert read_recipe(path, ["max_steps=1", "max_steps=2"]).max_steps == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learning_rat": 1}, "learning_rat: unknown key; did you mean 'learning_rate'?"),
        ({"max_step": 1}, "max_step: unknown key; did you mean 'max_steps'?"),
        ({"epsilon": 1}, "epsilon: unknown key; did you mean 'zo.epsilon'?"),
        ({"zo": {"epsilom": 1}}, "zo.epsilom: unknown key; did you mean 'zo.epsilon'?"),
        ({"zo": {"seed": 1}}, "zo.seed: unknown key; did you mean 'seed'?"),
        ({"lr": 1}, "lr: unknown key; use 'learning_rate'"),
        ({"batch_size": 1}, "batch_size: unknown key; use 'per_device_train_batch_size'"),
        ({"evaluation_strategy": "no"}, "evaluation_strategy: unknown key; use 'eval_steps'"),
        ({"num_train_epochs": 3}, "num_train_epochs: unknown key; use 'max_steps'"),
        (
            {"overwrite_output_dir": True},
            "overwrite_output_dir: unknown key; use 'resume_from_checkpoint'",
        ),
        ({"warmup_ratio": 0.1}, "warmup_ratio: unknown key; use 'warmup_steps'"),
        ({"no_cuda": True}, "no_cuda: unknown key; use 'device'"),
    ],
)
def test_unknown_keys_name_the_nearest(keys: dict[str, Any], message: str) -> None:
    with refusal(message):
        made(**keys)


def test_an_unknown_key_like_no_other_names_all() -> None:
    known = [*Recipe.model_fields, *(f"zo.{name}" for name in ZOConfig.model_fields)]

    with refusal(f"qqqqqq: unknown key; known keys are {', '.join(sorted(known))}"):
        made(qqqqqq=1)


@pytest.mark.parametrize("key", ["model", "output_dir"])
def test_keys_that_a_run_needs_must_be_there(key: str) -> None:
    values = {name: value for name, value in SMALLEST.items() if name != key}

    with refusal(f"{key}: expected this key in the recipe, not found"):
        recipe(values)


def test_a_recipe_needs_no_data_where_the_trainer_is_given_examples() -> None:
    assert made(data=None).data is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": 3}, "model: expected a valid string, got 3"),
        ({"max_steps": "many"}, "max_steps: expected a valid integer, unable to parse string as an "
            "integer, got 'many'"),
        ({"max_steps": 1.5}, "max_steps: expected a valid integer, got a number with a fractional "
            "part, got 1.5"),
        ({"max_steps": 0}, "max_steps: expected a number greater than or equal to 1, got 0"),
        ({"learning_rate": 0}, "learning_rate: expected a number greater than 0, got 0"),
        ({"learning_rate": float("inf")}, "learning_rate: expected a finite number, got inf"),
        ({"seed": 2**63}, "seed: expected a number less than 9223372036854775808, got "
            "9223372036854775808"),
        ({"task": "sst3"}, "task: expected 'sst2', 'rte', 'boolq', 'copa', 'squad', 'trec' or "
            "'e2e', got 'sst3'"),
        ({"dtype": "int8"}, "dtype: expected 'float32', 'float16' or 'bfloat16', got 'int8'"),
        ({"report_to": 3}, "report_to: expected a valid string, got 3"),
        ({"load_best_model_at_end": "perhaps"}, "load_best_model_at_end: expected a valid boolean, "
            "unable to interpret input, got 'perhaps'"),
        ({"preset": "best"}, "preset: expected one of ['default', 'none', 'paper'], got 'best'"),
        ({"preset": ["paper"]},
            "preset: expected one of ['default', 'none', 'paper'], got ['paper']"),
        ({"zo": 3}, "zo: expected keys and values, got int"),
        ({"zo": None}, "zo: expected keys and values, got NoneType"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "warmup_steps has no effect with "
            "lr_scheduler_type: constant; remove it or set lr_scheduler_type: "
            "constant_with_warmup"),
        ({"prompt": "empty"}, "prompt: expected 'template' or 'none', got 'empty'"),
        ({"prompt": "none"}, "prompt has no effect without a task: own data has the prompts that "
            "it holds; remove it or set task"),
        ({"zo": {"epsilon": -1}}, "zo.epsilon: expected a number greater than 0, got -1"),
        ({"zo": {"epsilon": "nan"}}, "zo.epsilon: expected a finite number, got 'nan'"),
        ({"zo": {"coordinates": "rows"}}, "zo.coordinates: expected 'absolute', 'relative', "
            "'row', 'column' or 'rank_one', got 'rows'"),
        ({"zo": {"max_loss_difference": 0}}, "zo.max_loss_difference: expected a number greater "
            "than 0, got 0"),
        ({"zo": {"coordinates": "relative"}}, "zo.coordinates: relative cannot be combined with "
            "zo.estimator: per_example: a direction for every few examples needs one of row, "
            "column, rank_one; set zo.estimator: spsa or zo.coordinates: row"),
        ({"zo": {"estimator": "mezo"}}, "zo.estimator: expected 'spsa', 'one_sided', 'fzoo', "
            "'rloo', 'per_example', 'spsa_1_5' or 'forward_gradient', got 'mezo'"),
        ({"preset": "none", "zo": {"estimator": "fzoo"}},
            "zo.num_directions: expected at least 2 with 'fzoo', which compares the losses of "
            "directions, got 1"),
        ({"preset": "none", "zo": {"estimator": "rloo"}},
            "zo.num_directions: expected at least 2 with 'rloo', which compares the losses of "
            "directions, got 1"),
        ({"zo": {"num_directions": 1}}, "zo.num_directions: expected at least 2 with "
            "'leave_one_out', which compares the losses of directions, got 1"),
        ({"objective": "accuracy", "zo": {"estimator": "forward_gradient"}}, "objective: accuracy "
            "cannot be combined with zo.estimator: forward_gradient: it has no derivative; set "
            "objective: loss, or set another zo.estimator"),
        ({"zo": {"tuned": "lora", "first_order_blocks": 1}}, "zo.tuned: lora cannot be combined "
            "with first-order blocks: exact derivatives are those of scales; set zo.tuned: scales, "
            "or remove the keys zo.first_order_*"),
        ({"zo": {"unquantized": ["norms"], "first_order_blocks": 1}}, "zo.unquantized cannot be "
            "combined with first-order blocks: exact derivatives are those of scales; remove "
            "zo.unquantized, or remove the keys zo.first_order_*"),
        ({"zo": {"depth": [0.5, 0.5]}}, "zo.depth: expected two parts of the depth, the smaller "
            "one first, got [0.5, 0.5]"),
        ({"zo": {"sides": "one"}}, "zo.sides: expected 'two' or 'leave_one_out', got 'one'"),
        ({"zo": {"normalize_over": "run"}},
            "zo.normalize_over: expected 'step' or 'group', got 'run'"),
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2,
          "zo": {"estimator": "per_example", "examples_per_direction": 4}},
            "zo.examples_per_direction: expected a number that divides the 6 examples of a step, "
            "got 4"),
        ({"preset": "none", "zo": {"num_directions": 2**20}},
            "zo.num_directions: expected fewer than 16777215 directions in a step, got "
            "16777216"),
        ({"zo": {"basis_steps": 0}}, "zo.basis_steps: expected a number greater than or equal to "
            "1, got 0"),
        ({"zo": {"optimizer": "hizoo"}}, "zo.estimator: per_example cannot be combined with "
            "zo.optimizer: hizoo: it measures the curvature along a direction; set zo.estimator: "
            "spsa or spsa_1_5"),
        ({"zo": {"optimizer": "conmezo"}}, "zo.estimator: per_example cannot be combined with "
            "zo.optimizer: conmezo: it needs two-sided probes along directions of the whole batch; "
            "set zo.estimator: spsa"),
        ({"zo": {"optimizer": "conservative", "num_directions": 1, "sides": "two"}},
            "zo.estimator: per_example cannot be combined with zo.optimizer: conservative: it "
            "needs directions of the whole batch; set zo.estimator: spsa or one_sided"),
        ({"zo": {"optimizer": "conservative", "estimator": "spsa", "layer_scaling": "grad_norm"}},
            "zo.layer_scaling: grad_norm cannot be combined with zo.optimizer: conservative: its "
            "steps go where probes went; set zo.layer_scaling: none or another zo.optimizer"),
        ({"zo": {"tuned": "prefix", "layer_scaling": "param_norm"}},
            "zo.layer_scaling: param_norm cannot be combined with zo.tuned: prefix: it is for "
            "layers whose scales are trained; set zo.layer_scaling: none or zo.tuned: scales"),
        ({"zo": {"stretch": {"k_proj": 0}}}, "zo.stretch: expected a number greater than 0, got 0"),
        ({"zo": {"stretch": {"k_proj": True}}}, "zo.stretch: expected a number, got True"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_used_name_their_key(keys: dict[str, Any], message: str) -> None:
    with refusal(message):
        made(**keys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1", "expected YAML: while parsing a flow sequence in \"<unicode string>\", line "
            "1, column 8: model: [1 ^ expected ',' or ']', but got '<stream end>' in \"<unicode "
            "string>\", line 1, column 10: model: [1 ^"),
        ("- a\n- b\n", "expected keys and values, got list"),
        ("", "expected keys and values, got NoneType"),
        ("just text", "expected keys and values, got str"),
    ],
)  # fmt: skip
def test_files_that_are_no_recipe_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "r.yaml", text)

    with refusal(f"{path}: {message}"):
        read_recipe(path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"model: \xff\xfe\n")

    with refusal(
        f"{path}: expected YAML: 'utf-8' codec can't decode byte 0xff in position 7: invalid start "
        "byte"
    ):
        read_recipe(path)


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with refusal(f"{tmp_path / 'r.yaml'}: cannot be read: No such file or directory"):
        read_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_steps", "max_steps: expected key=value"),
        ("max_steps=[1", "max_steps: expected a YAML value, got '[1'"),
        ("model.path=x", "model.path: expected model to hold keys, got 'a'"),
        ("max_stepz=1", "max_stepz: unknown key; did you mean 'max_steps'?"),
    ],
)
def test_overrides_that_cannot_be_used_are_refused(
    tmp_path: Path, override: str, message: str
) -> None:
    path = write(tmp_path / "r.yaml", "model: a\ndata: b\noutput_dir: c\n")

    with refusal(message):
        read_recipe(path, [override])


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        made().max_steps = 3
