import math
import random
import statistics
from collections.abc import Callable

import pytest

from qzo.errors import ConfigError
from qzo.estimators import SPSA, Estimator, PerExampleSPSA
from qzo.probes import Probe, direction_seed

ESTIMATORS: dict[str, type[SPSA]] = {"spsa": SPSA, "per_example": PerExampleSPSA}
COUNTS = (1, 3)


@pytest.fixture(params=sorted(ESTIMATORS))
def make(request: pytest.FixtureRequest) -> type[SPSA]:
    return ESTIMATORS[request.param]


def signs(seed: int, count: int = 3) -> list[int]:
    """Return a Rademacher direction from Python's own generator."""
    draw = random.Random(seed)
    return [draw.choice((-1, 1)) for _ in range(count)]


def losses_of(
    probes: list[Probe], at: list[float], loss: Callable[[list[float]], float]
) -> list[float]:
    """Evaluate a loss of a vector at the probes."""
    moved = [
        [v + probe.offset * z for v, z in zip(at, signs(probe.seed), strict=True)]
        for probe in probes
    ]
    return [loss(vector) for vector in moved]


def test_all_estimators_are_under_test() -> None:
    assert len(ESTIMATORS) == 2


def test_estimators_fit_the_seam(make: type[SPSA]) -> None:
    estimator: Estimator = make(0.1, 0, num_directions=2)

    assert len(estimator.ask(0)) == 4


@pytest.mark.parametrize("count", COUNTS)
def test_ask_returns_every_direction_at_plus_and_minus_epsilon(
    make: type[SPSA], count: int
) -> None:
    probes = make(0.25, 9, num_directions=count).ask(4)

    seeds = [direction_seed(9, 4, number) for number in range(count)]
    assert [(p.seed, p.offset) for p in probes] == [
        *((seed, 0.25) for seed in seeds),
        *((seed, -0.25) for seed in seeds),
    ]


def test_spsa_probes_cover_the_whole_batch() -> None:
    assert {probe.examples for probe in SPSA(0.1, 0, num_directions=3).ask(0)} == {None}


def test_per_example_probes_cover_one_example_each() -> None:
    probes = PerExampleSPSA(0.1, 0, num_directions=3).ask(0)

    assert [probe.examples for probe in probes] == [(0, 1), (1, 2), (2, 3)] * 2


def test_ask_is_a_function_of_the_step(make: type[SPSA]) -> None:
    estimator = make(0.1, 5, num_directions=2)

    first = estimator.ask(3)
    estimator.ask(4)

    assert estimator.ask(3) == first
    assert make(0.1, 5, num_directions=2).ask(3) == first
    assert make(0.1, 6, num_directions=2).ask(3) != first


def test_seeds_never_repeat_over_steps_and_directions(make: type[SPSA]) -> None:
    estimator = make(0.1, 0, num_directions=16)

    seeds = [probe.seed for step in range(200) for probe in estimator.ask(step)]

    assert len(set(seeds)) == len(seeds) / 2 == 200 * 16


@pytest.mark.parametrize("epsilon", [1e-3, 0.5, 2.0])
@pytest.mark.parametrize("count", COUNTS)
def test_estimates_are_exact_on_a_line(make: type[SPSA], count: int, epsilon: float) -> None:
    slope = [0.5, -2.0, 3.0]
    probes = make(epsilon, 1, num_directions=count).ask(0)

    losses = losses_of(probes, [1.0, 2.0, 4.0], lambda v: sum(map(float.__mul__, slope, v)))
    derivatives = make(epsilon, 1, num_directions=count).tell(probes, losses)

    assert len(derivatives) == count
    for derivative in derivatives:
        exact = sum(s * z for s, z in zip(slope, signs(derivative.seed), strict=True))
        # the losses, near 10, are exact to 2**-50; the division by epsilon magnifies that
        assert derivative.value == pytest.approx(exact, abs=1e-14 / epsilon)


def test_the_mean_of_derivative_times_direction_is_unbiased_on_a_quadratic(
    make: type[SPSA],
) -> None:
    at, weights = [1.0, -2.0, 0.5], [3.0, 1.0, 2.0]
    estimator = make(0.1, 2, num_directions=4)
    estimates: list[list[float]] = []
    for step in range(400):
        probes = estimator.ask(step)
        losses = losses_of(
            probes, at, lambda v: sum(w * x * x for w, x in zip(weights, v, strict=True))
        )
        for derivative in estimator.tell(probes, losses):
            estimates.append([derivative.value * z for z in signs(derivative.seed)])

    for values, w, x in zip(zip(*estimates, strict=True), weights, at, strict=True):
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert abs(statistics.fmean(values) - 2 * w * x) < 4 * error


def test_the_clip_is_the_largest_loss_difference_over_two_epsilon(make: type[SPSA]) -> None:
    estimator = make(1e-3, 0, num_directions=3, max_loss_difference=0.2)  # C = 100: the paper

    derivatives = estimator.tell(estimator.ask(0), [1.5, 1.0, 1.1, 1.0, 1.5, 1.0])

    assert [d.value for d in derivatives] == pytest.approx([100.0, -100.0, 50.0])
    assert [d.raw for d in derivatives] == pytest.approx([250.0, -250.0, 50.0])
    assert [d.is_clipped for d in derivatives] == [True, True, False]


