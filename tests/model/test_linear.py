from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from support import gptq_files, nf4_files
from support.gptq_files import GPTQVariant, random_layer
from support.models import relative_error
from torch import Tensor, nn

from quantizers import gptq, nf4
from qzo.errors import CheckpointError
from qzo.model import linear
from qzo.model.linear import EffectiveScales, Live, Multipliers, ProbeScales, QuantLinear

IN, OUT = 96, 160

# float32 sums of 96 products in another order differ by a few units of 2**-24
TOLERANCE = 1e-5

Build = Callable[[Tensor | None], tuple[QuantLinear, Callable[[Tensor], Tensor]]]


def build_gptq(**options: Any) -> Build:
    """Return a layer and the naive matrix for other scales ``(out, groups)``."""
    variant = GPTQVariant(**options)

    def build(bias: Tensor | None = None) -> tuple[QuantLinear, Callable[[Tensor], Tensor]]:
        tensors = random_layer(IN, OUT, variant)
        tensors["scales"] = tensors["scales"].float()
        weight = gptq.unpack(tensors, gptq.spec(variant.config()), "layer")

        def dense(scales: Tensor) -> Tensor:
            return gptq_files.read_layer({**tensors, "scales": scales.T}, variant)

        return QuantLinear("layer", weight, bias, Live()), dense

    return build


def build_nf4(**options: Any) -> Build:
    """Return a layer and the naive matrix for other scales."""

    def build(bias: Tensor | None = None) -> tuple[QuantLinear, Callable[[Tensor], Tensor]]:
        generator = torch.Generator().manual_seed(0)
        tensors = nf4_files.quantize_layer(torch.randn(OUT, IN, generator=generator), **options)
        weight = nf4.unpack(tensors, nf4.NF4Spec("nf4"), "layer")

        def dense(scales: Tensor) -> Tensor:
            return nf4_files.read_layer({**tensors, "absmax": scales.reshape(-1)})

        return QuantLinear("layer", weight, bias, Live()), dense

    return build


BUILDS = {
    "gptq": build_gptq(),
    "gptq-3bit-desc_act": build_gptq(bits=3, sym=False, desc_act=True),
    "gptq-ragged": build_gptq(group_size=64, sym=False),
    "nf4": build_nf4(blocksize=32),
    "nf4-crossing": build_nf4(blocksize=64),
}
every_build = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
row_builds = pytest.mark.parametrize("build", [BUILDS["gptq"], BUILDS["nf4"]], ids=["gptq", "nf4"])


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def several_scales(layer: QuantLinear, count: int) -> list[Tensor]:
    scales = layer.quantized.scales.float()
    return [scales * (1 + 0.2 * normal(*scales.shape, seed=p)) for p in range(count)]


