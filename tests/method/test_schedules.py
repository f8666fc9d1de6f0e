import math
from typing import get_args

import pytest

from qzo.method.schedules import SCHEDULES, ScheduleName, learning_rate

# Of 10 steps after 2 of warm-up: transformers' get_*_schedule_with_warmup, by hand.
AFTER_WARMUP: dict[ScheduleName, list[float]] = {
    "constant": [1.0] * 8,
    "constant_with_warmup": [1.0] * 8,
    "linear": [1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    "cosine": [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_its_closed_form(name: ScheduleName) -> None:
    rates = [learning_rate(name, 0.5, step, max_steps=8) for step in range(8)]

    assert rates == pytest.approx([0.5 * factor for factor in AFTER_WARMUP[name]])


WARM = [name for name in SCHEDULES if name != "constant"]


def test_constant_has_no_warm_up_as_in_transformers() -> None:
    assert [learning_rate("constant", 0.5, i, max_steps=4, warmup_steps=2) for i in range(4)] == [
        0.5
    ] * 4


@pytest.mark.parametrize("name", WARM)
def test_schedule_warms_up_linearly_and_then_runs_its_course(name: ScheduleName) -> None:
    rates = [learning_rate(name, 0.5, step, max_steps=10, warmup_steps=2) for step in range(10)]

    assert rates == pytest.approx([0.25, 0.5, *(0.5 * factor for factor in AFTER_WARMUP[name])])


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedule_ends_at_zero(name: ScheduleName) -> None:
    assert learning_rate(name, 3.0, 100, max_steps=100) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_allows_nothing_but_warm_up(name: ScheduleName) -> None:
    assert learning_rate(name, 1.0, 4, max_steps=5, warmup_steps=5) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_first_step_is_never_without_a_learning_rate(name: ScheduleName) -> None:
    assert learning_rate(name, 1.0, 0, max_steps=1) == 1.0
    warmed = 1.0 if name == "constant" else 0.01
    assert learning_rate(name, 1.0, 0, max_steps=100, warmup_steps=100) == warmed


def test_every_named_schedule_is_in_the_table() -> None:
    assert list(SCHEDULES) == list(get_args(ScheduleName)) == list(AFTER_WARMUP)
    assert len(SCHEDULES) == 4
