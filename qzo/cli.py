"""The command line. Every command takes ``--json`` and exits 0, 1 (one clear line) or 2 (usage)."""

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from quantizers.errors import FormatError
from qzo.bench.commands import app as bench
from qzo.console.terminal import (
    AsJSON,
    Device,
    Dtype,
    MemoryLimit,
    console,
    progress_bar,
    show,
    show_plan,
    show_training,
    stderr_console,
    stdout_for,
)
from qzo.errors import ConfigError, QZOError
from qzo.run.hardware_errors import hardware_errors

if TYPE_CHECKING:
    from qzo.checkpoint.checkpoint import Checkpoint

app = typer.Typer(
    name="qzo",
    help="Fine-tune 4-bit language models with forward passes only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(bench)

Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a repository on the hub.")
]

_stderr = stderr_console()
_TASKS = "sst2, rte, boolq, copa, squad, trec or e2e."
_STREAM = "or set --memory-limit, so that the model streams"
_CHAT_HINT = (
    "hint: the tokenizer has a chat template; --chat asks the model as a user would, --no-chat "
    "continues plain text without this hint"
)
_TYPER_INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt, without a word


def main() -> None:
    """Run a command; errors that a user can cause become one line.

    Raises:
        SystemExit: With the exit status.
    """
    _quiet_libraries()
    try:
        app()
    except (QZOError, FormatError) as error:
        _fail(" ".join(str(error).split()))
    except SystemExit as stop:
        if stop.code != _TYPER_INTERRUPTED:
            raise
        _fail("interrupted; the journal holds every finished step")
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror or error}")


def _fail(message: str) -> None:
    sys.stderr.write(f"qzo: {message}\n")
    raise SystemExit(1)


