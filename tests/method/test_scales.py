from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import logits_of, tiny_model
from support.nf4_files import write_nf4
from support.runs import dense_equal, tiny_checkpoint
from torch import Tensor

import qzo
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.errors import CheckpointError, ConfigError
from qzo.method import trained_vector as module
from qzo.method.coordinates import Coordinates
from qzo.method.directions.philox import directions
from qzo.method.probes import DirectionalDerivative, Probe
from qzo.method.trained_vector import Scales
from qzo.model.linear import EffectiveScales, Live, ProbeScales
from qzo.model.load import quant_linears

COORDINATES: tuple[Coordinates, ...] = ("absolute", "relative", "row", "column", "rank_one")
PROBES = (Probe(3, 0.01), Probe(4, 0.02), Probe(3, -0.01), Probe(0, 0.0))
NAMES = ("layers.0.a", "layers.0.b", "layers.1.a")


def file_scales() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 3), (4, 1), (7, 2))
    return [(torch.rand(shape, generator=generator) + 0.1).half() for shape in shapes]


def scales_of(coordinates: Coordinates) -> Scales:
    """Return scales of three layers whose master is not where it started."""
    result = Scales(NAMES, file_scales(), coordinates=coordinates, direction="gaussian")
    start = result.values + torch.linspace(-0.05, 0.05, len(result))
    result.restore(start)
    return result


def naive(scales: Scales, layer: int, probe: Probe) -> list[list[np.float32]]:
    """Compute the effective scales of a layer one by one, in fp32."""
    stored = file_scales()
    sizes = {
        "row": [len(s) for s in stored],
        "column": [s.shape[1] for s in stored],
        "rank_one": [len(s) + s.shape[1] for s in stored],
    }.get(scales.coordinates, [s.numel() for s in stored])
    first = sum(sizes[:layer])
    z = directions("gaussian", [probe.seed], 0, len(scales))[0].numpy()
    master = scales.values.numpy()
    result = []

    def moved(place: int) -> np.float32:
        step = np.float32(z[first + place] * np.float32(probe.offset))
        return np.float32(master[first + place] + step)

    for o, groups in enumerate(stored[layer].numpy().astype(np.float32)):
        line = []
        for g, stored_scale in enumerate(groups):
            places = {
                "row": [o],
                "column": [g],
                "rank_one": [o, len(stored[layer]) + g],
            }.get(scales.coordinates, [o * len(groups) + g])
            value = np.float32(1) if scales.coordinates == "absolute" else stored_scale
            for place in places:
                value = np.float32(value * moved(place))
            line.append(value)
        result.append(line)
    return result


def dense(effective: EffectiveScales, layer: int, probe: int) -> Tensor:
    """Return the effective scales of one probe, whatever form they have."""
    if isinstance(effective, ProbeScales):
        return effective.scales[probe]
    result = file_scales()[layer].float()
    if effective.rows is not None:
        result = result * effective.rows[probe][:, None]
    return result if effective.columns is None else result * effective.columns[probe]


def test_all_coordinates_are_under_test() -> None:
    assert len(COORDINATES) == 5


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_scales_start_at_those_of_the_file(coordinates: Coordinates) -> None:
    scales = Scales(NAMES, file_scales(), coordinates=coordinates, direction="rademacher")

    for layer, stored in enumerate(file_scales()):
        assert torch.equal(scales.tuned(layer), stored.float())


