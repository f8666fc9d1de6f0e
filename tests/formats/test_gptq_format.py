import runpy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.gptq_files import (
    GPTQVariant,
    pack_zero_rows,
    random_layer,
    read_layer,
    read_zeros,
    signed,
    unpack_stream,
)
from torch import Tensor

from quantizers import gptq, packing
from quantizers.errors import FormatError
from quantizers.weight import QuantizedWeight, dequantize

IN, OUT = 96, 64

V1_V2 = ("gptq", "gptq_v2")
VARIANTS = {
    **{
        f"{bits}bit-{version}-{'sym' if sym else 'asym'}": GPTQVariant(
            bits=bits, sym=sym, checkpoint_format=version
        )
        for bits in (2, 3, 4, 8)
        for version in V1_V2
        for sym in (True, False)
    },
    **{
        f"{bits}bit-gptqmodel-{version}": GPTQVariant(
            bits=bits, sym=False, checkpoint_format=version, writer="gptqmodel"
        )
        for bits in (2, 3, 4, 8)
        for version in V1_V2
    },
    "desc_act": GPTQVariant(desc_act=True),
    "desc_act-asym": GPTQVariant(desc_act=True, sym=False),
    "one-group": GPTQVariant(group_size=-1, sym=False),
    "ragged": GPTQVariant(group_size=64, sym=False),
    "ragged-desc_act": GPTQVariant(group_size=64, sym=False, desc_act=True),
    "group-wider-than-the-layer": GPTQVariant(group_size=128, sym=False),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def unpack(tensors: dict[str, Tensor], variant: GPTQVariant) -> QuantizedWeight:
    weight = gptq.unpack(tensors, gptq.spec(variant.config()), "layer")
    assert isinstance(weight, QuantizedWeight)
    return weight


def bad_layer(role: str, tensor: Tensor, variant: GPTQVariant | None = None) -> str:
    """Return the error about a layer with one tensor replaced."""
    variant = variant or GPTQVariant()
    tensors = {**random_layer(IN, OUT, variant), role: tensor}
    with pytest.raises(FormatError) as error:
        unpack(tensors, variant)
    return str(error.value)


def bad_config(**changes: Any) -> str:
    """Return the error about a config with some keys changed."""
    with pytest.raises(FormatError) as error:
        gptq.spec({**GPTQVariant().config(), **changes})
    return str(error.value)


def test_every_bits_version_and_symmetry_is_covered() -> None:
    assert len(VARIANTS) == 16 + 8 + 6


@every_variant
def test_dequantize_equals_a_reader_that_works_bit_by_bit(variant: GPTQVariant) -> None:
    tensors = random_layer(IN, OUT, variant)
    assert torch.equal(dequantize(unpack(tensors, variant)), read_layer(tensors, variant))


@pytest.mark.parametrize("bits", [2, 4])
def test_a_torch_without_its_retired_quantization_reads_the_same(
    monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    variant = GPTQVariant(bits=bits, sym=False)
    tensors = random_layer(IN, OUT, variant)
    assert packing.has_fused_unpack(bits, torch.device("cpu"))
    monkeypatch.setattr(torch.ops, "quantized", SimpleNamespace())

    runpy.run_path(packing.__file__)  # importing it looks nothing up

    assert not packing.has_fused_unpack(bits, torch.device("cpu"))
    assert torch.equal(dequantize(unpack(tensors, variant)), read_layer(tensors, variant))


@every_variant
def test_rows_decoded_in_blocks_equal_the_whole(variant: GPTQVariant) -> None:
    weight = unpack(random_layer(IN, OUT, variant), variant)
    scales = weight.scales.float()
    parts = []
    for start, stop in ((0, 1), (1, 33), (33, OUT)):
        rows, buffer = slice(start, stop), torch.full((OUT * IN,), torch.nan)
        decoded = weight.decode(rows, buffer)
        parts.append(weight.apply_scales(decoded, scales, rows, torch.empty(OUT * IN)).clone())
    assert torch.equal(torch.cat(parts), dequantize(weight))


@every_variant
def test_dequantize_takes_other_scales(variant: GPTQVariant) -> None:
    tensors = random_layer(IN, OUT, variant)
    other = random_layer(IN, OUT, variant, seed=7)["scales"]
    want = read_layer({**tensors, "scales": other}, variant)
    assert torch.equal(dequantize(unpack(tensors, variant), other.T.float()), want)


def test_decoding_does_not_change_the_codes() -> None:
    variant = GPTQVariant(bits=3, sym=False)
    tensors = random_layer(IN, OUT, variant)
    before = {role: tensor.clone() for role, tensor in tensors.items()}
    dequantize(unpack(tensors, variant))
    assert all(torch.equal(tensors[role], before[role]) for role in before)


def test_unpack_does_not_copy_the_codes() -> None:
    variant = GPTQVariant()
    tensors = random_layer(IN, OUT, variant)
    weight = gptq.unpack(tensors, gptq.spec(variant.config()), "layer")
    assert weight.qweight.data_ptr() == tensors["qweight"].data_ptr()


def test_a_missing_g_idx_means_consecutive_groups() -> None:
    variant = GPTQVariant(sym=False)
    tensors = random_layer(IN, OUT, variant)
    del tensors["g_idx"]
    assert torch.equal(dequantize(unpack(tensors, variant)), read_layer(tensors, variant))


def test_a_missing_g_idx_may_leave_a_ragged_group() -> None:
    variant = GPTQVariant(group_size=64, sym=False)
    tensors = random_layer(IN, OUT, variant)
    del tensors["g_idx"]
    assert torch.equal(dequantize(unpack(tensors, variant)), read_layer(tensors, variant))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_may_have_any_float_dtype(dtype: torch.dtype) -> None:
    tensors = random_layer(IN, OUT, GPTQVariant())
    tensors["scales"] = tensors["scales"].to(dtype)
    got = dequantize(unpack(tensors, GPTQVariant()))
    assert torch.equal(got, read_layer(tensors, GPTQVariant()))


def test_zeros_may_differ_between_groups_alone() -> None:
    variant = GPTQVariant(sym=False)
    tensors = random_layer(IN, OUT, variant)
    tensors["qzeros"] = pack_zero_rows([[3] * OUT, [5] * OUT, [3] * OUT], variant)
    assert torch.equal(dequantize(unpack(tensors, variant)), read_layer(tensors, variant))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_v1_zeros_of_zero_survive_the_borrow_of_their_writer(bits: int) -> None:
    variant = GPTQVariant(bits=bits, sym=False, writer="gptqmodel")
    zeros = [[o % 3 for o in range(OUT)], [0] * OUT, [o % 2 for o in range(OUT)]]
    packed = pack_zero_rows(zeros, variant)
    per_element = [
        [(z + 1) % 2**bits for z in unpack_stream(row, bits, OUT)] for row in packed.tolist()
    ]
    assert per_element != zeros  # a reader that adds one to every element is wrong here
    got = gptq.unpack_zeros(packed, gptq.spec(variant.config()), OUT)
    assert got.tolist() == zeros


@pytest.mark.parametrize("writer", ["auto_gptq", "gptqmodel"])
@pytest.mark.parametrize("version", V1_V2)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_pack_zeros_is_the_inverse_of_unpack_zeros(bits: int, version: str, writer: str) -> None:
    variant = GPTQVariant(bits=bits, sym=False, checkpoint_format=version, writer=writer)
    qzeros, spec = random_layer(IN, OUT, variant)["qzeros"], gptq.spec(variant.config())
    zeros = gptq.unpack_zeros(qzeros, spec, OUT)
    assert zeros.tolist() == read_zeros(qzeros, variant, OUT)
    assert torch.equal(gptq.pack_zeros(zeros.int(), spec), qzeros)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_pack_codes_is_read_by_the_naive_reader(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (IN, 4), generator=generator)
    words = gptq.pack_codes(codes, bits).T.tolist()
    assert [unpack_stream(column, bits, IN) for column in words] == codes.T.tolist()


def test_symmetric_v1_files_hold_sevens() -> None:
    variant = GPTQVariant()
    zeros = torch.full((1, OUT), 8, dtype=torch.int32)
    packed = gptq.pack_zeros(zeros, gptq.spec(variant.config()))
    assert torch.equal(packed, torch.full((1, OUT // 8), 0x77777777, dtype=torch.int32))


@every_variant
def test_repack_scales_gives_back_the_stored_scales(variant: GPTQVariant) -> None:
    tensors = random_layer(IN, OUT, variant)
    repacked = gptq.repack_scales(tensors, unpack(tensors, variant).scales.float(), "layer")
    assert repacked.keys() == tensors.keys()
    for role, tensor in tensors.items():
        assert repacked[role].dtype == tensor.dtype
        assert repacked[role].is_contiguous()
        assert torch.equal(repacked[role], tensor)


def test_repacked_scales_are_read_back_rounded_to_fp16() -> None:
    variant = GPTQVariant(desc_act=True)
    tensors = random_layer(IN, OUT, variant)
    scales = unpack(tensors, variant).scales.float() * 1.2345
    repacked = gptq.repack_scales(tensors, scales, "layer")
    assert torch.equal(unpack(repacked, variant).scales, scales.half())


@pytest.mark.parametrize(("value", "shown"), [(65520.0, "65520.0"), (float("nan"), "nan")])
def test_repack_scales_refuses_what_does_not_fit_fp16(value: float, shown: str) -> None:
    tensors = random_layer(IN, OUT, GPTQVariant())
    message = rf"^layer.scales: expected finite values up to 65504, got {shown}$"
    with pytest.raises(FormatError, match=message):
        gptq.repack_scales(tensors, torch.full((OUT, 3), value), "layer")


def test_export_config_is_a_copy_of_the_config() -> None:
    config = GPTQVariant(sym=False).config()
    assert gptq.export_config(config) == config
    assert gptq.export_config(config) is not config


def test_layers_are_those_with_codes() -> None:
    keys = ["a.0.qweight", "a.0.scales", "norm.weight", "a.1.qweight"]
    assert gptq.layer_names(keys) == ["a.0", "a.1"]


def test_tensor_names_are_the_keys_of_a_layer() -> None:
    assert gptq.tensor_names("a.0", gptq.spec(GPTQVariant().config())) == {
        "qweight": "a.0.qweight",
        "qzeros": "a.0.qzeros",
        "scales": "a.0.scales",
        "g_idx": "a.0.g_idx",
    }


def test_a_weight_moves_to_another_device() -> None:
    variant = GPTQVariant(sym=False, desc_act=True)
    weight = gptq.unpack(random_layer(IN, OUT, variant), gptq.spec(variant.config()), "layer")
    moved = weight.to(torch.device("meta"))
    assert isinstance(moved.zeros, Tensor)
    assert moved.group_index is not None
    tensors = (moved.qweight, moved.zeros, moved.file_scales, moved.group_index)
    assert all(tensor.device.type == "meta" for tensor in tensors)


@pytest.mark.parametrize("bits", [1, 5, 6, 16])
def test_spec_refuses_other_bits(bits: int) -> None:
    assert bad_config(bits=bits) == f"bits: expected one of (2, 3, 4, 8), got {bits}"


@pytest.mark.parametrize("key", ["bits", "group_size"])
@pytest.mark.parametrize("value", [None, "4", 4.0, True])
def test_spec_refuses_sizes_that_are_no_integers(key: str, value: object) -> None:
    message = f"{key}: expected an integer in the quantization config, got {value!r}"
    assert bad_config(**{key: value}) == message


@pytest.mark.parametrize("group_size", [0, -2])
def test_spec_refuses_impossible_group_sizes(group_size: int) -> None:
    message = f"group_size: expected -1 or a positive integer, got {group_size}"
    assert bad_config(group_size=group_size) == message


@pytest.mark.parametrize("name", ["gptq_p", "marlin", "bitblas"])
def test_spec_refuses_other_layouts_by_name(name: str) -> None:
    assert bad_config(checkpoint_format=name) == (
        f"checkpoint_format: expected 'gptq' or 'gptq_v2', got '{name}'; convert the checkpoint "
        "to one of them"
    )


def test_spec_reads_the_layout_under_its_newer_name() -> None:
    config = GPTQVariant().config()
    del config["checkpoint_format"]
    assert gptq.spec({**config, "format": "gptq_v2"}).checkpoint_format == "gptq_v2"


def test_spec_without_a_layout_is_v1() -> None:
    config = GPTQVariant().config()
    del config["checkpoint_format"]
    assert gptq.spec(config).checkpoint_format == "gptq"


def test_spec_without_symmetry_is_symmetric() -> None:
    config = GPTQVariant(sym=False).config()
    assert not gptq.spec(config).is_symmetric
    del config["sym"]
    assert gptq.spec(config).is_symmetric


def test_spec_refuses_words_of_another_width() -> None:
    assert bad_config(pack_dtype="int64") == "pack_dtype: expected 'int32', got 'int64'"


def test_spec_refuses_layers_with_bits_of_their_own() -> None:
    assert bad_config(dynamic={"-:head": {}, "+:.*down.*": {"bits": 8}}) == (
        "dynamic: expected the same bits and group size in every layer, got overrides for "
        "'+:.*down.*'"
    )


def test_spec_allows_layers_that_are_left_out() -> None:
    config = {**GPTQVariant().config(), "dynamic": {"-:.*down.*": {}}}
    assert gptq.spec(config) == gptq.spec(GPTQVariant().config())


@pytest.mark.parametrize("role", ["qweight", "qzeros", "scales"])
def test_unpack_names_a_missing_tensor(role: str) -> None:
    tensors = random_layer(IN, OUT, GPTQVariant())
    del tensors[role]
    message = rf"^layer.{role}: expected this tensor in the checkpoint, not found$"
    with pytest.raises(FormatError, match=message):
        unpack(tensors, GPTQVariant())


def test_unpack_refuses_codes_of_another_dtype() -> None:
    codes = torch.zeros(IN // 8, OUT, dtype=torch.int64)
    assert bad_layer("qweight", codes) == "layer.qweight: expected dtype int32, got int64"


def test_unpack_refuses_zeros_of_another_dtype() -> None:
    zeros = torch.zeros(3, OUT // 8, dtype=torch.float16)
    assert bad_layer("qzeros", zeros) == "layer.qzeros: expected dtype int32, got float16"


def test_unpack_refuses_scales_of_another_dtype() -> None:
    assert bad_layer("scales", torch.zeros(3, OUT, dtype=torch.int8)) == (
        "layer.scales: expected dtype float16 or bfloat16 or float32, got int8"
    )


def test_unpack_refuses_a_g_idx_of_another_dtype() -> None:
    assert bad_layer("g_idx", torch.zeros(IN)) == (
        "layer.g_idx: expected dtype int32 or int64, got float32"
    )


def test_unpack_refuses_codes_that_are_no_matrix() -> None:
    codes = torch.zeros(IN * OUT // 8, dtype=torch.int32)
    assert bad_layer("qweight", codes) == (
        "layer.qweight: expected shape ('any', 'any'), got (768,)"
    )


def test_unpack_refuses_scales_of_another_group_size() -> None:
    assert bad_layer("scales", torch.ones(2, OUT).half()) == (
        "layer.scales: expected shape (3, 64), got (2, 64); are bits 4, group_size 32 right?"
    )


def test_unpack_refuses_zeros_of_another_width() -> None:
    assert bad_layer("qzeros", torch.zeros(3, OUT // 4, dtype=torch.int32)) == (
        "layer.qzeros: expected shape (3, 8), got (3, 16); are bits 4, group_size 32 right?"
    )


def test_unpack_refuses_a_g_idx_of_another_length() -> None:
    index = torch.zeros(IN - 1, dtype=torch.int32)
    assert bad_layer("g_idx", index) == "layer.g_idx: expected shape (96,), got (95,)"


@pytest.mark.parametrize(("group", "low", "high"), [(3, 0, 3), (-1, -1, 2)])
def test_unpack_refuses_a_group_out_of_range(group: int, low: int, high: int) -> None:
    index = random_layer(IN, OUT, GPTQVariant())["g_idx"]
    index[7] = group
    message = f"layer.g_idx: expected groups 0 to 2, got {low} to {high}"
    assert bad_layer("g_idx", index) == message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_unpack_refuses_scales_that_are_not_finite(value: float) -> None:
    scales = random_layer(IN, OUT, GPTQVariant())["scales"]
    scales[1, 5] = value
    message = "layer.scales: expected finite values, got NaN or infinity"
    assert bad_layer("scales", scales) == message


def test_unpack_refuses_codes_of_three_bits_that_end_within_a_run() -> None:
    codes = torch.zeros(IN * 3 // 32 + 1, OUT, dtype=torch.int32)
    assert bad_layer("qweight", codes, GPTQVariant(bits=3)) == (
        "layer.qweight: expected whole runs of words, got 10"
    )


def test_unpack_refuses_a_layer_without_outputs() -> None:
    codes = torch.zeros(IN // 8, 0, dtype=torch.int32)
    assert bad_layer("qweight", codes) == "layer.qweight: expected whole runs of words, got 12"


def test_the_naive_reader_knows_a_word_by_hand() -> None:
    variant = GPTQVariant(checkpoint_format="gptq_v2", group_size=-1)
    tensors = {
        "qweight": signed([[0xFEDCBA98] + [0] * 7]),
        "qzeros": signed([[0x88888888]]),
        "scales": torch.full((1, 8), 0.5).half(),
    }
    assert read_layer(tensors, variant)[0].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
