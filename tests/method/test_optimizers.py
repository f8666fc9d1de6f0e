import math
from typing import Any

import pytest
import torch

from qzo.errors import CheckpointError
from qzo.method.directions.philox import directions
from qzo.method.directions.settings import DirectionSettings
from qzo.method.optimizers import OPTIMIZERS, REMEMBERED, Optimizer, make_optimizer
from qzo.method.probes import DirectionalDerivative, Probe
from qzo.method.trained_vector import Scales

RATES = (0.01, 0.02, 0.01, 0.005)


def new_scales(name: str = "sgd") -> Scales:
    """Return the scales of one layer, with directions that an optimizer can use."""
    stored = 1 + torch.rand(40, 3, generator=torch.Generator().manual_seed(1))
    if name == "lozo_momentum":
        rank = DirectionSettings(rank=2)
        return Scales(
            ["a"], [stored], coordinates="relative", direction="lozo", direction_settings=rank
        )
    return Scales(["a"], [stored], coordinates="relative", direction="gaussian")


def derivatives_of(step: int) -> list[DirectionalDerivative]:
    values = [(-1) ** step * 1.5, 0.25 * step + 0.1]
    return [
        DirectionalDerivative(10 * step + i, d, d, curvature=(-1) ** i * (1.0 + step))
        for i, d in enumerate(values)
    ]


def reference_of(name: str, values: torch.nn.Parameter) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam([values], betas=(0.9, 0.999), eps=1e-8)
    return torch.optim.SGD([values], momentum=0.9 if name == "momentum" else 0.0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *(("sgd", {}), ("sign", {})),
        *(("momentum", {"momentum": 0.9}), ("momentum", {})),
        *(("adam", {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}), ("adam", {})),
    ],
)
def test_an_optimizer_steps_as_that_of_torch_does(name: str, settings: dict[str, Any]) -> None:
    scales, optimizer = new_scales(name), make_optimizer(name, settings)
    values = torch.nn.Parameter(scales.values.clone())
    reference = reference_of(name, values)

    for step, rate in enumerate(RATES):
        derivatives = derivatives_of(step)
        optimizer.step(scales, derivatives, rate)
        drawn = directions("gaussian", [d.seed for d in derivatives], 0, len(values))
        sizes = [math.copysign(1, d.value) if name == "sign" else d.value for d in derivatives]
        values.grad = sum(size * z for size, z in zip(sizes, drawn, strict=True)) / 2
        reference.param_groups[0]["lr"] = rate
        reference.step()

    assert not torch.equal(scales.values, new_scales().values)
    # two orders of the same fp32 operations on values of size 1
    torch.testing.assert_close(scales.values, values.detach(), rtol=0, atol=1e-6)


DESCENTS: dict[str, tuple[float, dict[str, float]]] = {
    "sgd": (0.005, {}),
    "sign": (0.004, {}),
    "momentum": (0.0005, {}),
    "adam": (0.01, {}),
    "meazo": (0.01, {}),
    "hizoo": (0.02, {"hizoo_alpha": 0.003}),
    "conmezo": (0.003, {}),
    "conservative": (0.005, {}),
    "lozo_momentum": (0.005, {}),
}


