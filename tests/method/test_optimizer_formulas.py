"""Every rule against a transcription of its paper on dense float64 vectors."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qzo.method.directions.philox import directions
from qzo.method.estimators import SPSA
from qzo.method.optimizers import make_optimizer
from qzo.method.optimizers.optimizer import Optimizer
from qzo.method.probes import DirectionalDerivative, direction_seed
from qzo.method.trained_vector import Scales

Vector = NDArray[np.float64]

SIZE, SEED, STEPS, RATE, EPSILON = 60, 3, 6, 0.01, 0.01
WEIGHTS = np.linspace(0.2, 3.0, SIZE)


def loss_at(values: Vector) -> float:
    """Return a quadratic; no value of a run comes near 0, where scales stop."""
    return float(0.5 * np.sum(WEIGHTS * (values - 1.4) ** 2))


def new_scales() -> Scales:
    return Scales(["a"], [torch.ones(SIZE, 1)], coordinates="relative", direction="gaussian")


def z_of(step: int, number: int = 0) -> Vector:
    seed = direction_seed(SEED, step, number)
    return directions("gaussian", [seed], 0, SIZE)[0].double().numpy()


def trained(optimizer: Optimizer, *, num_directions: int = 1, curved: bool = False) -> Vector:
    """Take a few steps as the trainer does."""
    scales = new_scales()
    estimator = SPSA(EPSILON, SEED, num_directions=num_directions, measures_curvature=curved)
    for step in range(STEPS):
        optimizer.aim(scales)
        probes = estimator.ask(step)
        z = scales.directions.draw(probes, 0, SIZE).double().numpy()
        at = scales.values.double().numpy()
        losses = [loss_at(at + p.offset * row) for p, row in zip(probes, z, strict=True)]
        optimizer.step(scales, estimator.tell(probes, losses), RATE)
    assert not torch.equal(scales.values, new_scales().values)
    return scales.values.double().numpy()


def mezo(update: Callable[[Vector, int], Vector]) -> Vector:
    """MeZO's algorithm 1: perturb in place, measure, undo, step; ``update`` makes the step."""
    theta = np.ones(SIZE)
    for step in range(STEPS):
        z = z_of(step)
        theta += EPSILON * z
        plus = loss_at(theta)
        theta -= 2 * EPSILON * z
        minus = loss_at(theta)
        theta += EPSILON * z
        theta -= RATE * update((plus - minus) / (2 * EPSILON) * z, step)
    return theta


def momentum() -> Callable[[Vector, int], Vector]:
    total = np.zeros(SIZE)

    def update(estimate: Vector, step: int) -> Vector:
        total[:] = 0.9 * total + estimate
        return total

    return update


def adam() -> Callable[[Vector, int], Vector]:
    mean, square = np.zeros(SIZE), np.zeros(SIZE)

    def update(estimate: Vector, step: int) -> Vector:
        mean[:] = 0.9 * mean + 0.1 * estimate
        square[:] = 0.999 * square + 0.001 * estimate**2
        unbiased = square / (1 - 0.999 ** (step + 1))
        return mean / (1 - 0.9 ** (step + 1)) / (np.sqrt(unbiased) + 1e-8)

    return update


def meazo() -> Callable[[Vector, int], Vector]:
    moment = [0.0]

    def update(estimate: Vector, step: int) -> Vector:
        d = float(np.sqrt(np.sum(estimate**2) / np.sum(z_of(step) ** 2)))
        moment[0] = 0.8 * moment[0] + 0.2 * d * d
        return estimate / (math.sqrt(moment[0] / (1 - 0.8 ** (step + 1))) + 0.1)

    return update


@pytest.mark.parametrize(
    ("name", "settings", "update"),
    [
        ("sgd", {}, lambda estimate, step: estimate),
        ("momentum", {"momentum": 0.9}, momentum()),
        ("adam", {}, adam()),
        ("meazo", {"meazo_beta": 0.8, "meazo_epsilon": 0.1}, meazo()),
    ],
)
def test_a_rule_is_that_of_mezo_with_its_update(
    name: str, settings: dict[str, float], update: Callable[[Vector, int], Vector]
) -> None:
    got = trained(make_optimizer(name, settings))

    # fp32 values of size 1 against float64; losses differ by that too
    np.testing.assert_allclose(got, mezo(update), rtol=0, atol=1e-5)


