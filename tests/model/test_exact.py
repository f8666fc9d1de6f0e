"""Derivatives of products with quantized weights, against dense products by torch."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from support import gptq_files, nf4_files
from support.gptq_files import GPTQVariant, random_layer
from support.models import relative_error
from torch import Tensor, nn
from torch.autograd import forward_ad

from quantizers import gptq, nf4
from qzo.model import lazy_layers as mapped
from qzo.model import linear
from qzo.model.autograd import is_differentiated, tangents
from qzo.model.lazy_layers import MappedLinear
from qzo.model.linear import EffectiveScales, Live, Multipliers, ProbeScales, QuantLinear

IN, OUT = 96, 64
BOUNDS = (0, 2, 2, 5, 9)  # of four probes, one without tokens
TOLERANCE = 2e-6  # float32 sums of up to 96 products against float64

Build = Callable[[], tuple[QuantLinear, Callable[[Tensor], Tensor]]]


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build_gptq(**options: Any) -> Build:
    """Return a layer, and the naive matrix for any scales."""
    variant = GPTQVariant(**options)

    def build() -> tuple[QuantLinear, Callable[[Tensor], Tensor]]:
        tensors = random_layer(IN, OUT, variant)
        tensors["scales"] = tensors["scales"].float()
        weight = gptq.unpack(tensors, gptq.spec(variant.config()), "layer")
        return QuantLinear(
            "layer", weight, normal(OUT, seed=3), Live()
        ), lambda scales: gptq_files.read_layer({**tensors, "scales": scales.T}, variant)

    return build


def build_nf4(blocksize: int) -> Build:
    def build() -> tuple[QuantLinear, Callable[[Tensor], Tensor]]:
        tensors = nf4_files.quantize_layer(normal(OUT, IN, seed=0), blocksize=blocksize)
        weight = nf4.unpack(tensors, nf4.NF4Spec("nf4"), "layer")
        return QuantLinear(
            "layer", weight, normal(OUT, seed=3), Live()
        ), lambda scales: nf4_files.read_layer({**tensors, "absmax": scales.reshape(-1)})

    return build


BUILDS = {
    "gptq": build_gptq(),
    "gptq-3bit-desc_act": build_gptq(bits=3, sym=False, desc_act=True),
    "gptq-ragged": build_gptq(group_size=64, sym=False),
    "nf4": build_nf4(32),
    "nf4-crossing": build_nf4(64),
}
ROWS = ("gptq", "gptq-3bit-desc_act", "gptq-ragged", "nf4")
# Scales that are checked, by how many there are: the first, the last, and some between.
PLACES = {n: [0, 1, n // 3, n // 2 + 1, n - 2, n - 1] for n in (64, 96, 128, 192)}
every_build = pytest.mark.parametrize("name", BUILDS)
# Blocks that cross rows have no row coordinates.
every_kind = pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for k in ("scales", "rows", "file") for n in (ROWS if k == "rows" else BUILDS)],
)


@pytest.fixture(params=[32 * IN, linear.TILE_ELEMENTS], ids=["tiles", "one-tile"], autouse=True)
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "TILE_ELEMENTS", request.param)


def see(layer: QuantLinear, effective: EffectiveScales | None) -> None:
    layer.index = 0 if effective is not None else -1
    layer.live.effective = lambda _: effective  # type: ignore[assignment, return-value]
    layer.live.bounds = BOUNDS


def scales_of(layer: QuantLinear) -> list[Tensor]:
    scales = layer.quantized.scales.float()
    return [scales * (1 + 0.2 * normal(*scales.shape, seed=p)) for p in range(len(BOUNDS) - 1)]


def by_scale(dense: Callable[[Tensor], Tensor], like: Tensor, of_weights: Tensor) -> Tensor:
    """Return the slopes by some scales: a matrix is linear in them, so unit vectors tell."""
    units = torch.eye(like.numel())[PLACES[like.numel()]]
    return torch.stack([(dense(u.view(like.shape)).double() * of_weights).sum() for u in units])


def dense_slopes(
    x: Tensor, slope: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the slopes by the inputs and by the weights of every probe, by torch in float64."""
    spans = list(pairwise(BOUNDS))
    input_, leaves = x.double().requires_grad_(), [w.double().requires_grad_() for w in weights]
    parts = [input_[a:b] @ leaf.T for leaf, (a, b) in zip(leaves, spans, strict=True)]
    of_input, *of_weights = torch.autograd.grad(
        (torch.cat(parts) * slope.double()).sum(), [input_, *leaves]
    )
    return of_input, list(of_weights)


@every_build
def test_slopes_by_scales_and_inputs_are_those_of_dense_products(name: str) -> None:
    layer, dense = BUILDS[name]()
    scales = [part.requires_grad_() for part in scales_of(layer)]
    x, slope = normal(9, IN).requires_grad_(), normal(9, OUT, seed=2)
    see(layer, ProbeScales(scales))

    got = torch.autograd.grad((layer(x) * slope).sum(), [x, *scales])

    want, by_weight = dense_slopes(x.detach(), slope, [dense(part.detach()) for part in scales])
    assert relative_error(got[0], want) < TOLERANCE
    for of_probe in (0, 2, 3):
        of_weights = by_scale(dense, scales[of_probe], by_weight[of_probe])
        chosen = got[1 + of_probe].reshape(-1)[PLACES[scales[of_probe].numel()]]
        assert relative_error(chosen, of_weights) < TOLERANCE
    assert not got[2].any()  # a probe without tokens


