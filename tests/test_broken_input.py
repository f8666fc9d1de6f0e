"""Whatever is wrong with the input: one line that names it, exit code 1, nothing half-written."""

import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import Run, command, write_recipe
from support.models import tiny_model
from support.nf4_files import write_nf4
from support.runs import (
    RECORDS,
    change_tensor,
    json_lines,
    tiny_checkpoint,
    write_lines,
    write_tokenizer,
)

from qzo.run.launch import train
from qzo.run.recipe.read import read_recipe


@dataclass(frozen=True)
class World:
    """A checkpoint, data, a recipe and a finished run, to be broken; all in one folder."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def weights(self) -> Path:
        return self.base / "model.safetensors"

    @property
    def config(self) -> Path:
        return self.base / "config.json"

    @property
    def data(self) -> Path:
        return self.folder / "data.jsonl"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def out(self) -> Path:
        return self.folder / "out"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world before it is broken."""
    world = World(tmp_path_factory.mktemp("whole"))
    tiny_checkpoint(world.base)
    write_lines(world.data, RECORDS)
    train(read_recipe(write_recipe(world.recipe, world.base, world.data, world.run)))
    return world


@pytest.fixture
def world(whole: World, tmp_path: Path) -> World:
    """A copy of the world that knows where it is."""
    world = World(Path(shutil.copytree(whole.folder, tmp_path / "world")))
    write_recipe(world.recipe, world.base, world.data, world.out)
    change_json(world.run / "adapter_config.json", base_model_name_or_path=str(world.base))
    lines = json_lines(world.run / "journal.jsonl")
    lines[0]["base"] = str(world.base)
    write_lines(world.run / "journal.jsonl", lines)
    return world


@pytest.fixture
def qzo(capsys: pytest.CaptureFixture[str]) -> Run:
    return command(capsys)


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_recipe(world: World, **values: Any) -> None:
    write_recipe(world.recipe, world.base, world.data, world.out, **values)