def test_meazo_takes_the_mean_square_of_several_derivatives() -> None:
    scales, optimizer = new_scales(), make_optimizer("meazo", {"meazo_epsilon": 0.0})
    derivatives = [DirectionalDerivative(7, 3.0, 3.0), DirectionalDerivative(8, -4.0, -4.0)]

    optimizer.step(scales, derivatives, 0.01)

    z = directions("gaussian", [7, 8], 0, SIZE).double().numpy()
    want = 1 - 0.01 * (3 * z[0] - 4 * z[1]) / 2 / math.sqrt(12.5)
    np.testing.assert_allclose(scales.values.double().numpy(), want, rtol=0, atol=1e-6)


def test_meazo_does_not_depend_on_the_size_of_the_loss() -> None:
    results = []
    for factor in (1.0, 1024.0):  # a power of two: the same bits
        scales, optimizer = new_scales(), make_optimizer("meazo", {"meazo_epsilon": 0.0})
        for seed in range(4):
            d = factor * (seed - 1.5)
            optimizer.step(scales, [DirectionalDerivative(seed, d, d)], 0.01)
        results.append(scales.values)

    assert torch.equal(*results)


@pytest.mark.parametrize("num_directions", [1, 2])
def test_hizoo_is_its_formula_on_a_dense_vector(num_directions: int) -> None:
    alpha = 0.2
    optimizer = make_optimizer("hizoo", {"hizoo_alpha": alpha})

    got = trained(optimizer, num_directions=num_directions, curved=True)

    theta, h = np.ones(SIZE), np.ones(SIZE)  # h: the inverse of the paper's Sigma
    for step in range(STEPS):
        terms, seen = [], []
        centre = loss_at(theta)
        for number in range(num_directions):
            u = z_of(step, number)
            plus, minus = (loss_at(theta + s * EPSILON * u / np.sqrt(h)) for s in (1, -1))
            seen.append(abs(plus + minus - 2 * centre) / (2 * EPSILON**2) * h * u * u)
            terms.append((plus - minus) / (2 * EPSILON) * u)
        h = (1 - alpha) * h + alpha * np.mean(seen, axis=0)
        theta = theta - RATE * np.mean(terms, axis=0) / np.sqrt(h)
    # fp32 against float64; losses that nearly cancel, over epsilon squared, magnify that
    np.testing.assert_allclose(got, theta, rtol=0, atol=1e-5)
    assert h.max() > 2 * h.min()


def test_hizoo_in_stretched_coordinates_is_hizoo_on_the_unstretched_vector() -> None:
    """With ``v = s w``, probes and steps of ``w`` are those of ``v`` times ``s``."""
    factor, results = 2.0, []
    for stretch in (1.0, factor):
        scales, optimizer = new_scales(), make_optimizer("hizoo", {"hizoo_alpha": 0.2})
        scales.directions.stretch = torch.full((SIZE,), stretch)
        for step in range(3):
            optimizer.aim(scales)
            z = scales.directions.draw([DirectionalDerivative(step, 0.0, 0.0)], 0, SIZE)[0]
            offset = (scales.values - 1) / stretch
            d, c = float(z @ offset) / stretch - 1.0, float(z @ z) / stretch**2
            optimizer.step(scales, [DirectionalDerivative(step, d, d, curvature=c)], RATE)
        results.append((scales.values - 1) / stretch)

    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_the_curvature_of_hizoo_never_falls_to_zero() -> None:
    scales, optimizer = new_scales(), make_optimizer("hizoo", {"hizoo_alpha": 0.9})
    for seed in range(60):
        optimizer.aim(scales)
        optimizer.step(scales, [DirectionalDerivative(seed, 0.0, 0.0, curvature=0.0)], RATE)

    assert bool(scales.values.isfinite().all())
    assert float(optimizer.state()["curvature"].min()) == pytest.approx(1e-8)


