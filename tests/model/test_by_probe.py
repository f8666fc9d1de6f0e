"""Factors act in fp32 and their product is rounded once, whatever the dtype of the activations."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from support import gptq_files
from support.gptq_files import GPTQVariant
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantizers import gptq
from quantizers.weight import dequantize
from qzo.method.extra.lora import add_low_rank
from qzo.method.extra.section import Section
from qzo.method.extra.unquantized import seeing_sections
from qzo.model import by_probe
from qzo.model.by_probe import multiplied, multiply, probe_of_token
from qzo.model.linear import Live, Multipliers, QuantLinear

IN, OUT = 96, 160
HALVES = [torch.bfloat16, torch.float16]
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
# None has a whole number of half-precision steps: bfloat16 has 1 and 1.0078 around 1.003
FACTORS = torch.tensor([1.003, 0.9985, 1.0101])
BOUNDS = [(0, 4, 8, 12), (0, 1, 1, 12), (0, 5, 7, 12)]
every_bounds = pytest.mark.parametrize("bounds", BOUNDS, ids=str)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors_of(features: int) -> Tensor:
    return FACTORS[:, None] + 0.001 * normal(3, features, seed=2)


def by_token(factors: Tensor, bounds: Sequence[int]) -> Tensor:
    """Return the factors of every token, one token after the other."""
    probes = [p for p, (start, stop) in enumerate(pairwise(bounds)) for _ in range(start, stop)]
    return torch.stack([factors[p] for p in probes])


def rounded_product(values: Tensor, factors: Tensor) -> Tensor:
    """Return the product as float64 has it, rounded to fp32 and to the dtype of the values."""
    return (values.double() * factors.double()).float().to(values.dtype)


def quant_linear(dtype: torch.dtype) -> QuantLinear:
    variant = GPTQVariant()
    tensors = gptq_files.random_layer(IN, OUT, variant)
    weight = gptq.unpack(tensors, gptq.spec(variant.config()), "layer")
    return QuantLinear("layer", weight, None, Live()).to(dtype)


@every_dtype
@every_bounds
@pytest.mark.parametrize("on_cuda", [False, True])
def test_each_token_is_multiplied_by_the_factors_of_its_probe(
    dtype: torch.dtype, bounds: Sequence[int], on_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, factors = normal(12, 7).to(dtype), factors_of(7)
    want = rounded_product(values, by_token(factors, bounds))
    monkeypatch.setattr(torch.Tensor, "is_cuda", on_cuda)
    monkeypatch.setattr(by_probe, "GATHERED_ELEMENTS", 5 * 7)
    assert torch.equal(multiplied(values, factors, bounds), want)
    assert torch.equal(multiply(values, factors, bounds), want)
    assert torch.equal(values, want)


def assert_rounded_once(got: Tensor, want: Tensor) -> None:
    """Compare with float64 numbers: half a step of the dtype, and roundings of fp32 sums."""
    step = torch.finfo(got.dtype).eps * want.abs()
    assert bool(((got.double() - want).abs() <= 0.51 * step + 1e-5).all())


@every_half
def test_row_multipliers_of_a_layer_are_rounded_once(dtype: torch.dtype) -> None:
    layer, x, rows = quant_linear(dtype), normal(12, IN).to(dtype), factors_of(OUT)
    dense = dequantize(layer.quantized).to(dtype).double()
    see(layer, Multipliers(rows))
    assert_rounded_once(layer(x), (x.double() @ dense.T) * by_token(rows, BOUNDS[2]).double())


@every_half
def test_column_multipliers_of_a_layer_are_rounded_once(dtype: torch.dtype) -> None:
    layer, x = quant_linear(dtype), normal(12, IN).to(dtype)
    columns = factors_of(layer.quantized.scales.shape[1])
    want = layer(rounded_product(x, by_token(columns.repeat_interleave(32, 1), BOUNDS[2])))
    see(layer, Multipliers(None, columns))
    assert torch.equal(layer(x), want)
    assert torch.equal(layer(x.clone().requires_grad_()).detach(), want)


@every_half
def test_factors_that_are_differentiated_act_in_fp32(dtype: torch.dtype) -> None:
    layer, x, rows = quant_linear(dtype), normal(12, IN).to(dtype), factors_of(OUT)
    want = rounded_product(layer(x), by_token(rows, BOUNDS[2]))
    see(layer, Multipliers(rows))
    assert torch.equal(layer(x.clone().requires_grad_()).detach(), want)


@pytest.mark.parametrize("kind", ["rows", "columns", "both"])
def test_one_probe_on_cuda_computes_what_an_export_computes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = quant_linear(torch.bfloat16), normal(12, IN).bfloat16()
    scales = layer.quantized.scales.float()
    rows = None if kind == "columns" else factors_of(OUT)[:1]
    columns = None if kind == "rows" else factors_of(scales.shape[1])[:1]
    for factors in (rows[0][:, None] if rows is not None else 1, columns):
        scales = scales if factors is None else scales * factors
    layer.tuned = scales
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(QuantLinear, "_kernel_product", lambda *_: None)
    want = layer(x)
    see(layer, Multipliers(rows, columns))
    assert torch.equal(layer(x), want)


@every_half
def test_slopes_of_factors_are_summed_in_fp32(dtype: torch.dtype) -> None:
    factors = torch.ones(1, 1, requires_grad=True)
    values = torch.ones(3000, 1, dtype=dtype)  # neither half counts to 3,001
    (slope,) = torch.autograd.grad(multiplied(values, factors, (0, 3000)).sum(), [factors])
    assert slope.dtype == torch.float32
    assert slope.item() == 3000


@every_half
@pytest.mark.parametrize("has_bias", [False, True])
def test_trained_norms_are_rounded_once(dtype: torch.dtype, has_bias: bool) -> None:
    norm = nn.LayerNorm(8, bias=has_bias).to(dtype)
    if has_bias:
        norm.bias.data = normal(8, seed=4).to(dtype)
    live = Live(bounds=BOUNDS[2])
    x, factors = normal(1, 12, 8).to(dtype), factors_of(8)
    before = norm(x).double()
    bias = norm.bias.double() if has_bias else 0.0
    seeing_sections(live, {Section("norm.weight", "norm", (8,)): norm})
    live.sections = lambda _: factors
    assert_rounded_once(norm(x), (before - bias) * by_token(factors, BOUNDS[2]).double() + bias)


@every_half
def test_trained_biases_are_rounded_once(dtype: torch.dtype) -> None:
    layer, x = quant_linear(dtype), normal(1, 12, IN).to(dtype)
    offsets = 0.05 * normal(3, OUT, seed=3)
    want = (layer(x).float() + by_token(offsets, BOUNDS[2])).to(dtype)
    layer.live.bounds = BOUNDS[2]
    seeing_sections(layer.live, {Section("layer.bias", "bias", (OUT,)): layer})
    layer.live.sections = lambda _: offsets
    assert torch.equal(layer(x), want)


@every_half
@every_bounds
def test_low_rank_products_are_rounded_once(dtype: torch.dtype, bounds: Sequence[int]) -> None:
    x, y = normal(12, 8).to(dtype), normal(12, 5, seed=2).to(dtype)
    a, b = normal(3, 2, 8, seed=3), normal(3, 5, 2, seed=4)
    got = y.clone()
    add_low_rank(x, a, b, bounds, got)
    for p, (start, stop) in enumerate(pairwise(bounds)):
        want = y[start:stop].double() + x[start:stop].double() @ (b[p] @ a[p]).double().T
        assert_rounded_once(got[start:stop], want)


def see(layer: QuantLinear, multipliers: Multipliers) -> None:
    layer.index, layer.live.bounds = 0, BOUNDS[2]
    layer.live.effective = lambda _: multipliers


class Counted(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_even", [False, True])
def test_many_probes_take_as_many_launches_on_cuda_as_two(
    is_even: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    counts = []
    for num_probes in (2, 32):
        bounds = tuple(range(0, 2 * num_probes + 1, 2))
        bounds = bounds if is_even else (*bounds[:-1], bounds[-1] + 1)
        probe_of_token(bounds, torch.device("cpu"))  # made once a forward
        with Counted() as counted:
            multiply(normal(bounds[-1], 7), normal(num_probes, 7), bounds)
        counts.append(counted.count - 2)  # those of the random numbers
    assert counts == [1 if is_even else 2] * 2