def change_quantization(world: World, **values: Any) -> None:
    config = json.loads(world.config.read_text())
    change_json(world.config, quantization_config={**config["quantization_config"], **values})


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_header(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


# --- ways to break the world --------------------------------------------------------------------


def truncated_weights(world: World) -> None:
    world.weights.write_bytes(world.weights.read_bytes()[:-100])


def header_longer_than_the_file(world: World) -> None:
    data = world.weights.read_bytes()
    world.weights.write_bytes((2**40).to_bytes(8, "little") + data[8:])


def header_that_is_no_json(world: World) -> None:
    _, data = header_of(world.weights)
    write_header(world.weights, b"{'not': json}   ", data)


def header_with_a_shape_of_another_size(world: World) -> None:
    header, data = header_of(world.weights)
    key = next(key for key in header if key.endswith("qweight"))
    header[key]["shape"][0] *= 2
    write_header(world.weights, json.dumps(header).encode(), data)


def empty_weights(world: World) -> None:
    world.weights.write_bytes(b"")


def no_weights(world: World) -> None:
    world.weights.rename(world.base / "pytorch_model.bin")


def missing_shard(world: World) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (world.base / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_outside_of_the_folder(world: World) -> None:
    index = {"weight_map": {"a": "../data.jsonl"}}
    (world.base / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_tensor(world: World) -> None:
    change_tensors(world.weights, lambda t: delete(t, "q_proj.qzeros"))


def delete(tensors: dict[str, torch.Tensor], role: str) -> None:
    del tensors[next(key for key in tensors if key.endswith(role))]


def missing_norm(world: World) -> None:
    change_tensors(world.weights, lambda t: delete(t, "model.norm.weight"))


def unexpected_tensor(world: World) -> None:
    change_tensors(world.weights, lambda t: t.update({"model.extra": torch.zeros(2)}))


def nan_scales(world: World) -> None:
    change_tensors(world.weights, lambda t: put_nan(t, "v_proj.scales"))


def put_nan(tensors: dict[str, torch.Tensor], role: str) -> None:
    next(t for key, t in sorted(tensors.items()) if key.endswith(role)).view(-1)[0] = torch.nan


def config_of_another_size(world: World) -> None:
    change_json(world.config, hidden_size=128)


def config_that_is_no_json(world: World) -> None:
    world.config.write_text("{")


def config_that_is_a_list(world: World) -> None:
    world.config.write_text("[]")


def no_config(world: World) -> None:
    world.config.unlink()


def unknown_architecture(world: World) -> None:
    change_json(world.config, model_type="nonsense")


def float_checkpoint(world: World) -> None:
    shutil.rmtree(world.base)
    model: Any = tiny_model()
    model.save_pretrained(world.base)
    write_tokenizer(world.base)


def unsupported_format(world: World) -> None:
    change_quantization(world, quant_method="awq")


def unsupported_bits(world: World) -> None:
    change_quantization(world, bits=5)


def wrong_group_size(world: World) -> None:
    change_quantization(world, group_size=16)


def no_tokenizer(world: World) -> None:
    for path in world.base.glob("tokenizer*"):
        path.unlink()


def broken_tokenizer(world: World) -> None:
    (world.base / "tokenizer.json").write_text('{"version": "1.0"')


def crossing_blocks(world: World) -> None:
    shutil.rmtree(world.base)
    write_nf4(world.base, tiny_model())
    write_tokenizer(world.base)
    change_recipe(world, zo={"modules": None, "depth": None})


def no_base(world: World) -> None:
    shutil.rmtree(world.base)


def unknown_key(world: World) -> None:
    change_recipe(world, epsilon=0.1)


def wrong_type(world: World) -> None:
    change_recipe(world, max_steps="many")


def yaml_syntax(world: World) -> None:
    world.recipe.write_text("model: [a\n")


def no_recipe(world: World) -> None:
    world.recipe.unlink()


def binary_recipe(world: World) -> None:
    world.recipe.write_bytes(b"\xff\xfe\x00")


def unknown_device(world: World) -> None:
    change_recipe(world, device="quantum")


def unknown_integration(world: World) -> None:
    change_recipe(world, report_to="nowhere")


def too_many_blocks(world: World) -> None:
    change_recipe(world, zo={"num_blocks": 9})


def neither_data_nor_task(world: World) -> None:
    world.recipe.write_text(f"model: {world.base}\noutput_dir: {world.out}\n")


def no_data(world: World) -> None:
    world.data.unlink()


def empty_data(world: World) -> None:
    world.data.write_text("")


def bad_line(world: World) -> None:
    world.data.write_text('{"text": "a"}\n{"text": \n')


def other_columns(world: World) -> None:
    write_lines(world.data, [{"question": "a", "answer": "b"}])


def changing_columns(world: World) -> None:
    write_lines(world.data, [*RECORDS, {"text": "b"}])


def data_that_is_no_utf8(world: World) -> None:
    world.data.write_bytes(b'{"text": "caf\xe9"}\n')


def unknown_suffix(world: World) -> None:
    world.data.rename(world.folder / "data.xlsx")
    write_recipe(world.recipe, world.base, world.folder / "data.xlsx", world.out)


def long_answer(world: World) -> None:
    write_lines(world.data, [{"prompt": "a", "completion": "b" * 100}])


def changed_codes(world: World) -> None:
    change_tensor(world.weights, "qweight")


def changed_scales(world: World) -> None:
    change_tensor(world.weights, ".scales")


def damaged_journal(world: World) -> None:
    path = world.run / "journal.jsonl"
    path.write_text(path.read_text().replace('"step": 1', '"step": 7', 1))


def journal_of_a_header_without_a_base(world: World) -> None:
    lines = json_lines(world.run / "journal.jsonl")
    del lines[0]["base"]
    write_lines(world.run / "journal.jsonl", lines)


def no_run(world: World) -> None:
    shutil.rmtree(world.run)


def no_adapter(world: World) -> None:
    (world.run / "adapter_config.json").unlink()


def truncated_adapter(world: World) -> None:
    path = world.run / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def adapter_of_another_method(world: World) -> None:
    change_json(world.run / "adapter_config.json", peft_type="LORA")


def nan_adapter(world: World) -> None:
    change_tensors(world.run / "adapter_model.safetensors", lambda t: put_nan(t, "v_proj.scales"))


def damaged_reference(world: World) -> None:
    change_json(world.run / "reference.json", examples=[{"rows": 3}])


def damaged_snapshot(world: World) -> None:
    path = world.run / "checkpoint-3" / "scales.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def damaged_metrics(world: World) -> None:
    (world.run / "metrics.jsonl").write_text("\0\n")


def full_folder(world: World) -> None:
    world.out.mkdir()
    (world.out / "mine.txt").write_text("mine")


def file_in_the_place_of_the_folder(world: World) -> None:
    world.out.write_text("mine")


def folder_below_a_file(world: World) -> None:
    change_recipe(world, output_dir=str(world.data / "out"))


def folder_that_cannot_be_written(world: World) -> None:
    change_recipe(world, output_dir="/proc/qzo/out")


def nothing(world: World) -> None:
    del world


INSPECT = ("inspect", "{base}")
TRAIN = ("train", "{recipe}")
RESUME = ("train", "{recipe}", "output_dir={run}", "resume_from_checkpoint=true")
REPLAY = ("replay", "{run}")
EXPORT = ("export", "{run}", "--out", "{out}")
EVAL = ("eval", "{base}", "--data", "{data}", "--adapter", "{run}")
GENERATE = ("generate", "{base}", "--prompt", "a")

Break = Callable[[World], None]
# How the world is broken, what is then run, and the one line that it prints.
CASES: list[tuple[Break, tuple[str, ...], str]] = [
    (truncated_weights, INSPECT, r"{w}/base/model\.safetensors: expected a safetensors file: .+"),
    (truncated_weights, TRAIN, r"{w}/base/model\.safetensors: expected a safetensors file: .+"),
    (
        header_longer_than_the_file,
        INSPECT,
        r"{w}/base/model\.safetensors: expected a safetensors file: .+",
    ),
    (
        header_that_is_no_json,
        INSPECT,
        r"{w}/base/model\.safetensors: expected a safetensors file: .+",
    ),
    (
        header_with_a_shape_of_another_size,
        INSPECT,
        r"{w}/base/model\.safetensors: expected a safetensors file: .+",
    ),
    (empty_weights, INSPECT, r"{w}/base/model\.safetensors: expected a safetensors file: .+"),
    (
        no_weights,
        INSPECT,
        r"{w}/base: expected model\.safetensors, found none; pickled \.bin files are never read",
    ),
    (
        missing_shard,
        INSPECT,
        r"{w}/base/model-00002-of-00002\.safetensors: expected this shard, not found",
    ),
    (
        shard_outside_of_the_folder,
        INSPECT,
        r"{w}/base/model\.safetensors\.index\.json: expected file names without a folder, got "
        r"'\.\./data\.jsonl'",
    ),
    (
        missing_tensor,
        INSPECT,
        r"model\.layers\.0\.self_attn\.q_proj\.qzeros: expected this tensor in the "
        r"checkpoint, not found",
    ),
    (
        missing_norm,
        TRAIN,
        r"model\.norm\.weight: expected this tensor in the checkpoint, not found",
    ),
    (
        unexpected_tensor,
        TRAIN,
        r"model\.extra: expected only tensors of LlamaForCausalLM, found this one; does "
        r"config\.json belong to these files\?",
    ),
    (
        nan_scales,
        INSPECT,
        r"model\.layers\.0\.self_attn\.v_proj\.scales: expected finite values, got NaN or infinity",
    ),
    (
        config_of_another_size,
        TRAIN,
        r"model\.layers\.0\.mlp\.down_proj: expected shape \(128, 96\) by config\.json, got "
        r"\(64, 96\); are the bits and the config right\?",
    ),
    (
        config_that_is_no_json,
        INSPECT,
        r"{w}/base/config\.json: expected JSON, got Expecting property name enclosed in "
        r"double quotes: line 1 column 2 \(char 1\)",
    ),
    (config_that_is_a_list, INSPECT, r"{w}/base/config\.json: expected a JSON object, got list"),
    (no_config, INSPECT, r"{w}/base/config\.json: expected this file, not found"),
    (unknown_architecture, TRAIN, r"{w}/base/config\.json: not understood: .+"),
    (
        float_checkpoint,
        INSPECT,
        r"quantization_config: expected one in config\.json, found none; this is a float "
        r"checkpoint: make a 4-bit one with `qzo quantize`",
    ),
    (
        float_checkpoint,
        TRAIN,
        r"quantization_config: expected one in config\.json, found none; this is a float "
        r"checkpoint: make a 4-bit one with `qzo quantize`",
    ),
    (
        unsupported_format,
        INSPECT,
        r"quant_method: expected one of \['bitsandbytes', 'gptq'\], got 'awq'; quantize the "
        r"float model with `qzo quantize` instead",
    ),
    (unsupported_bits, INSPECT, r"bits: expected one of \(2, 3, 4, 8\), got 5"),
    (
        wrong_group_size,
        INSPECT,
        r"model\.layers\.0\.mlp\.down_proj\.scales: expected shape \(6, 64\), got \(3, 64\); "
        r"are bits 4, group_size 16 right\?",
    ),
    (
        no_tokenizer,
        TRAIN,
        r"{w}/base: expected a tokenizer: found none of tokenizer\.json, tokenizer\.model, "
        r"vocab\.json, vocab\.txt, spiece\.model",
    ),
    (
        no_tokenizer,
        GENERATE,
        r"{w}/base: expected a tokenizer: found none of tokenizer\.json, tokenizer\.model, "
        r"vocab\.json, vocab\.txt, spiece\.model",
    ),
    (broken_tokenizer, TRAIN, r"{w}/base: expected a tokenizer: .+"),
    (
        crossing_blocks,
        TRAIN,
        r"zo\.coordinates: expected 'absolute' or 'relative', got 'row': blocks of "
        r"model\.layers\.0\.mlp\.down_proj cross its rows, so a factor per row cannot be "
        r"written back exactly",
    ),
    (no_base, TRAIN, r"{w}/base: expected a folder or a hub id, found neither"),
    (
        no_base,
        REPLAY,
        r"{w}/base: expected a folder or a hub id, found neither; name the base of the run with "
        r"--base",
    ),
    (unknown_key, TRAIN, r"epsilon: unknown key; did you mean 'zo\.epsilon'\?"),
    (
        wrong_type,
        TRAIN,
        r"max_steps: expected a valid integer, unable to parse string as an integer, got 'many'",
    ),
    (yaml_syntax, TRAIN, r"{w}/recipe\.yaml: expected YAML: while parsing a flow sequence .+"),
    (no_recipe, TRAIN, r"{w}/recipe\.yaml: cannot be read: No such file or directory"),
    (
        binary_recipe,
        TRAIN,
        r"{w}/recipe\.yaml: expected YAML: 'utf-8' codec can't decode byte 0xff in position "
        r"0: invalid start byte",
    ),
    (unknown_device, TRAIN, r"device: expected 'cpu' or 'cuda', got 'quantum'"),
    (nothing, (*EVAL, "--device", "quantum"), r"device: expected 'cpu' or 'cuda', got 'quantum'"),
    (nothing, (*EVAL, "--device", "cpu:"), r"device: expected 'cpu' or 'cuda', got 'cpu:'"),
    (nothing, (*EVAL, "--device", "cpu:999"), r"device: expected 'cpu' or 'cuda', got 'cpu:999'"),
    (unknown_integration, TRAIN, r"report_to: nowhere is not supported, .+"),
    (too_many_blocks, TRAIN, r"zo\.num_blocks: expected at most the model's 1 blocks, got 9"),
    (
        neither_data_nor_task,
        TRAIN,
        r"data: expected 'data' or 'task' in the recipe, found neither",
    ),
    (no_data, TRAIN, r"{w}/data\.jsonl: expected a file, got nothing there; check the path"),
    (no_data, EVAL, r"{w}/data\.jsonl: expected a file, got nothing there; check the path"),
    (
        empty_data,
        TRAIN,
        r"{w}/data\.jsonl: expected at least one row, got none; is this the right file\?",
    ),
    (
        bad_line,
        TRAIN,
        r"{w}/data\.jsonl: expected one JSON object per line, got 'Expecting value' in line "
        r"2; correct that line",
    ),
    (
        other_columns,
        TRAIN,
        r"columns: expected prompt and completion; or messages; or text, got question, "
        r"answer; rename the columns",
    ),
    (
        changing_columns,
        TRAIN,
        r"row 9: prompt: expected this column as in row 1, got text; give all rows the same "
        r"columns",
    ),
    (
        data_that_is_no_utf8,
        TRAIN,
        r"{w}/data\.jsonl: expected UTF-8 text, got byte 0xe9 in line 1; save the file as UTF-8",
    ),
    (
        unknown_suffix,
        TRAIN,
        r"{w}/data\.xlsx: expected a name that ends in \.jsonl, \.json, \.csv, \.tsv, "
        r"\.parquet, got 'data\.xlsx'; convert the file or rename it",
    ),
    (
        long_answer,
        TRAIN,
        r"row 1: answer 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb\.\.\.': expected at most 39 "
        r"tokens, so that the end of the prompt fits before it, got 101; raise max_length or "
        r"shorten the answer",
    ),
    (
        changed_codes,
        REPLAY,
        r"{w}/base: codes_sha256 is not that of the journal; the base was changed since the "
        r"run, or is another one",
    ),
    (
        changed_codes,
        EXPORT,
        r"{w}/base: expected codes with sha256 [0-9a-f]{12}\.\.\., got [0-9a-f]{12}\.\.\.; "
        r"the scales were trained on another base",
    ),
    (
        changed_codes,
        RESUME,
        r"model: codes_sha256 of the base differs from that of the run that is to be continued",
    ),
    (
        changed_codes,
        EVAL,
        r"{w}/base: expected codes with sha256 [0-9a-f]{12}\.\.\., got [0-9a-f]{12}\.\.\.; "
        r"the scales were trained on another base",
    ),
    (
        changed_scales,
        REPLAY,
        r"{w}/base: scales_sha256 is not that of the journal; the base was changed since the "
        r"run, or is another one",
    ),
    (
        changed_scales,
        RESUME,
        r"model: scales_sha256 of the base differs from that of the run that is to be continued",
    ),
    (damaged_journal, REPLAY, r"{w}/run/journal\.jsonl: line 3: expected step 1, got 7"),
    (damaged_journal, RESUME, r"{w}/run/journal\.jsonl: line 3: expected step 1, got 7"),
    (
        journal_of_a_header_without_a_base,
        REPLAY,
        r"{w}/run/journal\.jsonl: line 1: expected base of type str, got None",
    ),
    (no_run, REPLAY, r"{w}/run/journal\.jsonl: cannot be read: No such file or directory"),
    (no_run, EXPORT, r"{w}/run/journal\.jsonl: cannot be read: No such file or directory"),
    (no_adapter, EVAL, r"{w}/run/adapter_config\.json: expected this file, not found"),
    (
        truncated_adapter,
        EXPORT,
        r"{w}/run/adapter_model\.safetensors: expected a safetensors file: .+",
    ),
    (
        truncated_adapter,
        REPLAY,
        r"{w}/run/adapter_model\.safetensors: expected a safetensors file: .+",
    ),
    (
        adapter_of_another_method,
        EVAL,
        r"{w}/run/adapter_config\.json: expected peft_type 'QZO', got 'LORA'",
    ),
    (
        nan_adapter,
        EVAL,
        r"model\.layers\.0\.self_attn\.v_proj\.scales: expected finite values, got NaN or infinity",
    ),
    (
        nan_adapter,
        EXPORT,
        r"model\.layers\.0\.self_attn\.v_proj\.scales: expected finite values, got NaN or infinity",
    ),
    (damaged_reference, EXPORT, r"{w}/run/reference\.json: damaged: KeyError\('candidates'\)"),
    (
        damaged_snapshot,
        RESUME,
        r"{w}/run/checkpoint-3/scales\.safetensors: expected a safetensors file: .+",
    ),
    (
        damaged_metrics,
        RESUME,
        r"{w}/run/metrics\.jsonl: line 1: expected a JSON object with a step, got something "
        r"else; remove the file to go on without earlier metrics",
    ),
    (
        full_folder,
        TRAIN,
        r"{w}/out: expected a new or empty folder; choose another output_dir, or set "
        r"resume_from_checkpoint: true",
    ),
    (full_folder, EXPORT, r"{w}/out: expected a new or empty folder; choose another --out"),
    (
        file_in_the_place_of_the_folder,
        TRAIN,
        r"{w}/out: expected a new or empty folder, found a file; choose another output_dir",
    ),
    (
        file_in_the_place_of_the_folder,
        EXPORT,
        r"{w}/out: expected a new or empty folder; choose another --out",
    ),
    (
        folder_below_a_file,
        TRAIN,
        r"{w}/data\.jsonl/out: cannot be written: Not a directory; nothing was left half-written",
    ),
    (
        folder_that_cannot_be_written,
        TRAIN,
        r"/proc/qzo/out: cannot be written: No such file or directory; nothing was left "
        r"half-written",
    ),
    (
        nothing,
        (*GENERATE, "--max-new-tokens", "64"),
        r"max_new_tokens: expected less than the model's 64 positions, got 64",
    ),
    (
        nothing,
        ("quantize", "{base}", "--out", "{out}"),
        r"{w}/base: expected a float model, got one quantized with gptq already; train it as "
        r"it is, or quantize the float model it was made from",
    ),
]


def test_there_are_enough_ways_to_break_the_world() -> None:
    assert len({damage for damage, _, _ in CASES}) >= 55
    assert len({arguments[0] for _, arguments, _ in CASES}) == 7


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    CASES,
    ids=[f"{damage.__name__}-{arguments[0]}" for damage, arguments, _ in CASES],
)
def test_broken_input_is_one_line_and_leaves_everything_as_it_was(
    qzo: Run, world: World, damage: Break, arguments: tuple[str, ...], message: str
) -> None:
    damage(world)
    before = content(world)
    places = {name: getattr(world, name) for name in ("base", "data", "recipe", "run", "out")}

    ran = qzo(*(argument.format(**places) for argument in arguments))

    assert (ran.code, ran.out) == (1, "")
    want = message.replace("{w}", re.escape(str(world.folder)))
    assert re.fullmatch(f"qzo: {want}\n", ran.err), ran.err
    assert content(world) == before


def test_an_export_with_another_loss_is_one_line_and_stays_unverified(
    qzo: Run, world: World
) -> None:
    change_json(world.run / "reference.json", loss=7.0)
    before = content(world)

    ran = qzo("export", world.run, "--out", world.out)

    assert re.fullmatch(
        r"qzo: export: expected the trained model's loss 7\.0000 up to 0\.02 from the exported "
        rf"files, got 0\.[0-9]+ in float32 on cpu; the files are in {world.out}\.unverified: "
        r"compare them with qzo eval, or export with --no-verify\n",
        ran.err,
    )
    shutil.rmtree(world.folder / "out.unverified")
    assert content(world) == before
    assert qzo("export", world.run, "--out", world.out, "--no-verify", "--json").code == 0


def content(world: World) -> dict[str, bytes]:
    """Return every file but the resolved recipe, which a resume writes first."""
    return {
        str(path.relative_to(world.folder)): path.read_bytes()
        for path in world.folder.rglob("*")
        if path.is_file() and path != world.run / "recipe.yaml"
    }


# --- full disks ---------------------------------------------------------------------------------


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Let every write beyond a size fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("arguments", "num_bytes", "place"),
    [
        (TRAIN, 500, "out/journal.jsonl"),
        (EXPORT, 20_000, "out"),
        (("quantize", "{base}/float", "--out", "{out}", "--method", "rtn"), 20_000, "out"),
        (("replay", "{run}", "--to-step", "1", "--out", "{out}"), 500, "out"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    qzo: Run, world: World, arguments: tuple[str, ...], num_bytes: int, place: str
) -> None:
    model: Any = tiny_model()
    model.save_pretrained(world.base / "float")
    before = content(world)
    places = {name: getattr(world, name) for name in ("base", "recipe", "run", "out")}

    with file_size_limit(num_bytes):
        ran = qzo(*(argument.format(**places) for argument in arguments))

    assert (ran.code, ran.out) == (1, "")
    *progress, message = ran.err.splitlines()  # the first step is done before the journal begins
    assert not [line for line in progress if not line.startswith("training")]
    assert message == (
        f"qzo: {world.folder / place}: cannot be written: File too large; nothing was left "
        "half-written"
    )
    assert content(world) == before


def test_a_disk_that_fills_up_in_the_middle_of_a_run_loses_no_step(qzo: Run, world: World) -> None:
    train_straight = qzo(
        *TRAIN_ON.format(recipe=world.recipe, out=world.folder / "straight").split()
    )
    assert train_straight.code == 0, train_straight.err
    header = (world.folder / "straight" / "journal.jsonl").read_bytes().index(b"\n")

    with file_size_limit(header + 600):  # room for a few lines
        ran = qzo(*TRAIN_ON.format(recipe=world.recipe, out=world.out).split())

    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[-1] == (
        f"qzo: {world.out / 'journal.jsonl'}: cannot be written: File too large; nothing was left "
        "half-written"
    )
    assert 1 <= len(json_lines(world.out / "journal.jsonl")) - 1 < 8
    assert qzo(*TRAIN_ON.format(recipe=world.recipe, out=world.out).split()).code == 0
    tensors = [f / "adapter_model.safetensors" for f in (world.out, world.folder / "straight")]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()


TRAIN_ON = "train {recipe} output_dir={out} max_steps=8 resume_from_checkpoint=true --json"