@pytest.mark.parametrize("num_directions", [1, 2])
def test_conmezo_is_its_formula_on_a_dense_vector(num_directions: int) -> None:
    angle, beta = 1.1, 0.7
    optimizer = make_optimizer("conmezo", {"conmezo_angle": angle, "conmezo_beta": beta})

    got = trained(optimizer, num_directions=num_directions)

    theta, m = np.ones(SIZE), np.zeros(SIZE)
    for step in range(STEPS):
        terms = []
        for number in range(num_directions):
            z = z_of(step, number)
            length = math.sqrt(sum(x * x for x in m))
            if length > 0:
                axis = math.sqrt(SIZE) * m / length
                z = math.cos(angle) * axis + math.sin(angle) * z
            plus, minus = (loss_at(theta + s * EPSILON * z) for s in (1, -1))
            terms.append((plus - minus) / (2 * EPSILON) * z)
        estimate = np.mean(terms, axis=0)
        theta, m = theta - RATE * estimate, beta * m + (1 - beta) * estimate
    np.testing.assert_allclose(got, theta, rtol=0, atol=1e-5)


@pytest.mark.parametrize("angle", [0.3, 1.35])
def test_directions_of_conmezo_have_its_angle_to_the_momentum(angle: float) -> None:
    size = 2**14
    scales = Scales(["a"], [torch.ones(size, 1)], coordinates="relative", direction="gaussian")
    optimizer = make_optimizer("conmezo", {"conmezo_angle": angle})
    momentum = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 7
    optimizer.restore({"momentum": momentum})

    optimizer.aim(scales)

    keys = [DirectionalDerivative(seed, 0.0, 0.0) for seed in range(8)]
    z = scales.directions.draw(keys, 0, size).double()
    length = z.norm(dim=1)
    cosine = z @ momentum.double() / length / momentum.double().norm()
    # along the momentum a Gaussian has 1 / sqrt(size) = 0.008, and its length varies by 0.6 %
    assert cosine.tolist() == pytest.approx([math.cos(angle)] * 8, abs=0.03)
    assert (length / math.sqrt(size)).tolist() == pytest.approx([1.0] * 8, abs=0.03)


def test_conmezo_at_a_right_angle_draws_plain_directions() -> None:
    scales = new_scales()
    optimizer = make_optimizer("conmezo", {"conmezo_angle": math.pi / 2})
    optimizer.restore({"momentum": torch.ones(SIZE)})

    optimizer.aim(scales)

    got = scales.directions.draw([DirectionalDerivative(1, 0.0, 0.0)], 0, SIZE)
    torch.testing.assert_close(got, directions("gaussian", [1], 0, SIZE), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "momentum", "hizoo", "conmezo"])
def test_a_factor_of_a_part_is_a_change_of_its_units(name: str) -> None:
    settings = {"hizoo_alpha": 0.1} if name == "hizoo" else {}
    results = []
    for factor in (1.0, 0.5):  # a larger one would end below 0
        scales, unit = new_scales(), np.ones(SIZE)
        scales.directions.factors, unit[20:45] = [(20, 45, factor)], factor
        optimizer = make_optimizer(name, settings)
        estimator = SPSA(EPSILON, SEED, num_directions=2, measures_curvature=name == "hizoo")
        for step in range(STEPS):
            optimizer.aim(scales)
            probes = estimator.ask(step)
            z = scales.directions.draw(probes, 0, SIZE).double().numpy()
            at = scales.values.double().numpy()
            places = [at + p.offset * row for p, row in zip(probes, z, strict=True)]
            losses = [loss_at(1 + (place - 1) / unit) for place in places]
            optimizer.step(scales, estimator.tell(probes, losses), RATE)
        results.append((scales.values.double().numpy() - 1) / unit)

    assert np.abs(results[0][20:45]).max() > 0.01
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=1e-4)  # fp32 losses of 1e2
