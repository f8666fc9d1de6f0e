import numpy as np
import pytest
import torch
from torch import Tensor

from quantizers.errors import FormatError
from quantizers.gptq_algorithm import Hessian, gptq
from quantizers.rounding import Grid, RoundedWeight, round_to_nearest

OUT, IN = 3, 24


def correlated_inputs(count: int, size: int, seed: int = 0) -> Tensor:
    """Vectors whose entries are strongly correlated and differ in size, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    common = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    spread = torch.linspace(0.2, 3, size, dtype=torch.float64)[
        torch.randperm(size, generator=generator)
    ]
    own = torch.randn(count, size, generator=generator, dtype=torch.float64)
    inputs: Tensor = (own @ mixing / size**0.5 + 2 * common) * spread
    return inputs


def random_weight(out: int = OUT, size: int = IN, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, size, generator=generator, dtype=torch.float64)


def naive_scale(values: list[float], bits: int, is_symmetric: bool) -> tuple[float, int]:
    low, high = min(0.0, *values), max(0.0, *values)
    if is_symmetric:
        high = max(-low, high)
        low = -high
    scale = float(np.float16((high - low) / (2**bits - 1)))
    return scale, 2 ** (bits - 1) if is_symmetric else round(-low / scale)


def naive_obq(
    weight: Tensor, hessian: Tensor, *, grid: Grid, order: list[int], damp_percent: float
) -> tuple[Tensor, Tensor]:
    """Optimal brain quantization, one row and one column at a time, on the inverse itself.

    After each column its row and column are eliminated from the inverse (eq. 3 of the paper).
    Returns codes and the dense matrix.
    """
    size = IN if grid.group_size == -1 else grid.group_size
    damping = damp_percent * float(hessian.diagonal().mean())
    permuted = hessian[order][:, order] + damping * torch.eye(len(order), dtype=torch.float64)
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    dense = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        values = weight[row, order].clone()
        inverse = torch.linalg.inv(permuted)
        for j in range(len(order)):
            if j % size == 0:
                members = values[j : j + size].tolist()
                scale, zero = naive_scale(members, grid.bits, grid.is_symmetric)
            code = round(float(values[j]) / scale) + zero
            code = min(max(code, 0), 2**grid.bits - 1)
            codes[row, order[j]] = code
            dense[row, order[j]] = scale * (code - zero)
            error = (values[j] - scale * (code - zero)) / inverse[j, j]
            values[j:] -= error * inverse[j, j:]
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes, dense


def output_error(weight: Tensor, dense: Tensor, inputs: Tensor) -> float:
    return float(((weight - dense) @ inputs.T).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, 7, -1, 24])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_equals_naive_optimal_brain_quantization(
    bits: int, is_symmetric: bool, group_size: int, act_order: bool
) -> None:
    weight, inputs = random_weight(), correlated_inputs(200, IN)
    hessian = 2 * inputs.T @ inputs / len(inputs)
    grid = Grid(bits, group_size, is_symmetric)
    order = sorted(range(IN), key=lambda i: -float(hessian[i, i])) if act_order else list(range(IN))

    rounded = gptq(weight, hessian, grid=grid, act_order=act_order, block_size=8)

    codes, dense = naive_obq(weight, hessian, grid=grid, order=order, damp_percent=0.01)
    assert torch.equal(rounded.codes, codes)
    # one fp32 product against one in fp64
    torch.testing.assert_close(rounded.dequantize().double(), dense, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("block_size", [1, 5, 16, 24, 128])
def test_gptq_gives_the_same_codes_for_every_block_size(block_size: int) -> None:
    weight, inputs = random_weight(), correlated_inputs(200, IN)
    hessian = 2 * inputs.T @ inputs / len(inputs)
    grid = Grid(4, 6)

    rounded = gptq(weight, hessian, grid=grid, block_size=block_size)

    assert torch.equal(rounded.codes, gptq(weight, hessian, grid=grid, block_size=6).codes)


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_gptq_without_correlation_rounds_to_nearest(is_symmetric: bool) -> None:
    weight, grid = random_weight().float(), Grid(4, 8, is_symmetric)

    rounded = gptq(weight, torch.eye(IN), grid=grid)

    plain = round_to_nearest(weight, grid)
    assert torch.equal(rounded.codes, plain.codes)
    assert torch.equal(rounded.scales, plain.scales)
    assert torch.equal(rounded.zeros, plain.zeros)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_halves_the_output_error_of_rounding_to_nearest(bits: int, act_order: bool) -> None:
    weight, inputs = random_weight(16, 64).float(), correlated_inputs(2000, 64).float()
    hessian = Hessian(64)
    hessian.add(inputs[:1000])
    grid = Grid(bits, 32)

    rounded = gptq(weight, hessian.matrix, grid=grid, act_order=act_order)

    held_out = inputs[1000:]
    plain = output_error(weight, round_to_nearest(weight, grid).dequantize(), held_out)
    assert output_error(weight, rounded.dequantize(), held_out) < 0.5 * plain


def test_gptq_with_act_order_numbers_groups_by_falling_activation() -> None:
    inputs = correlated_inputs(200, IN).float()
    hessian = 2 * inputs.T @ inputs / len(inputs)

    g_idx = gptq(random_weight().float(), hessian, grid=Grid(4, 10), act_order=True).g_idx

    by_activation = sorted(range(IN), key=lambda i: -float(hessian[i, i]))
    assert [int(g_idx[i]) for i in by_activation] == [0] * 10 + [1] * 10 + [2] * 4


def test_gptq_rounds_inputs_that_are_always_zero_to_nearest() -> None:
    weight, inputs = random_weight().float(), correlated_inputs(200, IN).float()
    inputs[:, 3] = 0
    hessian = Hessian(IN)
    hessian.add(inputs)

    dense = gptq(weight, hessian.matrix, grid=Grid(8, -1)).dequantize()

    # scale is (2 * 3.2) / 255 at most here: half of it, and no more for fp32
    assert (dense - weight)[:, 3].abs().max() < 0.013


def test_gptq_without_any_input_rounds_to_nearest() -> None:
    weight, grid = random_weight().float(), Grid(4, 8)

    rounded = gptq(weight, Hessian(IN).matrix, grid=grid)

    assert torch.equal(rounded.codes, round_to_nearest(weight, grid).codes)


def test_gptq_survives_a_singular_hessian() -> None:
    inputs = correlated_inputs(200, 2).float().repeat(1, IN // 2)  # rank 2
    hessian = Hessian(IN)
    hessian.add(inputs)

    rounded = gptq(random_weight().float(), hessian.matrix, grid=Grid(4, 8))

    assert torch.isfinite(rounded.dequantize()).all()


def test_gptq_refuses_a_hessian_with_nan() -> None:
    hessian = torch.eye(IN)
    hessian[2, 2] = torch.nan

    with pytest.raises(
        FormatError, match=r"^hessian: expected finite values, got NaN or infinity;"
    ):
        gptq(random_weight(), hessian, grid=Grid(4, 8))


def test_gptq_refuses_a_hessian_that_no_damping_makes_positive() -> None:
    hessian = torch.eye(IN) - 10 * (1 - torch.eye(IN))

    with pytest.raises(
        FormatError, match=r"^hessian: expected a positive definite .* up to 1, got none; use more"
    ):
        gptq(random_weight(), hessian, grid=Grid(4, 8))


def test_hessian_is_the_mean_of_all_inputs_however_they_are_split() -> None:
    inputs = correlated_inputs(60, IN).float()
    hessian = Hessian(IN)

    hessian.add(inputs[:10].view(2, 5, IN))
    hessian.add(inputs[:0])
    hessian.add(inputs[10:])

    assert hessian.num_inputs == 60
    want = sum(2 * torch.outer(x, x) for x in inputs.double()) / 60
    torch.testing.assert_close(hessian.matrix.double(), want, rtol=1e-5, atol=1e-5)  # fp32 sums


def naive_nearest(weight: Tensor, grid: Grid) -> RoundedWeight:
    size = weight.shape[1] if grid.group_size == -1 else grid.group_size
    groups = -(-weight.shape[1] // size)
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    scales, zeros = torch.zeros(len(weight), groups), torch.zeros(len(weight), groups)
    for row, values in enumerate(weight.tolist()):
        for group in range(groups):
            members = values[group * size : (group + 1) * size]
            scale, zero = naive_scale(members, grid.bits, grid.is_symmetric)
            scales[row, group], zeros[row, group] = scale, zero
            for place, value in enumerate(members):
                # round() of Python and of torch both take halves to the even integer
                code = min(max(round(value / scale) + zero, 0), 2**grid.bits - 1)
                codes[row, group * size + place] = code
    g_idx = torch.arange(weight.shape[1]) // size
    return RoundedWeight(codes, scales, zeros.int(), g_idx.int())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, 7, -1, 100])
def test_round_to_nearest_equals_a_loop_over_weights(
    bits: int, is_symmetric: bool, group_size: int
) -> None:
    weight, grid = random_weight().float(), Grid(bits, group_size, is_symmetric)

    rounded = round_to_nearest(weight, grid)

    want = naive_nearest(weight, grid)
    assert torch.equal(rounded.codes, want.codes)
    assert torch.equal(rounded.scales, want.scales)
    assert torch.equal(rounded.zeros, want.zeros)
    assert torch.equal(rounded.g_idx, want.g_idx)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_round_to_nearest_stays_within_half_a_scale_in_groups_of_one_sign(
    sign: int, is_symmetric: bool
) -> None:
    weight = sign * (random_weight().float().abs() + 1)

    rounded = round_to_nearest(weight, Grid(4, 8, is_symmetric))

    scales = rounded.scales[:, rounded.g_idx]
    # a symmetric grid has no code for +a, only for -a: up to one scale there; 1 % for fp16 scales
    reach = 1.0 if is_symmetric else 0.5
    assert ((rounded.dequantize() - weight).abs() <= (reach + 0.01) * scales).all()


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_scales_are_positive_and_survive_fp16(is_symmetric: bool) -> None:
    weight = random_weight().float() * torch.logspace(-9, 2, IN)
    weight[:, :8] = 0

    rounded = round_to_nearest(weight, Grid(4, 8, is_symmetric))

    assert rounded.scales.min() > 0
    assert torch.equal(rounded.scales.half().float(), rounded.scales)
    assert torch.equal(rounded.dequantize()[:, :8], weight[:, :8])


def test_round_to_nearest_refuses_weights_beyond_fp16() -> None:
    weight = random_weight().float()
    weight[0, 0] = 1e9

    with pytest.raises(FormatError, match=r"^scales: expected finite values up to 65504, got inf;"):
        round_to_nearest(weight, Grid(4, 8))
