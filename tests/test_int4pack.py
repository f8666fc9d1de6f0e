"""The layout of torch's 4-bit operator, by its sibling for the CPU."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from support.gptq_files import GPTQVariant, random_layer, read_layer, unpack_stream
from support.models import relative_error
from torch import Tensor

from quantizers import gptq
from quantizers.gptq import GPTQWeight
from qzo import int4pack

OUT = 48


def layer(in_features: int, **options: Any) -> tuple[GPTQWeight, dict[str, Tensor], GPTQVariant]:
    variant = GPTQVariant(**options)
    tensors = random_layer(in_features, OUT, variant)
    tensors["scales"] = tensors["scales"].float()
    return gptq.unpack(tensors, gptq.spec(variant.config()), "layer"), tensors, variant


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def several_scales(weight: GPTQWeight, count: int) -> list[Tensor]:
    scales = weight.scales.float()
    return [scales * (1 + 0.2 * normal(*scales.shape, seed=p)) for p in range(count)]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("bounds", [(0, 9), (0, 4, 4, 9)], ids=str)
def test_every_probe_sees_its_own_scales(
    sym: bool, group_size: int, bounds: tuple[int, ...]
) -> None:
    weight, tensors, variant = layer(256, sym=sym, group_size=group_size)
    scales, x = several_scales(weight, len(bounds) - 1), normal(9, 256).bfloat16()
    assert int4pack.fits(weight, x)
    got = int4pack.product(weight, int4pack.repack(weight), x, bounds, scales)
    for p, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            dense = read_layer({**tensors, "scales": scales[p].T}, variant)
            want = x[start:stop].float() @ dense.T
            # a weight and two sums are rounded to bfloat16
            assert relative_error(got[start:stop], want) < 3 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("sym", [True, False])
def test_scale_and_offset_turn_codes_into_weights(sym: bool) -> None:
    weight, tensors, variant = layer(128, sym=sym)
    scales = several_scales(weight, 1)[0]
    pairs = int4pack.scales_and_offsets(weight, scales)
    want = read_layer({**tensors, "scales": scales.T}, variant)
    words = tensors["qweight"].tolist()
    for out in range(OUT):
        codes = unpack_stream([row[out] for row in words], 4, 128)
        got = [
            float(pairs[i // 32, out, 0]) * (code - 8) + float(pairs[i // 32, out, 1])
            for i, code in enumerate(codes)
        ]
        # float32 products and their sum, of numbers up to 16 times the smallest difference
        assert relative_error(torch.tensor(got), want[out]) < 1e-6


def test_two_terms_keep_a_change_that_one_loses() -> None:
    values = normal(3, 50, 2).abs() + 0.1
    changed = values * 1.0005
    first, second = int4pack.bf16_terms(values)
    first_changed, second_changed = int4pack.bf16_terms(changed)
    assert (first == first_changed).float().mean() > 0.8  # lost
    change = (first_changed.float() - first.float()) + (second_changed.float() - second.float())
    # two roundings by 2**-17 of the value, over the change of 5e-4 of it
    assert ((change / values - 5e-4).abs() < 2**-15).all()


def test_the_first_of_two_codes_is_in_the_high_half() -> None:
    codes = torch.tensor([[1, 2, 15, 0], [3, 4, 5, 6]], dtype=torch.int32)
    assert int4pack.two_codes_a_byte(codes).tolist() == [[0x12, 0xF0], [0x34, 0x56]]


@pytest.mark.parametrize(("in_features", "tiles"), [(256, 8), (192, 4), (96, 2)])
def test_as_many_tiles_are_read_at_once_as_divide_the_layer(in_features: int, tiles: int) -> None:
    weight, _, _ = layer(in_features)
    packed = int4pack.repack(weight.to(torch.device("meta")))
    assert packed.shape == (OUT // 8, in_features // (16 * tiles), 32, tiles // 2)
    assert (packed.dtype, packed.device.type) == (torch.int32, "meta")


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"bits": 8}, torch.bfloat16),
        ({"desc_act": True}, torch.bfloat16),
        ({"group_size": 16}, torch.bfloat16),
        ({"group_size": -1}, torch.bfloat16),
        ({}, torch.float16),
    ],
    ids=str,
)
def test_what_the_operator_cannot_compute_does_not_fit(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    weight, _, _ = layer(192, **options)
    assert not int4pack.fits(weight, normal(2, 192).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("in_features", [256, 192, 96])
def test_the_operator_of_a_gpu_equals_that_of_the_cpu(sym: bool, in_features: int) -> None:
    weight, _, _ = layer(in_features, sym=sym)
    scales, x, bounds = several_scales(weight, 2), normal(9, in_features).bfloat16(), (0, 4, 9)
    want = int4pack.product(weight, int4pack.repack(weight), x, bounds, scales)
    moved = weight.to(torch.device("cuda"))
    there = [each.to("cuda") for each in scales]
    got = int4pack.product(moved, int4pack.repack(moved), x.to("cuda"), bounds, there)
    # on either side a weight and two sums are rounded to bfloat16
    assert relative_error(got.cpu(), want) < 6 * torch.finfo(torch.bfloat16).eps
