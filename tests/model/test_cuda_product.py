"""Which kernel computes a layer on CUDA, and that it computes what the CPU path computes.

bitsandbytes' operators and Triton's interpreter run on the CPU too; so do these tests.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import pytest
import torch
from support import gptq_files, nf4_files
from support.gptq_files import GPTQVariant
from support.models import relative_error
from torch import Tensor

from quantizers import gptq, nf4
from quantizers.gptq import GPTQWeight
from quantizers.nf4 import NF4Weight
from quantizers.weight import QuantizedWeight, dequantize
from qzo.model.kernels.product import cuda_product
from qzo.model.kernels.settings import has_triton
from qzo.model.linear import EffectiveScales, Live, Multipliers, ProbeScales, QuantLinear

IN, OUT = 96, 160

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; it comes for Linux on x86-64"
)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nf4_tensors(in_features: int = IN, **options: Any) -> dict[str, Tensor]:
    return nf4_files.quantize_layer(normal(OUT, in_features, seed=0), **options)


def nf4_layer(in_features: int = IN, **options: Any) -> NF4Weight:
    spec = nf4.NF4Spec(options.get("quant_type", "nf4"))
    return nf4.unpack(nf4_tensors(in_features, **options), spec, "layer")


def gptq_layer(**options: Any) -> GPTQWeight:
    variant = GPTQVariant(**options)
    tensors = gptq_files.random_layer(IN, OUT, variant)
    return gptq.unpack(tensors, gptq.spec(variant.config()), "layer")


def several_scales(weight: QuantizedWeight, count: int) -> list[Tensor]:
    scales = weight.scales.float()
    return [scales * (1 + 0.2 * normal(*scales.shape, seed=p)) for p in range(count)]


def product(
    weight: QuantizedWeight, x: Tensor, bounds: Sequence[int], scales: Sequence[Tensor]
) -> Tensor:
    got = cuda_product(weight, x, bounds, scales)
    assert got is not None
    return got


NF4_OPTIONS: dict[str, dict[str, Any]] = {
    "nf4": {"blocksize": 32},
    "fp4": {"blocksize": 32, "quant_type": "fp4"},
    "double": {"blocksize": 32, "double_quant": True},
    "bfloat16 storage": {"blocksize": 32, "storage": torch.bfloat16},
}


@pytest.mark.parametrize("options", NF4_OPTIONS.values(), ids=NF4_OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bounds", [(0, 7), (0, 2, 2, 7)], ids=str)
def test_every_probe_gives_bitsandbytes_its_own_absmax(
    options: dict[str, Any], dtype: torch.dtype, bounds: Sequence[int]
) -> None:
    weight, tensors = nf4_layer(**options), nf4_tensors(**options)
    scales, x = several_scales(weight, len(bounds) - 1), normal(7, IN).to(dtype)
    got = product(weight, x, bounds, scales)
    assert got.dtype == dtype
    plain = {role: tensor for role, tensor in tensors.items() if not role.startswith("nested")}
    # float32: FP4's table in bitsandbytes' CPU code has four digits. Others: a weight and a sum
    # are rounded to the dtype.
    tolerance = 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for p, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            dense = nf4_files.read_layer({**plain, "absmax": scales[p].reshape(-1)})
            assert relative_error(got[start:stop], x[start:stop].float() @ dense.T) < tolerance


@pytest.mark.parametrize("count", [1, 2])
def test_blocks_that_cross_rows_take_absmax_in_the_order_of_the_file(count: int) -> None:
    # an odd size, where bitsandbytes does not take its AVX512 code, which misreads such blocks
    weight, tensors = nf4_layer(95), nf4_tensors(95)
    assert weight.blocks_cross_rows
    scales, x = several_scales(weight, count), normal(6, 95)
    bounds = (0, 6) if count == 1 else (0, 4, 6)
    with torch.compiler.set_stance("force_eager"):
        got = product(weight, x, bounds, scales)
    for p, (start, stop) in enumerate(pairwise(bounds)):
        dense = nf4_files.read_layer({**tensors, "absmax": scales[p].reshape(-1)})
        assert relative_error(got[start:stop], x[start:stop] @ dense.T) < 1e-5


def test_no_tokens_give_no_outputs() -> None:
    weight = nf4_layer(blocksize=32)
    got = product(weight, normal(0, IN), (0, 0, 0), several_scales(weight, 2))
    assert got.shape == (0, OUT)


def test_bitsandbytes_without_the_whole_product_still_dequantizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = nf4_layer(blocksize=32)
    scales, x = several_scales(weight, 2), normal(7, IN)
    want = product(weight, x, (0, 3, 7), scales)

    class Older:
        dequantize_4bit = torch.ops.bitsandbytes.dequantize_4bit

    monkeypatch.setattr(torch.ops, "bitsandbytes", Older)
    assert relative_error(product(weight, x, (0, 3, 7), scales), want) < 1e-5


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_published_codebook_is_recognized(quant_type: str) -> None:
    assert nf4_layer(quant_type=quant_type).quant_type == quant_type


def test_a_codebook_of_its_own_has_no_kernel() -> None:
    tensors = nf4_tensors()
    tensors["quant_map"] = tensors["quant_map"] * 0.99
    weight = nf4.unpack(tensors, nf4.NF4Spec("nf4"), "layer")
    assert weight.quant_type is None
    assert cuda_product(weight, normal(2, IN), (0, 2), [weight.scales]) is None


def test_a_block_size_that_bitsandbytes_has_not_compiled_has_no_kernel() -> None:
    weight = NF4Weight(torch.zeros(24, dtype=torch.uint8), normal(16), normal(3), 3, 16, 16, "nf4")
    assert cuda_product(weight, normal(2, 16), (0, 2), [weight.scales]) is None


def test_three_bits_have_no_kernel() -> None:
    weight = gptq_layer(bits=3)
    assert cuda_product(weight, normal(2, IN), (0, 2), [weight.scales.float()]) is None


@needs_triton
def test_float64_has_no_kernel() -> None:
    weight = gptq_layer()
    assert cuda_product(weight, normal(2, IN).double(), (0, 2), [weight.scales.float()]) is None


def test_gptq_has_no_kernel_where_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qzo.model.kernels.settings.find_spec", lambda name: None)
    monkeypatch.setattr("qzo.model.kernels.product.has_triton", has_triton.__wrapped__)
    weight = gptq_layer()
    assert cuda_product(weight, normal(2, IN), (0, 2), [weight.scales.float()]) is None


def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the layer take the path that it takes on CUDA."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


BUILDS: dict[str, QuantizedWeight] = {
    "gptq": gptq_layer(sym=False),
    "gptq-3bit": gptq_layer(bits=3, sym=False),
    "nf4": nf4_layer(blocksize=32),
}
every_build = pytest.mark.parametrize("weight", BUILDS.values(), ids=BUILDS)


def effective_scales(kind: str, scales: Sequence[Tensor], multipliers: Tensor) -> EffectiveScales:
    if kind == "multipliers":
        return Multipliers(multipliers)
    return ProbeScales(scales if kind == "probes" else scales[:1])


def see(layer: QuantLinear, effective: EffectiveScales, bounds: Sequence[int]) -> None:
    layer.index = 0
    layer.live.effective = lambda _: effective
    layer.live.bounds = bounds


@needs_triton
@every_build
@pytest.mark.parametrize("kind", ["probes", "one", "multipliers"])
def test_a_layer_computes_the_same_on_the_cuda_path(
    weight: QuantizedWeight, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = QuantLinear("layer", weight, normal(OUT, seed=3), Live())
    scales, factors = several_scales(weight, 2), 1 + 0.2 * normal(2, OUT, seed=4)
    see(layer, effective_scales(kind, scales, factors), (0, 5, 15))
    x = normal(3, 5, IN)
    want = layer(x)
    tiles = layer.live.buffers
    tiles.clear()
    on_cuda(monkeypatch)
    got = layer(x)
    assert bool(tiles) == (weight is BUILDS["gptq-3bit"])  # a kernel needs no tiles
    assert relative_error(got, want) < 1e-5


@needs_triton
@every_build
@pytest.mark.parametrize("kind", ["multipliers", "file"])
def test_exact_slopes_are_the_same_on_the_cuda_path(
    weight: QuantizedWeight, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = QuantLinear("layer", weight, None, Live())
    if kind == "multipliers":
        see(layer, Multipliers(1 + 0.2 * normal(2, OUT, seed=4)), (0, 5, 15))

    def slope() -> Tensor:
        x = normal(15, IN).requires_grad_()
        (layer(x) * normal(15, OUT, seed=5)).sum().backward()
        assert x.grad is not None
        return x.grad

    want = slope()
    tiles = layer.live.buffers
    tiles.clear()
    on_cuda(monkeypatch)
    assert relative_error(slope(), want) < 1e-5
    if weight is BUILDS["gptq"]:
        assert not tiles  # the kernel's own


@every_build
def test_a_layer_on_the_cpu_takes_the_cpu_path(
    weight: QuantizedWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(QuantLinear, "_kernel_product")
    assert QuantLinear("layer", weight, None, Live())(normal(2, IN)).shape == (2, OUT)


@needs_triton
@pytest.mark.parametrize("tokens", [7, 300])
@pytest.mark.parametrize("name", ["gptq", "nf4"])
def test_outputs_are_where_the_codes_are(tokens: int, name: str) -> None:
    weight = BUILDS[name].to(torch.device("meta"))
    x = torch.empty(tokens, IN, dtype=torch.bfloat16, device="meta")
    scales = [torch.empty(weight.scales.shape, device="meta") for _ in range(2)]
    got = product(weight, x, (0, 3, tokens), scales)
    assert (got.shape, got.dtype, got.device.type) == ((tokens, OUT), torch.bfloat16, "meta")


@needs_triton
@every_build
@pytest.mark.parametrize("kind", ["probes", "one", "multipliers"])
def test_a_moved_layer_computes_where_it_is(
    weight: QuantizedWeight, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = QuantLinear("layer", weight, normal(OUT, seed=3), Live()).to("meta")
    scales = [torch.empty(weight.scales.shape, device="meta") for _ in range(2)]
    factors = torch.empty(2, OUT, device="meta")
    see(layer, effective_scales(kind, scales, factors), (0, 2, 6))
    on_cuda(monkeypatch)
    got = layer(torch.empty(3, 2, IN, device="meta"))
    assert (got.shape, got.device.type) == ((3, 2, OUT), "meta")


@pytest.mark.gpu
@every_build
@pytest.mark.parametrize("kind", ["probes", "one", "multipliers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 20, 200])
def test_a_layer_on_a_gpu_equals_the_layer_on_the_cpu(
    weight: QuantizedWeight, kind: str, dtype: torch.dtype, width: int
) -> None:
    x, bounds = normal(3, width, IN).to(dtype), (0, width, 3 * width)
    layer = QuantLinear("layer", weight, normal(OUT, seed=3).to(dtype), Live())
    scales, factors = several_scales(weight, 2), 1 + 0.2 * normal(2, OUT, seed=4)
    see(layer, effective_scales(kind, scales, factors), bounds)
    want = layer(x)
    layer.to("cuda")
    scales, factors = [each.to("cuda") for each in scales], factors.to("cuda")
    see(layer, effective_scales(kind, scales, factors), bounds)
    got = layer(x.to("cuda"))
    assert got.is_cuda
    # float32: sums in another order, and four digits of a codebook. Others: in all, five sums are
    # rounded by at most half a step.
    tolerance = 1e-4 if dtype == torch.float32 else 2.5 * torch.finfo(dtype).eps
    assert relative_error(got.cpu(), want) < tolerance


@pytest.mark.gpu
@every_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [20, 200])
def test_multipliers_on_a_gpu_act_in_float32(
    weight: QuantizedWeight, dtype: torch.dtype, width: int
) -> None:
    layer = QuantLinear("layer", weight, None, Live()).to("cuda")
    x, bounds = normal(3, width, IN).to("cuda", dtype), (0, width, 3 * width)
    before = layer(x).flatten(0, 1).double()
    factors = (1.0101, 0.9899)  # 1.0078 and 0.9883 in bfloat16, 1.0098 and 0.9897 in float16
    see(layer, Multipliers(torch.tensor(factors, device="cuda")[:, None].repeat(1, OUT)), bounds)
    got = layer(x).flatten(0, 1).double()
    for factor, (start, stop) in zip(factors, pairwise(bounds), strict=True):
        part = before[start:stop]
        # the mean over thousands of outputs, whose own roundings average out
        mean = float((got[start:stop] * part).sum() / part.square().sum())
        assert mean == pytest.approx(factor, abs=max(torch.finfo(dtype).eps / 8, 1e-5))


@pytest.mark.gpu
def test_blocks_that_cross_rows_are_read_right_on_a_gpu() -> None:
    weight = nf4_layer(blocksize=64)
    assert weight.blocks_cross_rows
    scales, x = several_scales(weight, 2), normal(6, IN)
    moved = weight.to(torch.device("cuda"))
    got = product(moved, x.to("cuda"), (0, 4, 6), [each.to("cuda") for each in scales]).cpu()
    for p, (start, stop) in enumerate(((0, 4), (4, 6))):
        want = x[start:stop] @ dequantize(weight, scales[p]).T
        assert relative_error(got[start:stop], want) < 1e-5
