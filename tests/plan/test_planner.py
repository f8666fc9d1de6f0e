"""The planner against plain arithmetic, and against files that the original tools wrote."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gptq_files import write_gptq
from support.models import ARCHITECTURES, tiny_model
from support.runs import VARIANT
from torch import Tensor

import qzo
from quantizers.errors import FormatError
from qzo.bench.batches import random_examples
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.data.examples import from_encoded
from qzo.errors import CheckpointError, ConfigError
from qzo.method.trained_vector import Scales
from qzo.model.load import trained_layers
from qzo.model.memory import parse_memory
from qzo.objective.loss import Objective
from qzo.plan import table as parts
from qzo.plan.activation_trace import backward_bytes_per_row
from qzo.plan.planner import Plan, plan
from qzo.plan.shapes import build_skeleton
from qzo.plan.sizes import assumed_quantization
from qzo.quantize.quantize import quantize
from qzo.quantize.settings import QuantizeSettings

GIB = 2**30
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LLAMA_2_13B = {
    "model_type": "llama",
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "intermediate_size": 13824,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
TOY = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 320,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def write_config(folder: Path, config: dict[str, Any], quantization: dict[str, Any] | None) -> Path:
    extra = {} if quantization is None else {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config | extra))
    return folder


def sizes(result: Plan) -> dict[str, int]:
    return {part.name: part.bytes for part in result.parts}


def test_llama_2_13b_agrees_with_a_hand_calculation_and_fits_24_gib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "find_spec", lambda _: None)  # no Triton
    folder = write_config(tmp_path, LLAMA_2_13B, GPTQ)

    result = plan(folder, batch_size=16, seq_len=512, memory_bytes=24 * GIB)

    # A layer has q, k, v, o (5120 x 5120), gate, up (13824 x 5120) and down (5120 x 13824).
    weights = 40 * (4 * 5120 * 5120 + 3 * 13824 * 5120)
    by_hand = (
        weights / 2  # codes
        + weights / 128 / 2  # zero points: 4 bits a group
        + weights / 128 * 2  # scales, fp16
        + 40 * (6 * 5120 + 13824) * 4  # g_idx: six layers read 5120 columns, down reads 13824
        + 40 * (4 * 5120 + 2 * 13824 + 5120) * 4  # master: a number an output row
        + 2 * 32000 * 5120 * 2  # embeddings and head, fp16 as in the file
        + (2 * 40 + 1) * 5120 * 4  # norms
        + 800 * 5120 * 4.5  # a tile of the attention layers: at most 4 Mi elements, in runs of 32
        # rows; the rearranged codes take half a byte
        # Peak in the MLP: embeddings, layer input, residual and normed input; activated gate, up,
        # and their product.
        + 2 * 16 * 512 * (4 * 5120 + 3 * 13824) * 4
        + 32 * 2**18 * 4  # 32 shifted vectors, 2^18 elements at a time
        + 13824 * 40 * 4  # the scales of an MLP layer in fp32
        + 503 * 1024 * 1024  # the measured process and what its allocator keeps
    )
    assert result.peak_bytes == pytest.approx(by_hand, rel=0.02)
    assert result.peak_bytes == pytest.approx(11.09 * GIB, rel=0.001)
    assert result.verdict == "yes"


@pytest.mark.slow
def test_llama_2_13b_has_the_published_counts(tmp_path: Path) -> None:
    result = plan(write_config(tmp_path, LLAMA_2_13B, GPTQ), coordinates="absolute")

    assert result.num_quantized_weights == 12_687_769_600
    assert result.num_scales == result.num_trained == 99_123_200
    assert result.checkpoint_bytes == pytest.approx(6.75 * GIB, rel=0.002)
    assert sizes(result)["master"] == 4 * 99_123_200


@pytest.mark.slow
def test_llama_2_13b_in_nf4_counts_a_block_of_64(tmp_path: Path) -> None:
    result = plan(write_config(tmp_path, LLAMA_2_13B, NF4))

    assert result.num_scales == 198_246_400
    assert result.checkpoint_bytes == pytest.approx(7.26 * GIB, rel=0.002)


def test_gptq_bytes_equal_those_of_a_file_from_gptqmodel(tmp_path: Path) -> None:
    result = plan(write_config(tmp_path, TOY, GPTQ))

    # Bytes by tensor name in a checkpoint of this model, written by gptqmodel 7.6.0.
    found = sizes(result)
    assert found["codes"] == 655_360
    assert found["zeros"] == 5_120
    assert found["base scales"] == 20_480
    assert found["g_idx"] == 16_384
    assert result.checkpoint_bytes == 1_027_584


def test_nested_nf4_bytes_equal_those_of_a_file_from_bitsandbytes(tmp_path: Path) -> None:
    nested = NF4 | {"bnb_4bit_use_double_quant": True}
    result = plan(write_config(tmp_path, TOY | {"num_hidden_layers": 1}, nested))

    # Bytes by tensor name, written by transformers 5.23 with bitsandbytes 0.50.2.
    found = sizes(result)
    assert found["codes"] == 327_680
    assert found["base scales"] == 10_240 + 160  # absmax and nested_absmax
    assert found["un-nested scales"] == 4 * 10_240
    tables = 448 + 7_168 + 1_192  # quant_map, nested_quant_map, quant_state: left out
    assert result.checkpoint_bytes == 676_104 - tables


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_codes_take_their_bits(tmp_path: Path, bits: int) -> None:
    result = plan(write_config(tmp_path, TOY, GPTQ | {"bits": bits}))

    assert sizes(result)["codes"] == 2 * (4 * 256 * 256 + 3 * 512 * 256) * bits // 8


def test_asymmetric_zero_points_are_also_counted_unpacked(tmp_path: Path) -> None:
    result = plan(write_config(tmp_path, TOY, GPTQ | {"sym": False}))

    assert sizes(result)["zeros"] == 10_240 // 2 + 10_240  # half a byte, and a byte, a group


def test_one_group_a_row_has_one_scale_a_row(tmp_path: Path) -> None:
    result = plan(write_config(tmp_path, TOY, GPTQ | {"group_size": -1}))

    assert result.num_scales == 2 * (4 * 256 + 2 * 512 + 256)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
@pytest.mark.parametrize("num_key_value_heads", [1, 4])
@pytest.mark.parametrize("seq_len", [7, 64])
def test_llama_activations_are_the_closed_form(
    tmp_path: Path, dtype: str, size: int, num_key_value_heads: int, seq_len: int
) -> None:
    config = TOY | {"num_key_value_heads": num_key_value_heads, "intermediate_size": 768}

    result = plan(write_config(tmp_path, config, GPTQ), batch_size=3, seq_len=seq_len, dtype=dtype)

    # Embeddings, layer input, residual, normed input; activated gate, up, and their product.
    assert sizes(result)["activations"] == 2 * 3 * seq_len * (4 * 256 + 3 * 768) * size


@pytest.mark.parametrize(
    ("architecture", "coordinates", "num_blocks"),
    [
        *((architecture, "row", 2) for architecture in ARCHITECTURES),
        *(("llama", coordinates, 1) for coordinates in ("row", "column", "rank_one", "relative")),
    ],
)
def test_a_backward_is_traced_as_what_autograd_keeps(
    tmp_path: Path, architecture: str, coordinates: Any, num_blocks: int
) -> None:
    write_gptq(tmp_path, tiny_model(architecture, num_layers=3), VARIANT)
    model = qzo.load(tmp_path)
    layers = trained_layers(model, None)
    scales = Scales.of_layers(layers, coordinates=coordinates, direction="rademacher")
    live = layers[0].live
    last = [i for i, x in enumerate(scales.names) if f".{3 - num_blocks}." in x or ".2." in x]
    objective = Objective(
        model, live, scales, from_encoded(random_examples([40, 40], 64)), batch_size=2
    )
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective.gradient(objective.batch(0), last)

    of_tokens = [x.untyped_storage().nbytes() for x in kept.values() if x.numel() >= 2 * 40 * 16]
    skeleton = build_skeleton(model.config.to_dict(), torch.float32)
    names = [scales.names[place] for place in last]
    traced = backward_bytes_per_row(skeleton, 40, names, coordinates)
    # Beside what is kept until the backward there is what it works on.
    assert 0.9 * sum(of_tokens) <= 2 * traced <= 1.6 * sum(of_tokens)


def test_a_backward_grows_with_its_blocks_and_has_moments(tmp_path: Path) -> None:
    folder = write_config(tmp_path, TOY, GPTQ)

    none, one, two = (
        sizes(plan(folder, num_probes=1, seq_len=2048, first_order_blocks=count))["backward"]
        for count in range(3)
    )

    assert none == 0
    rows = 4 * 256 + 2 * 512 + 256  # of a block
    # Kept of a block at least: the outputs of its seven layers before their multipliers.
    assert two - one > 16 * 2048 * 4 * rows + 16 * rows
    assert one > 16 * rows


def test_more_exact_blocks_than_there_are_is_refused(tmp_path: Path) -> None:
    message = r"^first_order_blocks: expected 0 to 2, the blocks there are, got 3$"
    with pytest.raises(ConfigError, match=message):
        plan(write_config(tmp_path, TOY, GPTQ), first_order_blocks=3)


def test_logits_count_where_they_exceed_the_activations(tmp_path: Path) -> None:
    folder = write_config(tmp_path, TOY | {"vocab_size": 50_000}, GPTQ)
    result = plan(folder, batch_size=3, seq_len=16, answer_len=16)

    logits = 6 * 16 * 50_000 * 4 + 50_000 * 8
    assert sizes(result)["logits"] == logits - sizes(result)["activations"]
    assert sizes(plan(folder, batch_size=3, seq_len=4096))["logits"] == 0


@pytest.mark.parametrize(("dtype", "in_fp32"), [("float32", 8), ("float16", 8 * 671)])
def test_logits_of_long_answers_exist_in_chunks(tmp_path: Path, dtype: str, in_fp32: int) -> None:
    folder = write_config(tmp_path, TOY | {"vocab_size": 50_000}, GPTQ)
    device = "cpu" if dtype == "float32" else "cuda"
    result = plan(folder, batch_size=3, seq_len=200, answer_len=200, device=device, dtype=dtype)

    rows = 2**25 // 50_000  # of 1,200
    logits = rows * 50_000 * (4 if dtype == "float32" else 2) + 50_000 * in_fp32
    assert sizes(result)["logits"] == logits - sizes(result)["activations"]


@pytest.mark.parametrize(("seq_len", "kept"), [(8, 0.75 * 48 * 3328 * 4), (4096, 110 * 2**20)])
def test_the_allocator_keeps_a_share_of_few_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seq_len: int, kept: float
) -> None:
    monkeypatch.setattr(parts, "find_spec", lambda _: None)
    folder = write_config(tmp_path, TOY | {"intermediate_size": 768}, GPTQ)
    result = plan(folder, batch_size=3, seq_len=seq_len)
    assert sizes(result)["framework"] == parts.CPU_PROCESS_BYTES + kept


def test_triton_counts_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_config(tmp_path, TOY, GPTQ)
    monkeypatch.setattr(parts, "find_spec", lambda _: None)
    without = plan(folder).peak_bytes
    monkeypatch.setattr(parts, "find_spec", lambda name: name == "triton" or None)
    assert plan(folder).peak_bytes == without + parts.TRITON_BYTES


def test_tied_head_costs_nothing(tmp_path: Path) -> None:
    result = plan(write_config(tmp_path, TOY | {"tie_word_embeddings": True}, GPTQ))

    assert sizes(result)["head"] == 0
    assert sizes(result)["embeddings"] == 320 * 256 * 2  # bfloat16, as in the file


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 128, "n_layer": 1, "n_head": 2, "vocab_size": 100}
    message = r"^config\.json: expected linear layers to quantize, found none$"
    with pytest.raises(ConfigError, match=message):
        plan(write_config(tmp_path, config, GPTQ))


@pytest.mark.parametrize(
    ("quantization", "num_rows"),
    [
        (GPTQ | {"dynamic": {r"-:.*\.mlp\..*": {}}}, 2 * 4 * 256),
        (GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"]]}, 2 * 256),
        (GPTQ | {"lm_head": True}, 2 * (4 * 256 + 2 * 512 + 256) + 320),
        (NF4 | {"llm_int8_skip_modules": ["lm_head", "mlp", "o_proj"]}, 2 * 3 * 256 + 2 * 1280),
        (NF4 | {"llm_int8_skip_modules": ["lm_head", "model.layers.0"]}, 4 * 256 + 1280),
    ],
    ids=["dynamic", "listed", "quantized head", "skipped suffix", "skipped layer"],
)
def test_layers_kept_in_floating_point_are_not_counted_as_codes(
    tmp_path: Path, quantization: dict[str, Any], num_rows: int
) -> None:
    result = plan(write_config(tmp_path, TOY, quantization))

    assert result.num_trained == num_rows


def test_a_float_model_is_planned_as_gptq_and_says_so(tmp_path: Path) -> None:
    result = plan(write_config(tmp_path, TOY, None))

    assert sizes(result)["codes"] == 655_360
    assert (
        "config.json has no quantization_config; assumed gptq, 4 bits, group 128." in result.notes
    )


def test_an_assumed_format_is_used(tmp_path: Path) -> None:
    result = plan(write_config(tmp_path, TOY, None), assumed=assumed_quantization("nf4"))

    assert result.num_scales == result.num_quantized_weights // 64


def test_quantize_config_beside_the_config_is_read(tmp_path: Path) -> None:
    write_config(tmp_path, TOY, None)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 8, "group_size": 64}))

    result = plan(tmp_path / "config.json")

    assert (result.quantization.bits, result.quantization.group_size) == (8, 64)


def test_too_large_a_batch_is_split_into_the_largest_divisor_that_fits(tmp_path: Path) -> None:
    folder = write_config(tmp_path, TOY, GPTQ)
    peaks = {n: plan(folder, batch_size=n).peak_bytes for n in (1, 2, 3, 4, 6, 12)}

    result = plan(folder, batch_size=12, memory_bytes=peaks[6] - 1)

    assert result.verdict == (
        "yes with per_device_train_batch_size 4 and gradient_accumulation_steps 3"
    )
    assert (result.per_device_train_batch_size, result.gradient_accumulation_steps) == (4, 3)
    assert peaks[4] < peaks[6] - 1 < result.peak_bytes == peaks[12]
    assert result.smallest_peak_bytes == peaks[1]


def test_memory_below_one_example_is_a_no(tmp_path: Path) -> None:
    result = plan(write_config(tmp_path, TOY, GPTQ), memory_bytes=GIB // 4)

    assert result.verdict == "no"
    assert result.per_device_train_batch_size is None
    assert result.gradient_accumulation_steps is None


def test_without_a_memory_there_is_no_verdict(tmp_path: Path) -> None:
    assert plan(write_config(tmp_path, TOY, GPTQ)).verdict is None


@pytest.mark.parametrize("block", [32, 64, 128])
def test_the_block_of_a_bitsandbytes_checkpoint_is_that_of_its_files(
    tmp_path: Path, block: int
) -> None:
    tiny_model().save_pretrained(tmp_path / "float")
    settings = QuantizeSettings(format="nf4", group_size=block)
    quantize(tmp_path / "float", tmp_path / "nf4", settings)

    # 64 or 96 inputs a row: blocks above 32 cross rows, so scales are trained one by one
    result = plan(tmp_path / "nf4", coordinates="relative", seq_len=8)

    stored = open_checkpoint(tmp_path / "nf4")
    assert result.quantization.group_size == block
    assert result.num_scales == sum(stored.weight(layer).scales.numel() for layer in stored.layers)
    assumed = assumed_quantization("nf4", group_size=block)
    of_float = plan(tmp_path / "float", assumed=assumed, coordinates="relative", seq_len=8)
    assert of_float.parts == result.parts
    if block == 32:
        usual = plan(tmp_path / "float", assumed=assumed_quantization("nf4"), seq_len=8)
        assert usual.quantization.group_size == 32  # what quantize makes of it


@pytest.mark.parametrize(
    "keys",
    [
        {"modules": ["v_proj", "o_proj"]},
        {"num_blocks": 1},
        {"depth": (0.0, 0.5)},
        {"depth": (0.4, 1.0), "modules": ["down_proj"]},
        {},
    ],
)
def test_as_many_values_are_planned_as_are_trained(tmp_path: Path, keys: dict[str, Any]) -> None:
    write_gptq(tmp_path, tiny_model(num_layers=3), VARIANT)
    layers = trained_layers(
        qzo.load(tmp_path), keys.get("num_blocks"), keys.get("modules"), depth=keys.get("depth")
    )
    rows = sum(layer.out_features for layer in layers)

    result = plan(tmp_path, seq_len=8, **keys)

    assert result.num_trained == rows
    assert sizes(result)["master"] == 4 * rows
    assert plan(tmp_path, seq_len=8, optimizer="momentum", **keys).peak_bytes == (
        result.peak_bytes + 4 * rows
    )


def test_a_backward_through_fewer_trained_layers_keeps_less(tmp_path: Path) -> None:
    folder = write_config(tmp_path, TOY, GPTQ)
    plan_of = partial(plan, folder, num_probes=1, seq_len=512, first_order_blocks=1)
    names = [f"model.layers.1.self_attn.{name}" for name in ("v_proj", "o_proj")]
    kept = backward_bytes_per_row(build_skeleton(TOY, torch.float32), 512, names, "row")

    few = plan_of(modules=["v_proj", "o_proj"])

    assert f"({kept:,} bytes of the graph" in next(
        part.formula for part in few.parts if part.name == "backward"
    )
    assert few.peak_bytes < plan_of().peak_bytes


def test_a_name_of_no_layer_is_refused(tmp_path: Path) -> None:
    message = (
        r"^modules: expected names of layers, such as 'model\.layers\.1\.mlp\.down_proj', or how "
        r"they end behind a dot, got \['attn'\]; the ends here are down_proj, .*, v_proj$"
    )
    with pytest.raises(ConfigError, match=message):
        plan(write_config(tmp_path, TOY, GPTQ), modules=["attn"])


@pytest.mark.parametrize(("optimizer", "remembered"), [("sgd", 0), ("momentum", 1), ("adam", 2)])
def test_what_an_optimizer_remembers_counts(
    tmp_path: Path, optimizer: str, remembered: int
) -> None:
    folder = write_config(tmp_path, TOY, GPTQ)
    result = plan(folder, coordinates="relative", optimizer=optimizer)

    assert sizes(result)["optimizer"] == remembered * 4 * result.num_scales
    assert (
        result.peak_bytes - plan(folder, coordinates="relative").peak_bytes
        == (sizes(result)["optimizer"])
    )


@pytest.mark.parametrize(
    ("keys", "count"),
    # two blocks of four layers of 256 x 256 and three of 256 x 512; keys and values of five tokens
    [({"lora_rank": 4}, 4 * 2 * (4 * 512 + 3 * 768)), ({"prefix_tokens": 5}, 5 * 2 * 2 * 256)],
)
def test_lora_factors_and_prefixes_count_with_their_moments(
    tmp_path: Path, keys: dict[str, Any], count: int
) -> None:
    folder = write_config(tmp_path, TOY, GPTQ)
    result = plan(folder, num_probes=4, optimizer="adam", **keys)

    assert sizes(result)["LoRA or prefix"] == 4 * count + 4 * 4 * count  # and four shifted ones
    assert sizes(result)["optimizer"] == 2 * 4 * count


def test_every_part_is_listed_and_explained(tmp_path: Path) -> None:
    result = plan(write_config(tmp_path, TOY, NF4), device="cuda", coordinates="relative")

    assert list(sizes(result)) == [
        "codes",
        "zeros",
        "base scales",
        "un-nested scales",
        "g_idx",
        "master",
        "LoRA or prefix",
        "optimizer",
        "embeddings",
        "head",
        "norms, biases, other",
        "dequantized tile",
        "activations",
        "keys and values",
        "logits",
        "backward",
        "directions",
        "framework",
    ]
    assert sum(sizes(result).values()) == result.peak_bytes
    assert all(part.formula for part in result.parts)
    assert "an allowance, not measured" in result.parts[-1].formula


def test_a_plan_is_json(tmp_path: Path) -> None:
    result = plan(write_config(tmp_path, TOY, GPTQ), memory_bytes=GIB)

    again = json.loads(json.dumps(result.to_dict()))

    assert again["verdict"] == "yes"
    assert again["parts"][0]["name"] == "codes"
    assert again["quantization"]["format"] == "gptq"
    assert again["workload"]["batch_size"] == 16


def test_row_coordinates_on_ragged_blocks_are_refused_as_in_training(tmp_path: Path) -> None:
    folder = write_config(tmp_path, TOY | {"intermediate_size": 172}, NF4)
    message = (
        r"^coordinates: expected 'absolute' or 'relative', got 'row': blocks of "
        r"model\.layers\.0\.mlp\.down_proj cross its rows, so a factor per row cannot be written "
        r"back exactly$"
    )
    with pytest.raises(ConfigError, match=message):
        plan(folder, coordinates="row")
    assert plan(folder, coordinates="relative").num_scales == 2 * (4 * 1024 + 3 * 688)


def test_the_planner_knows_the_block_sizes_of_the_forward() -> None:
    from qzo.method import trained_vector as scales
    from qzo.model import linear

    assert linear._TILE_STEP == parts.TILE_STEP
    assert scales.WINDOW == parts.WINDOW


@pytest.mark.parametrize(
    ("quantization", "arguments", "num_bytes"),
    [
        (GPTQ, {}, 4 + 0.5),
        (GPTQ, {"dtype": "float16"}, 4 + 0.5 + 2),
        (GPTQ, {"dtype": "float16", "device": "cuda"}, 4 + 2),
        (GPTQ, {"coordinates": "absolute"}, 4 + 0.5 + 4),
        (GPTQ, {"coordinates": "absolute", "num_probes": 1}, 4 + 0.5),
        (NF4, {"coordinates": "relative"}, 4 + 4),
        (
            NF4,
            {"coordinates": "relative", "dtype": "bfloat16", "device": "cuda"},
            4 + 4 + 2 + 5,
        ),
    ],
)
def test_a_tile_counts_every_buffer(
    tmp_path: Path, quantization: dict[str, Any], arguments: dict[str, Any], num_bytes: float
) -> None:
    result = plan(write_config(tmp_path, TOY, quantization), **arguments)

    assert sizes(result)["dequantized tile"] == 512 * 256 * num_bytes  # a whole layer is smaller


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 1024**3),
        ("8GB", 8_000_000_000),
        ("500MiB", 500 * 1024**2),
        (" 1.5 gb ", 1_500_000_000),
        ("100 B", 100),
        ("2TiB", 2 * 1024**4),
        ("3kB", 3_000),
    ],
)
def test_parse_memory_reads_both_kinds_of_units(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["24", "24G", "GiB", "-3GiB", "0GiB", "", "1e3GiB"])
def test_parse_memory_refuses_other_text(text: str) -> None:
    message = (
        r"^memory: expected a number with a unit, such as 24GiB, 8GB or 500MiB, "
        rf"got '{text}'$"
    )
    with pytest.raises(ConfigError, match=message):
        parse_memory(text)


@pytest.mark.parametrize("key", ["batch_size", "seq_len", "answer_len", "num_probes"])
def test_counts_must_be_above_zero(tmp_path: Path, key: str) -> None:
    folder = write_config(tmp_path, TOY, GPTQ)
    arguments: dict[str, Any] = {key: 0}
    with pytest.raises(ConfigError, match=rf"^{key}: expected a number above 0, got 0$"):
        plan(folder, **arguments)


def test_an_answer_is_no_longer_than_its_text(tmp_path: Path) -> None:
    folder = write_config(tmp_path, TOY, GPTQ)
    assert plan(folder, seq_len=9).workload.answer_len == 9
    assert plan(folder, seq_len=17).workload.answer_len == 16
    with pytest.raises(ConfigError, match=r"^answer_len: expected at most seq_len, 9, got 10$"):
        plan(folder, seq_len=9, answer_len=10)


def test_a_smaller_batch_is_planned_with_the_probes_that_are_then_stacked(tmp_path: Path) -> None:
    folder = write_config(tmp_path, TOY, GPTQ)
    peaks = {n: plan(folder, batch_size=n, evaluations=8).peak_bytes for n in (1, 4, 8, 16)}
    assert peaks[4] == peaks[8] == peaks[16] > peaks[1]  # 32 rows of 512 tokens; 8 at batch 1

    result = plan(folder, batch_size=16, evaluations=8, memory_bytes=peaks[4] - 1)

    assert result.per_device_train_batch_size == 2  # which stacks 16
    assert result.smallest_peak_bytes == peaks[1]


def test_unknown_coordinates_are_refused(tmp_path: Path) -> None:
    message = (
        r"^coordinates: expected one of absolute, relative, row, column, rank_one, got 'cell'$"
    )
    with pytest.raises(ConfigError, match=message):
        plan(write_config(tmp_path, TOY, GPTQ), coordinates="cell")


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    message = r"^dtype: expected one of float32, float16, bfloat16, got 'int8'$"
    with pytest.raises(ConfigError, match=message):
        plan(write_config(tmp_path, TOY, GPTQ), dtype="int8")


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: expected this file, not found$"):
        plan(tmp_path)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    message = (
        r"^config\.json: expected a causal language model that transformers knows, got "
        r"model_type 'ours'; Unrecognized model identifier: ours$"
    )
    with pytest.raises(ConfigError, match=message):
        plan(write_config(tmp_path, {"model_type": "ours"}, GPTQ))


def test_fused_experts_are_refused(tmp_path: Path) -> None:
    config = TOY | {"model_type": "mixtral", "num_local_experts": 2}
    message = (
        r"^config\.json: expected a dense model, got a mixture of experts with the fused tensor "
        r"model\.layers\.0\.\S+; qzo plan cannot tell how a 4-bit checkpoint stores it$"
    )
    with pytest.raises(ConfigError, match=message):
        plan(write_config(tmp_path, config, GPTQ))


def test_another_format_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"^quant_method: expected one of .* got 'awq'; .*$"):
        plan(write_config(tmp_path, TOY, {"quant_method": "awq", "bits": 4}))


def test_assuming_a_format_for_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    message = (
        r"^format, bits, group_size: expected none of them for a checkpoint that is quantized "
        r"already, got nf4 with 4 bits; leave them out$"
    )
    with pytest.raises(ConfigError, match=message):
        plan(write_config(tmp_path, TOY, GPTQ), assumed=assumed_quantization("nf4"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("awq",), r"^format: expected 'gptq', 'nf4' or 'fp4', got 'awq'$"),
        (("gptq", 5), r"^bits: expected one of \(2, 3, 4, 8\) for gptq, got 5$"),
        (("nf4", 8), r"^bits: expected one of \(4,\) for nf4, got 8$"),
        (("gptq", 4, -2), r"^group_size: expected a number above 0, got -2$"),
        (("nf4", 4, 48), r"^group_size: expected one of \(32, 64, .*, 4096\) for nf4, got 48$"),
    ],
)
def test_assumed_quantization_refuses_what_does_not_exist(
    arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        assumed_quantization(*arguments)
