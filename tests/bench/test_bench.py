"""``qzo bench`` in a tiny form: that it measures the right thing. Nothing here asserts on time."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command import Run, command
from support.runs import json_lines
from transformers import PreTrainedModel

from quantizers.gptq import GPTQWeight
from qzo.bench import memory, scaling, training_run
from qzo.bench.baselines import MeZO, answer_loss, as_batch, dense_model, use_bitsandbytes
from qzo.bench.batches import ANSWER_TOKENS, MIXED_LENGTHS, random_examples, row_lengths
from qzo.bench.clock import interleaved, ratio
from qzo.bench.parts import PARTS, Stopwatch, timed
from qzo.bench.process import Peaks, run_watched
from qzo.bench.scaling import Cost, Workload, bench_scaling, fit_line
from qzo.bench.step import QZOStep, StepSettings, estimator_keys
from qzo.bench.synthetic import Synthetic, synthetic_checkpoint
from qzo.bench.training_run import RunResult, RunSettings, run_apart
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.data.examples import from_encoded
from qzo.data.tokenize import EncodedExample
from qzo.errors import ConfigError, QZOError
from qzo.method.probes import Probe
from qzo.method.trained_vector import Scales
from qzo.model.linear import QuantLinear
from qzo.model.load import load, quant_linears
from qzo.objective.loss import Objective
from qzo.run.recipe.read import recipe
from qzo.run.trainer import Trainer

CPU = torch.device("cpu")
VOCABULARY = 96
COORDINATES = ("row", "relative", "absolute")


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("synthetic")


@pytest.fixture(scope="module")
def base(parent: Path) -> Path:
    return synthetic_checkpoint(Synthetic("tiny"), parent)


@pytest.fixture
def qzo(capsys: pytest.CaptureFixture[str]) -> Run:
    return command(capsys)


def dense(base: Path) -> PreTrainedModel:
    return dense_model(open_checkpoint(base), torch.float32, CPU)


def losses_at_file_scales(model: PreTrainedModel, examples: list[EncodedExample]) -> list[float]:
    """Every example's own loss, from one stacked forward."""
    layers = quant_linears(model)
    scales = Scales.of_layers(layers, coordinates="row", direction="rademacher")
    objective = Objective(
        model, layers[0].live, scales, from_encoded(examples), batch_size=len(examples)
    )
    probes = [Probe(7, 0.0, examples=(i, i + 1)) for i in range(len(examples))]
    return objective.losses(probes, [examples])


def test_rows_are_equal_and_cover_the_batch() -> None:
    assert row_lengths(32, 128) == (32,)
    assert row_lengths(512, 128) == (128,) * 4
    assert sum(MIXED_LENGTHS) == 8 * 68
    assert min(MIXED_LENGTHS) == 8
    assert max(MIXED_LENGTHS) == 128


@pytest.mark.parametrize(("tokens", "row_tokens"), [(100, 64), (2, 64), (64, 2)])
def test_a_batch_that_is_no_whole_rows_is_refused(tokens: int, row_tokens: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"^tokens: expected 4 or more, in whole rows of .*, got {tokens}$"
    ):
        row_lengths(tokens, row_tokens)


def test_answers_are_the_last_predictions_of_a_row() -> None:
    example = random_examples([9], VOCABULARY)[0]
    whole = random_examples([9], VOCABULARY, answer_len=9)[0]

    row, answer = example.rows[0], example.candidates[0]
    assert len(row) == 9
    assert answer.positions == (5, 6, 7, 8)
    assert answer.targets[:-1] == row[6:]
    assert len(answer.targets) == ANSWER_TOKENS
    assert whole.rows == example.rows
    assert whole.candidates[0].targets[:-1] == row[1:]


def test_the_dense_loss_is_that_of_plain_cross_entropy(base: Path) -> None:
    model, example = dense(base), random_examples([20], VOCABULARY)[0]

    loss = answer_loss(model, as_batch([example], CPU))

    logits = model(input_ids=torch.tensor([example.rows[0]])).logits[0].double()
    answer = example.candidates[0]
    pairs = zip(answer.positions, answer.targets, strict=True)
    want = -sum(float(logits[p].log_softmax(-1)[t]) for p, t in pairs) / ANSWER_TOKENS
    assert loss == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("format_name", ["gptq", "nf4"])
