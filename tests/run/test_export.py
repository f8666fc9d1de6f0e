import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import gptq_files
from support.gptq_files import GPTQVariant, write_gptq
from support.models import logits_of, relative_error, tiny_model
from support.nf4_files import load_bnb, read_absmax, state_of, write_bnb, write_nf4
from support.runs import tiny_checkpoint
from support.training import examples, scales_of, short_run, tuned_logits
from torch import Tensor

import qzo
from quantizers.errors import FormatError
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.checkpoint.inspect import inspect
from qzo.checkpoint.tensors import TensorFiles
from qzo.errors import CheckpointError, ConfigError
from qzo.method.probes import Probe
from qzo.model.load import quant_linears
from qzo.run.journal.compact import write_compact
from qzo.run.journal.journal import Journal
from qzo.run.output.adapter import apply_adapter, open_adapter
from qzo.run.trainer import Trainer

SINGLE = "model.safetensors"
EXTRA_FILES = {
    "tokenizer.json": b"{}",
    "generation_config.json": b'{"max_new_tokens": 4}',
    "merges.txt": b"a b\n",
    "LICENSE": b"free\n",
}

Write = Callable[[Path], Any]


def gptq_base(num_shards: int = 1, **options: Any) -> Write:
    return lambda folder: write_gptq(
        folder, tiny_model("qwen2"), GPTQVariant(**options), num_shards=num_shards
    )


def nf4_base(num_shards: int = 1, **options: Any) -> Write:
    return lambda folder: write_nf4(
        folder, tiny_model("qwen2", intermediate=128), num_shards=num_shards, **options
    )


GPTQ: dict[str, Write] = {
    "gptq-v1": gptq_base(),
    "gptq-v2": gptq_base(checkpoint_format="gptq_v2"),
    "gptq-asym": gptq_base(sym=False),
    "gptq-desc_act": gptq_base(sym=False, desc_act=True),
    "gptq-ragged": gptq_base(group_size=64, bits=8),
    "gptq-sharded": gptq_base(num_shards=3),
}
NF4: dict[str, Write] = {
    "nf4": nf4_base(),
    "nf4-double": nf4_base(double_quant=True),
    "fp4-double-sharded": nf4_base(quant_type="fp4", double_quant=True, num_shards=3),
}
BASES = GPTQ | NF4


@dataclass(frozen=True)
class Run:
    """A base, a training run on it, and the export of the run."""

    base: Path
    folder: Path
    out: Path
    trainer: Trainer