@pytest.mark.parametrize("name", ROWS)
def test_slopes_by_row_multipliers_are_those_of_dense_products(name: str) -> None:
    layer, dense = BUILDS[name]()
    weight = dense(layer.quantized.scales.float())
    factors = (1 + 0.2 * normal(4, OUT, seed=4)).requires_grad_()
    x, slope = normal(9, IN).requires_grad_(), normal(9, OUT, seed=2)
    see(layer, Multipliers(factors))

    got_x, got = torch.autograd.grad((layer(x) * slope).sum(), [x, factors])

    weights = [weight * row[:, None] for row in factors.detach()]
    want, by_weight = dense_slopes(x.detach(), slope, weights)
    assert relative_error(got_x, want) < TOLERANCE
    want_rows = torch.stack([(of_probe * weight).sum(1) for of_probe in by_weight])
    assert relative_error(got, want_rows) < TOLERANCE


@every_build
def test_a_layer_that_is_not_trained_passes_slopes_on(name: str) -> None:
    layer, dense = BUILDS[name]()
    see(layer, None)
    x, slope = normal(9, IN).requires_grad_(), normal(9, OUT, seed=2)

    (got,) = torch.autograd.grad((layer(x) * slope).sum(), [x])

    want = slope.double() @ dense(layer.quantized.scales.float()).double()
    assert relative_error(got, want) < TOLERANCE


@every_kind
def test_a_tangent_is_the_slopes_along_it(name: str, kind: str) -> None:
    layer, _ = BUILDS[name]()
    values = {"scales": scales_of(layer), "rows": [1 + 0.2 * normal(4, OUT)], "file": []}[kind]
    inputs = [normal(9, IN), *values]
    along = [normal(*tensor.shape, seed=10 + i) for i, tensor in enumerate(inputs)]
    slope = normal(9, OUT, seed=2)

    with tangents():
        duals = [forward_ad.make_dual(*pair) for pair in zip(inputs, along, strict=True)]
        see(layer, effective(kind, duals[1:]))
        tangent = forward_ad.unpack_dual(layer(duals[0])).tangent
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    see(layer, effective(kind, leaves[1:]))
    slopes = torch.autograd.grad((layer(leaves[0]) * slope).sum(), leaves)

    assert tangent is not None
    want = sum((s * a).double().sum() for s, a in zip(slopes, along, strict=True))
    assert float((tangent * slope).double().sum()) == pytest.approx(float(want), rel=1e-4)


def effective(kind: str, tensors: Sequence[Tensor]) -> EffectiveScales | None:
    if kind == "file":
        return None
    return ProbeScales(tensors) if kind == "scales" else Multipliers(tensors[0])


@every_kind
def test_values_are_bitwise_those_of_the_usual_product(name: str, kind: str) -> None:
    layer, _ = BUILDS[name]()
    values = {"scales": scales_of(layer), "rows": [1 + 0.2 * normal(4, OUT)], "file": []}[kind]
    see(layer, effective(kind, values))
    x = normal(9, IN)
    with torch.inference_mode():
        want = layer(x)

    traced = layer(x.clone().requires_grad_())
    with tangents():
        dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).primal.clone()

    assert traced.requires_grad
    assert torch.equal(traced, want)
    assert torch.equal(dual, want)


def test_half_precision_slopes_of_scales_are_summed_in_fp32() -> None:
    layer, dense = BUILDS["gptq"]()
    layer.to(torch.bfloat16)
    scales = [part.requires_grad_() for part in scales_of(layer)]
    x, slope = normal(9, IN).bfloat16().requires_grad_(), normal(9, OUT, seed=2).bfloat16()
    see(layer, ProbeScales(scales))

    got = torch.autograd.grad((layer(x) * slope).sum(), [x, scales[3]])

    weights = [dense(part.detach()) for part in scales]
    want, by_weight = dense_slopes(x.detach().float(), slope.float(), weights)
    assert (got[0].dtype, got[1].dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(got[0], want) < 2**-7  # weights and result rounded to 8 bits
    chosen = got[1].reshape(-1)[PLACES[scales[3].numel()]]
    assert relative_error(chosen, by_scale(dense, scales[3], by_weight[3])) < TOLERANCE


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_mapped_head_has_slopes_and_tangents(
    monkeypatch: pytest.MonkeyPatch, has_bias: bool
) -> None:
    monkeypatch.setattr(mapped, "TILE_ELEMENTS", 12)
    head = MappedLinear(nn.Linear(4, 7, bias=has_bias).requires_grad_(False), torch.float32, Live())
    head.weight = normal(7, 4).half()
    x, along, slope = normal(2, 3, 4), normal(2, 3, 4, seed=2), normal(2, 3, 7, seed=3)
    leaf = x.clone().requires_grad_()

    (got,) = torch.autograd.grad((head(leaf) * slope).sum(), [leaf])
    with tangents():
        tangent = forward_ad.unpack_dual(head(forward_ad.make_dual(x, along))).tangent

    torch.testing.assert_close(got, slope @ head.weight.float())
    assert tangent is not None
    torch.testing.assert_close(tangent, along @ head.weight.float().T)
    with torch.inference_mode():
        assert torch.equal(head(x), head(leaf).detach())


def test_nothing_is_traced_where_nobody_asks() -> None:
    plain, leaf = normal(2), normal(2).requires_grad_()
    assert not is_differentiated(plain)
    assert is_differentiated(plain, leaf)
    with torch.no_grad():
        assert not is_differentiated(leaf)
        with tangents():
            assert is_differentiated(forward_ad.make_dual(plain, plain))
    with torch.inference_mode():
        assert not is_differentiated(leaf)
