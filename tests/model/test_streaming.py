"""Streaming against the resident run: the same losses bit for bit, fewer pages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import nf4_files
from support.gptq_files import GPTQVariant, write_gptq
from support.models import logits_of, tiny_model
from support.runs import json_lines, tiny_recipe, write_tokenizer
from support.training import examples
from torch import nn
from transformers import PreTrainedModel

from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.errors import ConfigError
from qzo.method.probes import Probe
from qzo.method.trained_vector import Scales
from qzo.model.generate import Generator
from qzo.model.linear import QuantLinear
from qzo.model.load import decoder_blocks, load_checkpoint, trained_layers
from qzo.model.streaming import mapped_pages as pages
from qzo.model.streaming.blocks import Budget, MappedPages, attach, stream
from qzo.model.streaming.device_copies import DeviceCopies
from qzo.run.output.adapter import apply_adapter, open_adapter
from qzo.run.trainer import Trainer

pytestmark = pytest.mark.slow  # whole runs; the file takes half a minute

CPU = torch.device("cpu")
NUM_BLOCKS = 4
WRITERS: dict[str, Callable[[Path, PreTrainedModel], Any]] = {
    "gptq": write_gptq,
    "gptq-asym": lambda folder, model: write_gptq(folder, model, GPTQVariant(sym=False)),
    "gptq-sharded": lambda folder, model: write_gptq(folder, model, num_shards=3),
    "nf4": nf4_files.write_nf4,
    "nf4-nested": lambda folder, model: nf4_files.write_nf4(folder, model, double_quant=True),
    "nf4-sharded": lambda folder, model: nf4_files.write_nf4(folder, model, num_shards=3),
}


@pytest.fixture(params=WRITERS, ids=str)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    WRITERS[request.param](folder, wide_model())
    return folder


def wide_model(intermediate: int = 1024) -> PreTrainedModel:
    """Return a model whose layers fill several pages each."""
    return tiny_model(num_layers=NUM_BLOCKS, intermediate=intermediate)


def losses_of(model: PreTrainedModel, out: Path, **keys: Any) -> list[Any]:
    recipe = tiny_recipe(Path("given"), out, max_steps=2, **keys)
    Trainer(model, recipe, examples()).train()
    return [line["losses"] for line in json_lines(out / "journal.jsonl") if "losses" in line]


def limited(base: Path, kept: int) -> PreTrainedModel:
    """Load a model with room for ``kept`` blocks beside those that pass through."""
    resident = load_checkpoint(open_checkpoint(base))
    blocks, head = decoder_blocks(resident), resident.get_output_embeddings()
    sizes = MappedPages([*blocks, head], resident.get_input_embeddings()).sizes
    assert len(sizes) == NUM_BLOCKS + 1
    assert min(sizes[:-1]) > 0
    passing = max(a + b for a, b in zip(sizes[kept:], sizes[kept + 1 :], strict=False))
    budget = Budget(limit_bytes=1000 + sum(sizes[:kept]) + passing, other_bytes=1000)
    return load_checkpoint(open_checkpoint(base), budget=budget)


@pytest.mark.parametrize("kept", [0, 2])
def test_losses_of_a_streamed_run_are_those_of_the_resident_run(
    base: Path, tmp_path: Path, kept: int
) -> None:
    want = losses_of(load_checkpoint(open_checkpoint(base)), tmp_path / "resident")

    got = losses_of(limited(base, kept), tmp_path / "streamed", memory_limit="1GiB")

    assert len(want) == 2
    assert got == want


def test_a_streamed_model_writes_what_the_resident_one_writes(base: Path) -> None:
    tokenizer, probes = write_tokenizer(base), [Probe(5, 0.2), Probe(5, -0.2)]
    texts = []
    for model in (load_checkpoint(open_checkpoint(base)), limited(base, 0)):
        layers = trained_layers(model, None)
        scales = Scales.of_layers(layers, coordinates="relative", direction="rademacher")
        with scales.shifted(layers[0].live, probes):
            generator = Generator(model, tokenizer, layers[0].live, max_new_tokens=6)
            texts.append(generator.write([["a film", "q"]] * 2))

    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


@pytest.mark.parametrize(
    "zo", [{"unquantized": ["norms", "head"]}, {"tuned": "lora"}, {"tuned": "prefix"}], ids=str
)
def test_a_streamed_run_trains_what_is_no_scale_alike(tmp_path: Path, zo: dict[str, Any]) -> None:
    base = tmp_path / "base"
    write_gptq(base, wide_model())
    want = losses_of(load_checkpoint(open_checkpoint(base)), tmp_path / "resident", zo=zo)

    model = limited(base, 0)
    got = losses_of(model, tmp_path / "streamed", memory_limit="1GiB", zo=zo)

    assert len(want) == 2
    assert got == want
    first, second = (
        tmp_path / name / "adapter_model.safetensors" for name in ("resident", "streamed")
    )
    assert first.read_bytes() == second.read_bytes()
    resident = load_checkpoint(open_checkpoint(base))
    apply_adapter(resident, open_checkpoint(base), open_adapter(tmp_path / "resident"))
    assert torch.equal(logits_of(model), logits_of(resident))


def test_losses_of_copied_blocks_are_those_of_the_resident_run(base: Path, tmp_path: Path) -> None:
    want = losses_of(load_checkpoint(open_checkpoint(base)), tmp_path / "resident")
    model = load_checkpoint(open_checkpoint(base))
    copy_blocks(model, kept=1)

    got = losses_of(model, tmp_path / "copied")

    assert len(want) == 2
    assert got == want


def copy_blocks(model: PreTrainedModel, kept: int) -> DeviceCopies:
    blocks = decoder_blocks(model)
    source = DeviceCopies(blocks, model, CPU)
    source.keep(kept)
    attach(blocks, source, kept, model.get_input_embeddings())
    return source


def test_copied_blocks_compute_from_two_buffers_in_turn(tmp_path: Path) -> None:
    write_gptq(tmp_path, wide_model())
    model = load_checkpoint(open_checkpoint(tmp_path))
    copy_blocks(model, kept=1)
    seen = []
    for block in decoder_blocks(model):
        block.register_forward_pre_hook(lambda module, _: seen.append(codes_address(module)))

    logits_of(model)

    assert len(seen) == NUM_BLOCKS
    assert seen[1] == seen[3]
    assert len(set(seen)) == 3


def codes_address(block: nn.Module) -> int:
    layer = next(part for part in block.modules() if isinstance(part, QuantLinear))
    return int(vars(layer.quantized)["qweight"].data_ptr())


def test_a_pass_that_an_error_ends_does_not_spoil_the_next(tmp_path: Path) -> None:
    write_gptq(tmp_path, wide_model())
    model = load_checkpoint(open_checkpoint(tmp_path))
    want = logits_of(model)
    copy_blocks(model, kept=0)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    for block in decoder_blocks(model):
        handle = block.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            logits_of(model)
        handle.remove()
        assert torch.equal(logits_of(model), want)


def test_only_blocks_that_stay_are_in_memory_after_a_pass(tmp_path: Path) -> None:
    write_gptq(tmp_path, wide_model(intermediate=3072))
    model = limited(tmp_path, kept=1)
    blocks = decoder_blocks(model)

    logits_of(model)

    first, *others = [resident_bytes(block) for block in blocks]
    assert first > 2**18
    assert max(others) < first / 2  # a page that is touched brings its neighbours, up to 16 pages


def resident_bytes(module: nn.Module) -> int:
    """Return what of the codes of a module is in this process, as the system counts it."""
    layers = [part for part in module.modules() if isinstance(part, QuantLinear)]
    codes = [vars(layer.quantized)["qweight"] for layer in layers]
    ranges = pages.page_ranges(codes, pages.file_maps())
    assert ranges
    size = 4096
    with Path("/proc/self/pagemap").open("rb") as table:
        count = 0
        for part in ranges:
            table.seek(part.start // size * 8)
            entries = table.read(part.num_bytes // size * 8)
            count += sum(entry >> 7 for entry in entries[7::8])  # bit 63: present
    return count * size


def test_a_block_is_read_one_ahead_of_use() -> None:
    calls: list[tuple[str, int]] = []

    class Noted:
        def __init__(self) -> None:
            self.sizes = [1] * 4

        def keep(self, count: int) -> None: ...
        def fetch(self, unit: int) -> None:
            calls.append(("fetch", unit))

        def enter(self, unit: int) -> None:
            calls.append(("enter", unit))

        def leave(self, unit: int) -> None:
            calls.append(("leave", unit))

    embeddings, units = nn.Identity(), [nn.Identity() for _ in range(4)]
    attach(units, Noted(), 2, embeddings)

    nn.Sequential(embeddings, *units)(torch.zeros(1))

    assert calls == [
        ("fetch", 2),  # while block 1, which stays, computes
        ("enter", 2),
        ("fetch", 3),
        ("leave", 2),
        ("enter", 3),
        ("leave", 3),
    ]


def test_a_model_that_fits_does_not_stream(tmp_path: Path) -> None:
    write_gptq(tmp_path, wide_model())
    model = load_checkpoint(open_checkpoint(tmp_path))
    kept = stream(model, decoder_blocks(model), CPU, Budget(2**40, 0))
    assert kept == NUM_BLOCKS
    assert not any(block._forward_hooks for block in decoder_blocks(model))


def test_a_limit_that_is_too_small_names_the_smallest(tmp_path: Path) -> None:
    write_gptq(tmp_path, wide_model())
    with pytest.raises(
        ConfigError,
        match=r"^memory_limit: expected at least 1\.00GiB for this run, got 0\.50GiB; raise it, or "
        r"lower per_device_train_batch_size, per_device_eval_batch_size or max_length$",
    ):
        load_checkpoint(open_checkpoint(tmp_path), budget=Budget(2**29, 2**30 - 2**22))


def test_memory_that_is_short_without_a_limit_is_no_error(tmp_path: Path) -> None:
    write_gptq(tmp_path, wide_model())
    want = logits_of(load_checkpoint(open_checkpoint(tmp_path)))
    budget = Budget(2**29, 2**30, is_given=False)
    assert torch.equal(logits_of(load_checkpoint(open_checkpoint(tmp_path), budget=budget)), want)


def test_a_model_loaded_without_a_limit_is_refused_where_the_recipe_has_one(
    tmp_path: Path,
) -> None:
    write_gptq(tmp_path, tiny_model())
    model = load_checkpoint(open_checkpoint(tmp_path))
    recipe = tiny_recipe(tmp_path, tmp_path / "out", memory_limit="4GiB")
    with pytest.raises(
        ConfigError,
        match=r"^memory_limit: expected a model that streams its blocks, got one that does not; "
        r"run the recipe with qzo train, or leave memory_limit out$",
    ):
        Trainer(model, recipe, examples())


def test_page_ranges_leave_out_memory_that_is_no_file() -> None:
    assert pages.page_ranges([torch.zeros(10**6)], pages.file_maps()) == []


def test_page_ranges_hold_the_bytes_of_the_file(tmp_path: Path) -> None:
    write_gptq(tmp_path, wide_model())
    checkpoint = open_checkpoint(tmp_path)
    key = "model.layers.0.mlp.up_proj.qweight"
    tensor = checkpoint.tensors[key]

    (part,) = pages.page_ranges([tensor], pages.file_maps())

    data = (tmp_path / "model.safetensors").read_bytes()[part.offset :][: part.num_bytes]
    skipped = part.start - tensor.data_ptr()
    assert 0 <= skipped < 4096
    assert data == tensor.numpy().tobytes()[skipped:][: part.num_bytes]


def test_released_pages_come_back_from_the_file(tmp_path: Path) -> None:
    write_gptq(tmp_path, wide_model())
    tensor = open_checkpoint(tmp_path).tensors["model.layers.0.mlp.up_proj.qweight"]
    before = tensor.clone()
    for part in pages.page_ranges([tensor], pages.file_maps()):
        part.release()
        part.drop_from_cache()
        part.read_ahead()
    assert torch.equal(tensor, before)