@pytest.mark.parametrize(
    ("coordinates", "length"),
    [("absolute", 33), ("relative", 33), ("row", 16), ("column", 6), ("rank_one", 22)],
)
def test_the_trained_vector_has_an_element_per_factor(
    coordinates: Coordinates, length: int
) -> None:
    scales = scales_of(coordinates)

    assert len(scales) == scales.values.numel() == length
    assert scales.values.dtype == torch.float32


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_effective_scales_at_a_probe_are_the_naive_formula(
    coordinates: Coordinates, layer: int
) -> None:
    scales = scales_of(coordinates)

    effective = scales.effective(layer, PROBES)

    for place, probe in enumerate(PROBES):
        assert (
            dense(effective, layer, place).tolist()
            == np.array(naive(scales, layer, probe)).tolist()
        )


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("window", [1, 7, 2**22])
@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (0, 1, 2, 0)])
def test_effective_scales_do_not_depend_on_the_order_of_the_layers(
    coordinates: Coordinates,
    window: int,
    order: Sequence[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "WINDOW", window)
    scales = scales_of(coordinates)

    for layer in order:
        effective = scales.effective(layer, PROBES)
        for place, probe in enumerate(PROBES):
            want = np.array(naive(scales, layer, probe)).tolist()
            assert dense(effective, layer, place).tolist() == want


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("window", [1, 12, 20, 2**18])
def test_a_forward_draws_every_element_once(
    coordinates: Coordinates, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW", window)
    scales, drawn = scales_of(coordinates), []
    original = scales.directions.shifted

    def shifted(values: torch.Tensor, probes: list[Probe], start: int, stop: int) -> torch.Tensor:
        drawn.append((start, stop))
        return original(values, probes, start, stop)

    monkeypatch.setattr(scales.directions, "shifted", shifted)
    for layer in range(3):
        scales.effective(layer, PROBES)

    assert [place for start, stop in drawn for place in range(start, stop)] == [*range(len(scales))]
    sizes = [stop - start for start, stop in scales.parts(range(3))]
    assert all(stop - start <= max(window, *sizes) for start, stop in drawn)


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_effective_scales_follow_the_probes_and_the_master(coordinates: Coordinates) -> None:
    scales = scales_of(coordinates)

    scales.effective(0, PROBES)
    other = scales.effective(0, [Probe(9, 0.5)])
    assert dense(other, 0, 0).tolist() == np.array(naive(scales, 0, Probe(9, 0.5))).tolist()

    scales.move(0, len(scales), torch.full((len(scales),), 0.25))
    moved = scales.effective(0, [Probe(9, 0.5)])
    assert dense(moved, 0, 0).tolist() == np.array(naive(scales, 0, Probe(9, 0.5))).tolist()


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_tuned_scales_are_the_effective_ones_without_a_probe(coordinates: Coordinates) -> None:
    scales = scales_of(coordinates)

    for layer in range(3):
        want = np.array(naive(scales, layer, Probe(0, 0.0))).tolist()
        assert scales.tuned(layer).tolist() == want


def test_tuned_scales_are_a_copy() -> None:
    scales = scales_of("absolute")

    scales.tuned(0).zero_()

    assert scales.values.min() > 0


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_the_slope_is_the_mean_of_derivative_times_direction(coordinates: Coordinates) -> None:
    scales = scales_of(coordinates)
    derivatives = [DirectionalDerivative(s, d, d) for s, d in ((5, 1.5), (6, -0.25), (7, 3e-3))]

    slope = scales.directions.mean_slope(derivatives, 3, 15)

    for place in range(3, 15):
        total = sum(
            d.value * float(directions("gaussian", [d.seed], place, place + 1)) for d in derivatives
        )
        # fp32 sums of three terms of size 1
        assert float(slope[place - 3]) == pytest.approx(total / 3, abs=3e-7)


def test_move_adds_to_its_part_and_stops_at_zero() -> None:
    scales = Scales(NAMES, file_scales(), coordinates="relative", direction="rademacher")
    change = torch.tensor([0.5, -0.25, -1.0, -1.5])

    scales.move(2, 6, change)

    assert scales.values[:8].tolist() == [1, 1, 1.5, 0.75, 0, 0, 1, 1]


def test_move_keeps_the_sign_that_a_scale_has_in_the_file() -> None:
    stored = [torch.tensor([[0.5, -0.5], [0.0, -0.25]]), torch.tensor([[-1.0]])]
    scales = Scales(NAMES[:2], stored, coordinates="absolute", direction="rademacher")

    scales.move(1, 5, torch.tensor([0.25, -0.125, 0.5, -0.5]))
    first = scales.values.tolist()
    scales.move(0, 5, torch.tensor([-1.0, 0.5, 0.25, -0.25, 0.75]))

    assert first == [0.5, -0.25, 0, 0, -1.5]
    assert scales.values.tolist() == [0, 0, 0.25, -0.25, -0.75]


@pytest.mark.parametrize("size", [1, 10, 33, 100])
def test_chunks_cover_the_vector_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", size)

    bounds = list(scales_of("absolute").chunks())

    assert [place for start, stop in bounds for place in range(start, stop)] == list(range(33))


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_reset_brings_back_the_scales_of_the_file(coordinates: Coordinates) -> None:
    scales = scales_of(coordinates)

    scales.reset()

    fresh = Scales(NAMES, file_scales(), coordinates=coordinates, direction="gaussian")
    assert torch.equal(scales.values, fresh.values)


def test_a_vector_of_another_size_is_refused() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"^trained vector: expected 33 values, got 32; was it made from another base or with "
        r"other coordinates\?$",
    ):
        scales_of("absolute").restore(torch.ones(32))


def test_the_fingerprint_tells_masters_apart() -> None:
    scales = scales_of("row")
    before = scales.fingerprint()

    scales.values[3] = torch.nextafter(scales.values[3], torch.tensor(2.0))

    assert scales.fingerprint() != before
    assert scales_of("row").fingerprint() == before


@dataclass(frozen=True)
class Model:
    model: Any
    live: Live
    scales: Scales


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("scales") / "base")


