import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import json_lines, tiny_checkpoint, tiny_trainer

from qzo.errors import CheckpointError, ConfigError, QZOError
from qzo.method.directions.philox import directions
from qzo.method.extra.section import Section
from qzo.method.layer_scaling import (
    factors_of,
    gradient_norms,
    relative_sizes,
    stretch_scales,
    stretches,
)
from qzo.method.probes import DirectionalDerivative, Probe, layer_seed
from qzo.method.trained_vector import Scales

NAMES = ["layers.0.q_proj", "layers.0.k_proj", "layers.1.k_proj"]
SHAPES = ((5, 3), (4, 1), (7, 2))
BOUNDS = ((0, 15), (15, 19), (19, 33))


def new_scales(sections: Sequence[Section] = ()) -> Scales:
    generator = torch.Generator().manual_seed(0)
    stored = [torch.rand(shape, generator=generator) + 0.1 for shape in SHAPES]
    return Scales(NAMES, stored, coordinates="relative", direction="gaussian", sections=sections)


def gradient() -> torch.Tensor:
    return torch.linspace(-2.0, 3.0, BOUNDS[-1][-1])


@pytest.mark.parametrize(
    ("factors", "want"),
    [
        ({}, [1.0, 1.0, 1.0]),
        ({"k_proj": 3.0}, [1.0, 3.0, 3.0]),
        ({"q_proj": 2.0, "k_proj": 3.0}, [2.0, 3.0, 3.0]),
        ({"k_proj": 0.5, "0.k_proj": 2.0, "layers.0.k_proj": 4.0}, [1.0, 4.0, 0.5]),
    ],
)
def test_the_longest_name_of_a_layer_gives_its_factor(
    factors: dict[str, float], want: list[float]
) -> None:
    assert factors_of(NAMES, factors) == want


def test_a_name_of_no_layer_is_refused() -> None:
    reason = (
        r"^zo.stretch: expected names of layers, such as 'layers.1.k_proj', or how they end behind "
        r"a dot, got 'proj'; the ends here are k_proj, q_proj$"
    )
    with pytest.raises(ConfigError, match=reason):
        factors_of(NAMES, {"q_proj": 2.0, "proj": 1.0})


def test_sizes_have_a_mean_of_one_and_a_floor() -> None:
    assert relative_sizes(NAMES, [1.0, 2.0, 3.0]) == [0.5, 1.0, 1.5]
    assert relative_sizes(NAMES, [0.0, 2.0, 4.0]) == [0.1, 1.0, 2.0]


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ([1.0, math.nan, 1.0], r"^zo.layer_scaling: expected a finite size of layers.0.k_proj, got "
            r"nan; lower zo.epsilon$"),
        ([0.0, 0.0, 0.0], r"^zo.layer_scaling: expected sizes above 0, got 0 for all layers$"),
    ],
)  # fmt: skip
def test_sizes_that_say_nothing_are_refused(sizes: list[float], reason: str) -> None:
    with pytest.raises(QZOError, match=reason):
        relative_sizes(NAMES, sizes)


def test_the_size_by_param_norm_is_that_of_the_scales_in_the_file() -> None:
    scales = new_scales()
    stored = [scales.tuned(layer) for layer in range(3)]  # relative coordinates start at 1

    want = [math.sqrt(sum(float(x) ** 2 for x in s.flatten())) for s in stored]

    assert scales.file_norms() == pytest.approx(want, rel=1e-12)