def test_the_dense_loss_is_that_of_qzo_at_offset_0(parent: Path, format_name: str) -> None:
    folder = synthetic_checkpoint(Synthetic("tiny", format_name), parent)
    examples = random_examples([16, 16, 16], VOCABULARY)

    found = losses_at_file_scales(load(folder), examples)

    want = answer_loss(dense(folder), as_batch(examples, CPU))
    assert sum(found) / 3 == pytest.approx(want, rel=1e-5)  # fp32 in two orders


def test_mixed_rows_have_the_losses_of_each_row_alone(base: Path) -> None:
    examples = random_examples(MIXED_LENGTHS, VOCABULARY)

    found = losses_at_file_scales(load(base), examples)

    model = dense(base)
    want = [answer_loss(model, as_batch([example], CPU)) for example in examples]
    assert found == pytest.approx(want, rel=1e-5)
    assert answer_loss(model, as_batch(examples, CPU)) == pytest.approx(sum(want) / 8, rel=1e-5)


def test_a_dense_model_owns_its_weights(base: Path) -> None:
    before = (base / "model.safetensors").read_bytes()

    model = dense(base)
    for parameter in model.parameters():
        parameter.zero_()

    assert (base / "model.safetensors").read_bytes() == before
    assert answer_loss(dense(base), as_batch(random_examples([8], VOCABULARY), CPU)) < 10


@pytest.mark.usefixtures("natural_bitsandbytes")
def test_bitsandbytes_computes_all_quantized_layers(base: Path) -> None:
    import bitsandbytes

    layers = open_checkpoint(base).layers
    model = use_bitsandbytes(dense(base), layers)

    replaced = {
        name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"
    }
    assert replaced == set(layers)
    reference = dense(base)
    functional: Any = bitsandbytes.functional
    for name in layers:
        quantized: Any = model.get_submodule(name).weight
        weight = functional.dequantize_4bit(quantized.data, quantized.quant_state)
        reference.get_submodule(name).weight.data = weight
    batch = as_batch(random_examples([16, 16], VOCABULARY), CPU)
    loss = answer_loss(model, batch)
    assert loss == pytest.approx(answer_loss(reference, batch), rel=1e-4)
    assert loss != pytest.approx(answer_loss(dense(base), batch), rel=1e-6)  # rounded anew


def naive_mezo(model: PreTrainedModel, batch: Any, seed: int, eps: float, lr: float) -> None:
    """MeZO, arXiv 2305.17333, algorithm 1, line by line, with the global generator."""

    def perturb(scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            z = torch.normal(mean=0.0, std=1.0, size=parameter.shape)
            parameter.data = parameter.data + scale * z

    perturb(eps)
    plus = answer_loss(model, batch)
    perturb(-2 * eps)
    minus = answer_loss(model, batch)
    perturb(eps)
    projected_grad = (plus - minus) / (2 * eps)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        z = torch.normal(mean=0.0, std=1.0, size=parameter.shape)
        parameter.data = parameter.data - lr * projected_grad * z


def test_a_mezo_step_is_algorithm_1(base: Path) -> None:
    batch = as_batch(random_examples([12, 12], VOCABULARY), CPU)
    model, reference = dense(base), dense(base)
    start = [parameter.clone() for parameter in model.parameters()]

    MeZO(model, epsilon=1e-2, learning_rate=1e-1).step(11, batch)

    state = torch.random.get_rng_state()
    naive_mezo(reference, batch, 11, 1e-2, 1e-1)
    torch.random.set_rng_state(state)
    for before, found, want in zip(start, model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.data, want.data, rtol=0, atol=1e-6)  # fused add
        assert (found - before).abs().max() > 1e-3


def test_a_mezo_step_leaves_the_global_generator_alone(base: Path) -> None:
    state = torch.random.get_rng_state()

    MeZO(dense(base)).step(0, as_batch(random_examples([8], VOCABULARY), CPU))

    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_a_step_is_that_of_the_trainer(base: Path, tmp_path: Path, coordinates: str) -> None:
    model, examples = load(base), random_examples([8, 8], VOCABULARY)
    values = {
        **{"model": "x", "output_dir": str(tmp_path / "run"), "max_steps": 3},
        **{"per_device_train_batch_size": 2, "lr_scheduler_type": "constant"},
        **estimator_keys(coordinates),
    }
    trainer = Trainer(model, recipe(values), from_encoded(examples))
    trainer.train()
    want = [line for line in json_lines(tmp_path / "run/journal.jsonl") if "losses" in line]

    qzo_step = QZOStep(load(base), examples, tmp_path / "bench", coordinates)
    losses = [qzo_step.step() for _ in range(3)]

    found = [line for line in json_lines(tmp_path / "bench/journal.jsonl") if "losses" in line]
    assert losses == [line["losses"] for line in want]
    assert found == want


def test_unknown_coordinates_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^coordinates: expected one of row, relative, absolute, got 'columns'$"
    ):
        estimator_keys("columns")


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_stacked_and_separate_probes_have_the_same_losses(
    base: Path, tmp_path: Path, coordinates: str
) -> None:
    examples = random_examples([8, 8], VOCABULARY)
    qzo_step = QZOStep(load(base), examples, tmp_path, coordinates)

    stacked = qzo_step.stacked()

    assert len(stacked) == (4 if coordinates == "row" else 2)
    assert qzo_step.separate() == pytest.approx(stacked, rel=1e-5)  # sums in another order
    assert len(set(stacked)) == len(stacked)


