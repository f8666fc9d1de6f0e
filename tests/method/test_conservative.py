import math
from pathlib import Path

import pytest
from support.runs import json_lines, tiny_checkpoint, tiny_trainer

from qzo.method.estimators.conservative import candidates, choose
from qzo.method.probes import DirectionalDerivative, Probe

MEASURED = DirectionalDerivative(5, 2.0, 3.0, is_clipped=True, basis=4)


def test_candidates_are_the_place_the_step_and_its_opposite() -> None:
    assert candidates(MEASURED, 0.1) == [
        Probe(5, 0.0, basis=4),
        Probe(5, -0.2, basis=4),
        Probe(5, 0.2, basis=4),
    ]


def test_a_derivative_that_is_not_finite_has_no_candidates() -> None:
    unknown = DirectionalDerivative(5, math.nan, math.nan)

    assert candidates(unknown, 0.1) == []
    assert choose(unknown, []) is unknown


@pytest.mark.parametrize(
    ("losses", "value"),
    [
        ([1.0, 0.5, 0.7], 2.0),
        ([1.0, 0.9, 0.7], -2.0),
        ([0.1, 0.9, 0.7], 0.0),
        ([0.7, 0.7, 0.7], 0.0),
        ([math.nan, 0.9, math.inf], 2.0),
        ([math.nan, math.nan, math.nan], 0.0),
    ],
)
def test_the_smallest_loss_is_chosen(losses: list[float], value: float) -> None:
    chosen = choose(MEASURED, losses)

    assert (chosen.value, chosen.raw, chosen.is_clipped, chosen.seed) == (value, 3.0, True, 5)


def test_a_run_never_accepts_a_worse_loss_and_goes_where_it_looked(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", gain=8.0)
    zo = {"estimator": "spsa", "optimizer": "conservative", "modules": ["q_proj", "k_proj"]}
    trainer = tiny_trainer(base, tmp_path / "run", learning_rate=0.05, max_steps=8, zo=zo)
    reached: list[float] = []
    step = trainer.optimizer.step

    def watched(*arguments: object) -> None:
        step(*arguments)  # type: ignore[arg-type]  # as given
        batch = trainer.objective.batch(len(reached))
        reached.extend(trainer.objective.losses([Probe(0, 0.0)], batch))

    trainer.optimizer.step = watched  # type: ignore[assignment, method-assign]
    trainer.train()

    assert float(trainer.scales.values.min()) > 0  # there a step would end short of its probe
    lines = [e for e in json_lines(tmp_path / "run" / "journal.jsonl") if "losses" in e]
    signs = set()
    for line, loss in zip(lines, reached, strict=True):
        measured = line.get("raw", line["derivatives"])[0]
        tried = dict(zip((0.0, measured, -measured), line["losses"][2:], strict=True))
        applied = line["derivatives"][0]
        assert tried[applied] == min(tried.values()) <= tried[0.0]
        assert loss == pytest.approx(tried[applied], abs=1e-5)  # another order of roundings
        signs.add(applied / measured)
    assert signs > {1.0}  # some steps were turned down