def test_every_optimizer_is_under_test() -> None:
    assert set(DESCENTS) == set(OPTIMIZERS)
    assert len(OPTIMIZERS) == 9


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_an_optimizer_fits_the_seam(name: str) -> None:
    assert isinstance(make_optimizer(name, {}), Optimizer)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_an_optimizer_descends_on_a_quadratic(name: str) -> None:
    rate, settings = DESCENTS[name]
    scales, optimizer = new_scales(name), make_optimizer(name, settings)
    target = torch.full_like(scales.values, 1.3)
    before = float((scales.values - target).square().sum())

    for seed in range(100):
        optimizer.aim(scales)
        basis = seed // 20
        z = scales.directions.draw([Probe(seed, 0.1, basis=basis)], 0, len(target))[0]
        slope = float(z @ (scales.values - target))  # the exact directional derivative
        curvature = float(z @ z)
        derivative = DirectionalDerivative(seed, slope, slope, curvature=curvature, basis=basis)
        optimizer.step(scales, [derivative], rate)

    assert float((scales.values - target).square().sum()) < 0.85 * before


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_an_optimizer_remembers_as_much_as_is_planned(name: str) -> None:
    scales, optimizer = new_scales(name), make_optimizer(name, {})
    optimizer.aim(scales)
    optimizer.step(scales, derivatives_of(0), 0.01)

    large = [size for size in map(torch.numel, optimizer.state().values()) if size > 2]

    assert set(REMEMBERED) < set(OPTIMIZERS)
    if name == "lozo_momentum":  # as many a row as the rank
        assert 0 < sum(large) <= len(scales)
    else:
        assert sum(large) == REMEMBERED.get(name, 0) * len(scales)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_restored_optimizer_goes_on_bitwise(name: str) -> None:
    straight, stopped = new_scales(name), new_scales(name)
    settings = {"hizoo": {"hizoo_alpha": 0.3}}.get(name, {})
    optimizer, first = make_optimizer(name, settings), make_optimizer(name, settings)
    for step, rate in enumerate(RATES):
        optimizer.aim(straight)
        optimizer.step(straight, derivatives_of(step), rate)

    for step, rate in enumerate(RATES[:2]):
        first.aim(stopped)
        first.step(stopped, derivatives_of(step), rate)
    state = {key: tensor.clone() for key, tensor in first.state().items()}
    resumed = new_scales(name)
    resumed.restore(stopped.values)
    second = make_optimizer(name, settings)
    second.restore(state)
    for step, rate in enumerate(RATES[2:], start=2):
        second.aim(resumed)
        second.step(resumed, derivatives_of(step), rate)

    assert torch.equal(resumed.values, straight.values)
    assert not torch.equal(resumed.values, stopped.values)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_step_without_a_finite_derivative_moves_nothing(name: str) -> None:
    scales, optimizer = new_scales(name), make_optimizer(name, {})
    optimizer.aim(scales)
    optimizer.step(scales, derivatives_of(0), 0.01)
    before = scales.values.clone()
    state = {key: tensor.clone() for key, tensor in optimizer.state().items()}

    optimizer.step(scales, [], 0.01)

    assert torch.equal(scales.values, before)
    assert all(torch.equal(optimizer.state()[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("sgdm", {}, "optimizer: expected one of ['adam', 'conmezo', 'conservative', 'hizoo', "
            "'lozo_momentum', 'meazo', 'momentum', 'sgd', 'sign'], got 'sgdm'"),
        ("conmezo", {"conmezo_angle": 1.6}, "optimizer_settings: expected a conmezo_angle from 0 "
            "to pi / 2, got 1.6"),
        ("momentum", {"momentum": "a"}, "optimizer_settings: expected numbers from 0 to below 1, "
            "got {'momentum': 'a'}"),
        ("adam", {"adam_beta1": 1.0}, "optimizer_settings: expected numbers from 0 to below 1, got "
            "{'adam_beta1': 1.0}"),
        ("sgd", {"momentum": 0.5}, "optimizer_settings: sgd: SGD() takes no arguments"),
    ],
)  # fmt: skip
def test_an_unknown_optimizer_is_refused(name: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        make_optimizer(name, settings)

    assert str(caught.value) == reason


def test_hizoo_refuses_a_derivative_without_curvature() -> None:
    reason = (
        r"^optimizer: expected a curvature with every derivative for 'hizoo', got none; use an "
        r"estimator that measures it$"
    )
    with pytest.raises(CheckpointError, match=reason):
        make_optimizer("hizoo", {}).step(new_scales(), [DirectionalDerivative(1, 1.0, 1.0)], 0.1)