def test_contenders_take_turns_and_the_order_rotates() -> None:
    calls: list[str] = []

    seconds = interleaved({name: partial(calls.append, name) for name in "abc"}, 3, CPU)

    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_is_that_of_medians_with_the_spread_of_rounds() -> None:
    found = ratio([2.0, 9.0, 3.0], [4.0, 3.0, 2.0])

    assert (found.value, found.lowest, found.highest) == (1.0, 0.5, 3.0)


def test_a_part_does_not_contain_the_parts_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 4.0, 9.0, 16.0])
    monkeypatch.setattr("qzo.bench.parts.time.perf_counter", lambda: next(now))
    watch = Stopwatch(CPU)

    with watch.part("outer"):  # from 0 to 16
        with watch.part("inner"):  # from 1 to 3
            pass
        with watch.part("inner"):  # from 4 to 9
            pass

    assert watch.seconds == {"outer": 9.0, "inner": 7.0}


def test_parts_are_timed_from_outside_and_the_methods_come_back(base: Path, tmp_path: Path) -> None:
    originals = (GPTQWeight.decode, GPTQWeight.apply_scales, QuantLinear.forward, Scales.effective)
    examples = random_examples([8, 8], VOCABULARY)
    model = load(base)
    want = QZOStep(model, examples, tmp_path / "plain").step()
    watch = Stopwatch(CPU)

    qzo_step = QZOStep(model, examples, tmp_path / "timed")
    with timed(quant_linears(model), watch), watch.part("other"):
        losses = qzo_step.step(watch.part)

    assert losses == want
    assert set(watch.seconds) == set(PARTS)
    assert all(seconds > 0 for seconds in watch.seconds.values())
    now = (GPTQWeight.decode, GPTQWeight.apply_scales, QuantLinear.forward, Scales.effective)
    assert now == originals


def check_ratios(entry: dict[str, Any], names: set[str]) -> None:
    assert set(entry["spread"]) == names
    for name in names:
        lowest, highest = entry["spread"][name]
        assert 0 < lowest <= highest < math.inf
        assert 0 < entry[name] < math.inf


@pytest.mark.slow
def test_bench_step_prints_every_ratio(qzo: Run, parent: Path) -> None:
    sizes = ("--shape", "tiny", "--tokens", "8,32", "--row-tokens", "16", "--repeats", "1")
    ran = qzo("bench", "step", *sizes, "--dir", parent, "--json")

    assert ran.code == 0, ran.err
    result = ran.value
    assert list(result["tokens"]) == ["8", "32"]
    assert [entry["rows"] for entry in result["tokens"].values()] == [1, 2]
    for entry in result["tokens"].values():
        check_ratios(entry, {"vs_dense", "vs_mezo", "vs_bitsandbytes", "vs_separate"})
        assert set(entry["parts"]) == set(PARTS)
        assert set(entry["seconds"]) == {
            *("qzo", "dense", "mezo", "bitsandbytes", "stacked", "separate")
        }
    check_ratios(result["mixed_vs_equal"], {"ratio"})
    assert result["mixed_vs_equal"]["tokens"] == {"mixed": 544, "equal": 544}
    assert result["versions"]["torch"] == torch.__version__
    assert result["hardware"]["threads"] == torch.get_num_threads()


