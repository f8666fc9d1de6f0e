import re
from typing import Any

import pytest
import torch
from support.nf4_files import quantize_layer, read_absmax, read_layer, state_of, state_tensor
from torch import Tensor

from quantizers import nf4
from quantizers.errors import FormatError
from quantizers.weight import QuantizedWeight, dequantize

CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
SPEC = nf4.NF4Spec("nf4")

# in_features 96 is no multiple of 64: its blocks cross rows, and the last one is ragged.
VARIANTS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "fp4": {"quant_type": "fp4"},
    "nf4-double": {"double_quant": True},
    "fp4-double": {"quant_type": "fp4", "double_quant": True},
    "nf4-block-32": {"blocksize": 32},
    "nf4-block-128": {"blocksize": 128, "double_quant": True},
    "nf4-block-4096": {"blocksize": 4096},
    "nf4-bfloat16-storage": {"storage": torch.bfloat16},
    "fp4-float32-storage": {"storage": torch.float32, "quant_type": "fp4"},
}
SHAPES = [(10, 128), (33, 96), (8, 34)]
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make_layer(shape: tuple[int, int] = (10, 128), **options: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    weight[0] = 0  # bitsandbytes divides by the largest magnitude of a block
    return quantize_layer(weight, **options)


def unpack(tensors: dict[str, Tensor]) -> QuantizedWeight:
    weight = nf4.unpack(tensors, SPEC, "layer")
    assert isinstance(weight, QuantizedWeight)
    return weight


def bad_layer(changes: dict[str, Tensor], **options: Any) -> str:
    """Return the error about a layer with some tensors replaced."""
    with pytest.raises(FormatError) as error:
        unpack({**make_layer(**options), **changes})
    return str(error.value)


def bad_state(changes: dict[str, Any], **options: Any) -> str:
    """Return the error about a layer with some fields of its quant_state replaced."""
    tensors = make_layer(**options)
    return bad_layer({"quant_state": state_tensor({**state_of(tensors), **changes})}, **options)


def bad_config(**changes: Any) -> str:
    with pytest.raises(FormatError) as error:
        nf4.spec({**CONFIG, **changes})
    return str(error.value)


@every_shape
@every_variant
def test_dequantize_equals_a_reader_that_works_value_by_value(
    options: dict[str, Any], shape: tuple[int, int]
) -> None:
    tensors = make_layer(shape, **options)
    assert torch.equal(dequantize(unpack(tensors)), read_layer(tensors))


@every_shape
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantize_equals_bitsandbytes(quant_type: str, shape: tuple[int, int]) -> None:
    from bitsandbytes import functional

    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    packed, state = functional.quantize_4bit(weight, quant_type=quant_type)
    # One long row: bitsandbytes 0.50.2 restarts blocks at every row in its AVX512 dequantization,
    # though its quantization and its portable dequantization let them cross rows.
    state.shape = torch.Size([1, weight.numel()])
    want = functional.dequantize_4bit(packed, state).view(shape)
    assert torch.equal(dequantize(unpack(quantize_layer(weight, quant_type=quant_type))), want)


@every_variant
def test_double_quantization_is_un_nested_as_bitsandbytes_does(options: dict[str, Any]) -> None:
    from bitsandbytes import functional

    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(160, 128, generator=generator)  # 640 blocks of 32: three of 256
    options = {**options, "double_quant": True}
    tensors = quantize_layer(weight, **options)
    del options["double_quant"], tensors["quant_state"]
    _, state = functional.quantize_4bit(
        weight,
        compress_statistics=True,
        quant_type=options.get("quant_type", "nf4"),
        blocksize=options.get("blocksize", 64),
    )
    want = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    got = unpack(quantize_layer(weight, double_quant=True, **options)).scales.reshape(-1)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@every_shape
@every_variant
def test_rows_decoded_in_blocks_equal_the_whole(
    options: dict[str, Any], shape: tuple[int, int]
) -> None:
    weight = unpack(make_layer(shape, **options))
    scales, size, parts = weight.scales, shape[0] * shape[1], []
    for start, stop in ((0, 1), (1, 4), (4, shape[0])):
        rows, buffer = slice(start, stop), torch.full((size,), torch.nan)
        decoded = weight.decode(rows, buffer)
        parts.append(weight.apply_scales(decoded, scales, rows, torch.empty(size)).clone())
    assert torch.equal(torch.cat(parts), dequantize(weight))


def test_rows_of_an_odd_number_of_codes_start_within_a_byte() -> None:
    tensors = make_layer((4, 31))
    weight = unpack(tensors)
    decoded = weight.decode(slice(1, 3), torch.empty(4 * 31))
    rows = weight.apply_scales(decoded, weight.scales, slice(1, 3), torch.empty(4 * 31))
    assert torch.equal(rows, read_layer(tensors)[1:3])


@pytest.mark.parametrize(
    ("in_features", "blocksize", "crosses"), [(128, 64, False), (96, 64, True), (32, 64, True)]
)
def test_blocks_cross_rows_where_they_do_not_divide_them(
    in_features: int, blocksize: int, crosses: bool
) -> None:
    weight = unpack(make_layer((8, in_features), blocksize=blocksize))
    assert weight.blocks_cross_rows == crosses
    num_blocks = -(-8 * in_features // blocksize)
    assert weight.scales.shape == ((1, num_blocks) if crosses else (8, num_blocks // 8))


@every_shape
@every_variant
def test_dequantize_takes_other_scales(options: dict[str, Any], shape: tuple[int, int]) -> None:
    tensors = make_layer(shape, **options)
    weight = unpack(tensors)
    other = weight.scales * 1.25
    want = read_layer({**tensors, "absmax": other.reshape(-1)})
    assert torch.equal(dequantize(weight, other), want)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_unpack_does_not_copy_the_codes(storage: torch.dtype) -> None:
    tensors = make_layer(storage=storage)
    weight = nf4.unpack(tensors, SPEC, "layer")
    assert weight.packed.data_ptr() == tensors["weight"].data_ptr()


def test_a_weight_moves_to_another_device() -> None:
    moved = nf4.unpack(make_layer(), SPEC, "layer").to(torch.device("meta"))
    assert all(t.device.type == "meta" for t in (moved.packed, moved.codebook, moved.absmax))


@every_variant
def test_repack_scales_gives_back_plain_tensors(options: dict[str, Any]) -> None:
    tensors = make_layer(**{**options, "double_quant": False})
    repacked = nf4.repack_scales(tensors, unpack(tensors).scales, "layer")
    assert repacked.keys() == tensors.keys()
    for role, tensor in tensors.items():
        assert repacked[role].dtype == tensor.dtype
        assert torch.equal(repacked[role].view(torch.uint8), tensor.view(torch.uint8))


@every_variant
def test_repack_scales_un_nests(options: dict[str, Any]) -> None:
    tensors = make_layer(**{**options, "double_quant": True})
    repacked = nf4.repack_scales(tensors, unpack(tensors).scales, "layer")
    plain = make_layer(**{**options, "double_quant": False})
    assert repacked.keys() == plain.keys()
    assert state_of(repacked) == state_of(plain)
    assert repacked["absmax"].tolist() == read_absmax(tensors)
    assert torch.equal(read_layer(repacked), read_layer(tensors))


def test_bitsandbytes_reads_the_repacked_quant_state() -> None:
    from bitsandbytes import functional

    tensors = make_layer(double_quant=True)
    repacked = nf4.repack_scales(tensors, unpack(tensors).scales, "layer")
    repacked["quant_state.bitsandbytes__nf4"] = repacked.pop("quant_state")
    packed = repacked.pop("weight")
    state = functional.QuantState.from_dict(repacked, device=torch.device("cpu"))
    assert not state.nested
    assert torch.equal(functional.dequantize_4bit(packed, state), read_layer(tensors))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_repack_scales_refuses_what_is_not_finite(value: float) -> None:
    message = r"^layer.weight.absmax: expected finite values, got NaN or infinity$"
    with pytest.raises(FormatError, match=message):
        nf4.repack_scales(make_layer(), torch.full((10, 2), value), "layer")


def test_export_config_switches_double_quantization_off() -> None:
    config = {**CONFIG, "bnb_4bit_use_double_quant": True}
    assert nf4.export_config(config) == {**CONFIG, "bnb_4bit_use_double_quant": False}
    assert config["bnb_4bit_use_double_quant"] is True


def test_layers_are_those_with_a_quant_state() -> None:
    keys = [
        "a.0.weight",
        "a.0.weight.quant_state.bitsandbytes__nf4",
        "norm.weight",
        "a.1.weight.quant_state.bitsandbytes__fp4",
    ]
    assert nf4.layer_names(keys) == ["a.0", "a.1"]


def test_tensor_names_are_the_keys_of_a_layer() -> None:
    assert nf4.tensor_names("a", nf4.NF4Spec("fp4")) == {
        "weight": "a.weight",
        "absmax": "a.weight.absmax",
        "quant_map": "a.weight.quant_map",
        "nested_absmax": "a.weight.nested_absmax",
        "nested_quant_map": "a.weight.nested_quant_map",
        "quant_state": "a.weight.quant_state.bitsandbytes__fp4",
    }


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_spec_reads_the_quant_type(quant_type: str) -> None:
    assert nf4.spec({**CONFIG, "bnb_4bit_quant_type": quant_type}) == nf4.NF4Spec(quant_type)


def test_spec_refuses_eight_bits() -> None:
    assert bad_config(load_in_4bit=False, load_in_8bit=True) == (
        "load_in_4bit: expected true, got false; bitsandbytes checkpoints of 8 bits have no "
        "continuous group scales to train"
    )


def test_spec_refuses_another_quant_type() -> None:
    message = "bnb_4bit_quant_type: expected 'nf4' or 'fp4', got 'af4'"
    assert bad_config(bnb_4bit_quant_type="af4") == message


@pytest.mark.parametrize(
    ("role", "key"),
    [
        ("weight", "layer.weight"),
        ("absmax", "layer.weight.absmax"),
        ("quant_map", "layer.weight.quant_map"),
        ("quant_state", "layer.weight.quant_state.bitsandbytes__nf4"),
    ],
)
def test_unpack_names_a_missing_tensor(role: str, key: str) -> None:
    tensors = make_layer()
    del tensors[role]
    message = rf"^{key}: expected this tensor in the checkpoint, not found$"
    with pytest.raises(FormatError, match=message):
        unpack(tensors)


@pytest.mark.parametrize("role", ["nested_absmax", "nested_quant_map"])
def test_unpack_names_a_missing_nested_tensor(role: str) -> None:
    tensors = make_layer(double_quant=True)
    del tensors[role]
    message = rf"^layer.weight.{role}: expected this tensor beside a uint8 absmax, not found$"
    with pytest.raises(FormatError, match=message):
        unpack(tensors)


def test_unpack_refuses_a_quant_state_of_another_shape() -> None:
    assert bad_state({"shape": [20, 128]}) == (
        "layer.weight: expected 1280 bytes for shape (20, 128), got 640"
    )


def test_unpack_refuses_a_quant_state_of_another_block_size() -> None:
    assert bad_state({"blocksize": 32}) == (
        "layer.weight.absmax: expected 40 values for blocksize 32, got 20"
    )


@pytest.mark.parametrize(
    "shape", [None, [1280], [10, 128, 1], [10, -128], [0, 128], [10.0, 128], "10x128"]
)
def test_unpack_refuses_a_quant_state_whose_shape_is_no_matrix(shape: object) -> None:
    assert bad_state({"shape": shape}) == (
        f"layer.weight.quant_state: expected a shape of two sizes, got {shape!r}"
    )


@pytest.mark.parametrize("blocksize", [None, 0, -64, "64"])
def test_unpack_refuses_a_quant_state_without_a_block_size(blocksize: object) -> None:
    assert bad_state({"blocksize": blocksize}) == (
        f"layer.weight.quant_state: expected a positive blocksize, got {blocksize!r}"
    )


def test_unpack_refuses_a_quant_state_that_is_no_json() -> None:
    stored = torch.tensor(list(b"{nf4}"), dtype=torch.uint8)
    assert bad_layer({"quant_state": stored}) == (
        "layer.weight.quant_state: expected JSON, got Expecting property name enclosed in double "
        "quotes: line 1 column 2 (char 1)"
    )


def test_unpack_refuses_a_quant_state_of_nested_brackets() -> None:
    stored = torch.full((4096,), ord("["), dtype=torch.uint8)
    message = bad_layer({"quant_state": stored})  # how deep Python goes depends on its version
    assert re.fullmatch(
        r"layer.weight.quant_state: expected JSON, got (maximum recursion|Expecting value).*",
        message,
    )


def test_unpack_refuses_a_quant_state_that_is_no_object() -> None:
    stored = torch.tensor(list(b"[64]"), dtype=torch.uint8)
    message = "layer.weight.quant_state: expected a JSON object, got list"
    assert bad_layer({"quant_state": stored}) == message


@pytest.mark.parametrize(
    "stored", [torch.zeros(8), torch.zeros(4097, dtype=torch.uint8)], ids=["dtype", "size"]
)
def test_unpack_refuses_a_quant_state_that_is_no_short_text(stored: Tensor) -> None:
    message = "layer.weight.quant_state: expected up to 4096 bytes of JSON"
    assert bad_layer({"quant_state": stored}) == message


@pytest.mark.parametrize("field", ["nested_blocksize", "nested_offset"])
def test_unpack_refuses_double_quantization_without_its_fields(field: str) -> None:
    tensors = make_layer(double_quant=True)
    state = {**state_of(tensors), "nested_offset": 0.5, field: None}
    shown = (state["nested_blocksize"], state["nested_offset"])
    assert bad_state(state, double_quant=True) == (
        "layer.weight.quant_state: expected nested_blocksize and nested_offset, got "
        f"{shown[0]!r} and {shown[1]!r}"
    )


@pytest.mark.parametrize("offset", [float("nan"), float("inf")])
def test_unpack_refuses_an_offset_that_is_not_finite(offset: float) -> None:
    assert bad_state({"nested_offset": offset}, double_quant=True) == (
        "layer.weight.quant_state: expected nested_blocksize and nested_offset, got "
        f"256 and {offset!r}"
    )


def test_unpack_refuses_another_number_of_nested_scales() -> None:
    assert bad_layer({"nested_absmax": torch.ones(2)}, double_quant=True) == (
        "layer.weight.nested_absmax: expected one value for 256 blocks, got 2 for 20"
    )


def test_unpack_refuses_another_number_of_nested_codes() -> None:
    assert bad_layer({"nested_quant_map": torch.ones(16)}, double_quant=True) == (
        "layer.weight.nested_quant_map: expected 256 values, got 16"
    )


def test_unpack_refuses_another_number_of_codebook_values() -> None:
    message = "layer.weight.quant_map: expected 16 values, got 8"
    assert bad_layer({"quant_map": torch.ones(8)}) == message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_unpack_refuses_absmax_of_another_dtype(dtype: torch.dtype) -> None:
    absmax = torch.full((20,), 120).to(dtype)
    name = str(dtype).removeprefix("torch.")
    assert bad_layer({"absmax": absmax}, double_quant=True) == (
        f"layer.weight.absmax: expected dtype float32 or uint8, got {name}"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_unpack_refuses_an_absmax_that_is_not_finite(value: float) -> None:
    absmax = make_layer()["absmax"]
    absmax[3] = value
    message = "layer.weight.absmax: expected finite values, got NaN or infinity"
    assert bad_layer({"absmax": absmax}) == message


def test_unpack_refuses_a_nested_absmax_that_is_not_finite() -> None:
    message = "layer.weight.absmax: expected finite values, got NaN or infinity"
    nested = torch.full((1,), torch.nan)
    assert bad_layer({"nested_absmax": nested}, double_quant=True) == message


def test_unpack_refuses_a_codebook_that_is_not_finite() -> None:
    message = "layer.weight.quant_map: expected finite values, got NaN or infinity"
    assert bad_layer({"quant_map": torch.full((16,), torch.nan)}) == message