def test_without_a_clip_values_are_raw(make: type[SPSA]) -> None:
    estimator = make(1e-3, 0, num_directions=1)

    (derivative,) = estimator.tell(estimator.ask(0), [1e6, -1e6])

    assert derivative.value == derivative.raw == 1e9


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [1, 4])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_a_loss_that_is_not_finite_gives_nan_in_its_place(
    make: type[SPSA], bad: float, place: int, clip: float | None
) -> None:
    estimator = make(0.5, 0, num_directions=3, max_loss_difference=clip)
    probes, losses = estimator.ask(0), [1.0, 1.0, 1.0, 0.9, 0.9, 0.9]
    losses[place] = bad

    derivatives = estimator.tell(probes, losses)

    assert [d.seed for d in derivatives] == [probe.seed for probe in probes[:3]]
    assert [math.isnan(d.value) for d in derivatives] == [False, True, False]
    assert [math.isnan(d.raw) for d in derivatives] == [False, True, False]
    assert derivatives[0].value == derivatives[2].value == pytest.approx(0.1)


def test_a_difference_that_overflows_is_nan(make: type[SPSA]) -> None:
    estimator = make(1e-3, 0, num_directions=1, max_loss_difference=0.2)

    (derivative,) = estimator.tell(estimator.ask(0), [1.7e308, -1.7e308])

    assert math.isnan(derivative.value)


def test_normalised_derivatives_have_a_root_mean_square_of_one() -> None:
    estimator = PerExampleSPSA(0.5, 0, num_directions=3, is_normalized=True)

    derivatives = estimator.tell(estimator.ask(0), [3.0, 1.0, -2.0, 0.0, 0.0, 0.0])

    size = math.sqrt((9 + 1 + 4) / 3)
    assert [d.value for d in derivatives] == pytest.approx([3 / size, 1 / size, -2 / size])
    assert [d.raw for d in derivatives] == [3.0, 1.0, -2.0]
    assert not any(d.is_clipped for d in derivatives)


def test_normalisation_follows_the_clip_and_leaves_out_what_is_not_finite() -> None:
    estimator = PerExampleSPSA(
        0.5, 0, num_directions=3, max_loss_difference=2.0, is_normalized=True
    )

    derivatives = estimator.tell(estimator.ask(0), [4.0, math.nan, 2.0, 0.0, 0.0, 0.0])

    assert [d.value for d in (derivatives[0], derivatives[2])] == [1.0, 1.0]
    assert math.isnan(derivatives[1].value)
    assert [d.is_clipped for d in derivatives] == [True, False, False]


@pytest.mark.parametrize("losses", [[1.0] * 4, [math.nan] * 4])
def test_normalisation_leaves_nothing_as_it_is(losses: list[float]) -> None:
    estimator = PerExampleSPSA(0.5, 0, num_directions=2, is_normalized=True)

    values = [d.value for d in estimator.tell(estimator.ask(0), losses)]

    assert values == [0.0, 0.0] or all(math.isnan(value) for value in values)


def test_tell_wants_a_loss_for_every_probe(make: type[SPSA]) -> None:
    estimator = make(0.1, 0, num_directions=2)

    with pytest.raises(ValueError, match=r"^zip\(\) argument 3 is shorter than arguments 1-2$"):
        estimator.tell(estimator.ask(0), [1.0, 2.0, 3.0])


@pytest.mark.parametrize("value", [0, -1e-3, math.nan, math.inf])
def test_epsilon_must_be_a_positive_number(make: type[SPSA], value: float) -> None:
    with pytest.raises(
        ConfigError, match=rf"^zo\.epsilon: expected a number above 0, got {value}$"
    ):
        make(value, 0, num_directions=1)


@pytest.mark.parametrize("value", [0, -2])
def test_num_directions_must_be_positive(make: type[SPSA], value: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"^zo\.num_directions: expected a number above 0, got {value}$"
    ):
        make(0.1, 0, num_directions=value)


@pytest.mark.parametrize("value", [0.0, -0.2, math.nan, math.inf])
def test_max_loss_difference_must_be_a_positive_number(make: type[SPSA], value: float) -> None:
    with pytest.raises(
        ConfigError, match=rf"^zo\.max_loss_difference: expected a number above 0, got {value}$"
    ):
        make(0.1, 0, num_directions=1, max_loss_difference=value)


def test_spsa_measures_the_second_derivative_along_every_direction() -> None:
    estimator = SPSA(0.25, 3, num_directions=2, measures_curvature=True)
    probes = estimator.ask(0)
    assert [probe.offset for probe in probes] == [0.25, 0.25, -0.25, -0.25, 0.0]

    weights = [3.0, -1.0, 2.0]
    losses = losses_of(
        probes, [1.0, 2.0, 4.0], lambda v: sum(w * x * x for w, x in zip(weights, v, strict=True))
    )
    derivatives = estimator.tell(probes, losses)

    plain = SPSA(0.25, 3, num_directions=2).tell(probes[:4], losses[:4])
    assert [d.value for d in derivatives] == [d.value for d in plain]
    # signs are squared: the same along every direction
    assert [d.curvature for d in derivatives] == pytest.approx([8.0, 8.0], abs=1e-10)


def test_without_a_finite_loss_at_the_centre_there_is_no_derivative() -> None:
    estimator = SPSA(0.25, 3, measures_curvature=True)

    (derivative,) = estimator.tell(estimator.ask(0), [1.0, 2.0, math.nan])

    assert math.isnan(derivative.value)
    assert math.isnan(derivative.raw)