@pytest.mark.slow
def test_bench_step_prints_tables(qzo: Run, base: Path) -> None:
    ran = qzo("bench", "step", "--model", base, "--tokens", "8", "--repeats", "1")

    assert ran.code == 0, ran.err
    assert "vs dense" in ran.out
    assert "dequantize" in ran.out
    assert "rows of mixed length / equal rows" in ran.out


KERNELS = ("bench", "kernels", "--device", "cpu", "--dtype", "float32", "--repeats", "1")


def test_bench_kernels_computes_every_contender_right(qzo: Run) -> None:
    ours = "probes,plain,scales,nf4,bitsandbytes"
    sizes = ("--shapes", "96x128", "--tokens", "7,64", "--group-size", "64", "--probes", "3")
    ran = qzo(*KERNELS, *sizes, "--contenders", ours, "--json")

    assert ran.code == 0, ran.err
    assert list(ran.value["shapes"]) == ["96x128"]
    for entries in ran.value["shapes"]["96x128"].values():
        assert list(entries) == ["dense", *ours.split(",")]
        for name, entry in entries.items():
            assert entry.get("failed") is None
            assert entry["vs_dense"] == entries["dense"]["seconds"] / entry["seconds"]
            assert entry["lowest"] <= entry["seconds"] <= entry["highest"]
            # float32 sums in another order; bitsandbytes quantizes to 4 bits anew
            assert entry["error"] < (0.2 if name == "bitsandbytes" else 1e-5)


def test_bench_kernels_shows_why_a_contender_cannot_run(qzo: Run) -> None:
    sizes = ("--shapes", "96x128", "--tokens", "16", "--group-size", "64")
    ran = qzo(*KERNELS, *sizes, "--contenders", "plain,humming")

    assert ran.code == 0, ran.err
    assert "plain" in ran.out
    assert "humming: humming is not installed" in ran.out


@pytest.mark.parametrize("text", ["", "96", "96x128x4"])
def test_shapes_of_layers_are_two_numbers_each(qzo: Run, text: str) -> None:
    ran = qzo(*KERNELS, "--shapes", text)

    want = f"qzo: --shapes: expected outputs x inputs, such as 4096x4096, got {text!r}\n"
    assert (ran.code, ran.err) == (1, want)


def test_unknown_contenders_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^against: expected some of dense, .*, got 'sgd'$"):
        StepSettings(against=("sgd",))


def test_only_cuda_memory_is_capped(base: Path) -> None:
    message = r"^--memory-cap cannot be combined with --device cpu: .*; use --memory-limit$"
    with pytest.raises(ConfigError, match=message):
        run_apart(RunSettings(str(base), memory_cap="24GiB"))


@pytest.mark.parametrize("text", ["", "8,", "a", "0", "8,-1"])
def test_bad_lists_of_numbers_are_refused(qzo: Run, text: str) -> None:
    ran = qzo("bench", "step", "--tokens", text)

    want = f"qzo: --tokens: expected numbers above 0, such as 32,128, got {text!r}\n"
    assert (ran.code, ran.err) == (1, want)


def test_repeats_are_at_least_one() -> None:
    with pytest.raises(ConfigError, match=r"^repeats: expected a number above 0, got 0$"):
        StepSettings(repeats=0)


def test_a_watched_process_shows_its_anonymous_memory() -> None:
    size = 300 * 2**20
    hold = f"b = b'x' * {size}; import time; time.sleep(0.1)"

    peaks = run_watched(["timeit", "-n1", "-r1", hold])

    overhead = 40 * 2**20  # of the interpreter
    assert size < peaks.anonymous < size + overhead
    assert size < peaks.resident < size + overhead
    assert 0 < peaks.file_backed < overhead


def test_a_watched_process_that_fails_says_why() -> None:
    with pytest.raises(QZOError, match=r"^measured run: expected it to finish, got: .*no_module"):
        run_watched(["no_module"])