def _quiet_libraries() -> None:
    """Keep libraries from writing between our lines; a download shows its bar on a terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "--json" in sys.argv or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A folder, a hub id or a .gguf file.")],
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint.")],
    format: Annotated[str, typer.Option(help="gptq, nf4 or fp4.")] = "gptq",
    bits: Annotated[int, typer.Option(help="GPTQ: 2, 3, 4 or 8.")] = 4,
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale, -1 for all; fitting if missing.")
    ] = None,
    method: Annotated[str, typer.Option(help="gptq, or rtn for plain rounding.")] = "gptq",
    sym: Annotated[bool, typer.Option("--sym/--asym", help="GPTQ zero points.")] = True,
    act_order: Annotated[bool, typer.Option(help="GPTQ: columns by activation size.")] = False,
    double_quant: Annotated[bool, typer.Option(help="NF4: quantize absmax too.")] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="Text (.txt, .jsonl); the model's own samples if missing.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Calibration samples.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sample.")] = 256,
    damp_percent: Annotated[float, typer.Option(help="GPTQ: added to the Hessian.")] = 0.01,
    device: Annotated[str, typer.Option(help="Where blocks are computed: cpu or cuda.")] = "cpu",
    revision: Revision = None,
    as_json: AsJSON = False,
) -> None:
    """Write a standard 4-bit checkpoint of a float model."""
    from qzo.model.placement import device_of
    from qzo.quantize.quantize import quantize as run
    from qzo.quantize.settings import QuantizeSettings

    settings = QuantizeSettings(
        format=format,
        bits=bits,
        group_size=group_size,
        method=method,
        is_symmetric=sym,
        act_order=act_order,
        double_quant=double_quant,
        num_samples=num_samples,
        seq_len=seq_len,
        damp_percent=damp_percent,
        device=str(device_of(device)),
    )
    short = hardware_errors(_lower("--num-samples", num_samples, "--seq-len", seq_len))
    with stdout_for(as_json) as print_json, progress_bar("quantizing") as progress, short:
        summary = run(
            model, out, settings, calibration=calibration, progress=progress, revision=revision
        )
        show(summary, as_json, print_json)


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A folder or a hub id.")],
    revision: Revision = None,
    as_json: AsJSON = False,
) -> None:
    """Show format, bits, groups and sizes of a checkpoint; refuse what cannot be read."""
    from qzo.checkpoint.inspect import inspect as run

    with stdout_for(as_json) as print_json:
        show(asdict(run(checkpoint, revision)), as_json, print_json)


@app.command()
def plan(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint folder, a config.json or a hub id.")
    ],
    batch_size: Annotated[int, typer.Option(help="Examples of a step.")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens of an example.")] = 512,
    answer_len: Annotated[
        int | None,
        typer.Option(
            help="Those of its answer, 16 if missing; where whole texts are learned, all."
        ),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="What is there: 24GiB, 8GB.")] = None,
    format: Annotated[
        str | None, typer.Option(help="Of a float model, as it is to be: gptq, nf4 or fp4.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Likewise; 4 if missing.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Likewise; as quantize chooses.")] = None,
    coordinates: Annotated[
        str, typer.Option(help="row, column, rank_one, relative or absolute.")
    ] = "row",
    num_probes: Annotated[
        int, typer.Option(help="Evaluations of an example: 8 in preset default, 2 in paper.")
    ] = 8,
    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of a generated answer, for a reward (default: 0).")
    ] = 0,
    generation_batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Answers generated together (default: what --memory holds)."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; it need not be there.")] = "cpu",
    dtype: Dtype = None,
    first_order_blocks: Annotated[
        int, typer.Option(help="Last blocks with exact gradients, as zo.first_order_blocks.")
    ] = 0,
    modules: Annotated[
        list[str] | None, typer.Option(help="A name in zo.modules; may be repeated.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="As zo.optimizer.")] = "sgd",
    revision: Revision = None,
    as_json: AsJSON = False,
) -> None:
    """Tell what a training step needs, part by part; needs no weights and no device."""
    from qzo.checkpoint.checkpoint import config_path
    from qzo.model.memory import parse_memory
    from qzo.plan.planner import plan as run
    from qzo.plan.sizes import assumed_quantization

    chosen = (format or "gptq", bits, group_size)
    is_assumed = format is not None or bits is not None or group_size is not None
    with stdout_for(as_json) as print_json:
        result = run(
            config_path(checkpoint, revision),
            assumed=assumed_quantization(*chosen) if is_assumed else None,
            batch_size=batch_size,
            seq_len=seq_len,
            answer_len=answer_len,
            memory_bytes=None if memory is None else parse_memory(memory),
            coordinates=coordinates,
            evaluations=num_probes,
            dtype=dtype,
            device=device,
            first_order_blocks=first_order_blocks,
            modules=modules or None,
            optimizer=optimizer,
            max_new_tokens=max_new_tokens,
            generation_batch_size=generation_batch_size,
        )
        if as_json:
            print_json(result.to_dict())
            return
    show_plan(result, memory)


@app.command()
def doctor(as_json: AsJSON = False) -> None:
    """Check versions, devices, kernels and known traps of the installed packages."""
    from qzo.console.doctor import doctor as run

    with stdout_for(as_json) as print_json:
        report = run()
        if as_json:
            print_json(report.to_dict())
        else:
            table = Table("check", "status", "found", "what to do")
            for check in report.checks:
                table.add_row(check.name, check.status, check.detail, check.advice)
            console().print(table)
    if report.status == "fail":
        sys.exit(1)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value; zo.epsilon=0.01 for the zo block.")
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Train the scales of a checkpoint into output_dir."""
    from qzo.run.recipe.read import read_recipe

    config = read_recipe(recipe, overrides or [])
    from qzo.console.progress import ProgressCallback, loading_progress
    from qzo.run.launch import train as run

    with stdout_for(as_json) as print_json:
        is_first = os.environ.get("RANK", "0") == "0"
        loading = loading_progress(_stderr, is_silent=as_json or not is_first)
        with ProgressCallback(_stderr) as progress, loading as show_loading:
            result = run(config, [progress], show_loading)
        if result is None:  # not the first process of the run
            return
        if as_json:
            print_json(result.to_dict())
            return
    show_training(config, result)