def loaded(base: Path, coordinates: Coordinates) -> Model:
    model = qzo.load(base)
    layers = quant_linears(model)
    scales = Scales.of_layers(layers, coordinates=coordinates, direction="rademacher")
    return Model(model, layers[0].live, scales)


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_a_forward_at_probes_leaves_the_master_bitwise_alone(
    base: Path, coordinates: Coordinates
) -> None:
    given = loaded(base, coordinates)
    before = given.scales.values.clone()

    with given.scales.shifted(given.live, PROBES[:1]):
        shifted = logits_of(given.model)

    assert torch.equal(given.scales.values, before)
    assert not torch.equal(shifted, logits_of(given.model))


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_an_exception_in_a_forward_leaves_the_master_bitwise_alone(
    base: Path, coordinates: Coordinates, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = loaded(base, coordinates)
    before, logits = given.scales.values.clone(), logits_of(given.model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quant_linears(given.model)[-1], "_product", interrupt)
        with pytest.raises(KeyboardInterrupt), given.scales.shifted(given.live, PROBES[:1]):
            logits_of(given.model)

    assert torch.equal(given.scales.values, before)
    assert torch.equal(logits_of(given.model), logits)


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_scales_of_a_model_and_of_its_checkpoint_are_the_same(
    base: Path, coordinates: Coordinates
) -> None:
    of_model = loaded(base, coordinates).scales
    checkpoint = open_checkpoint(base)
    of_files = Scales.of_checkpoint(
        checkpoint, checkpoint.layers, coordinates=coordinates, direction="rademacher"
    )

    assert of_model.names == of_files.names
    assert len(of_model.names) == 7
    assert of_model.fingerprint() == of_files.fingerprint()


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_a_model_at_its_master_computes_what_the_dense_model_computes(
    base: Path, coordinates: Coordinates
) -> None:
    given = loaded(base, coordinates)
    given.scales.move(0, len(given.scales), torch.full((len(given.scales),), 0.02))
    tuned = {name: given.scales.tuned(i).T for i, name in enumerate(given.scales.names)}

    with given.scales.shifted(given.live, [Probe(0, 0.0)]):
        got = logits_of(given.model)

    # fp32 sums in another order
    torch.testing.assert_close(got, logits_of(dense_equal(base, tuned)), rtol=1e-4, atol=1e-5)


def test_row_coordinates_are_refused_where_blocks_cross_rows(tmp_path: Path) -> None:
    write_nf4(tmp_path / "nf4", tiny_model())  # 96 inputs are one and a half blocks of 64
    checkpoint = open_checkpoint(tmp_path / "nf4")
    message = (
        r"^zo\.coordinates: expected 'absolute' or 'relative', got 'row': blocks of "
        r"model\.layers\.0\.mlp\.down_proj cross its rows, so a factor per row cannot be written "
        r"back exactly$"
    )

    with pytest.raises(ConfigError, match=message):
        Scales.of_checkpoint(
            checkpoint, checkpoint.layers, coordinates="row", direction="rademacher"
        )
    with pytest.raises(ConfigError, match=message):
        Scales.of_layers(
            quant_linears(qzo.load(tmp_path / "nf4")), coordinates="row", direction="rademacher"
        )


@pytest.mark.parametrize("coordinates", ["absolute", "relative"])
def test_other_coordinates_train_blocks_that_cross_rows(
    coordinates: Coordinates, tmp_path: Path
) -> None:
    dense_model = write_nf4(tmp_path / "nf4", tiny_model())
    given = loaded(tmp_path / "nf4", coordinates)

    with given.scales.shifted(given.live, [Probe(0, 0.0)]):
        got = logits_of(given.model)

    torch.testing.assert_close(got, logits_of(dense_model), rtol=1e-4, atol=1e-5)