@pytest.mark.slow
def test_a_run_apart_has_the_losses_of_one_in_this_process(base: Path) -> None:
    settings = RunSettings(str(base), batch_size=2, seq_len=8, steps=2)

    apart = run_apart(settings)

    here = training_run.train(settings)
    assert [[loss.hex() for loss in step] for step in apart.losses] == here["losses"]
    assert [len(step) for step in apart.losses] == [4, 4]
    assert len(apart.step_seconds) == 2
    assert apart.first_layer_seconds > max(apart.step_seconds)  # it imported torch before
    assert apart.peaks.resident >= apart.peaks.anonymous > 2**20


def test_directions_for_the_whole_batch_are_as_many_as_asked_for(base: Path) -> None:
    settings = RunSettings(str(base), batch_size=2, seq_len=8, num_directions=3)

    found = training_run.train(settings)

    assert [len(step) for step in found["losses"]] == [6]
    assert settings.num_probes == 6


def fake_run(settings: RunSettings) -> RunResult:
    """A run that cost what is easy to recognise."""
    assert settings.seq_len
    return RunResult(Peaks(3 * 2**30, 2**30, 2**31), 5.0, (0.5, 1.5, 1.0), ((1 / 3, 0.5),) * 3)


def test_bench_memory_compares_a_run_with_the_plan(
    qzo: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "run_apart", fake_run)

    ran = qzo("bench", "memory", "--model", base, "--seq-len", "8", "--batch-size", "2", "--json")

    assert ran.code == 0, ran.err
    result = ran.value
    predicted = qzo("plan", base, "--batch-size", "2", "--seq-len", "8", "--json").value
    assert result["predicted"] == pytest.approx(predicted["peak_bytes"], rel=1e-3)  # 4 answers
    assert result["resident_vs_predicted"] == 3 * 2**30 / result["predicted"]
    assert result["peak_anonymous"] == 2**30
    assert result["step_vs_products"] == 1.0 / result["products_seconds"]
    assert [[float.fromhex(x) for x in step] for step in result["losses_hex"]] == [[1 / 3, 0.5]] * 3


def test_bench_memory_prints_a_table(qzo: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "run_apart", fake_run)

    ran = qzo("bench", "memory", "--model", base, "--seq-len", "8")

    assert ran.code == 0, ran.err
    assert "3.000 GiB" in ran.out
    assert "losses 0.3333333333333333, 0.5" in ran.out


def test_a_plan_of_a_device_is_compared_with_the_memory_of_the_device(
    qzo: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_device(settings: RunSettings) -> RunResult:
        return replace(fake_run(settings), device_peak=2**30, device_reserved=2**31)

    monkeypatch.setattr(memory, "run_apart", on_device)
    arguments = ("bench", "memory", "--model", base, "--seq-len", "8")

    result, shown = qzo(*arguments, "--json").value, qzo(*arguments).out

    assert (result["device_peak"], result["device_reserved"]) == (2**30, 2**31)
    assert result["device_vs_predicted"] == 2**30 / result["predicted"]
    assert "resident_vs_predicted" not in result
    assert "device / predicted" in shown
    assert "resident / predicted" not in shown


def test_products_are_counted_for_every_layer_but_the_head(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int, int]] = []

    def product(out_features: int, in_features: int, num_tokens: int, _: torch.device) -> float:
        calls.append((out_features, in_features, num_tokens))
        return float(out_features * in_features)

    monkeypatch.setattr(memory, "_product_seconds", product)

    total = memory.products_seconds(RunSettings(str(base)), 32)

    per_block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64
    assert total == 2 * per_block
    assert sorted(calls) == [(32, 64, 32), (64, 64, 32), (64, 128, 32), (128, 64, 32)]


def test_the_plan_is_asked_for_the_same_workload(base: Path) -> None:
    settings = RunSettings(str(base), batch_size=3, seq_len=16, answer_len=7, num_directions=2)

    workload = memory.predict(settings).workload

    assert (workload.batch_size, workload.seq_len, workload.num_probes) == (3, 16, 4)
    assert (workload.dtype, workload.answer_len) == ("float32", 7)