@app.command("eval")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A folder or a hub id.")],
    adapter: Annotated[str | None, typer.Option(help="A run folder.")] = None,
    task: Annotated[str | None, typer.Option(help=_TASKS)] = None,
    prompt: Annotated[str, typer.Option(help="template, or none of its words.")] = "template",
    data: Annotated[str | None, typer.Option(help="A file, a folder or a hub id.")] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of the text; as in the recipe of the run if missing.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of the label, or none; likewise.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Prompt with columns in braces; likewise.")
    ] = None,
    label_words: Annotated[
        str | None, typer.Option(help="Answers such as '{0: ham, 1: spam}'; likewise.")
    ] = None,
    num_examples: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of a forward.")] = 32,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an example at most.")] = 512,
    device: Device = None,
    dtype: Dtype = None,
    memory_limit: MemoryLimit = None,
    revision: Revision = None,
    as_json: AsJSON = False,
) -> None:
    """Evaluate a checkpoint on a task or on your own data."""
    keys = {
        **{"text_column": text_column, "label_column": label_column},
        **{"template": template, "label_words": label_words},
    }
    _check_evaluated(task, data, prompt, keys)
    from qzo.checkpoint.checkpoint import open_checkpoint
    from qzo.console.progress import loading_progress
    from qzo.data.examples import read_set
    from qzo.data.vocabulary import check_examples
    from qzo.model.generate import MAX_NEW_TOKENS, Generator
    from qzo.model.load import load_tokenizer, quant_linears
    from qzo.model.placement import placement
    from qzo.objective.evaluate import evaluate as run
    from qzo.plan.answer_memory import tokens_at_once
    from qzo.plan.batch_shape import evaluation_shape
    from qzo.run.inference import load_for_inference
    from qzo.run.output.adapter import open_adapter
    from qzo.run.recipe.read import read_labelling

    lower = _lower("--batch-size", batch_size, "--max-length", max_length)
    with stdout_for(as_json) as print_json, hardware_errors(f"{lower}; {_STREAM}"):
        place = placement(device, dtype, memory_limit)
        labelling = read_labelling(None if adapter is None else Path(adapter), keys)
        opened = open_checkpoint(checkpoint, revision)
        tuned = None if adapter is None else open_adapter(Path(adapter))
        tokenizer = load_tokenizer(opened.folder)
        with progress_bar("reading the data"):
            examples = read_set(
                task=task,
                data=data,
                split="validation",
                tokenizer=tokenizer,
                max_length=max_length,
                num_examples=num_examples,
                is_prompted=prompt == "template",
                labelling=labelling,
            )
        shape = evaluation_shape(examples, batch_size, MAX_NEW_TOKENS)
        if tuned is not None:
            _wait_for_digests(opened)
        with loading_progress(_stderr, is_silent=as_json) as loading:
            model = load_for_inference(opened, place, shape, adapter=tuned, progress=loading)
        check_examples(examples, model, tokenizer)
        live = quant_linears(model)[0].live
        generator = None
        if examples.is_generation:
            generator = Generator(
                model, tokenizer, live, max_length=max_length, max_tokens=tokens_at_once(model)
            )
        with progress_bar("evaluating") as progress:
            result = run(
                model,
                live,
                examples,
                batch_size=batch_size,
                progress=progress,
                generator=generator,
            )
        show(result.to_dict(), as_json, print_json)


@app.command()
def replay(
    run: Annotated[str, typer.Argument(help="A run folder, or a journal.")],
    to_step: Annotated[int | None, typer.Option(min=0, help="Stop before this step.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the adapter here.")] = None,
    base: Annotated[str | None, typer.Option(help="The base, if it was moved.")] = None,
    revision: Revision = None,
    as_json: AsJSON = False,
) -> None:
    """Rebuild the tuned scales from the journal, without the model."""
    from qzo.run.output.replay import replay as rebuild

    with stdout_for(as_json) as print_json:
        with progress_bar("rebuilding the scales"):
            found = rebuild(run, to_step=to_step, out=out, base=base, revision=revision)
        show(asdict(found), as_json, print_json)