def test_the_size_by_grad_norm_is_measured_with_all_else_at_rest() -> None:
    scales = new_scales([Section("norm.weight", "norm", (5,))])
    slope = torch.cat([gradient(), torch.full((5,), 7.0)]).double()
    seen = []

    def losses(probes: list[Probe]) -> list[float]:
        seen.append(probes)
        z = scales.directions.draw(probes, 0, len(scales)).double()
        return [float(p.offset * (row @ slope)) for p, row in zip(probes, z, strict=True)]

    got = gradient_norms(scales, losses, 0.5, seed=9)  # type: ignore[arg-type]  # lists are given

    for layer, (start, stop) in enumerate(BOUNDS):
        z = directions("gaussian", [layer_seed(9, layer)], start, stop)[0].double()
        assert got[layer] == pytest.approx(abs(float(z @ slope[start:stop])), rel=1e-6)
    assert [[p.offset for p in probes] for probes in seen] == [[0.5, -0.5]] * 3
    assert scales.directions.stretch is None


@pytest.mark.parametrize("rule", ["variance", "expectation", "by hand"])
def test_the_expected_estimate_is_the_gradient_or_that_over_the_sizes(rule: str) -> None:
    factors, sizes = [1.0, 0.5, 2.0], [0.5, 1.0, 1.5]
    scales, slope = new_scales(), gradient()
    found = stretches(factors, None if rule == "by hand" else sizes, rule)
    stretch_scales(scales, {"stretch": found})

    means = []
    for first in range(0, 4000, 80):
        seeds = range(first, first + 80)
        z = scales.directions.draw([Probe(seed, 0.1) for seed in seeds], 0, len(scales))
        slopes = (z @ slope).tolist()  # what two-sided SPSA measures on any quadratic
        derivatives = [
            DirectionalDerivative(*pair, 0.0) for pair in zip(seeds, slopes, strict=True)
        ]
        means.append(scales.directions.mean_slope(derivatives, 0, len(scales)))

    drawn = torch.stack(means).double()
    error = drawn.std(0) / math.sqrt(len(drawn))
    for (start, stop), s, d in zip(BOUNDS, factors, sizes, strict=True):
        want = slope[start:stop] * s**2 / (d if rule == "expectation" else 1.0)
        distance = (drawn.mean(0)[start:stop] - want) / error[start:stop]
        assert float(distance.abs().max()) < 4.5  # the largest of 33 normal values
    assert (scales.directions.update_stretch is None) == (rule == "by hand")


@pytest.mark.parametrize(
    "stretch",
    [7, {}, {"probe": [1.0] * 3}, {"probe": [1.0] * 3, "update": [1.0] * 2},
     {"probe": [1.0] * 3, "update": [1.0, 0.0, 1.0]}, {"probe": [1, 1, True], "update": [1.0] * 3}],
)  # fmt: skip
def test_a_header_with_another_stretch_is_refused(stretch: Any) -> None:
    reason = (
        r"^journal: expected stretch\.(probe|update) with a positive number for each of 3 layers, "
        r"got something else$"
    )
    with pytest.raises(CheckpointError, match=reason):
        stretch_scales(new_scales(), {"stretch": stretch})


def test_a_run_notes_the_factors_that_it_measured(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    zo = {"estimator": "spsa", "layer_scaling": "grad_norm", "stretch": {"q_proj": 2.0}}
    zo["coordinates"] = "row"
    trainer = tiny_trainer(base, tmp_path / "run", max_steps=1, zo=zo)
    names = trainer.scales.names
    batch = trainer.objective.batch(0)
    sizes = []
    for layer in range(len(names)):
        trainer.scales.directions.stretch = trainer.scales.by_layer(
            [float(i == layer) for i in range(7)]
        )
        z = layer_seed(0, layer)
        plus, minus = trainer.objective.losses([Probe(z, 1e-2), Probe(z, -1e-2)], batch)
        sizes.append(abs(plus - minus) / 2e-2)
    trainer.scales.directions.stretch = None

    trainer.train()

    mean = sum(sizes) / 7
    header = json_lines(tmp_path / "run" / "journal.jsonl")[0]
    for name, size, probe, update in zip(names, sizes, *header["stretch"].values(), strict=True):
        d, s = max(size / mean, 0.1), 2.0 if "q_proj" in name else 1.0
        assert (probe, update) == pytest.approx((s / d, s * d), rel=1e-12)