def see(
    layer: QuantLinear, effective: EffectiveScales, bounds: Sequence[int] | None = None
) -> None:
    layer.index = 0
    layer.live.effective, layer.live.bounds = (lambda _: effective), bounds


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what a dense float32 layer computes."""
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.inference_mode():
        dense.weight.copy_(weight)
        if bias is not None:
            dense.bias.copy_(bias)
        result: Tensor = dense(x)
    return result


@every_build
@pytest.mark.parametrize("shape", [(5, IN), (2, 7, IN), (2, 3, 4, IN)], ids=str)
def test_a_quant_linear_equals_a_dense_layer(build: Build, shape: tuple[int, ...]) -> None:
    layer, dense = build(None)
    x = normal(*shape)
    want = product(x, dense(layer.quantized.scales.float()))
    assert relative_error(layer(x), want) < TOLERANCE


@every_build
def test_a_bias_is_added(build: Build) -> None:
    bias = normal(OUT, seed=3)
    layer, dense = build(bias)
    x = normal(2, 7, IN)
    want = product(x, dense(layer.quantized.scales.float()), bias)
    assert relative_error(layer(x), want) < TOLERANCE


@every_build
@pytest.mark.parametrize("tile_rows", [32, 64])
def test_tiles_smaller_than_the_layer_give_the_same(
    build: Build, tile_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, dense = build(normal(OUT, seed=3))
    x = normal(2, 7, IN)
    want = product(x, dense(layer.quantized.scales.float()), normal(OUT, seed=3))
    monkeypatch.setattr(linear, "TILE_ELEMENTS", tile_rows * IN)
    assert relative_error(layer(x), want) < TOLERANCE
    assert layer.live.buffers["decoded"].numel() == tile_rows * IN


@every_build
@pytest.mark.parametrize("tile_elements", [32 * IN, linear.TILE_ELEMENTS])
def test_every_probe_sees_its_own_scales(
    build: Build, tile_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "TILE_ELEMENTS", tile_elements)
    bias = normal(OUT, seed=3)
    layer, dense = build(bias)
    scales, bounds = several_scales(layer, 3), (0, 2, 3, 6)
    x = normal(6, IN)
    see(layer, ProbeScales(scales), bounds)
    got = layer(x)
    for probe, (start, stop) in enumerate(pairwise(bounds)):
        want = product(x[start:stop], dense(scales[probe]), bias)
        assert relative_error(got[start:stop], want) < TOLERANCE


@every_build
def test_a_probe_may_have_no_tokens(build: Build) -> None:
    layer, dense = build(None)
    scales, x = several_scales(layer, 2), normal(1, 3, IN)
    see(layer, ProbeScales(scales), (0, 0, 3))
    assert relative_error(layer(x), product(x, dense(scales[1]))) < TOLERANCE


@row_builds
@pytest.mark.parametrize(
    ("bounds", "expected"), [((0, 10, 15), "15 tokens"), (None, "one probe")], ids=str
)
def test_tokens_that_belong_to_no_probe_are_refused(
    build: Build, bounds: tuple[int, ...] | None, expected: str
) -> None:
    layer, _ = build(None)
    see(layer, ProbeScales(several_scales(layer, 2)), bounds)
    with pytest.raises(CheckpointError) as error:
        layer(normal(4, IN))
    assert str(error.value) == (
        f"layer: expected {expected} of 2 probes, got 4; a layer that sees only some tokens, as in "
        "a mixture of experts, cannot be trained"
    )


@row_builds
def test_any_tokens_are_fine_under_one_probe(build: Build) -> None:
    layer, dense = build(None)
    scales = several_scales(layer, 1)
    see(layer, ProbeScales(scales), (0, 15))
    x = normal(4, IN)
    assert relative_error(layer(x), product(x, dense(scales[0]))) < TOLERANCE


@row_builds
@pytest.mark.parametrize("tile_elements", [32 * IN, linear.TILE_ELEMENTS])
def test_row_multipliers_multiply_outputs_before_the_bias(
    build: Build, tile_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "TILE_ELEMENTS", tile_elements)
    bias = normal(OUT, seed=3)
    layer, dense = build(bias)
    scales, multipliers = layer.quantized.scales.float(), 1 + 0.2 * normal(2, OUT, seed=4)
    x = normal(15, IN)
    see(layer, Multipliers(multipliers), (0, 6, 15))
    got = layer(x)
    for probe, (start, stop) in enumerate(((0, 6), (6, 15))):
        want = product(x[start:stop], dense(scales)) * multipliers[probe] + bias
        assert relative_error(got[start:stop], want) < TOLERANCE


@row_builds
def test_column_multipliers_equal_scales_multiplied_by_group(build: Build) -> None:
    layer, dense = build(normal(OUT, seed=3))
    scales = layer.quantized.scales.float()
    columns = 1 + 0.2 * normal(2, scales.shape[1], seed=4)
    rows = 1 + 0.2 * normal(2, OUT, seed=5)
    x = normal(9, IN)

    for of_rows in (None, rows):
        see(layer, Multipliers(of_rows, columns), (0, 6, 9))
        for probe, (start, stop) in enumerate(((0, 6), (6, 9))):
            factors = columns[probe] if of_rows is None else rows[probe][:, None] * columns[probe]
            want = product(x[start:stop], dense(scales * factors)) + normal(OUT, seed=3)
            # fp32 sums in another order
            torch.testing.assert_close(layer(x)[start:stop], want, rtol=1e-4, atol=1e-4)


@row_builds
def test_row_multipliers_equal_scales_multiplied_by_row(build: Build) -> None:
    layer, dense = build(None)
    scales, multipliers = layer.quantized.scales.float(), 1 + 0.2 * normal(1, OUT, seed=4)
    x = normal(2, 3, IN)
    see(layer, Multipliers(multipliers), (0, 6))
    want = product(x, dense(scales * multipliers[0][:, None]))
    assert relative_error(layer(x), want) < TOLERANCE


@row_builds
def test_a_layer_outside_of_the_trained_vector_keeps_its_scales(build: Build) -> None:
    layer, dense = build(None)
    x = normal(2, 3, IN)
    see(layer, ProbeScales(several_scales(layer, 1)))
    layer.index = -1
    assert relative_error(layer(x), product(x, dense(layer.quantized.scales.float()))) < TOLERANCE


@every_build
def test_moving_to_a_dtype_leaves_codes_and_scales_alone(build: Build) -> None:
    layer, _ = build(normal(OUT, seed=3))
    before = layer.quantized
    layer.to(torch.bfloat16)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.quantized.scales, before.scales)
    assert layer.quantized.scales.dtype == torch.float32
    assert vars(layer.quantized).keys() == vars(before).keys()
    for name, value in vars(before).items():
        after = getattr(layer.quantized, name)
        same = torch.equal(after, value) if isinstance(value, Tensor) else after == value
        assert same, name


@every_build
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_may_have_half_the_bits(build: Build, dtype: torch.dtype) -> None:
    layer, dense = build(normal(OUT, seed=3))
    layer.to(dtype)
    x = normal(2, 7, IN).to(dtype)
    got = layer(x)
    weight = dense(layer.quantized.scales.float()).to(dtype).float()
    want = product(x.float(), weight, normal(OUT, seed=3).to(dtype).float())
    assert got.dtype == dtype
    # the sum is rounded to the dtype once or twice: 2**-8 of a value in bfloat16
    assert relative_error(got, want) < 2 * torch.finfo(dtype).eps


def test_layers_of_a_model_share_their_buffers() -> None:
    variant, live = GPTQVariant(), Live()
    for out_features in (64, 32, 64):
        tensors = random_layer(IN, out_features, variant)
        weight = gptq.unpack(tensors, gptq.spec(variant.config()), "layer")
        QuantLinear("layer", weight, None, live)(normal(2, IN))
    assert {name: buffer.numel() for name, buffer in live.buffers.items()} == {"decoded": 64 * IN}


def test_a_forward_leaves_the_scales_of_the_file_alone() -> None:
    layer, _ = BUILDS["nf4"](None)
    before = layer.quantized.scales.clone()
    see(layer, ProbeScales(several_scales(layer, 2)), (0, 3, 6))
    layer(normal(2, 3, IN))
    assert torch.equal(layer.quantized.scales, before)


def test_a_printed_layer_names_its_sizes() -> None:
    layer, _ = BUILDS["gptq"](None)
    assert str(layer) == "QuantLinear(in_features=96, out_features=160)"
