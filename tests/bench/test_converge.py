"""``qzo bench converge`` on a tiny checkpoint; numbers are computed again from the runs' files."""

import base64
import io
import json
import math
import os
import re
import shutil
import signal
import statistics
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.image import imread
from support.command import Run, command
from support.runs import json_lines, tiny_checkpoint, write_lines

from quantizers.errors import FormatError
from qzo.bench.converge import cells as cells_module
from qzo.bench.converge.cell_results import reached
from qzo.bench.converge.cells import forwards_per_step, write_tuning_data
from qzo.bench.converge.converge import converge
from qzo.bench.converge.report import loss_figure, table, write_report
from qzo.bench.converge.suite import read_suite, with_keys
from qzo.data.tasks import TASKS
from qzo.errors import ConfigError, DataError
from qzo.method.probes import Probe, forwards_of
from qzo.run.recipe.read import recipe
from qzo.run.result import StoppedError

pytestmark = pytest.mark.slow  # whole runs; the file takes half a minute

SPSA = {
    **{"preset": "none", "learning_rate": 1e-2},
    "zo": {"estimator": "spsa", "num_directions": 2},
}
ADAM = {
    "preset": "none",
    "zo": {"estimator": "per_example", "coordinates": "row", "optimizer": "adam"},
    "grid": {"learning_rate": [1e-3, 3e-2]},
}
SPSA_GRID = {**SPSA, "grid": {"learning_rate": [1e-2, 1e-4]}}
METRICS = ("loss", "accuracy", "accuracy_bias_corrected")


def records(words: str) -> list[dict[str, Any]]:
    answers = [" bad", " great"]
    return [
        {"prompt": f"a {w} film.", "completion": answers[w < "n"], "candidates": answers}
        for w in words
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("converge") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "train.jsonl", records("abcdefghijklopqrstuvwxyz"))
    write_lines(folder / "validation.jsonl", records("gmnt"))
    return folder


def suite_keys(base: Path, data: Path, **keys: Any) -> dict[str, Any]:
    task = {
        **{"model": str(base), "data": str(data), "eval_data": str(data)},
        **{"per_device_train_batch_size": 3, "max_length": 40, "target_loss": 0.0},
    }
    return {
        **{"methods": {"spsa": SPSA_GRID, "adam": ADAM}, "tasks": {"films": task}},
        **{"seeds": [0, 1], "forwards": 12, "tuning_forwards": 8, "eval_forwards": [4, 9, 12]},
        **keys,
    }


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def write_suite(path: Path, keys: Mapping[str, Any]) -> Path:
    path.write_text(yaml.dump(dict(keys), Dumper=_NoAliases, sort_keys=False), encoding="utf-8")
    return path