@app.command()
def compact(
    run: Annotated[str, typer.Argument(help="A run folder, or a journal.")],
    out: Annotated[Path, typer.Option(help="New file, NAME.safetensors.")],
    as_json: AsJSON = False,
) -> None:
    """Write the compact form of a journal: all that replay and export need."""
    from qzo.run.journal.compact import open_record, write_compact

    _check_compact_name(out)
    with stdout_for(as_json) as print_json:
        record = open_record(Path(run))
        write_compact(record, out)
        summary = {"file": str(out), "steps": record.next_step, "bytes": out.stat().st_size}
        show(summary, as_json, print_json)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run folder, or a journal.")],
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint.")],
    base: Annotated[str | None, typer.Option(help="The base, if it was moved.")] = None,
    revision: Revision = None,
    verify: Annotated[
        bool, typer.Option(help="Load the result and compare its loss with the trained model's.")
    ] = True,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16 of the check (default: that of the run)."),
    ] = None,
    memory_limit: MemoryLimit = None,
    as_json: AsJSON = False,
) -> None:
    """Write the full checkpoint with the tuned scales, all else byte for byte."""
    from qzo.run.output.export import export as write

    with stdout_for(as_json) as print_json, hardware_errors("free some memory"):
        with progress_bar("reading the base") as progress:
            written = write(
                run,
                out,
                base=base,
                revision=revision,
                verify=verify,
                device=device,
                dtype=dtype,
                memory_limit=memory_limit,
                progress=progress,
            )
        show(asdict(written), as_json, print_json)


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Argument(help="A folder or a hub id.")],
    prompt: Annotated[
        str, typer.Option(help="Text to continue, or with --chat what the user says.")
    ],
    adapter: Annotated[str | None, typer.Option(help="A run folder.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Apply the chat template and stop at the end of the turn (default: no-chat).",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt, with --chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 50,
    device: Device = None,
    dtype: Dtype = None,
    memory_limit: MemoryLimit = None,
    revision: Revision = None,
    as_json: AsJSON = False,
) -> None:
    """Continue a text, or answer a user with --chat; greedily."""
    _check_system(system, is_chat=bool(chat))
    from qzo.checkpoint.checkpoint import open_checkpoint
    from qzo.console.progress import loading_progress
    from qzo.data.chat_prompt import chat_prompt, has_chat_template
    from qzo.data.tokenize import encode_prompt
    from qzo.model.generate import AUTO_STOP
    from qzo.model.generate import generate as run
    from qzo.model.load import load_tokenizer
    from qzo.model.placement import placement
    from qzo.plan.batch_shape import BatchShape
    from qzo.run.inference import load_for_inference
    from qzo.run.output.adapter import open_adapter

    lower = _lower("--max-new-tokens", max_new_tokens)
    with stdout_for(as_json) as print_json, hardware_errors(f"{lower}; {_STREAM}"):
        place = placement(device, dtype, memory_limit)
        opened = open_checkpoint(checkpoint, revision)
        tuned = None if adapter is None else open_adapter(Path(adapter))
        tokenizer = load_tokenizer(opened.folder)
        room = int(opened.config.get("max_position_embeddings", 2048))
        text = chat_prompt(tokenizer, prompt, system) if chat else prompt
        if chat is None and has_chat_template(tokenizer) and not as_json:
            _stderr.print(_CHAT_HINT, soft_wrap=True)
        tokens = len(encode_prompt(tokenizer, text, max_length=room))
        if tuned is not None:
            _wait_for_digests(opened)
        with loading_progress(_stderr, is_silent=as_json) as loading:
            model = load_for_inference(
                opened,
                place,
                BatchShape(rows=1, tokens=tokens, generated=max_new_tokens),
                adapter=tuned,
                lower="--max-new-tokens",
                progress=loading,
            )
        stop = AUTO_STOP if chat else None
        answer = run(model, tokenizer, text, max_new_tokens=max_new_tokens, stop=stop)
        if as_json:
            print_json({"prompt": prompt, "completion": answer})
        else:
            print(answer if chat else prompt + answer)


def _wait_for_digests(checkpoint: "Checkpoint") -> None:
    """Read all codes of a base, to see whether an adapter belongs to it; that takes a while."""
    with progress_bar("reading the codes of the base"):
        checkpoint.digests.result()


def _lower(*flags: str | int) -> str:
    """Return what to lower, to half of what it is: flags and their values in turn."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return "lower " + " or ".join(
        f"{flag} from {value} to {max(int(value) // 2, 1)}" for flag, value in pairs
    )


def _check_evaluated(
    task: str | None, data: str | None, prompt: str, keys: Mapping[str, str | None]
) -> None:
    """Refuse arguments of ``eval`` that do not go together.

    Raises:
        ConfigError: Neither a task nor data is given, or the task has no such prompt.
    """
    if task is None and data is None:
        raise ConfigError("--task: expected a task, or --data with a file, got neither")
    if prompt not in {"template", "none"} or (task is None and prompt == "none"):
        raise ConfigError(f"--prompt: expected template, or none with a --task, got {prompt!r}")
    given = [f"--{key.replace('_', '-')}" for key, value in keys.items() if value is not None]
    if task is not None and given:
        raise ConfigError(
            f"{given[0]} cannot be combined with --task: a task has its own prompts and answers; "
            "leave out one of them"
        )


def _check_system(system: str | None, *, is_chat: bool) -> None:
    """Refuse a system prompt where there is no conversation.

    Raises:
        ConfigError: There is none.
    """
    if system is not None and not is_chat:
        raise ConfigError(
            "--system cannot be combined with --no-chat, the default: plain text has no system "
            "prompt; add --chat"
        )


def _check_compact_name(out: Path) -> None:
    """Refuse a name that is not that of a new safetensors file.

    Raises:
        ConfigError: It is not.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out: expected a name that ends in .safetensors, got {out.name!r}")
    if out.exists():
        raise ConfigError(f"{out}: expected a new file, found one; choose another name")


if __name__ == "__main__":
    main()
