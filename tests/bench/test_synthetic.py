"""Synthetic checkpoints against the plan, published counts and plain arithmetic."""

import json
from collections import namedtuple
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from quantizers.weight import dequantize
from qzo.bench.model_shapes import SHAPES
from qzo.bench.synthetic import FORMATS, Synthetic, default_folder, synthetic_checkpoint
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.errors import CheckpointError, ConfigError
from qzo.model.load import load
from qzo.plan.planner import plan
from qzo.plan.shapes import build_skeleton

# Number of parameters, as the model cards' files have them.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "smollm2-135m": 134_515_008,
}
TINY_LAYERS = {  # out, in
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}
TINY_FLOATS = {
    "model.embed_tokens.weight": (96, 64),
    "model.norm.weight": (64,),
    "lm_head.weight": (96, 64),
    **{
        f"model.layers.{i}.{name}.weight": (64,)
        for i in range(2)
        for name in ("input_layernorm", "post_attention_layernorm")
    },
}


def stored(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # no mapping
                tensor = file.get_tensor(key)
                found[key] = (tuple(tensor.shape), tensor.dtype)
    return found


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("shape", PUBLISHED)
def test_a_published_shape_has_the_published_number_of_parameters(shape: str) -> None:
    model = build_skeleton(Synthetic(shape).config, torch.float16)

    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[shape]


def test_every_shape_of_a_model_is_under_test() -> None:
    assert {*PUBLISHED, "small", "tiny"} == set(SHAPES)


def test_a_gptq_file_has_exactly_the_tensors_of_the_format(tmp_path: Path) -> None:
    folder = synthetic_checkpoint(Synthetic("tiny", group_size=32), tmp_path)

    want = {key: (shape, torch.float16) for key, shape in TINY_FLOATS.items()}
    for i in range(2):
        for name, (outputs, inputs) in TINY_LAYERS.items():
            layer = f"model.layers.{i}.{name}"
            groups = inputs // 32
            want[f"{layer}.qweight"] = ((inputs // 8, outputs), torch.int32)
            want[f"{layer}.qzeros"] = ((groups, outputs // 8), torch.int32)
            want[f"{layer}.scales"] = ((groups, outputs), torch.float16)
            want[f"{layer}.g_idx"] = ((inputs,), torch.int32)
    assert stored(folder) == want


def test_an_nf4_file_has_exactly_the_tensors_of_the_format(tmp_path: Path) -> None:
    folder = synthetic_checkpoint(Synthetic("tiny", format="nf4"), tmp_path)

    found = stored(folder)
    floats = {key: found.pop(key) for key in TINY_FLOATS}
    assert floats == {key: (shape, torch.float16) for key, shape in TINY_FLOATS.items()}
    for i in range(2):
        for name, (outputs, inputs) in TINY_LAYERS.items():
            weight = f"model.layers.{i}.{name}.weight"
            assert found.pop(weight) == ((outputs * inputs // 2, 1), torch.uint8)
            assert found.pop(f"{weight}.absmax") == ((outputs * inputs // 64,), torch.float32)
            assert found.pop(f"{weight}.quant_map") == ((16,), torch.float32)
            assert found.pop(f"{weight}.quant_state.bitsandbytes__nf4")[1] == torch.uint8
    assert not found


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_file_is_as_large_as_the_plan_says(tmp_path: Path, format_name: str) -> None:
    folder = synthetic_checkpoint(Synthetic("tiny", format=format_name), tmp_path)

    counted = sum(
        torch.Size(shape).numel() * dtype.itemsize
        for key, (shape, dtype) in stored(folder).items()
        if not key.endswith(("quant_map", "bitsandbytes__nf4"))  # constants the plan leaves out
    )
    assert counted == plan(folder).checkpoint_bytes


@pytest.mark.parametrize("format_name", FORMATS)
def test_weights_have_the_deviation_of_a_new_model(tmp_path: Path, format_name: str) -> None:
    what = Synthetic("tiny", format=format_name)
    checkpoint = open_checkpoint(synthetic_checkpoint(what, tmp_path))

    weights = [dequantize(checkpoint.weight(layer)).flatten() for layer in checkpoint.layers]

    # Uniform factors of 0.8 to 1.2 make it larger by sqrt(1 + 0.2^2 / 3) - 1 = 0.7 %; the sample of
    # 57,344 weights adds 0.3 %, and an NF4 codebook is not symmetric, so its mean is not 0.
    assert float(torch.cat(weights).std(correction=0)) == pytest.approx(0.02, rel=0.015)


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_checkpoint_loads_and_computes(tmp_path: Path, format_name: str) -> None:
    model = load(synthetic_checkpoint(Synthetic("tiny", format=format_name), tmp_path))

    logits = model(input_ids=torch.arange(8)[None]).logits

    assert logits.shape == (1, 8, 96)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.01


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_rerun_writes_the_same_bytes(tmp_path: Path, format_name: str) -> None:
    what = Synthetic("tiny", format=format_name, seed=3)

    first = digests(synthetic_checkpoint(what, tmp_path / "a"))

    assert digests(synthetic_checkpoint(what, tmp_path / "b")) == first
    other = digests(synthetic_checkpoint(Synthetic("tiny", format_name, seed=4), tmp_path / "b"))
    assert other["model.safetensors"] != first["model.safetensors"]


def test_layers_differ_from_each_other(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(synthetic_checkpoint(Synthetic("tiny"), tmp_path))

    words = [
        checkpoint.tensors[f"{layer}.qweight"].numpy().tobytes()[:64] for layer in checkpoint.layers
    ]

    assert len(set(words)) == len(words) == 14


def test_a_complete_checkpoint_is_used_again(tmp_path: Path) -> None:
    first = synthetic_checkpoint(Synthetic("tiny"), tmp_path)
    (first / "model.safetensors").write_bytes(b"kept")

    assert synthetic_checkpoint(Synthetic("tiny"), tmp_path) == first
    assert (first / "model.safetensors").read_bytes() == b"kept"


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = synthetic_checkpoint(Synthetic("tiny"), tmp_path)
    (folder / "synthetic.json").unlink()

    with pytest.raises(CheckpointError, match=r"expected a new or empty folder"):
        synthetic_checkpoint(Synthetic("tiny"), tmp_path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    folder = synthetic_checkpoint(Synthetic("tiny"), tmp_path)
    mark = json.loads((folder / "synthetic.json").read_text())
    (folder / "synthetic.json").write_text(json.dumps({**mark, "version": 0}))

    with pytest.raises(CheckpointError, match=r"of version 1, found another; remove the folder$"):
        synthetic_checkpoint(Synthetic("tiny"), tmp_path)


def test_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    single = synthetic_checkpoint(Synthetic("tiny"), tmp_path / "single")
    sharded = synthetic_checkpoint(Synthetic("tiny"), tmp_path / "sharded", max_shard_bytes=20_000)

    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert stored(sharded) == stored(single)
    one, many = open_checkpoint(single), open_checkpoint(sharded)
    assert one.codes_sha256() == many.codes_sha256()
    assert one.scales_sha256() == many.scales_sha256()


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")  # as shutil's
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10, 10, 2**30))

    # 6.75 GiB and a shard of 1 GiB.
    with pytest.raises(
        CheckpointError, match=r"expected 7\.8 GiB of free disk for .*, found 1\.0 GiB; .* --dir$"
    ):
        synthetic_checkpoint(Synthetic("llama-2-13b"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_default_folder_is_in_the_cache_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QZO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert default_folder() == tmp_path / "qzo" / "synthetic"


def test_group_sizes_are_chosen_as_checkpoints_have_them() -> None:
    names = [Synthetic(shape, kind).name for shape in sorted(SHAPES) for kind in FORMATS]

    assert [name.split("-seed")[0] for name in names] == [
        "llama-2-13b-gptq-g128",
        "llama-2-13b-nf4-g64",
        "llama-2-70b-gptq-g128",
        "llama-2-70b-nf4-g64",
        "llama-2-7b-gptq-g128",
        "llama-2-7b-nf4-g64",
        "llama-3.1-8b-gptq-g128",
        "llama-3.1-8b-nf4-g64",
        "qwen2.5-14b-gptq-g128",
        "qwen2.5-14b-nf4-g64",
        "qwen2.5-32b-gptq-g128",
        "qwen2.5-32b-nf4-g64",
        "qwen2.5-7b-gptq-g128",
        "qwen2.5-7b-nf4-g64",
        "small-gptq-g128",
        "small-nf4-g64",
        "smollm2-135m-gptq-g64",
        "smollm2-135m-nf4-g64",
        "tiny-gptq-g64",
        "tiny-nf4-g64",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": "gpt-5"}, r"^shape: expected one of llama-2-7b, .*, got 'gpt-5'$"),
        ({"format": "awq"}, r"^format: expected gptq or nf4, got 'awq'$"),
        ({"group_size": 48}, r"^group_size: expected a divisor of .*, got 48$"),
        ({"format": "nf4", "group_size": 32}, r"^group_size: expected 64, got 32$"),
        ({"num_layers": 0}, r"^num_layers: expected a number above 0, got 0$"),
        ({"seed": -1}, r"^seed: expected a number of at least 0, got -1$"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, object], message: str) -> None:
    keys: dict[str, object] = {"shape": "tiny", **values}
    with pytest.raises(ConfigError, match=message):
        Synthetic(**keys)  # type: ignore[arg-type]  # as a user might