def run(folder: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    suite = read_suite(write_suite(folder / "suite.yaml", keys))
    return converge(suite, folder, lambda text: None)


@pytest.fixture(scope="module")
def done(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished suite with its report; nothing of it is changed."""
    folder = tmp_path_factory.mktemp("done")
    write_report(run(folder, suite_keys(base, data)), folder)
    return folder


def results_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return value


def losses(folder: Path) -> dict[int, float]:
    """Return the evaluation losses of a run by step."""
    lines = json_lines(folder / "metrics.jsonl")
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return sum(values) / len(values), statistics.stdev(values) / math.sqrt(len(values))


@pytest.mark.parametrize(("method", "forwards_per_step"), [("spsa", 4), ("adam", 2)])
def test_all_runs_have_the_same_forwards(done: Path, method: str, forwards_per_step: int) -> None:
    entry = results_of(done)["tasks"]["films"]["methods"][method]

    assert len(entry["cells"]) == 2
    for cell in entry["cells"]:
        lines = json_lines(Path(cell["folder"]) / "journal.jsonl")
        steps = [line for line in lines if "losses" in line]
        assert len(steps) * forwards_per_step == 12
        num_losses = sum(len(line["losses"]) for line in steps)
        # spsa: a loss of the whole batch; adam: of one example out of three
        assert num_losses == (12 if method == "spsa" else 36)


@pytest.mark.parametrize("method", ["spsa", "adam"])
def test_means_are_those_of_the_runs_metrics(done: Path, method: str) -> None:
    entry = results_of(done)["tasks"]["films"]["methods"][method]

    folders = [done / "cells" / "films" / method / entry["point"] / f"seed-{n}" for n in (0, 1)]
    finals = [json_lines(folder / "metrics.jsonl")[-2] for folder in folders]
    for key in METRICS:
        mean, error = mean_and_error([line[f"eval_{key}"] for line in finals])
        assert entry[key]["mean"] == pytest.approx(mean, rel=1e-12)
        assert entry[key]["se"] == pytest.approx(error, rel=1e-9, abs=1e-15)
    per_step = 4 if method == "spsa" else 2
    want = [(step * per_step, loss) for step, loss in losses(folders[0]).items()]
    assert [(p["forwards"], p["loss"]) for p in entry["cells"][0]["curve"]] == want
    both = [losses(folder) for folder in folders]
    means = [sum(curve[step] for curve in both) / 2 for step in both[0]]
    assert [p["mean"] for p in entry["curve"]] == pytest.approx(means, rel=1e-12)


def test_runs_are_evaluated_at_the_steps_before_the_forwards_asked_for(done: Path) -> None:
    methods = results_of(done)["tasks"]["films"]["methods"]
    at = {n: [p["forwards"] for p in e["cells"][0]["curve"]] for n, e in methods.items()}

    assert at == {"spsa": [0, 4, 8, 12], "adam": [0, 4, 8, 12]}  # 9 lies between two steps


@pytest.mark.parametrize("method", ["spsa", "adam"])
def test_the_grid_point_of_the_lowest_tuning_loss_is_chosen(done: Path, method: str) -> None:
    entry = results_of(done)["tasks"]["films"]["methods"][method]

    found = {}
    for folder in sorted((done / "cells" / "films" / method).iterdir()):
        found[folder.name] = list(losses(folder / "seed-100").values())[-1]
    assert len(found) == 2
    assert entry["point"] == min(found, key=found.__getitem__)
    assert {e["point"]: e["loss"]["mean"] for e in entry["tuning"]} == found
    not_chosen = next(name for name in found if name != entry["point"])
    others = [p.name for p in (done / "cells" / "films" / method / not_chosen).iterdir()]
    assert others == ["seed-100"]


def test_tuning_sees_neither_the_reported_set_nor_examples_that_it_trains_on(
    done: Path, data: Path
) -> None:
    parts = [
        {record["prompt"] for record in json_lines(done / "tuning" / "films" / f"{name}.jsonl")}
        for name in ("train", "held-out")
    ]

    assert len(parts[1]) == 2  # a tenth of 24
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {r["prompt"] for r in json_lines(data / "train.jsonl")}
    assert not parts[1] & {r["prompt"] for r in json_lines(data / "validation.jsonl")}


def test_texts_of_the_same_attributes_are_held_out_together(base: Path, tmp_path: Path) -> None:
    names = [f"name[{letter}]" for letter in "abcdefghijklmnopqrst"]
    rows = [f"{name},text {number} of it" for number in range(3) for name in names]
    for name in ("train", "eval"):
        (tmp_path / f"{name}.csv").write_text("\n".join(["mr,ref", *rows]) + "\n")
    keys = suite_keys(base, tmp_path)
    keys["tasks"] = {
        "restaurants": {
            **{"task": "e2e", "model": str(base), "per_device_train_batch_size": 3},
            **{"data": str(tmp_path / "train.csv"), "eval_data": str(tmp_path / "eval.csv")},
        }
    }
    suite = read_suite(write_suite(tmp_path / "suite.yaml", keys))

    write_tuning_data(suite, tmp_path, suite.tasks[0])

    place = tmp_path / "tuning" / "restaurants"
    held_out, trained = (json_lines(place / f"{n}.jsonl") for n in ("held-out", "train"))
    assert len(held_out) == 2 * 3  # a tenth of the 20 sets of attributes, with all their texts
    assert len(trained) == 18 * 3
    assert not {record["mr"] for record in held_out} & {record["mr"] for record in trained}


def test_dates_of_a_parquet_file_do_not_stop_the_tuning(base: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    given = [{**record, "day": date(2026, 1, 2)} for record in records("abcdefghijklmnopqrst")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), tmp_path / "train.parquet")
    keys = suite_keys(base, tmp_path)
    task = keys["tasks"]["films"]
    keys["tasks"]["films"] = {**task, "data": str(tmp_path / "train.parquet"), "eval_data": "none"}
    suite = read_suite(write_suite(tmp_path / "suite.yaml", keys))

    write_tuning_data(suite, tmp_path, suite.tasks[0])

    held_out = json_lines(tmp_path / "tuning" / "films" / "held-out.jsonl")
    assert [record["day"] for record in held_out] == ["2026-01-02"] * 2


def test_the_table_shows_mean_and_error(done: Path) -> None:
    entry = results_of(done)["tasks"]["films"]["methods"]["adam"]
    lines = (done / "results.md").read_text(encoding="utf-8").splitlines()

    head = next(line for line in lines if line.startswith("| method"))
    row = next(line for line in lines if line.startswith("| adam"))
    folder = done / "cells" / "films" / "adam" / entry["point"]
    finals = [list(losses(folder / f"seed-{n}").values())[-1] for n in (0, 1)]
    mean, error = mean_and_error(finals)
    assert head == (
        "| method | grid point | loss | accuracy | bias-corrected | forwards to 0 | "
        "seconds per forward |"
    )
    assert row.startswith(f"| adam | {entry['point']} | {mean:.4f} ± {error:.4f} | ")
    assert "| 0 of 2 reached it |" in row


def test_a_second_call_runs_nothing_also_where_the_folder_was_moved(
    done: Path, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(done, tmp_path / "copy")
    keys = suite_keys(base, data)
    monkeypatch.setattr(cells_module, "train", None)

    again = run(copy, keys)

    assert json.dumps(again["tasks"]).replace(str(copy), str(done)) == json.dumps(
        results_of(done)["tasks"]
    )


def test_a_suite_that_was_stopped_goes_on_as_if_it_had_not_been(
    base: Path, data: Path, tmp_path: Path
) -> None:
    keys = suite_keys(base, data, methods={"adam": ADAM}, grid={}, seeds=[0, 1])
    done, folder = tmp_path / "done", tmp_path / "stopped"
    run(done, keys)
    suite = read_suite(done / "suite.yaml")
    said: list[str] = []

    def stop_in_the_middle(text: str) -> None:
        said.append(text)
        if "seed 1, step 3 of 6" in text:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(
        StoppedError, match=r"^stopped by a signal in .*/seed-1; the same command goes on .*there$"
    ):
        converge(suite, folder, stop_in_the_middle)
    stopped = next(folder.glob("cells/films/adam/*/seed-1"))
    assert not (stopped / "cell.json").exists()
    converge(suite, folder, said.append)

    paths = sorted(path.relative_to(done) for path in done.glob("cells/**/journal.jsonl"))
    assert len(paths) == 2
    for path in paths:
        want, got = json_lines(done / path)[1:], json_lines(folder / path)[1:]
        steps = [[line for line in lines if "losses" in line] for lines in (want, got)]
        assert steps[0] == steps[1]
        assert want[-1] == got[-1]  # the fingerprint of the scales at the end
        assert losses(folder / path.parent) == losses(done / path.parent)
    resumed = [text for text in said if "seed 1," in text]
    assert [re.findall(r"step \d+ of", text)[0] for text in resumed] == [
        *(f"step {n} of" for n in (0, 1, 2, 3)),
        *(f"step {n} of" for n in (0, 4, 5, 6)),
    ]


def test_progress_names_the_run_and_the_time_left(base: Path, data: Path, tmp_path: Path) -> None:
    keys = suite_keys(base, data, methods={"spsa": SPSA}, seeds=[0, 1])
    suite = read_suite(write_suite(tmp_path / "suite.yaml", keys))
    said: list[str] = []

    converge(suite, tmp_path / "out", said.append)

    assert said[0] == "run 1 of 2: films, spsa, as-given, seed 0, step 0 of 3"
    assert re.fullmatch(
        r"run 2 of 2: films, spsa, as-given, seed 1, step 2 of 3, \d+ s left", said[-2]
    )
    assert said[-1].endswith("step 3 of 3, 0 s left")


def test_a_method_that_diverges_is_reported_and_the_others_go_on(
    base: Path, data: Path, tmp_path: Path
) -> None:
    zo = {"estimator": "per_example", "coordinates": "row", "optimizer": "sign"}
    wild = {"preset": "none", "learning_rate": 1e38, "zo": {**zo, "max_skipped_steps": 2}}
    keys = suite_keys(base, data, methods={"wild": wild, "spsa": SPSA}, seeds=[0])

    results = run(tmp_path, keys)
    markdown = write_report(results, tmp_path)

    methods = results["tasks"]["films"]["methods"]
    assert methods["wild"]["num_diverged"] == 1
    assert methods["wild"]["loss"] is None
    assert methods["spsa"]["num_diverged"] == 0
    message = methods["wild"]["cells"][0]["message"]
    assert message.startswith("loss: expected finite values, got none in 2 steps in a row")
    assert f"- diverged: wild, as-given, seed 0: {message}" in markdown
    assert "| wild | as-given | 1 of 1 diverged |" in markdown
    assert (tmp_path / "cells/films/wild/as-given/seed-0/journal.jsonl").exists()
    assert run(tmp_path, keys)["tasks"] == results["tasks"]  # it is not tried again


def test_a_model_that_cannot_be_read_is_no_method_that_diverged(
    base: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "base")
    keys = suite_keys(tmp_path / "base", data, methods={"spsa": SPSA}, seeds=[0])
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["bits"] = 5
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))

    with pytest.raises(FormatError, match=r"^bits: expected one of .*, got 5$"):
        run(tmp_path / "out", keys)

    shutil.copy(base / "config.json", tmp_path / "base")
    methods = run(tmp_path / "out", keys)["tasks"]["films"]["methods"]
    assert methods["spsa"]["num_diverged"] == 0


def test_a_method_whose_every_grid_point_diverges_is_not_reported_as_a_number(
    base: Path, data: Path, tmp_path: Path
) -> None:
    zo = {"max_skipped_steps": 2, "optimizer": "sign"}
    wild = {"zo": zo, "grid": {"learning_rate": [1e37, 1e38]}}
    keys = suite_keys(base, data, methods={"wild": wild}, seeds=[0])

    results = run(tmp_path, keys)

    entry = results["tasks"]["films"]["methods"]["wild"]
    assert entry["point"] is None
    assert [e["num_diverged"] for e in entry["tuning"]] == [1, 1]
    assert "| wild | all diverged |" in write_report(results, tmp_path)


def test_the_page_needs_no_other_file_and_holds_the_plot(done: Path, data: Path) -> None:
    page = (done / "index.html").read_text(encoding="utf-8")

    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^">)]*)', page)
    assert len(sources) == 1
    kind, _, encoded = sources[0].partition(",")
    assert kind == "data:image/png;base64"
    picture = base64.b64decode(encoded)
    assert picture == (done / "loss-films.png").read_bytes()
    assert imread(io.BytesIO(picture)).shape[:2] == (600, 960)
    assert "<script" not in page
    assert "learning_rate=0.03" in page
    assert "torch" in page


def ranked_task(losses: Mapping[str, float | None]) -> dict[str, Any]:
    def method(loss: float | None) -> dict[str, Any]:
        mean = None if loss is None else {"mean": loss, "se": 0.1}
        curve = [{"forwards": 0, "mean": 3.0, "se": None}]
        curve += [] if loss is None else [{"forwards": 10, "mean": loss, "se": 0.1}]
        metrics = dict.fromkeys(("accuracy", "accuracy_bias_corrected", "f1"))
        numbers = {"loss": mean, **metrics, "num_diverged": int(loss is None), "num_seeds": 1}
        return {"point": "p", **numbers, "curve": curve, "seconds_per_forward": None}

    return {"target_loss": None, "methods": {name: method(x) for name, x in losses.items()}}


def test_the_table_has_the_lowest_loss_first_and_what_diverged_last() -> None:
    task = ranked_task({"b": 2.0, "wild": None, "a": 1.0})

    _, rows = table(task)

    assert [row[0] for row in rows] == ["a", "b", "wild"]


def test_the_plot_names_the_ten_best_and_counts_the_others() -> None:
    losses = {f"m{number}": float(number) for number in range(12, 0, -1)}
    losses["m12"] = 1000.0

    (axes,) = loss_figure(ranked_task({**losses, "wild": None}), "films").axes

    legend = axes.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [*(f"m{number}" for number in range(1, 11)), "3 others"]
    assert len(axes.lines) == 13 + 1  # one holds the legend's entry
    assert axes.get_ylim()[1] < 12


def test_the_command_prints_one_object(
    capsys: pytest.CaptureFixture[str], base: Path, data: Path, tmp_path: Path
) -> None:
    qzo: Run = command(capsys)
    tasks = {"films": {"model": "elsewhere", "data": "elsewhere", "max_length": 40}}
    tasks["films"] |= {"eval_data": "elsewhere", "per_device_train_batch_size": 3}
    keys = suite_keys(base, data, methods={"spsa": SPSA}, tasks=tasks, seeds=[0])
    path = write_suite(tmp_path / "mine.yaml", keys)
    where = ("--dir", tmp_path / "out", "--model", base, "--data", data)

    ran = qzo("bench", "converge", path, *where, "--json")
    shown = qzo("bench", "converge", path, *where)

    assert ran.code == 0, ran.err
    assert ran.err == ""
    assert ran.value["tasks"]["films"]["methods"]["spsa"]["num_seeds"] == 1
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == ran.value
    assert shown.out.startswith((tmp_path / "out" / "results.md").read_text(encoding="utf-8"))


def refused(tmp_path: Path, keys: Mapping[str, Any]) -> str:
    with pytest.raises((ConfigError, DataError)) as caught:
        run(tmp_path, keys)
    return str(caught.value).removeprefix(f"{tmp_path / 'suite.yaml'}: ")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"seed": [0]}, "seed: unknown key; did you mean 'seeds'?"),
    ({"methods": {}}, "methods: expected at least one, got {}"),
    ({"seeds": []}, "seeds: expected at least one, got []"),
    ({"forwards": 0}, "forwards: expected a number greater than or equal to 1, got 0"),
    ({"eval_forwards": 1}, "eval_forwards: expected a valid list, got 1"),
    (
        {"methods": {"a": {"learning_ratee": 1}}},
        "methods.a.learning_ratee: unknown key; did you mean 'learning_rate'?",
    ),
    (
        {"methods": {"a": {"max_steps": 5}}},
        "methods.a.max_steps: expected no such key, since the suite decides it by 'forwards'; "
        "remove it",
    ),
    (
        {"methods": {"a": {"grid": {"seed": [1, 2]}}}},
        "methods.a.grid.seed: expected no such key, since the suite decides it by 'seeds'; "
        "remove it",
    ),
    (
        {"methods": {"a": {"grid": {"learning_rate": 1.0}}}},
        "methods.a.grid.learning_rate: expected a list of numbers or words, got 1.0",
    ),
    (
        {"methods": {"a": SPSA_GRID, "b": SPSA}},
        "grid: expected the same number of points for every method, which is its tuning budget, "
        "got a 2, b 1; make them equal, or say 'grid: {}' to tune nothing",
    ),
    (
        {"methods": {"a/b": SPSA}},
        "methods: expected names of letters, digits, '_', '-' and '.', got 'a/b'",
    ),
    (
        {"tuning_seeds": [1, 7]},
        "tuning_seeds: expected seeds that are not in 'seeds', got [1]; a method must not be "
        "chosen by the runs that are reported",
    ),
    ({"seeds": [3, 3]}, "seeds: expected every seed once, got [3, 3]"),
    ({"eval_forwards": [4, 13]}, "eval_forwards: expected at most 'forwards', 12, got 13"),
    (
        {"forwards": 3, "eval_forwards": 2, "grid": {}},
        "films, spsa, as-given: forwards: expected at least those of one step, 4, got 3",
    ),
    (
        {"methods": {"a": {"zo": {"first_order_blocks": 2}}}},
        "films, a, as-given: zo.first_order_blocks: expected at most the 1 blocks of the model, "
        "got 2",
    ),
    (
        {"methods": {"a": {"zo": {"first_order_layers": "profile"}}}},
        "films, a, as-given: zo.first_order_layers: expected 'last', got 'profile', which finds "
        "the cost of a step only in the run; name zo.first_order_blocks",
    ),
    (
        {"methods": {"a": {"grid": {"zo.optimizer": ["sgd", "best"]}}}},
        "films, a, zo.optimizer=best: zo.optimizer: expected 'sgd', 'sign', 'momentum', 'adam', "
        "'meazo', 'hizoo', 'conmezo', 'conservative' or 'lozo_momentum', got 'best'",
    ),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=[m.split(":")[0] for _, m in REFUSED])
def test_a_suite_that_cannot_be_used_is_refused_in_words(
    base: Path, data: Path, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    got = refused(tmp_path, suite_keys(base, data, **keys))

    assert got == message
    assert not (tmp_path / "cells").exists()


TASKS_REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"eval_data": None},
        "tasks.films.eval_data: expected data to evaluate on, got none; what a run holds out of "
        "its own data differs from seed to seed",
    ),
    (
        {"eval_data": "same", "tuning_eval_data": "same"},
        "tasks.films.tuning_eval_data: expected other data than eval_data, got both 'same'; a "
        "method must not be chosen by what is reported",
    ),
    (
        {"target_loss": "low"},
        "tasks.films.target_loss: expected a valid number, unable to parse string as a number, "
        "got 'low'",
    ),
    (
        {"data": "{data}/validation.jsonl"},
        "tasks.films.data: expected at least 10 training examples, of which some are held out for "
        "tuning, got 4; name tuning_eval_data",
    ),
]


@pytest.mark.parametrize(
    ("keys", "message"), TASKS_REFUSED, ids=[m.split(":")[0] for _, m in TASKS_REFUSED]
)
def test_a_task_that_cannot_be_used_is_refused_in_words(
    base: Path, data: Path, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    suite = suite_keys(base, data)
    filled = {k: v.format(data=data) if isinstance(v, str) else v for k, v in keys.items()}
    suite["tasks"]["films"] |= filled

    assert refused(tmp_path, suite) == message


CHANGED: list[tuple[dict[str, Any], str]] = [
    ({"forwards": 16, "eval_forwards": [16]}, "max_steps: expected 3 as in the run in {}, got 4"),
    ({"num_eval_examples": 3}, "num_eval_examples: expected 500 as in the run in {}, got 3"),
    (
        {"methods": {"spsa": {**SPSA, "zo": {**SPSA["zo"], "epsilon": 0.5}}}},  # type: ignore[dict-item]
        "zo.epsilon: expected 0.01 as in the run in {}, got 0.5",
    ),
]


@pytest.mark.parametrize(("keys", "message"), CHANGED, ids=[m.split(":")[0] for _, m in CHANGED])
def test_a_changed_suite_does_not_go_on_with_the_runs_of_another(
    base: Path, data: Path, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    run(tmp_path, suite_keys(base, data, methods={"spsa": SPSA}, seeds=[0]))

    changed = suite_keys(base, data, **{"methods": {"spsa": SPSA}, "seeds": [0], **keys})
    got = refused(tmp_path, changed)

    folder = tmp_path / "cells/films/spsa/as-given/seed-0"
    end = " from the suite; choose another --dir, or remove that folder"
    assert got == message.format(folder) + end


def test_a_method_is_a_recipe_file_beside_the_suite(base: Path, data: Path, tmp_path: Path) -> None:
    write_suite(tmp_path / "mine.yaml", SPSA_GRID)
    keys = suite_keys(base, data, methods={"mine": "mine.yaml"})

    suite = read_suite(write_suite(tmp_path / "suite.yaml", keys))

    assert suite.methods[0].fragment == SPSA
    assert list(suite.methods[0].points) == ["learning_rate=0.01", "learning_rate=0.0001"]


def test_keys_in_the_suite_are_put_over_those_of_the_file(
    base: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.yaml").write_text("zo: {estimator: spsa}\ngrid: {learning_rate: [1.0, 2.0]}\n")
    over = {"file": "m.yaml", "zo": {"coordinates": "row"}, "grid": {"zo.epsilon": [0.1, 0.2]}}
    keys = suite_keys(base, data, methods={"a": over}, grid=None)

    (method,) = read_suite(write_suite(tmp_path / "suite.yaml", keys)).methods

    assert method.fragment == {"zo": {"estimator": "spsa", "coordinates": "row"}}
    assert list(method.points) == ["zo.epsilon=0.1", "zo.epsilon=0.2"]


@pytest.mark.parametrize("suite_name", ["tiny", "stories"])
def test_every_method_file_is_in_the_suites_with_as_many_grid_points(
    tmp_path: Path, suite_name: str
) -> None:
    folder = Path(__file__).parents[2] / "recipes" / "converge"
    shutil.copytree(folder / "methods", tmp_path / "methods")
    keys = yaml.safe_load((folder / f"{suite_name}.yaml").read_text(encoding="utf-8"))
    keys.pop("grid", None)

    suite = read_suite(write_suite(tmp_path / "tuned.yaml", keys))

    files = {path.stem for path in (folder / "methods").glob("*.yaml")}
    assert {method.name for method in suite.methods} == files
    assert len(files) >= 35
    assert {len(method.points) for method in suite.methods} == {3}


def test_keys_of_a_block_are_put_over_one_by_one() -> None:
    got = with_keys(
        {"model": "m", "zo": {"epsilon": 1, "momentum": 2}},
        {"zo": {"momentum": 3}},
        {"zo.num_blocks": 4, "learning_rate": 5},
    )

    assert got == {
        **{"model": "m", "learning_rate": 5},
        "zo": {"epsilon": 1, "momentum": 3, "num_blocks": 4},
    }


def test_a_probe_of_some_examples_costs_its_share_of_a_forward() -> None:
    whole, half = Probe(1, 0.1), Probe(1, 0.1, examples=(2, 4))

    assert forwards_of([whole, whole], 4) == 2
    assert forwards_of([half, whole], 4) == 1.5
    assert forwards_of([], 4) == 0


def test_a_larger_batch_costs_more_forwards(base: Path, data: Path, tmp_path: Path) -> None:
    keys = suite_keys(base, data)
    task = read_suite(write_suite(tmp_path / "suite.yaml", keys)).tasks[0]
    own = {**task.fragment, "output_dir": "", "preset": "none", "zo": {"estimator": "spsa"}}

    larger = recipe({**own, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2})

    assert forwards_per_step(recipe(own), task) == 2
    assert forwards_per_step(larger, task) == 2 * 12 / 3


COSTS: list[tuple[dict[str, Any], float]] = [
    ({"optimizer": "conservative"}, 2 + 3),
    ({"estimator": "forward_gradient"}, 2),
    ({"first_order_blocks": 1}, 2 + 1 + 2 / 2),  # the last of two blocks
    ({"first_order_blocks": 2}, 1 + 2),  # of all blocks: nothing is probed
]


@pytest.mark.parametrize(("zo", "cost"), COSTS, ids=[next(iter(zo.values())) for zo, _ in COSTS])
def test_a_step_costs_what_its_run_counts(
    data: Path, tmp_path: Path, zo: dict[str, Any], cost: float
) -> None:
    base = tiny_checkpoint(tmp_path / "base", num_layers=2)
    methods = {"own": {"preset": "none", "zo": {"estimator": "spsa", **zo}}}
    keys = suite_keys(base, data, methods=methods, seeds=[0])

    entry = run(tmp_path, keys)["tasks"]["films"]["methods"]["own"]["cells"][0]

    lines = json_lines(Path(entry["folder"]) / "metrics.jsonl")
    counted = [line["forwards"] for line in lines if "forwards" in line][-1]
    assert entry["forwards_per_step"] == cost
    assert counted == entry["forwards"] == 12 // cost * cost


@pytest.mark.parametrize(
    ("losses", "want"),
    [
        ([2.0, 1.5, 1.0], 15.0),  # 1.25 lies in the middle of the last interval
        ([2.0, 1.25, 1.5], 10.0),
        ([1.2, 3.0, 3.0], 0.0),
        ([2.0, None, 1.0], 20.0),  # no line to cross it
        ([2.0, 1.5, 1.3], None),
    ],
)
def test_forwards_to_a_loss_are_where_the_line_crosses_it(
    losses: list[float | None], want: float | None
) -> None:
    curve = [{"forwards": 10 * i, "loss": loss} for i, loss in enumerate(losses)]

    assert reached(curve, 1.25) == want


EXAMPLES: dict[str, dict[str, Any]] = {
    "sst2": {"sentence": "a film", "label": 1},
    "rte": {"premise": "it rains", "hypothesis": "it is wet", "label": 0},
    "boolq": {"passage": "it rains", "question": "is it wet", "label": True},
    "copa": {
        **{"premise": "it rains", "choice1": "a", "choice2": "b"},
        **{"question": "cause", "label": 0},
    },
    "squad": {
        **{"title": "t", "context": "it rains", "question": "does it"},
        "answers": {"text": ["it rains", "rains"]},
    },
    "trec": {"text": "where is it", "coarse_label": 4},
    "e2e": {"mr": "name[it]", "ref": "It is it."},
}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples_of_a_task_can_be_written_and_read_again(name: str, tmp_path: Path) -> None:
    task = TASKS[name](None)
    once = task.source.read_file(write_lines(tmp_path / "once.jsonl", [EXAMPLES[name]]), "train")

    again = task.source.read_file(write_lines(tmp_path / "again.jsonl", once), "train")

    assert again == once
