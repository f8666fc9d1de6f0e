import re
from pathlib import Path
from typing import Any, get_args

import pytest

from qzo.config import Recipe, ZOConfig
from qzo.coordinates import Coordinates
from qzo.defaults import PRESETS
from qzo.errors import ConfigError
from qzo.estimators import ESTIMATORS
from qzo.recipe_file import read_recipe, recipe

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
        modules=["v_proj", "o_proj", "out_proj", "value", "attention.dense", "attn.c_proj"],
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


@pytest.mark.parametrize(
    ("zo", "has_estimator", "has_layers"),
    [
        ({"estimator": "spsa"}, False, True),
        ({"num_directions": 4}, True, True),
        ({"num_blocks": 3}, True, False),
        ({"coordinates": "column"}, True, False),
        ({"coordinates": "relative", "estimator": "spsa"}, False, False),
        ({"tuned": "lora"}, True, False),
    ],
)
def test_what_a_recipe_chooses_the_default_leaves_alone(
    zo: dict[str, Any], has_estimator: bool, has_layers: bool
) -> None:
    result = made(zo=zo).zo

    assert (result.sides == "leave_one_out") is has_estimator
    assert (result.depth is not None) is has_layers
    assert (result.modules is not None) is has_layers
    assert {key: getattr(result, key) for key in zo} == zo


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
            rate = made(zo={"num_directions": 2, **zo}).learning_rate
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
    ({"momentum": 0.5}, "zo.momentum: expected 0.9 with 'sgd', got 0.5; only 'momentum' or "
        "'lozo_momentum' reads it"),
    ({"estimator": "spsa", "normalize": False}, "zo.normalize: expected True with 'spsa', got "
        "False; only 'per_example' reads it"),
    ({"estimator": "spsa", "sides": "leave_one_out"}, "zo.sides: expected 'two' with 'spsa', got "
        "'leave_one_out'; only 'per_example' reads it"),
    ({"normalize": False, "normalize_over": "group"}, "zo.normalize_over: expected 'step' without "
        "zo.normalize, which reads it, got 'group'"),
    ({"layer_scaling_rule": "expectation"}, "zo.layer_scaling_rule: expected 'variance' with "
        "'none', got 'expectation'; only 'param_norm' or 'grad_norm' reads it"),
    ({"unquantized_factor": 3.0}, "zo.unquantized_factor: expected 1.0 without zo.unquantized, "
        "which reads it, got 3.0"),
    ({"first_order_learning_rate": 1e-2}, "zo.first_order_learning_rate: expected None without "
        "first-order blocks, which reads it, got 0.01"),
    ({"first_order_share": 0.1, "first_order_blocks": 1}, "zo.first_order_share: expected 0.5 with "
        "'last', got 0.1; only 'profile' reads it"),
    ({"adam_beta1": 0.5, "first_order_blocks": 1, "first_order_optimizer": "sgd",
        "first_order_learning_rate": 1.0}, "zo.adam_beta1: expected 0.9 without adam, which reads "
        "it, got 0.5"),
    ({"lora_rank": 4}, "zo.lora_rank: expected 8 with 'scales', got 4; only 'lora' reads it"),
    ({"prefix_tokens": 4, "tuned": "lora"}, "zo.prefix_tokens: expected 5 with 'lora', got 4; only "
        "'prefix' reads it"),
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
    assert sorted(PRESETS) == ["default", "paper"]


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
        ({"preset": "best"}, "preset: expected one of ['default', 'paper'], got 'best'"),
        ({"preset": ["paper"]}, "preset: expected one of ['default', 'paper'], got ['paper']"),
        ({"zo": 3}, "zo: expected keys and values, got int"),
        ({"zo": None}, "zo: expected keys and values, got NoneType"),
        ({"prompt": "empty"}, "prompt: expected 'template' or 'none', got 'empty'"),
        ({"prompt": "none"}, "prompt: expected a task whose template is left out, got 'none' "
            "without a task; own data has the prompts that it holds"),
        ({"zo": {"epsilon": -1}}, "zo.epsilon: expected a number greater than 0, got -1"),
        ({"zo": {"epsilon": "nan"}}, "zo.epsilon: expected a finite number, got 'nan'"),
        ({"zo": {"coordinates": "rows"}}, "zo.coordinates: expected 'absolute', 'relative', "
            "'row', 'column' or 'rank_one', got 'rows'"),
        ({"zo": {"max_loss_difference": 0}}, "zo.max_loss_difference: expected a number greater "
            "than 0, got 0"),
        ({"zo": {"coordinates": "relative"}}, "zo.estimator: expected 'spsa' in 'relative' "
            "coordinates, got 'per_example', which needs one of row, column, rank_one"),
        ({"zo": {"estimator": "mezo"}}, "zo.estimator: expected 'spsa', 'one_sided', 'fzoo', "
            "'rloo', 'per_example', 'spsa_1_5' or 'forward_gradient', got 'mezo'"),
        ({"zo": {"estimator": "fzoo"}}, "zo.num_directions: expected at least 2 with 'fzoo', which "
            "compares the losses of directions, got 1"),
        ({"zo": {"estimator": "rloo"}}, "zo.num_directions: expected at least 2 with 'rloo', which "
            "compares the losses of directions, got 1"),
        ({"zo": {"estimator": "per_example", "sides": "leave_one_out"}},
            "zo.num_directions: expected at least 2 with "
            "'leave_one_out', which compares the losses of directions, got 1"),
        ({"zo": {"sides": "one"}}, "zo.sides: expected 'two' or 'leave_one_out', got 'one'"),
        ({"zo": {"estimator": "spsa", "sides": "leave_one_out"}}, "zo.sides: expected 'two' with "
            "'spsa', got 'leave_one_out'; only 'per_example' reads it"),
        ({"zo": {"estimator": "rloo", "normalize_over": "group"}}, "zo.normalize_over: "
            "expected 'step' with 'rloo', got 'group'; only 'per_example' reads it"),
        ({"zo": {"normalize_over": "run"}},
            "zo.normalize_over: expected 'step' or 'group', got 'run'"),
        ({"zo": {"estimator": "rloo", "examples_per_direction": 2}}, "zo.examples_per_direction: "
            "expected 1 with 'rloo', got 2; only 'per_example' reads it"),
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2,
          "zo": {"estimator": "per_example", "examples_per_direction": 4}},
            "zo.examples_per_direction: expected a number that divides the 6 examples of a step, "
            "got 4"),
        ({"zo": {"estimator": "per_example", "num_directions": 2**20}},
            "zo.num_directions: expected fewer than 16777215 directions in a step, got "
            "16777216"),
        ({"zo": {"basis_steps": 0}}, "zo.basis_steps: expected a number greater than or equal to "
            "1, got 0"),
        ({"zo": {"optimizer": "hizoo"}}, "zo.estimator: expected 'spsa' or 'spsa_1_5' with the "
            "optimizer 'hizoo', which measures the curvature along a direction, got 'per_example'"),
        ({"zo": {"optimizer": "conmezo"}}, "zo.estimator: expected 'spsa' with the optimizer "
            "'conmezo', two-sided probes along directions that the whole batch shares, got "
            "'per_example'"),
        ({"zo": {"optimizer": "conservative"}}, "zo.estimator: expected 'spsa' or 'one_sided' with "
            "the optimizer 'conservative', whose directions the whole batch shares, got "
            "'per_example'"),
        ({"zo": {"optimizer": "conservative", "estimator": "spsa", "num_directions": 2}},
            "zo.num_directions: expected 1 with the optimizer 'conservative', which tries a step "
            "along one direction, got 2"),
        ({"zo": {"optimizer": "conservative", "estimator": "spsa", "layer_scaling": "grad_norm"}},
            "zo.layer_scaling: expected 'none' with the optimizer 'conservative', whose steps go "
            "where probes went, got 'grad_norm'"),
        ({"zo": {"tuned": "prefix", "layer_scaling": "param_norm"}},
            "zo.layer_scaling: expected 'none' with zo.tuned 'prefix', got 'param_norm'; it goes "
            "with 'scales'"),
        ({"zo": {"tuned": "lora", "stretch": {"k_proj": 2.0}}}, "zo.stretch: expected none with "
            "zo.tuned 'lora', got {'k_proj': 2.0}; it goes with 'scales'"),
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
