"""The Triton kernels: in Triton's interpreter, or on the GPU where there is one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gptq_files import GPTQVariant, random_layer, read_layer
from support.models import relative_error
from torch import Tensor

from quantizers import gptq
from quantizers.gptq import GPTQWeight
from qzo.model.by_probe import RowFactors
from qzo.model.kernels.settings import KernelSettings, settings_for

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; it comes for Linux on x86-64"
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Product = Callable[..., Tensor]
Dense = Callable[[Tensor], Tensor]


def way(name: str) -> Product:
    product: Product = getattr(import_module("qzo.model.kernels.triton_product"), name)
    return product


WAYS = ["fused_product", "dense_product"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def layer(
    in_features: int, out_features: int, *, seed: int = 0, **options: Any
) -> tuple[GPTQWeight, Dense]:
    """Return a layer and the naive matrix for other scales ``(out, groups)``."""
    variant = GPTQVariant(**options)
    tensors = random_layer(in_features, out_features, variant, seed=seed)
    tensors["scales"] = tensors["scales"].float()
    weight = gptq.unpack(tensors, gptq.spec(variant.config()), "layer").to(DEVICE)

    def dense(scales: Tensor) -> Tensor:
        return read_layer({**tensors, "scales": scales.cpu().T}, variant)

    return weight, dense


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def several_scales(weight: GPTQWeight, count: int) -> list[Tensor]:
    return [
        weight.scales.float() * (1 + 0.2 * normal(*weight.scales.shape, seed=p))
        for p in range(count)
    ]


def naive(x: Tensor, dense: Dense, bounds: Sequence[int], scales: Sequence[Tensor]) -> Tensor:
    parts = [
        x[start:stop].double().cpu() @ dense(scales[p]).double().T
        for p, (start, stop) in enumerate(pairwise(bounds))
        if start < stop
    ]
    return torch.cat(parts)


def tolerance(dtype: torch.dtype) -> float:
    """Return two roundings to the dtype: of a weight, and of the sum.

    In float32 the sums of up to 300 products are taken in another order instead.
    """
    return 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


def check(name: str, weight: GPTQWeight, dense: Dense, x: Tensor, bounds: Sequence[int]) -> None:
    scales = several_scales(weight, len(bounds) - 1)
    got = way(name)(weight, x, bounds, scales)
    assert (got.dtype, got.device.type) == (x.dtype, x.device.type)
    assert relative_error(got.cpu(), naive(x, dense, bounds, scales)) < tolerance(x.dtype)


LAYOUTS: dict[str, dict[str, Any]] = {
    "symmetric": {},
    "asymmetric": {"sym": False},
    "group of 24": {"group_size": 24, "sym": False},
    "one group": {"group_size": -1, "sym": False},
    "shuffled groups": {"sym": False, "desc_act": True},
    "shuffled symmetric groups": {"desc_act": True},
    "last group is ragged": {"group_size": 64, "sym": False},
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        *((4, dtype) for dtype in DTYPES),
        (2, torch.float32),
        (8, torch.bfloat16),  # codes minus zeros reach 255, the largest that bfloat16 holds
    ],
    ids=str,
)
def test_every_probe_sees_its_own_scales_in_every_layout(
    name: str, options: dict[str, Any], bits: int, dtype: torch.dtype
) -> None:
    options = {"group_size": 32, **options, "bits": bits}
    weight, dense = layer(96, 70, **options)
    check(name, weight, dense, normal(9, 96).to(dtype), (0, 2, 2, 9))


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_sizes_give_the_naive_product(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([2, 4, 8]))
    in_features = data.draw(st.integers(1, 12)) * (32 // bits)
    divisors = [size for size in range(1, in_features + 1) if in_features % size == 0]
    weight, dense = layer(
        in_features,
        data.draw(st.integers(1, 130)),
        bits=bits,
        group_size=data.draw(st.sampled_from([-1, 16, 32, 64, *divisors])),
        sym=data.draw(st.booleans()),
        desc_act=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 3)),
    )
    counts = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any))
    bounds = [sum(counts[:p]) for p in range(len(counts) + 1)]
    x = normal(bounds[-1], in_features).to(data.draw(st.sampled_from(DTYPES)))
    check(data.draw(st.sampled_from(WAYS)), weight, dense, x, bounds)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("desc_act", [False, True])
def test_more_tokens_than_a_tile_are_tiled(name: str, desc_act: bool) -> None:
    weight, dense = layer(64, 9, desc_act=desc_act, sym=False)
    check(name, weight, dense, normal(150, 64), (0, 63, 66, 129, 150))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("desc_act", [False, True])
def test_tokens_of_one_probe_do_not_reach_another(name: str, desc_act: bool) -> None:
    weight, dense = layer(64, 40, desc_act=desc_act)
    scales, x = several_scales(weight, 2), normal(9, 64)
    x[4:] = torch.nan
    got = way(name)(weight, x, (0, 4, 9), scales)
    assert relative_error(got[:4].cpu(), naive(x[:4], dense, (0, 4), scales)) < 1e-5
    assert got[4:].isnan().all()


@pytest.mark.parametrize("name", WAYS)
def test_scales_are_read_at_every_call(name: str) -> None:
    weight, dense = layer(64, 40, sym=False)
    x, first, second = normal(5, 64), *several_scales(weight, 2)
    got = [way(name)(weight, x, (0, 5), [scales]) for scales in (first, second, first)]
    assert relative_error(got[1].cpu(), naive(x, dense, (0, 5), [second])) < 1e-5
    assert torch.equal(got[0], got[2])
    assert not torch.equal(got[0], got[1])


@pytest.mark.parametrize("name", WAYS)
def test_scales_and_inputs_may_be_views(name: str) -> None:
    weight, dense = layer(64, 40, sym=False)
    scales, x = several_scales(weight, 1)[0], normal(64, 10)
    got = way(name)(weight, x.T[::2], (0, 5), [scales.T.contiguous().T])
    want = naive(x.T[::2], dense, (0, 5), [scales])
    assert relative_error(got.cpu(), want) < 1e-5


@pytest.mark.parametrize("name", WAYS)
def test_no_tokens_give_no_outputs(name: str) -> None:
    weight, _ = layer(64, 40)
    got = way(name)(weight, normal(0, 64), (0, 0, 0), several_scales(weight, 2))
    assert got.shape == (0, 40)


def with_settings(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> KernelSettings:
    """Let the kernels be launched by the settings of a GPU with some changes."""
    settings = replace(settings_for((9, 0)), **changes)
    monkeypatch.setattr("qzo.model.kernels.triton_product.settings_of", lambda device: settings)
    return settings


def test_dense_tiles_smaller_than_the_layer_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, dense = layer(64, 40, sym=False)
    with_settings(monkeypatch, dense_elements=64 * 21)
    check("dense_product", weight, dense, normal(9, 64), (0, 4, 9))


@pytest.mark.parametrize("num_probes", [1, 32])
def test_dense_tiles_do_not_shrink_with_the_number_of_probes(
    num_probes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = torch.device("meta")
    weight = layer(64, 40)[0].to(meta)
    with_settings(monkeypatch, dense_elements=64 * 20)
    shapes = []

    def mm(x: Tensor, dense: Tensor, *, out: Tensor) -> None:
        shapes.append((len(x), *dense.shape))

    monkeypatch.setattr(torch, "mm", mm)
    bounds = range(0, 2 * num_probes + 1, 2)
    x = torch.empty(bounds[-1], 64, device=meta)
    way("dense_product")(weight, x, bounds, [weight.scales] * num_probes)
    assert shapes == [(2, 64, 20), (2, 64, 20)] * num_probes


@pytest.mark.parametrize("desc_act", [False, True])
def test_dense_tiles_are_the_matrix_of_the_file(
    desc_act: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, dense = layer(96, 70, sym=False, desc_act=desc_act)
    with_settings(monkeypatch, dense_elements=96 * 33)
    scales = several_scales(weight, 1)[0]
    tiles = import_module("qzo.model.kernels.triton_product").dense_tiles(
        weight, scales, torch.float32
    )
    got = torch.cat([tile.T.clone() for _, tile in tiles])
    # one product of float32 numbers: at most one rounding apart
    assert relative_error(got.cpu(), dense(scales)) < 2**-23


@pytest.mark.parametrize("name", WAYS)
def test_scales_of_the_file_are_read_as_they_lie(name: str) -> None:
    tensors = random_layer(64, 40, GPTQVariant(), seed=3)
    weight = gptq.unpack(tensors, gptq.spec(GPTQVariant().config()), "layer").to(DEVICE)
    operand = import_module("qzo.model.kernels.triton_product")._scale_operands([weight.scales])[0]
    assert operand.dtype == torch.float16
    assert operand.data_ptr() == weight.file_scales.data_ptr()  # neither converted nor copied
    x = normal(5, 64)
    got = way(name)(weight, x, (0, 5), [weight.scales])
    want = x.double().cpu() @ read_layer(tensors, GPTQVariant()).double().T
    assert relative_error(got.cpu(), want) < 1e-5


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("processors", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_of_rows_are_multiplied_by_probe_and_rounded_once(
    name: str, processors: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qzo.model.kernels.triton_product.num_processors", lambda device: processors
    )
    weight, dense = layer(64, 40, group_size=16, sym=False)
    bounds, scales, x = (0, 3, 3, 10), several_scales(weight, 1), normal(10, 64).to(dtype)
    factors = 1 + 0.2 * normal(3, 40, seed=5)
    got = way(name)(weight, x, (0, 10), scales, RowFactors(factors, bounds))
    want = naive(x, dense, (0, 10), scales)
    for p, (start, stop) in enumerate(pairwise(bounds)):
        want[start:stop] *= factors[p].double().cpu()
    assert relative_error(got.cpu(), want) < tolerance(dtype)


@pytest.mark.parametrize("processors", [2, 3, 64])
@pytest.mark.parametrize("options", [{"group_size": 16}, {"group_size": -1}, {"desc_act": True}])
def test_programs_that_share_the_inputs_give_the_same(
    processors: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qzo.model.kernels.triton_product.num_processors", lambda device: processors
    )
    weight, dense = layer(160, 40, sym=False, **options)
    check("fused_product", weight, dense, normal(9, 160).half(), (0, 2, 2, 9))


@pytest.mark.parametrize(("tokens", "name"), [(8, "fused_product"), (9, "dense_product")])
def test_the_way_is_chosen_by_the_tokens_of_a_set_of_scales(
    tokens: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_settings(monkeypatch, fused_tokens_max=4)
    weight, _ = layer(32, 8)
    other = next(each for each in WAYS if each != name)
    monkeypatch.delattr(f"qzo.model.kernels.triton_product.{other}")
    got = way("product")(weight, normal(tokens, 32), (0, 2, tokens), several_scales(weight, 2))
    assert got.shape == (tokens, 8)
