import math
import random
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from qzo.errors import ConfigError
from qzo.method.estimators import ESTIMATORS, Estimator, evaluations_per_example, make_estimator
from qzo.method.estimators.averages import deviation, mean
from qzo.method.estimators.per_example import normalized
from qzo.method.probes import DirectionalDerivative, Probe, basis_seed, direction_seed

COUNT = 4  # directions of every variant
NUM_EXAMPLES = 4
Pairs = list[tuple[float, float]]  # value and raw of every direction


# --- the formulas, transcribed one by one ---------------------------------------------------


def ddc(x: float, limit: float | None) -> float:
    return x if limit is None else max(-limit, min(limit, x))


def spsa(losses: Sequence[float], eps: float, limit: float | None) -> Pairs:
    differences = [losses[i] - losses[i + COUNT] for i in range(COUNT)]
    return [(ddc(x, limit) / (2 * eps), x / (2 * eps)) for x in differences]


def spsa_with_center(losses: Sequence[float], eps: float, limit: float | None) -> Pairs:
    return spsa(losses[1:], eps, limit)


def curvatures(losses: Sequence[float], eps: float) -> list[float]:
    return [(losses[1 + i] - 2 * losses[0] + losses[1 + COUNT + i]) / eps**2 for i in range(COUNT)]


def spsa_1_5(losses: Sequence[float], eps: float, limit: float | None) -> Pairs:
    weights = [1 / max(1, abs(c) ** 0.1) for c in curvatures(losses, eps)]
    pairs = spsa(losses[1:], eps, limit)
    return [(w * value, raw) for w, (value, raw) in zip(weights, pairs, strict=True)]


def one_sided(losses: Sequence[float], eps: float, limit: float | None) -> Pairs:
    return [(ddc(loss - losses[0], limit) / eps, (loss - losses[0]) / eps) for loss in losses[1:]]


def fzoo(losses: Sequence[float], eps: float, limit: float | None) -> Pairs:
    sigma = statistics.stdev(losses[1:])
    return [(value / sigma, raw) for value, raw in one_sided(losses, eps, limit)]


def rloo(losses: Sequence[float], eps: float, limit: float | None) -> Pairs:
    num = len(losses)
    differences = [num / (num - 1) * (loss - statistics.fmean(losses)) for loss in losses]
    return [(ddc(x, limit) / eps, x / eps) for x in differences]


def rloo_of_two(losses: Sequence[float], eps: float, limit: float | None) -> Pairs:
    return rloo(losses[:2], eps, limit) + rloo(losses[2:], eps, limit)


def forward_gradient(losses: Sequence[float], eps: float, limit: float | None) -> Pairs:
    bound = None if limit is None else limit / (2 * eps)
    return [(ddc(slope, bound), slope) for slope in losses]


@dataclass(frozen=True)
class Variant:
    """An estimator with settings.

    Attributes:
        name: A key of ``ESTIMATORS``.
        settings: Beyond the common ones.
        formula: ``(losses, epsilon, clip) -> (value, raw) per direction``.
        places: The losses that direction ``i`` cannot do without.
        cost: Evaluations of each example in a step.
        group: Directions whose losses are compared with each other, or 0.
    """

    name: str
    settings: dict[str, Any]
    formula: Callable[[Sequence[float], float, float | None], Pairs]
    places: Callable[[int], set[int]]
    cost: int
    group: int = 0

    def make(self, epsilon: float = 0.1, seed: int = 0, **settings: Any) -> Estimator:
        given = {"epsilon": epsilon, "seed": seed, **self.settings, **settings}
        return make_estimator(self.name, given)


FOUR = {"num_directions": COUNT}
EXAMPLES = {"num_examples": NUM_EXAMPLES}
PAIRS = {**EXAMPLES, "examples_per_direction": 2, "num_directions": 2}