def make_run(folder: Path, write: Write, **zo: Any) -> Run:
    base = folder / "base"
    write(base)
    for name, content in EXTRA_FILES.items():
        (base / name).write_bytes(content)
    (base / "README.md").write_text("the card of the base")
    trainer = short_run(qzo.load(base), folder / "run", **zo)
    qzo.export(folder / "run", folder / "out")
    return Run(base, folder / "run", folder / "out", trainer)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Give the run of a base by its name, made when it is first asked for."""
    made: dict[str, Run] = {}

    def get(name: str) -> Run:
        if name not in made:
            made[name] = make_run(tmp_path_factory.mktemp(name), BASES[name])
        return made[name]

    return get


every_base = pytest.mark.parametrize("name", BASES)
every_gptq = pytest.mark.parametrize("name", GPTQ)
every_nf4 = pytest.mark.parametrize("name", NF4)


def stored(folder: Path) -> dict[str, tuple[str, str, tuple[int, ...], bytes]]:
    """Return file, dtype, shape and bytes of every tensor, read by hand."""
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__")
        for key, entry in header.items():
            first, last = entry["data_offsets"]
            content = data[start + first : start + last]
            result[key] = (path.name, entry["dtype"], tuple(entry["shape"]), content)
    return result


def names_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@every_gptq
def test_a_gptq_export_differs_in_its_scales_alone(runs: Callable[[str], Run], name: str) -> None:
    run = runs(name)
    before, after = stored(run.base), stored(run.out)
    assert list(after) == list(before)
    changed = {key for key in before if after[key] != before[key]}
    assert changed == {key for key in before if key.endswith(".scales")}
    assert len(changed) == 7
    for key in changed:  # file, dtype and shape
        assert after[key][:3] == before[key][:3]


@every_nf4
def test_an_nf4_export_differs_in_its_scales_and_their_nesting_alone(
    runs: Callable[[str], Run], name: str
) -> None:
    run = runs(name)
    before, after = stored(run.base), stored(run.out)
    nesting = (".nested_absmax", ".nested_quant_map")
    assert set(after) == {key for key in before if not key.endswith(nesting)}
    changed = {key for key in after if after[key] != before[key]}
    absmax = {key for key in after if key.endswith(".absmax")}
    states = {key for key in after if ".quant_state." in key}
    assert changed == (absmax | states if "double" in name else absmax)
    assert len(absmax) == 7
    for key in absmax:
        assert after[key][0] == before[key][0]
        assert after[key][1] == "F32"
        assert after[key][2] == before[key][2]


@every_base
def test_an_export_holds_the_scales_of_the_adapter(runs: Callable[[str], Run], name: str) -> None:
    run = runs(name)
    after, adapter = stored(run.out), stored(run.folder)
    assert len(adapter) == 7
    for key, entry in adapter.items():
        assert after[key][1:] == entry[1:]


@every_base
def test_an_export_computes_the_logits_of_the_trained_model(
    runs: Callable[[str], Run], name: str
) -> None:
    run = runs(name)
    tuned = tuned_logits(run.trainer)
    assert relative_error(tuned, logits_of(qzo.load(run.base))) > 0.01
    # GPTQ scales are rounded to fp16, 2**-11 of each weight; NF4 scales to float32
    tolerance = 2e-3 if name in GPTQ else 1e-5
    assert relative_error(logits_of(qzo.load(run.out)), tuned) < tolerance


@every_base
def test_an_export_is_the_base_with_its_adapter(runs: Callable[[str], Run], name: str) -> None:
    run = runs(name)
    checkpoint = open_checkpoint(run.base)
    model = qzo.load(run.base)
    apply_adapter(model, checkpoint, open_adapter(run.folder))
    assert torch.equal(logits_of(qzo.load(run.out)), logits_of(model))


@every_base
def test_an_export_has_the_codes_of_the_base(runs: Callable[[str], Run], name: str) -> None:
    run = runs(name)
    base, out = open_checkpoint(run.base), open_checkpoint(run.out)
    assert out.codes_sha256() == base.codes_sha256()
    assert out.layers == base.layers


@every_nf4
@pytest.mark.usefixtures("natural_bitsandbytes")
def test_plain_transformers_computes_the_logits_of_the_trained_model(
    runs: Callable[[str], Run], name: str
) -> None:
    run = runs(name)
    # bitsandbytes dequantizes to float32 here: the order of sums differs, no rounding
    assert relative_error(logits_of(load_bnb(run.out)), tuned_logits(run.trainer)) < 1e-5


@every_nf4
def test_plain_transformers_runs_an_export_on_its_own_kernel(
    runs: Callable[[str], Run], name: str
) -> None:
    run = runs(name)
    # with AVX512-BF16 the kernel rounds activations and scales to bf16: 2**-8 of a value each time
    assert relative_error(logits_of(load_bnb(run.out)), tuned_logits(run.trainer)) < 0.05


@pytest.mark.usefixtures("natural_bitsandbytes")
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_a_checkpoint_that_transformers_saved_is_exported_for_it(
    tmp_path: Path, double_quant: bool
) -> None:
    def write(folder: Path) -> None:
        model = tiny_model("opt", intermediate=128)
        write_bnb(folder, model, bnb_4bit_use_double_quant=double_quant)

    run = make_run(tmp_path, write)
    assert relative_error(logits_of(load_bnb(run.out)), tuned_logits(run.trainer)) < 1e-5


@pytest.mark.parametrize("name", ["nf4-double", "fp4-double-sharded"])
def test_a_nested_base_is_un_nested_in_state_and_config(
    runs: Callable[[str], Run], name: str
) -> None:
    run = runs(name)
    config = json.loads((run.out / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is False
    base = json.loads((run.base / "config.json").read_text())
    base["quantization_config"]["bnb_4bit_use_double_quant"] = False
    assert config == base
    checkpoint = open_checkpoint(run.out)
    for layer in checkpoint.layers:
        tensors = checkpoint.layer_tensors(layer)
        assert set(tensors) == {"weight", "absmax", "quant_map", "quant_state"}
        assert not any(field.startswith("nested") for field in state_of(tensors))


def test_un_nesting_alone_changes_no_scale(tmp_path: Path) -> None:
    write_nf4(tmp_path / "base", tiny_model(), double_quant=True)
    trainer = short_run(
        qzo.load(tmp_path / "base"), tmp_path / "run", steps=1, coordinates="absolute",
        estimator="spsa", max_loss_difference=1e-30,
    )  # fmt: skip
    qzo.export(tmp_path / "run", tmp_path / "out")
    base, out = (open_checkpoint(tmp_path / name) for name in ("base", "out"))
    assert len(trainer.scales.names) == len(base.layers) == 7
    for layer in base.layers:
        want = read_absmax(base.layer_tensors(layer))
        assert read_absmax(out.layer_tensors(layer)) == want


@every_base
def test_other_files_are_copied(runs: Callable[[str], Run], name: str) -> None:
    run = runs(name)
    assert names_of(run.out) == names_of(run.base)
    same = {*EXTRA_FILES}
    if "double" not in name:  # what is nested changes the config and the index
        same |= {path.name for path in run.base.glob("*.json")}
    for file in same:
        assert (run.out / file).read_bytes() == (run.base / file).read_bytes()


@every_base
def test_the_model_card_is_that_of_the_run(runs: Callable[[str], Run], name: str) -> None:
    run = runs(name)
    card = (run.out / "README.md").read_text()
    assert "# base, fine-tuned with QZO\n" in card
    assert "the card of the base" not in card


@pytest.mark.parametrize("name", ["gptq-sharded", "fp4-double-sharded"])
def test_shards_and_index_are_kept(runs: Callable[[str], Run], name: str) -> None:
    run = runs(name)
    index = json.loads((run.out / "model.safetensors.index.json").read_text())
    after = stored(run.out)
    assert index["weight_map"] == {key: entry[0] for key, entry in after.items()}
    assert len(set(index["weight_map"].values())) == 3


@every_base
def test_metadata_of_the_files_are_kept(runs: Callable[[str], Run], name: str) -> None:
    run = runs(name)
    tensors = open_checkpoint(run.out).tensors
    for file in set(tensors.files.values()):
        assert tensors.metadata(file) == {"format": "pt"}


@pytest.mark.parametrize("name", ["gptq-v1", "nf4-double"])
def test_an_export_can_be_trained_again(
    runs: Callable[[str], Run], name: str, tmp_path: Path
) -> None:
    run = runs(name)
    again = short_run(qzo.load(run.out), tmp_path / "run")
    qzo.export(tmp_path / "run", tmp_path / "out")
    tolerance = 2e-3 if name in GPTQ else 1e-5
    assert relative_error(logits_of(qzo.load(tmp_path / "out")), tuned_logits(again)) < tolerance


def test_the_result_names_what_was_written(tmp_path: Path) -> None:
    write_gptq(tmp_path / "base", tiny_model())
    short_run(qzo.load(tmp_path / "base"), tmp_path / "run")
    result = qzo.export(tmp_path / "run", tmp_path / "out")
    assert (result.folder, result.num_changed) == (tmp_path / "out", 7)
    assert result.trained_loss is not None
    assert result.exported_loss == pytest.approx(result.trained_loss, abs=0.02)


@pytest.mark.parametrize("kind", ["folder", "file", "compact"])
def test_a_bare_journal_is_exported_too(
    runs: Callable[[str], Run], tmp_path: Path, kind: str
) -> None:
    run = runs("gptq-v1")
    (tmp_path / "run").mkdir()
    journal = Path(shutil.copy(run.folder / "journal.jsonl", tmp_path / "run"))
    small = tmp_path / "small.safetensors"
    write_compact(Journal.open(journal), small)
    given = {"folder": journal.parent, "file": journal, "compact": small}[kind]

    result = qzo.export(given, tmp_path / "out", base=str(run.base))

    assert result.trained_loss is None
    assert stored(tmp_path / "out") == stored(run.out)
    assert names_of(tmp_path / "run") == {"journal.jsonl"}


def test_a_run_whose_base_was_moved_is_exported(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = copied(runs("gptq-v1"), tmp_path)
    moved = run.base.rename(tmp_path / "moved")

    qzo.export(run.folder, tmp_path / "again", base=str(moved))

    assert stored(tmp_path / "again") == stored(runs("gptq-v1").out)


def test_blocks_that_cross_rows_are_trained_and_exported(tmp_path: Path) -> None:
    write_nf4(tmp_path / "base", tiny_model())  # 96 inputs, blocks of 64
    trainer = short_run(
        qzo.load(tmp_path / "base"), tmp_path / "run", coordinates="relative", estimator="spsa"
    )
    qzo.export(tmp_path / "run", tmp_path / "out")
    assert relative_error(logits_of(qzo.load(tmp_path / "out")), tuned_logits(trainer)) < 1e-5


def test_blocks_that_cross_rows_are_refused_in_row_coordinates(tmp_path: Path) -> None:
    write_nf4(tmp_path, tiny_model())
    with pytest.raises(ConfigError) as error:
        short_run(qzo.load(tmp_path), tmp_path / "run")
    assert str(error.value) == (
        "zo.coordinates: expected 'absolute' or 'relative', got 'row': blocks of "
        "model.layers.0.mlp.down_proj cross its rows, so a factor per row cannot be written back "
        "exactly"
    )


def test_a_quantization_config_of_its_own_is_copied(tmp_path: Path) -> None:
    write_gptq(tmp_path / "base", tiny_model(), config_file="quantize_config.json")
    short_run(qzo.load(tmp_path / "base"), tmp_path / "run")
    qzo.export(tmp_path / "run", tmp_path / "out")
    for file in ("config.json", "quantize_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "base" / file).read_bytes()


def copied(run: Run, folder: Path) -> Run:
    """Return a run of its own that can be damaged."""
    shutil.copytree(run.base, folder / "base")
    shutil.copytree(run.folder, folder / "run")
    path = folder / "run" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = str(folder / "base")
    path.write_text(json.dumps(config))
    return Run(folder / "base", folder / "run", folder / "out", run.trainer)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object], file: str = SINGLE) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


def refusal(run: Run) -> str:
    """Return the error of an export, which leaves nothing behind."""
    before = names_of(run.out.parent)
    with pytest.raises(CheckpointError) as error:
        qzo.export(run.folder, run.out)
    assert names_of(run.out.parent) == before
    return str(error.value)


@pytest.mark.parametrize("kind", ["run", "journal"])
def test_an_export_reads_the_codes_once_for_their_digest(
    runs: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("QZO_CACHE", str(tmp_path / "cache"))
    run, reads = runs("gptq-v1"), Counter[str]()
    journal = Path(shutil.copy(run.folder / "journal.jsonl", tmp_path))
    read = TensorFiles.read

    def noted(tensors: TensorFiles, key: str) -> Iterator[memoryview]:
        reads[key] += 1
        return read(tensors, key)

    monkeypatch.setattr(TensorFiles, "read", noted)
    given = {"run": run.folder, "journal": journal}[kind]
    qzo.export(given, tmp_path / "out", base=str(run.base), verify=False)
    assert sum("qweight" in key for key in reads) == len(open_checkpoint(run.base).layers)
    assert set(reads.values()) == {1}


@pytest.mark.parametrize("role", ["qweight", "qzeros", "g_idx"])
def test_a_base_whose_codes_changed_is_refused(
    runs: Callable[[str], Run], tmp_path: Path, role: str
) -> None:
    run = copied(runs("gptq-v1"), tmp_path)
    want = open_checkpoint(run.base).codes_sha256()
    key = f"model.layers.0.mlp.up_proj.{role}"
    edit(run.base, lambda tensors: tensors[key].view(-1)[0:1].add_(1))
    got = open_checkpoint(run.base).codes_sha256()
    assert refusal(run) == (
        f"{run.base}: expected codes with sha256 {want[:12]}..., got {got[:12]}...; the scales "
        "were trained on another base"
    )


def test_a_run_without_a_base_is_refused(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = copied(runs("gptq-v1"), tmp_path)
    shutil.rmtree(run.base)
    assert refusal(run) == (
        f"{run.base}: expected a folder or a hub id, found neither; name the base of the run with "
        "--base"
    )


def with_another_loss(run: Run) -> None:
    path = run.folder / "reference.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "loss": value["loss"] + 0.03}))


def test_an_export_with_another_loss_stays_unverified(
    runs: Callable[[str], Run], tmp_path: Path
) -> None:
    run = copied(runs("gptq-v1"), tmp_path)
    with_another_loss(run)
    kept = tmp_path / "out.unverified"
    for _ in range(2):  # a second try replaces the first
        with pytest.raises(CheckpointError) as error:
            qzo.export(run.folder, run.out)
        assert re.fullmatch(
            r"export: expected the trained model's loss \S+ up to 0\.02 from the exported files, "
            rf"got \S+ in float32 on cpu; the files are in {kept}: compare them with qzo eval, or "
            r"export with --no-verify",
            str(error.value),
        )
        assert not run.out.exists()
    assert stored(kept) == stored(runs("gptq-v1").out)
    assert names_of(kept) == names_of(runs("gptq-v1").out)


def test_an_export_need_not_be_verified(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = copied(runs("gptq-v1"), tmp_path)
    with_another_loss(run)
    result = qzo.export(run.folder, run.out, verify=False)
    assert (result.trained_loss, result.exported_loss) == (None, None)
    assert stored(run.out) == stored(runs("gptq-v1").out)
    assert names_of(tmp_path) == {"base", "run", "out"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_run_in_half_precision_is_compared_in_its_dtype(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    base = tiny_checkpoint(tmp_path / "base", gain=16.0)  # rounding moves a loss by 0.01 to 0.08
    short_run(qzo.load(base, dtype), tmp_path / "run")
    alike = qzo.export(tmp_path / "run", tmp_path / "alike")
    limited = qzo.export(tmp_path / "run", tmp_path / "limited", memory_limit="2GiB")
    single = qzo.export(tmp_path / "run", tmp_path / "single", dtype=torch.float32)

    name = str(dtype).removeprefix("torch.")
    assert json.loads((tmp_path / "run" / "reference.json").read_text())["dtype"] == name
    assert alike.exported_loss != single.exported_loss
    assert limited.exported_loss == pytest.approx(alike.exported_loss, abs=0.2)
    assert stored(tmp_path / "limited") == stored(tmp_path / "single") == stored(tmp_path / "alike")


def test_the_check_streams_within_a_limit(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = runs("gptq-v1")
    with pytest.raises(CheckpointError) as error:
        qzo.export(run.folder, tmp_path / "small", memory_limit="1MiB")
    assert re.fullmatch(
        r"memory_limit: expected at least .*; raise it, or lower --dtype to float16 or bfloat16; "
        rf"the files are in {tmp_path}/small\.unverified: check them with another --device, "
        "--dtype or --memory-limit, or export with --no-verify",
        str(error.value),
    )
    least = str(error.value).split("at least ")[1].split("GiB")[0]
    result = qzo.export(run.folder, tmp_path / "out", memory_limit=f"{least}GiB")
    assert result.exported_loss == pytest.approx(result.trained_loss, abs=0.02)


def test_an_adapter_without_a_layer_exports_the_scales_of_its_base(
    runs: Callable[[str], Run], tmp_path: Path
) -> None:
    run = copied(runs("gptq-v1"), tmp_path)
    key = "model.layers.0.mlp.up_proj.scales"
    edit(run.folder, lambda tensors: tensors.pop(key), "adapter_model.safetensors")
    (run.folder / "reference.json").unlink()
    qzo.export(run.folder, run.out)
    assert stored(run.out)[key] == stored(run.base)[key]


def test_an_adapter_of_another_shape_is_refused(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = copied(runs("gptq-v1"), tmp_path)
    key = "model.layers.0.mlp.up_proj.scales"
    edit(
        run.folder,
        lambda tensors: tensors.update({key: torch.ones(1, 96).half()}),
        "adapter_model.safetensors",
    )
    before = names_of(tmp_path)
    with pytest.raises(FormatError) as error:
        qzo.export(run.folder, run.out)
    assert str(error.value) == (
        f"{key}: expected shape (2, 96), got (1, 96); are bits 4, group_size 32 right?"
    )
    assert names_of(tmp_path) == before


@pytest.mark.parametrize(
    ("step", "interruption"),
    [
        ("write_safetensors", KeyboardInterrupt),
        ("write_safetensors", MemoryError),
        ("_rewrite_configs", MemoryError),
        ("check_export", KeyboardInterrupt),
    ],
)
def test_an_interrupted_export_leaves_nothing(
    runs: Callable[[str], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    interruption: type[BaseException],
) -> None:
    run = runs("gptq-sharded")

    def interrupt(*_: object) -> None:
        raise interruption

    monkeypatch.setattr(import_module("qzo.run.output.export"), step, interrupt)
    with pytest.raises(interruption):
        qzo.export(run.folder, tmp_path / "out")
    assert names_of(tmp_path) == set()


def test_files_that_could_not_be_checked_are_kept(
    runs: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(import_module("qzo.run.output.export"), "check_export", full)
    with pytest.raises(
        CheckpointError, match=r"^CUDA out of memory\. Tried to allocate 2 GiB; the f"
    ):
        qzo.export(runs("gptq-v1").folder, tmp_path / "out")
    assert names_of(tmp_path) == {"out.unverified"}
    assert stored(tmp_path / "out.unverified") == stored(runs("gptq-v1").out)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    runs: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(CheckpointError) as error:
        qzo.export(runs("gptq-v1").folder, tmp_path / "out")
    assert str(error.value) == (
        f"{tmp_path / 'out'}: cannot be written: No space left on device; nothing was left "
        "half-written"
    )
    assert names_of(tmp_path) == set()


def test_a_folder_that_is_not_empty_is_refused(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = runs("gptq-v1")
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(CheckpointError) as error:
        qzo.export(run.folder, tmp_path)
    assert str(error.value) == f"{tmp_path}: expected a new or empty folder; choose another --out"
    assert (tmp_path / "mine").read_text() == "keep"


def test_an_empty_folder_is_filled(runs: Callable[[str], Run], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    qzo.export(runs("gptq-v1").folder, tmp_path / "out")
    assert stored(tmp_path / "out") == stored(runs("gptq-v1").out)


def test_an_export_has_what_loads_it_and_nothing_else(
    runs: Callable[[str], Run], tmp_path: Path
) -> None:
    run = copied(runs("gptq-sharded"), tmp_path)
    others = [".env", "pytorch_model.bin", "notes.txt", "modeling_own.py", "adapter_config.json"]
    others += ["adapter_model.safetensors", "model.fp16.safetensors.index.json", "README.txt"]
    needed = ["chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer.model"]
    needed += ["preprocessor_config.json", "special_tokens_map.json", "NOTICE"]
    for name in (*others, *needed):
        (run.base / name).parent.mkdir(exist_ok=True)
        (run.base / name).write_text("{}")
    config = json.loads((run.base / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_own.Config"}
    (run.base / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))

    qzo.export(run.folder, run.out)

    files = {str(p.relative_to(run.out)) for p in run.out.rglob("*") if p.is_file()}
    base = {str(p.relative_to(run.base)) for p in run.base.rglob("*") if p.is_file()}
    assert files == base - set(others)
    assert json.loads((run.out / "config.json").read_text()) == config
    assert stored(run.out) == stored(runs("gptq-sharded").out)


def test_the_scales_of_a_layer_are_the_tuned_ones(runs: Callable[[str], Run]) -> None:
    run = runs("gptq-v1")
    exported = scales_of(qzo.load(run.out))
    for index, layer in enumerate(run.trainer.scales.names):
        assert torch.equal(exported[layer], run.trainer.scales.tuned(index).half())


@pytest.mark.parametrize(
    ("name", "format_name", "group_size"),
    [("gptq-v1", "gptq", 32), ("nf4-double", "bitsandbytes", 64)],
)
def test_inspect_counts_what_a_checkpoint_holds(
    runs: Callable[[str], Run], name: str, format_name: str, group_size: int
) -> None:
    run = runs(name)
    found = inspect(run.base)
    intermediate = 96 if name in GPTQ else 128
    num_weights = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * intermediate
    assert (found.format, found.group_size) == (format_name, group_size)
    assert (found.model_type, found.num_layers) == ("qwen2", 7)
    assert found.num_weights == num_weights
    assert found.num_scales == num_weights // group_size
    assert found.num_rows == 64 + 32 + 32 + 64 + 2 * intermediate + 64
    assert found.scale_dtype == ("float16" if name in GPTQ else "float32")
    assert found.bytes == (run.base / SINGLE).stat().st_size


def test_the_naive_reader_reads_an_export(runs: Callable[[str], Run]) -> None:
    run = runs("gptq-asym")
    checkpoint = open_checkpoint(run.out)
    layer = checkpoint.layers[0]
    scales = run.trainer.scales.tuned(0).half()
    tensors = {**open_checkpoint(run.base).layer_tensors(layer), "scales": scales.T}
    variant = GPTQVariant(sym=False)
    want = gptq_files.read_layer(tensors, variant)
    assert torch.equal(gptq_files.read_layer(checkpoint.layer_tensors(layer), variant), want)


@pytest.mark.parametrize(
    ("dtype", "learning_rate"), [(torch.bfloat16, 1e-3), (torch.float16, 1.2e-4)], ids=str
)
def test_what_a_half_precision_run_trains_is_what_is_exported(
    tmp_path: Path, dtype: torch.dtype, learning_rate: float
) -> None:
    """Multipliers move by less than half a step of the dtype, which would round them to 1."""
    base, out = tmp_path / "base", tmp_path / "out"
    write_nf4(base, tiny_model(intermediate=128))  # its scales are fp32: an export rounds nothing
    tokens = torch.randint(3, 64, (64, 60), generator=torch.Generator().manual_seed(0))
    model = qzo.load(base, dtype)
    zo = {"optimizer": "sign", "modules": None, "depth": None}
    values = {"model": "given", "data": "given", "output_dir": str(tmp_path / "run"), "zo": zo}
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": learning_rate}
    trainer = Trainer(model, qzo.recipe(values | settings), examples())
    trainer.train()
    assert 0 < float((trainer.scales.values - 1).abs().max()) < torch.finfo(dtype).eps / 2
    qzo.export(tmp_path / "run", out)

    exported, before = (logits_of(qzo.load(folder), tokens) for folder in (out, base))
    change = exported - before
    with trainer.scales.shifted(quant_linears(model)[0].live, (Probe(seed=0, offset=0.0),)):
        trained = logits_of(model, tokens).float()
    untrained = logits_of(qzo.load(base, dtype), tokens).float()
    # how far training moved 30,720 logits along the change; their roundings average out
    moved = ((trained - untrained) * change).sum() / change.square().sum()
    assert float(moved) == pytest.approx(1, abs=0.15)
