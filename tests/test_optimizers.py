from typing import Any

import pytest
import torch

from qzo.directions import directions
from qzo.errors import CheckpointError
from qzo.optimizers import make_optimizer
from qzo.probes import DirectionalDerivative
from qzo.scales import Scales

RATES = (0.01, 0.02, 0.01, 0.005)


def new_scales() -> Scales:
    stored = 1 + torch.rand(40, 3, generator=torch.Generator().manual_seed(1))
    return Scales(["a"], [stored], coordinates="relative", direction="gaussian")


def derivatives_of(step: int) -> list[DirectionalDerivative]:
    values = [(-1) ** step * 1.5, 0.25 * step]
    return [DirectionalDerivative(10 * step + i, d, d) for i, d in enumerate(values)]


@pytest.mark.parametrize(
    ("name", "settings"), [("sgd", {}), ("momentum", {"momentum": 0.9}), ("momentum", {})]
)
def test_an_optimizer_steps_as_that_of_torch_does(name: str, settings: dict[str, Any]) -> None:
    scales, optimizer = new_scales(), make_optimizer(name, settings)
    values = torch.nn.Parameter(scales.values.clone())
    reference = torch.optim.SGD([values], momentum=0.9 if name == "momentum" else 0.0)

    for step, rate in enumerate(RATES):
        derivatives = derivatives_of(step)
        optimizer.step(scales, derivatives, rate)
        drawn = directions("gaussian", [d.seed for d in derivatives], 0, len(values))
        values.grad = sum(d.value * z for d, z in zip(derivatives, drawn, strict=True)) / 2
        reference.param_groups[0]["lr"] = rate
        reference.step()

    assert not torch.equal(scales.values, new_scales().values)
    # two orders of the same fp32 operations on values of size 1
    torch.testing.assert_close(scales.values, values.detach(), rtol=0, atol=1e-6)


def test_a_restored_optimizer_goes_on_bitwise() -> None:
    straight, stopped = new_scales(), new_scales()
    optimizer, first = (make_optimizer("momentum", {"momentum": 0.8}) for _ in range(2))
    for step, rate in enumerate(RATES):
        optimizer.step(straight, derivatives_of(step), rate)

    for step, rate in enumerate(RATES[:2]):
        first.step(stopped, derivatives_of(step), rate)
    second = make_optimizer("momentum", {"momentum": 0.8})
    second.restore({key: tensor.clone() for key, tensor in first.state().items()})
    for step, rate in enumerate(RATES[2:], start=2):
        second.step(stopped, derivatives_of(step), rate)

    assert torch.equal(stopped.values, straight.values)


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_a_step_without_a_finite_derivative_moves_nothing(name: str) -> None:
    scales, optimizer = new_scales(), make_optimizer(name, {})
    optimizer.step(scales, derivatives_of(0), 0.01)
    before = scales.values.clone()
    state = {key: tensor.clone() for key, tensor in optimizer.state().items()}

    optimizer.step(scales, [], 0.01)

    assert torch.equal(scales.values, before)
    assert all(torch.equal(optimizer.state()[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("adam", {}, "optimizer: expected one of ['momentum', 'sgd'], got 'adam'"),
        ("momentum", {"momentum": "a"}, "optimizer_settings: expected finite numbers, got "
            "{'momentum': 'a'}"),
        ("sgd", {"momentum": 0.5}, "optimizer_settings: sgd: SGD() takes no arguments"),
    ],
)  # fmt: skip
def test_an_unknown_optimizer_is_refused(name: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        make_optimizer(name, settings)

    assert str(caught.value) == reason