def test_more_scored_predictions_than_tokens_are_refused(base: Path, tmp_path: Path) -> None:
    message = r"^--answer-len: expected at most --seq-len, 16, got 17$"
    with pytest.raises(ConfigError, match=message):
        RunSettings(str(base), seq_len=16, answer_len=17).recipe(tmp_path)


def test_a_fitted_line_has_the_slope_and_r_squared_of_numpy() -> None:
    x, y = [1, 2, 4, 7], [2.0, 1.0, 6.0, 5.0]

    found = fit_line(x, y)

    assert [found.slope, found.intercept] == pytest.approx(np.polyfit(x, y, 1).tolist())
    assert found.r_squared == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


def test_a_line_needs_two_values() -> None:
    with pytest.raises(ConfigError, match=r"^series: expected two or more .*, got \[2, 2\]$"):
        fit_line([2, 2], [1.0, 2.0])


def linear_cost(workload: Workload) -> Cost:
    seconds = 0.1 + 0.02 * workload.layers + 0.001 * workload.tokens + 0.5 * workload.probes
    return Cost(seconds, 1000 + 7 * workload.layers, 500 + 3 * workload.tokens)


def test_scaling_finds_the_slopes_and_measures_the_base_once() -> None:
    measured: list[Workload] = []

    def measure(workload: Workload) -> Cost:
        measured.append(workload)
        return linear_cost(workload)

    result = bench_scaling(measure)

    fits = {name: series["fit"] for name, series in result["series"].items()}
    slopes = [fits[name]["seconds_per_step"]["slope"] for name in ("layers", "tokens", "probes")]
    assert slopes == pytest.approx([0.02, 0.001, 0.5])
    assert fits["layers"]["peak_resident"]["slope"] == pytest.approx(7)
    assert fits["tokens"]["peak_anonymous"]["slope"] == pytest.approx(3)
    assert [line["r_squared"] for line in fits["probes"].values()] == pytest.approx([1.0] * 3)
    assert measured.count(Workload()) == 1
    assert len(measured) == 10


@pytest.mark.parametrize(
    ("name", "value", "unit"), [("layers", 0, 1), ("tokens", 100, 64), ("probes", 3, 2)]
)
def test_a_workload_that_cannot_be_run_is_refused(name: str, value: int, unit: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"^{name}: expected a positive multiple of {unit}, got {value}$"
    ):
        replace(Workload(), **{name: value})


@pytest.mark.slow
def test_bench_scaling_measures_runs_and_draws_them(
    qzo: Run, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[RunSettings] = []

    def run(settings: RunSettings) -> RunResult:
        asked.append(settings)
        return fake_run(settings)

    monkeypatch.setattr(scaling, "run_apart", run)
    sizes = ("--layers", "1,2", "--tokens", "64,256", "--probes", "2,4", "--dir", parent)

    ran = qzo("bench", "scaling", *sizes, "--out", tmp_path / "s.png", "--json")

    assert ran.code == 0, ran.err
    assert list(ran.value["series"]) == ["layers", "tokens", "probes"]
    assert ran.value["series"]["tokens"]["seconds_per_step"] == [1.0, 1.0]
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    found = [(Path(s.checkpoint).name, s.batch_size, s.num_directions) for s in asked]
    eight = "small-8-layers-gptq-g128-seed0"
    assert found == [
        ("small-1-layers-gptq-g128-seed0", 4, 1),
        ("small-2-layers-gptq-g128-seed0", 4, 1),
        (eight, 1, 1),
        (eight, 4, 1),
        (eight, 4, 2),
    ]


@pytest.mark.slow
def test_bench_replay_times_both_forms_of_a_journal(qzo: Run) -> None:
    ran = qzo("bench", "replay", "--steps", "250", "--values", "2000", "--json")

    assert ran.code == 0, ran.err
    assert (ran.value["steps"], ran.value["values"]) == (250, 2000)
    assert set(ran.value["seconds"]) == {"writing", "jsonl", "compact"}
    size = ran.value["bytes"]
    assert 0 < size["compact"] < size["jsonl"] < 250 * 150 + 20_000
    assert size["compact"] < 250 * 16 + 3 * 40 + 20_000


def test_bench_replay_prints_a_table(qzo: Run) -> None:
    ran = qzo("bench", "replay", "--steps", "3", "--values", "1000")

    assert ran.code == 0, ran.err
    assert "compact" in ran.out
