"""The commands under ``qzo bench``."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qzo.console.terminal import AsJSON, console, stderr_console, stdout_for
from qzo.errors import ConfigError

app = typer.Typer(
    name="bench",
    help="Measure time and memory on this computer, against what you would run instead.",
    no_args_is_help=True,
)

_GIB = 2**30
_SILENT_SECONDS = 10

Folder = Annotated[
    Path | None,
    typer.Option("--dir", help="Synthetic checkpoints are kept here; the user's cache if missing."),
]
Coordinates = Annotated[str, typer.Option(help="row, relative or absolute.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Format = Annotated[str, typer.Option(help="Of a synthetic checkpoint: gptq or nf4.")]
GroupSize = Annotated[
    int | None, typer.Option(help="Of a synthetic checkpoint; 128 where it fits, else 64.")
]


@app.command()
def step(
    model: Annotated[
        str | None, typer.Option(help="A 4-bit checkpoint; random codes if missing.")
    ] = None,
    shape: Annotated[str, typer.Option(help="Of the random codes.")] = "smollm2-135m",
    tokens: Annotated[str, typer.Option(help="Batch tokens at one probe.")] = "32,128,512,2048",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs everything once.")] = 7,
    row_tokens: Annotated[int, typer.Option(help="Tokens of a row, at most.")] = 128,
    coordinates: Coordinates = "row",
    dtype: Annotated[str, typer.Option(help="Of activations and dense weights.")] = "float32",
    device: Device = "cpu",
    format: Format = "gptq",
    group_size: GroupSize = None,
    against: Annotated[
        str, typer.Option(help="Some of dense, mezo, bitsandbytes and qlora (needs peft).")
    ] = "dense,mezo,bitsandbytes",
    folder: Folder = None,
    as_json: AsJSON = False,
) -> None:
    """Time a step against dense weights, MeZO, bitsandbytes and QLoRA.

    A step is one of `qzo train`: both probes, the journal, the update. Beside it, on the same
    tokens and the same loss: two forwards with dense weights; a MeZO step, which perturbs all dense
    weights in place; two forwards through bitsandbytes' Linear4bit; a QLoRA step with gradient
    checkpointing. On CUDA the peak memory of each is shown, too. Batches are rows of up to
    --row-tokens random tokens of which the last 4 are the answer; the head sees only that, in all
    of them. Ratios are those of medians; in brackets the smallest and largest of one round.
    """
    from qzo.bench.step import StepSettings, bench_step

    settings = StepSettings(
        tokens=_numbers("--tokens", tokens),
        repeats=repeats,
        row_tokens=row_tokens,
        coordinates=coordinates,
        device=device,
        dtype=dtype,
        against=_names(against),
    )
    with stdout_for(as_json) as print_json, _progress() as progress:
        checkpoint = model or _synthetic(shape, format, group_size, folder, progress)
        result = bench_step(checkpoint, settings, progress)
        if as_json:
            print_json(result)
            return
    _show_step(result)


@app.command()
def kernels(
    shapes: Annotated[
        str, typer.Option(help="Outputs x inputs of each layer.")
    ] = "4096x4096,13824x5120",
    tokens: Annotated[
        str, typer.Option(help="Tokens of all probes together.")
    ] = "16,32,64,128,256,512,1024,2048,4096,8192",
    contenders: Annotated[
        str | None, typer.Option(help="Some of those in the first column; all if missing.")
    ] = None,
    probes: Annotated[int, typer.Option(min=1, help="Probes that share the tokens.")] = 2,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 10,
    dtype: Annotated[str, typer.Option(help="Of inputs and dense weights.")] = "float16",
    device: Device = "cuda",
    as_json: AsJSON = False,
) -> None:
    """Time one 4-bit layer against a dense product over as many tokens.

    Rows: `probes` is the layer as a training step computes it, with the tokens of all probes and a
    multiplier for each probe and output; `plain` the same without multipliers, `scales` with scales
    of its own for each probe; `fused` and `tiles` are the two kernels behind it; `nf4` an NF4
    layer. bitsandbytes, humming and gemlite are other libraries, where installed. Numbers are the
    dense product's time over the contender's: above 1 is faster than dense.
    """
    from qzo.bench.kernels import KernelSettings, bench_kernels

    settings = KernelSettings(
        shapes=_shapes(shapes),
        tokens=_numbers("--tokens", tokens),
        contenders=None if contenders is None else _names(contenders),
        probes=probes,
        group_size=group_size,
        repeats=repeats,
        dtype=dtype,
        device=device,
    )
    with stdout_for(as_json) as print_json, _progress() as progress:
        result = bench_kernels(settings, progress)
        if as_json:
            print_json(result)
            return
    _show_kernels(result)


@app.command()
def memory(
    shape: Annotated[str, typer.Option(help="Random codes of this shape.")] = "llama-2-13b",
    model: Annotated[str | None, typer.Option(help="A 4-bit checkpoint instead.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of a step.")] = 1,
    seq_len: Annotated[int, typer.Option(min=4, help="Tokens of an example.")] = 128,
    answer_len: Annotated[int, typer.Option(min=1, help="Those of its answer.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the run.")] = 1,
    first_order_blocks: Annotated[int, typer.Option(min=0, help="As in a recipe.")] = 0,
    memory_limit: Annotated[str | None, typer.Option(help="As in a recipe: 2.5GiB.")] = None,
    memory_cap: Annotated[
        str | None, typer.Option(help="Of a CUDA device, to stand in for a smaller one: 24GiB.")
    ] = None,
    coordinates: Coordinates = "row",
    dtype: Annotated[str | None, typer.Option(help="As in a recipe.")] = None,
    device: Device = "cpu",
    format: Format = "gptq",
    group_size: GroupSize = None,
    folder: Folder = None,
    as_json: AsJSON = False,
) -> None:
    """Train in a fresh process; show its memory and time against the plan.

    The run is one of `qzo train`, on random tokens: journal, snapshots and adapter included. Peak
    resident is what the kernel kept (VmHWM) and counts pages of the mapped checkpoint; peak
    anonymous is sampled every 5 ms and does not. On CUDA device peak is what torch had allocated
    there at most, and what is compared with the plan. Products alone: the same matrix products with
    dense operands in memory, float32 on a CPU and float16 on CUDA. Losses are shown bit for bit, to
    compare two runs.
    """
    from qzo.bench.memory import bench_memory
    from qzo.bench.training_run import RunSettings

    with stdout_for(as_json) as print_json, _progress() as progress:
        checkpoint = model or _synthetic(shape, format, group_size, folder, progress)
        settings = RunSettings(
            checkpoint,
            batch_size=batch_size,
            seq_len=seq_len,
            answer_len=answer_len,
            steps=steps,
            coordinates=coordinates,
            first_order_blocks=first_order_blocks,
            memory_limit=memory_limit,
            dtype=dtype,
            device=device,
            memory_cap=memory_cap,
        )
        progress("training")
        result = bench_memory(settings)
        if as_json:
            print_json(result)
            return
    _show_memory(result)


@app.command()
def scaling(
    out: Annotated[Path, typer.Option(help="The plot.")] = Path("scaling.png"),
    layers: Annotated[str, typer.Option(help="Decoder blocks.")] = "4,8,16,32",
    tokens: Annotated[str, typer.Option(help="Batch tokens at one probe.")] = "128,256,512,1024",
    probes: Annotated[str, typer.Option(help="Probes of a step.")] = "2,4,8,16",
    steps: Annotated[int, typer.Option(min=1, help="Steps of a run; the median counts.")] = 5,
    folder: Folder = None,
    as_json: AsJSON = False,
) -> None:
    """Show how time and memory of a step grow with layers, tokens and probes.

    One is varied at a time, around 8 layers of width 512, 256 tokens in rows of 64, and 2 probes;
    every point is a training run in a fresh process. A line is fitted through each series.
    """
    from qzo.bench.scaling import bench_scaling, measure_apart, plot_scaling

    series = {
        "layers": _numbers("--layers", layers),
        "tokens": _numbers("--tokens", tokens),
        "probes": _numbers("--probes", probes),
    }
    with stdout_for(as_json) as print_json, _progress() as progress:
        result = bench_scaling(measure_apart(folder, steps), series, progress)
        plot_scaling(result, out)
        if as_json:
            print_json({**result, "plot": str(out)})
            return
    _show_scaling(result)
    console().print(f"plot: {out}")


@app.command()
def replay(
    steps: Annotated[int, typer.Option(min=1, help="Steps of one direction.")] = 20_000,
    values: Annotated[int, typer.Option(min=1, help="Trained values.")] = 1_000_000,
    as_json: AsJSON = False,
) -> None:
    """Write a long journal and replay it in both of its forms."""
    from qzo.bench.replay import bench_replay

    with stdout_for(as_json) as print_json, _progress() as progress:
        result = bench_replay(steps, values, progress)
        if as_json:
            print_json(result)
            return
    table = Table("form", "bytes", "seconds")
    for form, count in result["bytes"].items():
        table.add_row(form, f"{count:,}", f"{result['seconds'][form]:.1f}")
    terminal = console()
    terminal.print(f"{steps} steps, {values} values, {_machine(result)}")
    terminal.print(table)


@app.command()
def converge(
    suite: Annotated[Path, typer.Argument(help="A YAML file; see recipes/converge.")],
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Of the results; runs/converge/SUITE if missing.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Of every task, in place of its own.")] = None,
    data: Annotated[
        str | None, typer.Option(help="The same for data: a folder with a split to evaluate on.")
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Compare methods on tasks over several seeds, at an equal number of forwards.

    Each method is tuned on the same number of grid points, on other seeds and other examples than
    those reported. Called again, it goes on where it was stopped; finished runs are not repeated.
    Written are results.json, results.md, a plot of every task, index.html, and every run's folder.
    """
    from qzo.bench.converge.converge import converge as run
    from qzo.bench.converge.report import write_report
    from qzo.bench.converge.suite import read_suite

    place = folder or Path("runs") / "converge" / suite.stem
    with stdout_for(as_json) as print_json, _spoken(is_silent=as_json) as say:
        results = run(read_suite(suite, model=model, data=data), place, say)
        markdown = write_report(results, place)
        if as_json:
            print_json(results)
            return
    console().print(markdown, soft_wrap=True)
    console().print(f"written: {place / 'index.html'}", soft_wrap=True)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    """Read ``32,128,512``.

    Raises:
        ConfigError: It is no list of positive numbers.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"{flag}: expected numbers above 0, such as 32,128, got {text!r}")
    return tuple(map(int, parts))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    """Read ``4096x4096,13824x5120``.

    Raises:
        ConfigError: It is no list of two sizes each.
    """
    shapes = [tuple(_numbers("--shapes", each.replace("x", ","))) for each in _names(text)]
    if not shapes or any(len(shape) != 2 for shape in shapes):
        raise ConfigError(f"--shapes: expected outputs x inputs, such as 4096x4096, got {text!r}")
    return tuple((shape[0], shape[1]) for shape in shapes)


def _synthetic(
    shape: str,
    format_name: str,
    group_size: int | None,
    folder: Path | None,
    progress: Callable[[str], None],
) -> str:
    from qzo.bench.synthetic import Synthetic, synthetic_checkpoint

    what = Synthetic(shape, format_name, group_size)
    progress(f"checkpoint {what.name}")
    return str(synthetic_checkpoint(what, folder))


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    terminal = stderr_console()
    with terminal.status("starting") as status:
        yield status.update


@contextmanager
def _spoken(*, is_silent: bool) -> Iterator[Callable[[str], None]]:
    """Give a function that shows a line; without a terminal, at most one in ten seconds."""
    terminal = stderr_console()
    spoken_at = -math.inf

    def say(text: str) -> None:
        nonlocal spoken_at
        if not is_silent and time.monotonic() - spoken_at > _SILENT_SECONDS:
            terminal.print(text, soft_wrap=True)
            spoken_at = time.monotonic()

    if is_silent or not terminal.is_terminal:
        yield say
        return
    with terminal.status("starting") as status:
        yield status.update


def _show_step(result: dict[str, Any]) -> None:
    entries = result["tokens"]
    references = (*result["settings"]["against"], "separate")
    ratios = Table("tokens", *(f"vs {name}" for name in references), "seconds")
    parts = Table("tokens", *next(iter(entries.values()))["parts"])
    for count, entry in entries.items():
        shown = [
            _ratio(entry, f"vs_{name}") if f"vs_{name}" in entry else "does not run"
            for name in references
        ]
        ratios.add_row(count, *shown, f"{entry['seconds']['qzo']:.3f}")
        parts.add_row(count, *(f"{seconds:.4f}" for seconds in entry["parts"].values()))
    terminal = console()
    terminal.print(f"{result['checkpoint']}, {_machine(result)}")
    terminal.print(ratios)
    for count, entry in entries.items():
        for name, reason in entry["failed"].items():
            terminal.print(f"{name} at {count} tokens: {reason}", soft_wrap=True)
        if entry["peak_bytes"]:
            sizes = (f"{name} {size / _GIB:.2f}" for name, size in entry["peak_bytes"].items())
            terminal.print(f"peak GiB at {count} tokens: {', '.join(sizes)}", soft_wrap=True)
    terminal.print("seconds of a step by part")
    terminal.print(parts)
    mixed = result["mixed_vs_equal"]
    terminal.print(f"rows of mixed length / equal rows: {_ratio(mixed, 'ratio')}")


def _ratio(entry: dict[str, Any], name: str) -> str:
    lowest, highest = entry["spread"][name]
    return f"{entry[name]:.2f} ({lowest:.2f} to {highest:.2f})"


def _show_kernels(result: dict[str, Any]) -> None:
    terminal = console()
    terminal.print(f"{_machine(result)}, {result['settings']['dtype']}")
    for shape, counts in result["shapes"].items():
        names = list(next(iter(counts.values())))
        table = Table(shape, *counts)
        for name in names:
            table.add_row(name, *(_vs_dense(entries[name]) for entries in counts.values()))
        terminal.print(table)
        for name in names:
            failed = {e[name]["failed"] for e in counts.values() if "failed" in e[name]}
            for reason in sorted(failed):
                terminal.print(f"{name}: {reason}", soft_wrap=True)


def _vs_dense(entry: dict[str, Any]) -> str:
    return f"{entry['vs_dense']:.2f}" if "vs_dense" in entry else "-"


def _show_memory(result: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    peaks = [f"peak_{kind}" for kind in ("resident", "anonymous", "file_backed")]
    sizes = [*peaks, "device_peak", "device_reserved", "predicted"]
    for name in (size for size in sizes if size in result):
        table.add_row(name.replace("_", " "), f"{result[name] / _GIB:.3f} GiB")
    for measured in ("resident", "device"):
        if f"{measured}_vs_predicted" in result:
            table.add_row(f"{measured} / predicted", f"{result[f'{measured}_vs_predicted']:.3f}")
    table.add_row("start to first layer", f"{result['first_layer_seconds']:.1f} s")
    for number, seconds in enumerate(result["step_seconds"]):
        losses = ", ".join(f"{loss!r}" for loss in result["losses"][number])
        table.add_row(f"step {number}", f"{seconds:.2f} s; losses {losses}")
    table.add_row("products alone", f"{result['products_seconds']:.2f} s")
    table.add_row("step / products", f"{result['step_vs_products']:.2f}")
    terminal = console()
    terminal.print(f"{result['settings']['checkpoint']}, {_machine(result)}")
    terminal.print(table)


def _show_scaling(result: dict[str, Any]) -> None:
    table = Table("", "x", "seconds a step", "resident MiB", "anonymous MiB")
    fits = Table("", "of", "each more", "at 0", "R²")
    for name, series in result["series"].items():
        for place, x in enumerate(series["x"]):
            sizes = (series[key][place] / 2**20 for key in ("peak_resident", "peak_anonymous"))
            seconds = f"{series['seconds_per_step'][place]:.3f}"
            table.add_row(name, str(x), seconds, *(f"{size:.1f}" for size in sizes))
        for quantity, fit in series["fit"].items():
            numbers = (f"{fit[key]:.4g}" for key in ("slope", "intercept", "r_squared"))
            fits.add_row(name, quantity.replace("_", " "), *numbers)
    terminal = console()
    terminal.print(_machine(result))
    terminal.print(table)
    terminal.print("fitted lines, in seconds and bytes")
    terminal.print(fits)


def _machine(result: dict[str, Any]) -> str:
    hardware, versions = result["hardware"], result["versions"]
    where = hardware.get("gpu") or f"{hardware['processor']}, {hardware['threads']} threads"
    return f"{where}, torch {versions['torch']}, qzo {versions['qzo']}"
