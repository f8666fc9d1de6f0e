import io
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from support.command import Run, command, write_recipe
from support.models import tiny_model
from support.runs import (
    COMPLETIONS,
    ESTIMATORS,
    RECORDS,
    json_lines,
    tiny_checkpoint,
    write_lines,
    write_tokenizer,
)
from transformers import TrainerControl, TrainerState, TrainingArguments
from typer.main import get_command

from qzo import cli
from qzo.cli import app
from qzo.console.checks import Check, Status
from qzo.console.doctor import Report
from qzo.console.progress import ProgressCallback, loading_progress
from qzo.run import launch as run
from qzo.run.launch import base_checkpoint
from qzo.run.output.export import export
from qzo.run.recipe.read import read_recipe


@dataclass(frozen=True)
class Place:
    base: Path
    data: Path
    run: Path


@pytest.fixture
def qzo(capsys: pytest.CaptureFixture[str]) -> Run:
    return command(capsys)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A checkpoint, data and a finished run; nothing of it is changed."""
    folder = tmp_path_factory.mktemp("cli")
    base = tiny_checkpoint(folder / "base")
    data = write_lines(folder / "data.jsonl", RECORDS)
    recipe = write_recipe(folder / "recipe.yaml", base, data, folder / "run")
    from qzo.run.launch import train
    from qzo.run.recipe.read import read_recipe

    train(read_recipe(recipe))
    return Place(base, data, folder / "run")


def test_every_command_is_under_test() -> None:
    names: list[str] = sorted(getattr(get_command(app), "commands"))  # noqa: B009  # of a group
    tested = {line[0] for line in COMMANDS} | {"quantize", "train", "export", "compact"}
    tested |= {"doctor", "bench"}

    assert set(names) <= tested
    assert len(names) >= 9


COMMANDS: list[tuple[str, ...]] = [
    ("inspect", "{base}"),
    ("plan", "{base}"),
    ("plan", "{base}/config.json", "--memory", "24GiB"),
    ("eval", "{base}", "--data", "{data}"),
    ("eval", "{base}", "--data", "{data}", "--num-examples", "1"),
    ("eval", "{base}", "--data", "{data}", "--adapter", "{run}"),
    ("replay", "{run}"),
    ("generate", "{base}", "--prompt", "a film", "--max-new-tokens", "4"),
    ("generate", "{base}", "--prompt", "a film", "--adapter", "{run}", "--max-new-tokens", "4"),
]


def filled(arguments: tuple[str, ...], place: Place) -> list[str]:
    return [a.format(base=place.base, data=place.data, run=place.run) for a in arguments]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_command_prints_one_json_object_and_nothing_else(
    qzo: Run, place: Place, arguments: tuple[str, ...]
) -> None:
    ran = qzo(*filled(arguments, place), "--json")

    assert ran.code == 0, ran.err
    assert ran.value
    assert ran.err == ""


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_command_prints_for_people_otherwise(
    qzo: Run, place: Place, arguments: tuple[str, ...]
) -> None:
    ran = qzo(*filled(arguments, place))

    assert ran.code == 0, ran.err
    assert ran.out.strip()
    assert not ran.out.startswith("{")
    assert ran.err == ""


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_doctor_fails_where_a_check_fails(
    qzo: Run, monkeypatch: pytest.MonkeyPatch, status: Status, code: int
) -> None:
    report = Report((Check("packages", "torch", status, "found", "do this"),))
    monkeypatch.setattr("qzo.console.doctor.doctor", lambda: report)

    ran = qzo("doctor", "--json")

    assert (ran.code, ran.err) == (code, "")
    assert ran.value["status"] == status
    assert "do this" in qzo("doctor").out


def test_inspect_counts(qzo: Run, place: Place) -> None:
    value = qzo("inspect", place.base, "--json").value

    stored = load_file(place.base / "model.safetensors")
    scales = [tensor for key, tensor in stored.items() if key.endswith(".scales")]
    assert value["num_layers"] == len(scales) == 7
    assert value["num_scales"] == sum(tensor.numel() for tensor in scales)
    assert value["num_rows"] == sum(tensor.shape[1] for tensor in scales)
    assert (value["format"], value["group_size"], value["model_type"]) == ("gptq", 32, "llama")


def test_a_task_is_trained_and_evaluated_without_its_template(
    qzo: Run, place: Place, tmp_path: Path
) -> None:
    data = tmp_path / "test.txt"
    data.write_text("NUM:dist How far ?\nHUM:ind Who ?\n", encoding="utf-8")
    keys = {"task": "trec", "prompt": "none", "eval_data": str(data), "num_eval_examples": 2}
    recipe = write_recipe(tmp_path / "r.yaml", place.base, data, tmp_path / "run", **keys)

    trained = qzo("train", recipe, "--json")
    options = ("--task", "trec", "--data", data, "--json")
    bare = qzo("eval", place.base, *options, "--prompt", "none")
    prompted = qzo("eval", place.base, *options)

    assert (trained.code, bare.code, prompted.code) == (0, 0, 0), trained.err
    assert trained.value["before"]["loss"] == pytest.approx(bare.value["loss"], rel=1e-6)
    assert abs(prompted.value["loss"] / bare.value["loss"] - 1) > 1e-6


@pytest.mark.slow
def test_e2e_is_trained_on_one_file_and_evaluated_on_another(
    qzo: Run, place: Place, tmp_path: Path
) -> None:
    train, test = tmp_path / "devset.csv", tmp_path / "testset_w_refs.csv"
    train.write_text("mr,ref\nab,a b\ncd,c d\n", encoding="utf-8")
    test.write_text("mr,ref\nab,a b\nab,b a\n", encoding="utf-8")
    keys = {"task": "e2e", "eval_data": str(test), "num_eval_examples": 9}
    recipe = write_recipe(tmp_path / "r.yaml", place.base, train, tmp_path / "run", **keys)

    ran = qzo("train", recipe, "--json")

    assert ran.code == 0, ran.err
    assert ran.value["before"]["num_examples"] == 1
    assert 0 <= ran.value["after"]["f1"] <= 1


@pytest.mark.parametrize(
    ("options", "got"),
    [
        (("--task", "sst2", "--prompt", "empty"), "empty"),
        (("--data", "d", "--prompt", "none"), "none"),
    ],
)
def test_eval_refuses_a_prompt_that_the_examples_do_not_have(
    qzo: Run, options: tuple[str, ...], got: str
) -> None:
    ran = qzo("eval", "x", *options)

    want = f"qzo: --prompt: expected template, or none with a --task, got {got!r}\n"
    assert (ran.code, ran.err) == (1, want)


def test_eval_does_not_print_numbers_that_json_does_not_have(qzo: Run, place: Place) -> None:
    value = qzo("eval", place.base, "--data", place.data, "--num-examples", "1", "--json").value

    assert value["num_examples"] == 1
    assert value["loss_se"] is None
    assert math.isfinite(value["loss"])


def test_train_prints_the_result_and_writes_the_run(qzo: Run, place: Place, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml", place.base, place.data, tmp_path / "run", num_eval_examples=2
    )

    ran = qzo("train", recipe, "eval_data=" + str(place.data), "--json")

    assert ran.code == 0, ran.err
    value = ran.value
    assert (value["steps"], value["skipped_steps"], value["warnings"]) == (3, 0, value["warnings"])
    assert value["before"]["num_examples"] == value["after"]["num_examples"] == 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "best"),
        *("checkpoint-3", "journal.jsonl", "loss.png", "metrics.jsonl", "recipe.yaml"),
        "reference.json",
    ]


def test_train_takes_overrides(qzo: Run, place: Place, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", place.base, place.data, tmp_path / "run")

    ran = qzo("train", recipe, "max_steps=1", "zo.epsilon=0.05", "--json")

    assert ran.value["steps"] == 1
    header = json_lines(tmp_path / "run" / "journal.jsonl")[0]
    assert header["recipe"]["zo"]["epsilon"] == 0.05


def test_train_continues_where_the_recipe_says_so(qzo: Run, place: Place, tmp_path: Path) -> None:
    keys = {"lr_scheduler_type": "constant", "resume_from_checkpoint": True}
    recipe = write_recipe(tmp_path / "r.yaml", place.base, place.data, tmp_path / "run", **keys)

    assert qzo("train", recipe, "--json").value["steps"] == 3
    assert qzo("train", recipe, "max_steps=4", "--json").value["steps"] == 4
    assert qzo("replay", tmp_path / "run", "--json").value["adapter"] == "equal"


def test_train_prints_a_warning_where_the_file_cannot_hold_the_updates(
    qzo: Run, place: Place, tmp_path: Path
) -> None:
    zo = {**ESTIMATORS["absolute"], "max_loss_difference": None}
    recipe = write_recipe(
        tmp_path / "r.yaml",
        place.base,
        place.data,
        tmp_path / "run",
        learning_rate=1e-12,
        zo=zo,
    )

    ran = qzo("train", recipe)

    assert ran.code == 0, ran.err
    assert (
        "\nwarning: only 0.0% of the scales differ from the base once rounded to float16, the "
        "dtype of the file: the other updates are too small to survive the export; raise "
        "learning_rate, or train longer\n"
    ) in ran.out


def test_train_says_what_comes_next(qzo: Run, place: Place, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", place.base, place.data, tmp_path / "run")
    scales = qzo("train", recipe).out.splitlines()[-1]
    lora = qzo("train", recipe, f"output_dir={tmp_path}/lora", "zo={tuned: lora}").out

    assert scales == f"next: qzo export {tmp_path}/run --out NEW_FOLDER"
    assert lora.splitlines()[-1] == f"next: qzo eval {place.base} --adapter {tmp_path}/lora"
    assert "of the scales" not in lora


def test_plan_takes_a_float_model_as_it_is_to_be(qzo: Run, place: Place, tmp_path: Path) -> None:
    config = json.loads((place.base / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ("plan", tmp_path, "--seq-len", "8", "--json")

    ran = qzo(*options, "--format", "nf4", "--coordinates", "relative")
    assert ran.code == 0, ran.err
    found = ran.value["quantization"]
    assert (found["format"], found["bits"], found["group_size"]) == ("nf4", 4, 32)
    found = qzo(*options, "--bits", "3").value["quantization"]
    assert (found["format"], found["bits"], found["group_size"]) == ("gptq", 3, 32)
    refused = qzo("plan", place.base, "--group-size", "32")
    assert "expected none of them for a checkpoint that is quantized already" in refused.err


def test_train_shows_progress_on_stderr(qzo: Run, place: Place, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", place.base, place.data, tmp_path / "run")

    ran = qzo("train", recipe, "logging_steps=1")

    assert "step 2/3  loss " in ran.err
    assert "step" not in ran.out.splitlines()[0].partition(" ")[0]


def test_the_time_left_counts_the_steps_of_this_call_alone() -> None:
    shown = Console(file=io.StringIO(), width=200)
    callback = ProgressCallback(shown)
    arguments, control = TrainingArguments("unused"), TrainerControl()
    with callback:
        callback.on_train_begin(arguments, TrainerState(global_step=90, max_steps=100), control)
        state = TrainerState(global_step=92, max_steps=100)
        callback.on_log(arguments, state, control, logs={"loss": 1.0, "seconds": 4.0})

    text: str = shown.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith("step 92/100  loss 1.0000  derivative nan  clipped 0%  16 s left\n")


def test_an_evaluation_inside_a_run_shows_its_progress(place: Place, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []

    class Noted(ProgressCallback):
        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            told.append((kwargs["done"], kwargs["total"]))
            super().on_prediction_step(*args, **kwargs)

    recipe = write_recipe(
        tmp_path / "r.yaml",
        place.base,
        place.data,
        tmp_path / "run",
        **{"eval_data": str(place.data), "num_eval_examples": 8, "per_device_eval_batch_size": 3},
    )
    shown = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Noted(shown) as callback:
        run.train(read_recipe(recipe), [callback])

    assert told[:3] == [(3, 8), (6, 8), (8, 8)]  # before the first step
    assert "evaluating" in shown.file.getvalue()  # type: ignore[attr-defined]


def test_what_reads_or_writes_all_of_a_checkpoint_shows_its_progress(
    qzo: Run, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(*arguments: Any) -> str:
        file = io.StringIO()
        monkeypatch.setattr(
            "qzo.console.terminal.stderr_console",
            lambda: Console(file=file, force_terminal=True, width=100),
        )
        ran = qzo(*arguments, "--json")
        assert ran.value
        assert (ran.code, ran.err) == (0, "")
        return file.getvalue()

    evaluated = shown("eval", place.base, "--data", place.data, "--adapter", place.run)

    assert "reading the data" in evaluated
    assert "reading the codes of the base" in evaluated
    assert "rebuilding the scales" in shown("replay", place.run)
    assert "reading the base" in shown("export", place.run, "--out", tmp_path / "out")


def test_an_export_tells_what_it_does(place: Place, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []

    export(place.run, tmp_path / "out", progress=lambda *done: told.append(done))

    assert told[0] == (0, 1, "writing")
    assert [name for _, _, name in told] == ["writing", *["loading"] * (len(told) - 2), "checking"]
    assert told[-2] == (7, 7, "loading")
    assert told[-1][:2] == (8, 8)


def test_a_bar_appears_where_loading_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(patience: float, **keys: bool) -> str:
        monkeypatch.setattr("qzo.console.progress._PATIENCE", patience)
        console = Console(file=io.StringIO(), force_terminal=True, width=100)
        with loading_progress(console, **{"is_silent": False, **keys}) as show:
            show(1, 2, "quantizing")
            show(2, 2, "quantizing")
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text

    assert "quantizing" in shown(0.0)
    assert shown(60.0) == shown(0.0, is_silent=True) == ""


@pytest.mark.parametrize(
    ("arguments", "is_terminal", "is_quiet"),
    [(["eval"], True, False), (["eval", "--json"], True, True), (["eval"], False, True)],
)
def test_a_download_shows_its_bar_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], is_terminal: bool, is_quiet: bool
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setattr(sys, "argv", ["qzo", *arguments])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)

    cli._quiet_libraries()

    assert ("HF_HUB_DISABLE_PROGRESS_BARS" in os.environ) is is_quiet


def test_replay_writes_an_earlier_step(qzo: Run, place: Place, tmp_path: Path) -> None:
    ran = qzo("replay", place.run, "--to-step", "2", "--out", tmp_path / "out", "--json")

    assert (ran.value["steps"], ran.value["adapter"]) == (2, "written")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["step"] == 2


def test_compact_writes_a_journal_that_can_be_replayed(
    qzo: Run, place: Place, tmp_path: Path
) -> None:
    small = tmp_path / "small.safetensors"

    ran = qzo("compact", place.run, "--out", small, "--json")

    steps = len(json_lines(place.run / "journal.jsonl")) - 1
    assert ran.value["bytes"] == small.stat().st_size
    assert ran.value["steps"] <= steps
    again = qzo("replay", small, "--base", place.base, "--out", tmp_path / "out", "--json").value
    assert again["fingerprint"] == qzo("replay", place.run, "--json").value["fingerprint"]


def test_compact_overwrites_nothing(qzo: Run, place: Place) -> None:
    model = place.base / "model.safetensors"
    before = model.read_bytes()

    ran = qzo("compact", place.run, "--out", model)

    want = f"qzo: {model}: expected a new file, found one; choose another name\n"
    assert (ran.code, ran.err) == (1, want)
    assert model.read_bytes() == before


def test_compact_wants_the_suffix_that_replay_tells_the_form_by(
    qzo: Run, place: Place, tmp_path: Path
) -> None:
    ran = qzo("compact", place.run, "--out", tmp_path / "small.bin")

    want = "qzo: --out: expected a name that ends in .safetensors, got 'small.bin'\n"
    assert (ran.code, ran.err) == (1, want)


def test_export_writes_a_checkpoint_with_the_trained_loss(
    qzo: Run, place: Place, tmp_path: Path
) -> None:
    ran = qzo("export", place.run, "--out", tmp_path / "out", "--json")

    assert ran.code == 0, ran.err
    assert ran.value["num_changed"] == 2  # queries and keys of one block
    # rounding the scales to fp16
    assert ran.value["exported_loss"] == pytest.approx(ran.value["trained_loss"], abs=5e-3)
    assert qzo("inspect", tmp_path / "out", "--json").code == 0


@pytest.mark.parametrize("options", [("--format", "nf4"), ("--method", "rtn")])
def test_quantize_writes_a_checkpoint(qzo: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    model: Any = tiny_model()
    model.save_pretrained(tmp_path / "float")
    write_tokenizer(tmp_path / "float")

    ran = qzo("quantize", tmp_path / "float", "--out", tmp_path / "out", *options, "--json")

    assert ran.code == 0, ran.err
    assert ran.value["num_layers"] == 7
    assert qzo("inspect", tmp_path / "out", "--json").value["num_layers"] == 7


def test_the_next_command_names_the_base_that_was_quantized_for_the_run(
    qzo: Run, place: Place, tmp_path: Path
) -> None:
    model: Any = tiny_model(intermediate=128)
    model.save_pretrained(tmp_path / "float")
    write_tokenizer(tmp_path / "float")
    run, keys = tmp_path / "run", {"quantize": "nf4", "zo": {"tuned": "lora"}, "max_steps": 1}
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "float", place.data, run, **keys)
    last = qzo("train", recipe).out.splitlines()[-1]
    assert last == f"next: qzo eval {run}/base --adapter {run}"


def test_train_quantizes_a_float_model_once_and_takes_no_other_base(
    qzo: Run, place: Place, tmp_path: Path
) -> None:
    for name in ("float", "other"):
        model: Any = tiny_model(intermediate=128)
        model.save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name)
    run, base = tmp_path / "run", tmp_path / "run" / "base"
    keys = {"quantize": "nf4", "lr_scheduler_type": "constant", "resume_from_checkpoint": True}
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "float", place.data, run, **keys)
    base_checkpoint(read_recipe(recipe))  # and then the process was killed
    (run / ".base.partial-1").mkdir()  # and one before that
    made = (base / "model.safetensors").stat().st_mtime_ns

    def refusal(*changes: str) -> str:
        ran = qzo("train", recipe, *changes)
        assert ran.code == 1
        return ran.err.strip()

    found = f"found what was made from {tmp_path / 'float'} as nf4, or from other files of it"
    hint = "choose another output_dir, or remove this folder"
    assert refusal("quantize=gptq") == (
        f"qzo: {base}: expected {tmp_path / 'float'} as gptq, {found}; {hint}"
    )
    assert refusal(f"model={tmp_path / 'other'}") == (
        f"qzo: {base}: expected {tmp_path / 'other'} as nf4, {found}; {hint}"
    )
    origin = (run / "base_origin.json").read_bytes()
    (run / "base_origin.json").unlink()
    assert refusal() == (
        f"qzo: {base}: expected {tmp_path / 'float'} as nf4, found what was made from nothing that "
        f"is known; {hint}"
    )
    (run / "base_origin.json").write_bytes(origin)
    assert qzo("train", recipe, "--json").value["steps"] == 3
    assert "expected a new or empty folder" in refusal("resume_from_checkpoint=false")
    assert refusal("quantize=gptq", "max_steps=4") == (
        "qzo: quantize: expected 'nf4' as in the run that is to be continued, got 'gptq'"
    )

    shutil.rmtree(tmp_path / "float")  # what counts from now on is in the journal
    assert qzo("train", recipe, "max_steps=4", "--json").value["steps"] == 4
    assert (base / "model.safetensors").stat().st_mtime_ns == made


def test_other_files_of_the_same_model_are_another_base(
    qzo: Run, place: Place, tmp_path: Path
) -> None:
    model: Any = tiny_model(intermediate=128)
    model.save_pretrained(tmp_path / "float")
    write_tokenizer(tmp_path / "float")
    keys = {"quantize": "nf4"}
    recipe = write_recipe(
        tmp_path / "r.yaml", tmp_path / "float", place.data, tmp_path / "run", **keys
    )
    base_checkpoint(read_recipe(recipe))
    tiny_model(intermediate=128, seed=1).save_pretrained(tmp_path / "float")

    ran = qzo("train", recipe)

    assert (ran.code, ran.err.strip().endswith("or remove this folder")) == (1, True)


def test_completions_are_learned_through_the_command_line(
    qzo: Run, place: Place, tmp_path: Path
) -> None:
    data = write_lines(tmp_path / "d.jsonl", COMPLETIONS)
    recipe = write_recipe(tmp_path / "r.yaml", place.base, data, tmp_path / "run")

    assert qzo("train", recipe, "--json").value["steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("inspect",), "Missing argument"),
        (("nonsense",), "No such command"),
        (("inspect", "x", "--nonsense"), "No such option"),
        (("generate", "x", "--prompt", "a", "--max-new-tokens", "many"), "Invalid value"),
        (("eval", "x", "--batch-size", "0"), "Invalid value"),
        (("replay", "x", "--to-step", "-1"), "Invalid value"),
    ],
)
def test_wrong_usage_exits_2(qzo: Run, arguments: tuple[str, ...], complaint: str) -> None:
    ran = qzo(*arguments)

    assert (ran.code, ran.out) == (2, "")
    assert complaint in ran.err


def test_help_is_for_users(qzo: Run) -> None:
    for name in getattr(get_command(app), "commands"):  # noqa: B009  # of a group
        assert "Raises" not in qzo(name, "--help").out


def test_help_exits_0(qzo: Run) -> None:
    ran = qzo("--help")

    assert (ran.code, ran.err) == (0, "")
    assert "forward passes only" in ran.out


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_an_error_is_one_line_and_exits_1(qzo: Run, tmp_path: Path, as_json: tuple[str]) -> None:
    ran = qzo("inspect", tmp_path / "nothing", *as_json)

    assert (ran.code, ran.out) == (1, "")
    assert ran.err == f"qzo: {tmp_path / 'nothing'}: expected a folder or a hub id, found neither\n"


def test_an_interrupt_is_one_line_and_exits_1(
    qzo: Run, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qzo.run.launch.split_records", interrupt)
    recipe = write_recipe(tmp_path / "r.yaml", place.base, place.data, tmp_path / "run")

    ran = qzo("train", recipe, "--json")

    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "qzo: interrupted; the journal holds every finished step\n"