VARIANTS = {
    "spsa": Variant("spsa", FOUR, spsa, lambda i: {i, i + COUNT}, 8),
    "spsa-curvature": Variant(
        *("spsa", {**FOUR, "measures_curvature": True}, spsa_with_center),
        *(lambda i: {0, 1 + i, 1 + i + COUNT}, 9),
    ),
    "one_sided": Variant("one_sided", FOUR, one_sided, lambda i: {0, 1 + i}, 5),
    "fzoo": Variant("fzoo", FOUR, fzoo, lambda i: {0, 1 + i}, 5),
    "rloo": Variant("rloo", FOUR, rloo, lambda i: {i}, 4, group=COUNT),
    "per_example": Variant("per_example", EXAMPLES, spsa, lambda i: {i, i + COUNT}, 2),
    "per_example-pairs": Variant("per_example", PAIRS, spsa, lambda i: {i, i + COUNT}, 4),
    "per_example-leave_one_out": Variant(
        *("per_example", {**PAIRS, "sides": "leave_one_out"}, rloo_of_two),
        *(lambda i: {i // 2 * 2, i // 2 * 2 + 1}, 2),
        group=2,
    ),
    "spsa_1_5": Variant("spsa_1_5", FOUR, spsa_1_5, lambda i: {0, 1 + i, 1 + i + COUNT}, 9),
    "forward_gradient": Variant("forward_gradient", FOUR, forward_gradient, lambda i: {i}, 4),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Variant:
    return VARIANTS[request.param]


# --- losses of a vector, a little different for every example -------------------------------

AT = [1.0, -2.0, 0.5]
LINES = [[0.5, -2.0, 3.0], [1.0, 1.0, -1.0], [-2.0, 0.0, 2.0], [0.25, 1.0, 0.0]]


def rademacher(seed: int) -> list[float]:
    """Return a direction from Python's own generator."""
    draw = random.Random(seed)
    return [float(draw.choice((-1, 1))) for _ in AT]


def gaussian(seed: int) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(0, 1) for _ in AT]


Draw = Callable[[int], list[float]]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def line_of(probe: Probe) -> list[float]:
    """Return the mean line of the examples that a probe covers."""
    first, stop = probe.examples or (0, NUM_EXAMPLES)
    return [statistics.fmean(column) for column in zip(*LINES[first:stop], strict=True)]


def losses_of(
    probes: Sequence[Probe], weights: Sequence[float], draw: Draw = rademacher
) -> list[float]:
    """Evaluate ``sum_j w_j v_j^2 + line . v``, or its slope, at the probes."""
    losses = []
    for probe in probes:
        z, line = draw(probe.seed), line_of(probe)
        v = [x + probe.offset * s for x, s in zip(AT, z, strict=True)]
        gradient = [2 * w * x + b for w, x, b in zip(weights, v, line, strict=True)]
        loss = dot(weights, [x * x for x in v]) + dot(line, v)
        losses.append(dot(gradient, z) if probe.is_tangent else loss)
    return losses


def random_losses(count: int, seed: int = 1) -> list[float]:
    draw = random.Random(seed)
    return [draw.uniform(0, 2) for _ in range(count)]


# --- what all have in common ----------------------------------------------------------------


def test_all_estimators_are_under_test() -> None:
    assert {variant.name for variant in VARIANTS.values()} == set(ESTIMATORS)
    assert (len(ESTIMATORS), len(VARIANTS)) == (7, 10)


def test_estimators_fit_the_seam(variant: Variant) -> None:
    estimator = variant.make()

    assert isinstance(estimator, Estimator)
    assert len(estimator.tell(estimator.ask(0), losses_of(estimator.ask(0), AT))) == COUNT


def test_a_derivative_carries_the_seed_of_its_place(variant: Variant) -> None:
    estimator = variant.make(seed=9)
    probes = estimator.ask(4)

    seeds = [d.seed for d in estimator.tell(probes, losses_of(probes, AT))]

    assert seeds == [direction_seed(9, 4, number) for number in range(COUNT)]
    assert {probe.seed for probe in probes} == set(seeds)


def test_ask_is_a_function_of_the_step(variant: Variant) -> None:
    estimator = variant.make(seed=5)

    first = estimator.ask(3)
    estimator.ask(4)

    assert estimator.ask(3) == first
    assert variant.make(seed=5).ask(3) == first
    assert variant.make(seed=6).ask(3) != first


def test_seeds_never_repeat_over_steps_and_directions(variant: Variant) -> None:
    estimator = variant.make()

    seeds = [{probe.seed for probe in estimator.ask(step)} for step in range(200)]

    assert {len(of_a_step) for of_a_step in seeds} == {COUNT}
    assert len(set().union(*seeds)) == 200 * COUNT


@pytest.mark.parametrize("basis_steps", [None, 3])
def test_probes_and_derivatives_carry_the_basis_of_their_step(
    variant: Variant, basis_steps: int | None
) -> None:
    estimator = variant.make(seed=9, basis_steps=basis_steps)

    for step in (0, 2, 3):
        probes = estimator.ask(step)
        derivatives = estimator.tell(probes, losses_of(probes, AT))
        want = 0 if basis_steps is None else basis_seed(9, step, basis_steps)
        assert {p.basis for p in probes} == {d.basis for d in derivatives} == {want}


def test_the_cost_counts_the_losses_of_an_example(variant: Variant) -> None:
    assert evaluations_per_example(variant.make(), NUM_EXAMPLES) == variant.cost


def mean_of_others(values: Sequence[float], place: int, size: int) -> float:
    """Return the mean of the others in the group of ``size`` that ``place`` lies in."""
    members = [i for i in range(len(values)) if i // size == place // size and i != place]
    return statistics.fmean(values[i] for i in members)


@pytest.mark.parametrize("epsilon", [1e-3, 0.5, 2.0])
@pytest.mark.parametrize("draw", [rademacher, gaussian])
def test_estimates_are_exact_on_a_line(variant: Variant, draw: Draw, epsilon: float) -> None:
    estimator = variant.make(epsilon)
    probes = estimator.ask(0)

    derivatives = estimator.tell(probes, losses_of(probes, [0.0] * 3, draw))

    line_by_seed = {probe.seed: line_of(probe) for probe in probes}
    slopes = [dot(line_by_seed[d.seed], draw(d.seed)) for d in derivatives]
    for i, derivative in enumerate(derivatives):
        others = mean_of_others(slopes, i, variant.group) if variant.group else 0.0
        # the losses, near 10, are exact to 2**-50; the division by epsilon magnifies that
        assert derivative.raw == pytest.approx(slopes[i] - others, abs=1e-13 / epsilon)
        if variant.name != "fzoo":  # which divides by the spread
            assert derivative.value == derivative.raw


@pytest.mark.parametrize("draw", [rademacher, gaussian])
def test_the_mean_of_derivative_times_direction_is_unbiased_on_a_quadratic(
    variant: Variant, draw: Draw
) -> None:
    weights, estimator = [3.0, 1.0, 2.0], variant.make(seed=2)
    estimates: list[list[float]] = []  # of whole steps, which are independent
    for step in range(200):
        probes = estimator.ask(step)
        derivatives = estimator.tell(probes, losses_of(probes, weights, draw))
        # as measured: normalising and weighing make other lengths of it
        terms = [[d.raw * z for z in draw(d.seed)] for d in derivatives]
        estimates.append([statistics.fmean(column) for column in zip(*terms, strict=True)])

    line = [statistics.fmean(column) for column in zip(*LINES, strict=True)]
    gradient = [2 * w * x + b for w, x, b in zip(weights, AT, line, strict=True)]
    for values, want in zip(zip(*estimates, strict=True), gradient, strict=True):
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert abs(statistics.fmean(values) - want) < 4 * error


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("epsilon", [1e-3, 0.5])
def test_derivatives_are_those_of_the_formula(
    variant: Variant, clip: float | None, epsilon: float
) -> None:
    estimator = variant.make(epsilon, max_loss_difference=clip)
    probes = estimator.ask(0)
    losses = random_losses(len(probes))
    if variant.name == "forward_gradient":
        losses = [loss / epsilon for loss in losses]  # slopes

    derivatives = estimator.tell(probes, losses)

    want = variant.formula(losses, epsilon, clip)
    for derivative, pair in zip(derivatives, want, strict=True):
        assert (derivative.value, derivative.raw) == pytest.approx(pair, rel=1e-12, abs=1e-12)
    free = variant.formula(losses, epsilon, None)
    moved = [a != pytest.approx(b) for (a, _), (b, _) in zip(want, free, strict=True)]
    assert [d.is_clipped for d in derivatives] == moved
    assert any(moved) == (clip is not None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_a_loss_that_is_not_finite_gives_nan_where_it_is_needed(
    variant: Variant, bad: float, clip: float | None
) -> None:
    estimator = variant.make(0.5, max_loss_difference=clip)
    probes = estimator.ask(0)

    for place in range(len(probes)):
        losses = random_losses(len(probes))
        losses[place] = bad
        derivatives = estimator.tell(probes, losses)

        missing = [place in variant.places(i) for i in range(COUNT)]
        assert [math.isnan(d.value) for d in derivatives] == missing
        assert [math.isnan(d.raw) for d in derivatives] == missing
        assert [d.seed for d in derivatives] == [direction_seed(0, 0, i) for i in range(COUNT)]
        assert not any(d.is_clipped for d, gone in zip(derivatives, missing, strict=True) if gone)


def test_losses_that_overflow_do_no_harm(variant: Variant) -> None:
    estimator = variant.make(1e-3, max_loss_difference=0.2)
    probes = estimator.ask(0)
    losses = [(-1.7e308, 1.7e308)[i < len(probes) / 2] for i in range(len(probes))]

    values = [d.value for d in estimator.tell(probes, losses)]

    assert len(values) == COUNT
    assert all(math.isnan(value) or abs(value) <= 200 for value in values)  # C = 0.2 / 1e-3


def test_tell_wants_a_loss_for_every_probe(variant: Variant) -> None:
    estimator = variant.make()
    probes = estimator.ask(0)

    for got in (len(probes) - 1, len(probes) + 1):
        message = f"^losses: expected one per probe, {len(probes)}, got {got}$"
        with pytest.raises(ValueError, match=message):
            estimator.tell(probes, [1.0] * got)


def refusal(message: str) -> Any:
    return pytest.raises(ConfigError, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        *((key, (0.0, -2.0, math.nan, math.inf)) for key in ("epsilon", "max_loss_difference")),
        *((key, (0, -2)) for key in ("num_directions", "basis_steps")),
    ],
)
def test_numbers_must_be_positive(variant: Variant, key: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with refusal(f"zo.{key}: expected a number above 0, got {value}"):
            variant.make(**{key: value})


def test_a_step_has_fewer_directions_than_seeds(variant: Variant) -> None:
    message = "zo.num_directions: expected fewer than 16777215 directions in a step, got {}"

    with refusal(message.format(2**24 - 1)):
        variant.make(num_directions=2**24 - 1)


def test_directions_are_counted_over_all_examples() -> None:
    message = "zo.num_directions: expected fewer than 16777215 directions in a step, got 16777216"

    with refusal(message):
        VARIANTS["per_example"].make(num_directions=2**22)


def test_an_estimator_that_is_not_there_is_refused() -> None:
    names = ", ".join(repr(name) for name in sorted(ESTIMATORS))

    with refusal(f"zo.estimator: expected one of [{names}], got 'mezo'"):
        make_estimator("mezo", {})


# --- where they evaluate --------------------------------------------------------------------


def offsets(probes: Sequence[Probe]) -> list[float]:
    return [probe.offset for probe in probes]


def test_probes_are_where_the_formulas_want_them() -> None:
    plus, minus = [0.25] * COUNT, [-0.25] * COUNT
    want = {
        **{"spsa": plus + minus, "spsa-curvature": [0, *plus, *minus]},
        **{"one_sided": [0, *plus], "fzoo": [0, *plus], "rloo": plus},
        **{"per_example": plus + minus, "per_example-pairs": plus + minus},
        **{"per_example-leave_one_out": plus, "spsa_1_5": [0, *plus, *minus]},
        "forward_gradient": [0] * COUNT,
    }

    assert {name: offsets(v.make(0.25).ask(1)) for name, v in VARIANTS.items()} == want


def test_only_the_forward_gradient_asks_for_slopes(variant: Variant) -> None:
    wants_slopes = variant.name == "forward_gradient"

    assert {probe.is_tangent for probe in variant.make().ask(0)} == {wants_slopes}


def test_only_per_example_probes_leave_examples_out(variant: Variant) -> None:
    covers_all = [probe.examples is None for probe in variant.make().ask(0)]

    assert set(covers_all) == {variant.name != "per_example"}


@pytest.mark.parametrize(
    ("name", "covered"),
    [
        ("per_example", [(0, 1), (1, 2), (2, 3), (3, 4)] * 2),
        ("per_example-pairs", [(0, 2), (0, 2), (2, 4), (2, 4)] * 2),
        ("per_example-leave_one_out", [(0, 2), (0, 2), (2, 4), (2, 4)]),
    ],
)
def test_per_example_probes_cover_consecutive_examples(
    name: str, covered: list[tuple[int, int]]
) -> None:
    assert [probe.examples for probe in VARIANTS[name].make().ask(0)] == covered


# --- curvature ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["spsa-curvature", "spsa_1_5"])
def test_curvature_is_the_second_difference(name: str) -> None:
    estimator = VARIANTS[name].make(0.5)
    losses = random_losses(9)

    found = [d.curvature for d in estimator.tell(estimator.ask(0), losses)]

    assert found == pytest.approx(curvatures(losses, 0.5))


def test_curvature_is_exact_on_a_quadratic() -> None:
    estimator = VARIANTS["spsa-curvature"].make(0.5)
    probes = estimator.ask(0)

    derivatives = estimator.tell(probes, losses_of(probes, [3.0, 1.0, 2.0], gaussian))

    for derivative in derivatives:
        z = gaussian(derivative.seed)
        assert derivative.curvature == pytest.approx(2 * dot([3.0, 1.0, 2.0], [x * x for x in z]))


def test_others_measure_no_curvature() -> None:
    for name in set(VARIANTS) - {"spsa-curvature", "spsa_1_5"}:
        estimator = VARIANTS[name].make()
        derivatives = estimator.tell(estimator.ask(0), [1.0] * len(estimator.ask(0)))
        assert {d.curvature for d in derivatives} == {None}


@pytest.mark.parametrize(
    ("curvature", "weight"), [(0.0, 1), (-0.9, 1), (1024.0, 0.5), (-1024, 0.5)]
)
def test_1_5_spsa_weighs_large_curvature_down(curvature: float, weight: float) -> None:
    estimator = make_estimator("spsa_1_5", {"epsilon": 1.0, "seed": 0})

    (derivative,) = estimator.tell(estimator.ask(0), [0.0, curvature / 2 + 3, curvature / 2 - 3])

    assert (derivative.value, derivative.raw) == pytest.approx((3 * weight, 3))


# --- FZOO and leave-one-out -----------------------------------------------------------------


def test_fzoo_takes_nothing_from_equal_losses() -> None:
    estimator = VARIANTS["fzoo"].make(0.5)

    derivatives = estimator.tell(estimator.ask(0), [1.0, 0.3, math.nan, 0.3, 0.3])

    assert [d.value for d in derivatives if not math.isnan(d.value)] == [0.0, 0.0, 0.0]
    assert math.isnan(derivatives[1].value)


@pytest.mark.parametrize("loss", [0.1, 0.2, 0.4, 0.8, -0.8])
@pytest.mark.parametrize("count", [2, 3, 6, 8, 12])
def test_equal_losses_say_nothing_at_any_count(loss: float, count: int) -> None:
    """The mean of equal numbers is that number, although a rounded quotient may not be."""
    assert mean([loss] * count) == loss
    assert deviation([loss] * count) == 0

    keys: dict[str, Any] = {"seed": 0, "epsilon": 0.01, "num_directions": count}
    keys |= {"max_loss_difference": None, "basis_steps": None}
    fzoo, rloo = make_estimator("fzoo", keys), make_estimator("rloo", keys)
    grouped = {"num_examples": 4, "examples_per_direction": 2, "sides": "leave_one_out"}
    over_step = make_estimator("per_example", {**keys, **grouped, "normalized_over": "step"})
    over_group = make_estimator("per_example", {**keys, **grouped, "normalized_over": "group"})
    for estimator in (fzoo, rloo, over_step, over_group):
        probes = estimator.ask(0)
        derivatives = estimator.tell(probes, [loss] * len(probes))
        assert {d.value for d in derivatives} == {0.0}


def test_derivatives_too_large_to_square_are_no_crash() -> None:
    large = [DirectionalDerivative(seed, value, value) for seed, value in enumerate((1e200, 1.0))]
    assert all(d.value == 0 for d in normalized(large))


def test_fzoo_needs_two_finite_losses() -> None:
    estimator = VARIANTS["fzoo"].make(0.5)

    derivatives = estimator.tell(estimator.ask(0), [1.0, 0.3, math.nan, math.inf, math.nan])

    assert all(math.isnan(d.value) for d in derivatives)


def test_fzoo_leaves_what_is_not_finite_out_of_the_spread() -> None:
    estimator = VARIANTS["fzoo"].make(0.5)

    derivatives = estimator.tell(estimator.ask(0), [1.0, 2.0, math.nan, 3.0, 5.0])

    sigma = statistics.stdev([2.0, 3.0, 5.0])
    values = [derivatives[i].value for i in (0, 2, 3)]
    assert values == pytest.approx([x / 0.5 / sigma for x in (1, 2, 4)])


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    estimator = VARIANTS["rloo"].make(0.5)

    derivatives = estimator.tell(estimator.ask(0), [1.0, math.nan, 2.0, 6.0])

    values = [derivatives[i].value for i in (0, 2, 3)]
    assert values == pytest.approx([(1 - 4) / 0.5, (2 - 3.5) / 0.5, (6 - 1.5) / 0.5])
    assert math.isnan(derivatives[1].value)


def test_leave_one_out_needs_two_finite_losses() -> None:
    estimator = VARIANTS["rloo"].make()

    derivatives = estimator.tell(estimator.ask(0), [1.0, math.nan, math.nan, math.inf])

    assert all(math.isnan(d.value) for d in derivatives)


@pytest.mark.parametrize("name", ["fzoo", "rloo", "leave_one_out"])
def test_comparing_losses_takes_two_directions(name: str) -> None:
    loo = {"num_directions": 1, **EXAMPLES, "sides": "leave_one_out"}
    settings = {"epsilon": 0.1, "seed": 0, **(loo if name == "leave_one_out" else {})}

    with refusal(
        f"zo.num_directions: expected at least 2 with {name!r}, which compares the losses of "
        "directions, got 1"
    ):
        make_estimator("per_example" if name == "leave_one_out" else name, settings)


# --- a direction per example ----------------------------------------------------------------


def per_example(count: int, **settings: Any) -> Estimator:
    given = {
        "epsilon": 0.5,
        "seed": 0,
        "num_examples": count,
        "normalized_over": "step",
        **settings,
    }
    return make_estimator("per_example", given)


def test_normalised_derivatives_have_a_root_mean_square_of_one() -> None:
    estimator = per_example(3)

    derivatives = estimator.tell(estimator.ask(0), [3.0, 1.0, -2.0, 0.0, 0.0, 0.0])

    size = math.sqrt((9 + 1 + 4) / 3)
    assert [d.value for d in derivatives] == pytest.approx([3 / size, 1 / size, -2 / size])
    assert [d.raw for d in derivatives] == [3.0, 1.0, -2.0]
    assert not any(d.is_clipped for d in derivatives)


def test_leave_one_out_is_normalised_over_all_groups() -> None:
    estimator = per_example(2, sides="leave_one_out", num_directions=2)

    derivatives = estimator.tell(estimator.ask(0), [1.0, 0.0, 5.0, 2.0])

    size = math.sqrt((2**2 + 6**2) / 2)
    want = [2 / size, -2 / size, 6 / size, -6 / size]
    assert [d.value for d in derivatives] == pytest.approx(want)


def test_normalised_over_a_group_no_group_weighs_more() -> None:
    estimator = per_example(2, sides="leave_one_out", num_directions=2, normalized_over="group")

    derivatives = estimator.tell(estimator.ask(0), [1.0, 0.0, 5.0, 2.0])

    assert [d.value for d in derivatives] == [1.0, -1.0, 1.0, -1.0]
    assert [d.raw for d in derivatives] == [2.0, -2.0, 6.0, -6.0]


def test_normalisation_follows_the_clip_and_leaves_out_what_is_not_finite() -> None:
    estimator = per_example(3, max_loss_difference=2.0)

    derivatives = estimator.tell(estimator.ask(0), [4.0, math.nan, 2.0, 0.0, 0.0, 0.0])

    assert [d.value for d in (derivatives[0], derivatives[2])] == [1.0, 1.0]
    assert math.isnan(derivatives[1].value)
    assert [d.is_clipped for d in derivatives] == [True, False, False]


@pytest.mark.parametrize("losses", [[1.0] * 4, [math.nan] * 4])
def test_normalisation_leaves_nothing_as_it_is(losses: list[float]) -> None:
    estimator = per_example(2)

    values = [d.value for d in estimator.tell(estimator.ask(0), losses)]

    assert values == [0.0, 0.0] or all(math.isnan(value) for value in values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples_per_direction": 3}, "zo.examples_per_direction: expected a number that divides "
            "the 4 examples of a step, got 3"),
        ({"examples_per_direction": 0}, "zo.examples_per_direction: expected a number above 0, got "
            "0"),
    ],
)  # fmt: skip
def test_settings_of_groups_are_checked(settings: dict[str, Any], message: str) -> None:
    with refusal(message):
        per_example(4, **settings)


# --- numbers of the paper -------------------------------------------------------------------


def test_the_clip_of_the_paper_is_a_hundred() -> None:
    estimator = make_estimator(
        "spsa", {"epsilon": 1e-3, "seed": 0, "num_directions": 3, "max_loss_difference": 0.2}
    )

    derivatives = estimator.tell(estimator.ask(0), [1.5, 1.0, 1.1, 1.0, 1.5, 1.0])

    assert [d.value for d in derivatives] == pytest.approx([100.0, -100.0, 50.0])
    assert [d.raw for d in derivatives] == pytest.approx([250.0, -250.0, 50.0])
    assert [d.is_clipped for d in derivatives] == [True, True, False]


def test_without_a_clip_values_are_raw() -> None:
    estimator = make_estimator("spsa", {"epsilon": 1e-3, "seed": 0})

    (derivative,) = estimator.tell(estimator.ask(0), [1e6, -1e6])

    assert derivative.value == derivative.raw == 1e9
