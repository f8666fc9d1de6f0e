"""Exact gradients and slopes of the training loss, against transformers' dense model."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.gptq_files import GPTQVariant, write_gptq
from support.models import ARCHITECTURES, relative_error, tiny_model
from support.runs import COMPLETIONS, RECORDS, dense_equal, tiny_checkpoint, tiny_trainer
from support.training import examples
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

import qzo
from qzo.data.examples import from_encoded
from qzo.data.tokenize import EncodedExample
from qzo.method.coordinates import Coordinates
from qzo.method.directions.philox import directions
from qzo.method.probes import Probe, forwards_of
from qzo.method.trained_vector import Scales
from qzo.model.load import decoder_blocks, trained_layers
from qzo.objective.loss import Objective
from qzo.run.trainer import Trainer

COORDINATES: tuple[Coordinates, ...] = ("absolute", "relative", "row")
NUM_LAYERS = 2
# float32 forwards and backwards of two blocks, against float64; units of the largest slope
TOLERANCE = 2e-5

every_coordinates = pytest.mark.parametrize("coordinates", COORDINATES)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradient") / "base"
    return tiny_checkpoint(folder, num_layers=NUM_LAYERS)


@pytest.fixture(params=["packed", "padded"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "padded":
        monkeypatch.setattr("qzo.objective.loss.can_pack", lambda _: False)


def trainer_of(base: Path, out: Path, coordinates: str, **keys: Any) -> Trainer:
    """Return a trainer whose vector is not where it starts."""
    zo = {"estimator": "spsa", "coordinates": coordinates}
    made = tiny_trainer(base, out, zo=zo, **keys)
    scales = made.scales
    made.scales.move(
        0, len(scales), scales.values * 0.1 * directions("gaussian", [3], 0, len(scales))[0]
    )
    return made


class Dense:
    """The loss of a dense model as a function of the trained vector, in float64.

    Weights are written out with the group of every input, as the files have it.
    """

    def __init__(self, base: Path, trainer: Trainer) -> None:
        self.model: PreTrainedModel = dense_equal(base).double().requires_grad_(False)
        self.scales = trainer.scales
        stored = load_file(base / "model.safetensors")
        self._groups = {n: stored[f"{n}.g_idx"].long() for n in self.scales.names}
        self._file = {n: stored[f"{n}.scales"].T.double() for n in self.scales.names}
        self._weights = {
            n: self.model.get_parameter(f"{n}.weight").double() for n in self.scales.names
        }

    def weights(self, values: Tensor) -> Mapping[str, Tensor]:
        made = {}
        for place, name in enumerate(self.scales.names):
            [(start, stop)] = self.scales.parts([place])
            file, part, group = self._file[name], values[start:stop], self._groups[name]
            decoded = self._weights[name] / file[:, group]
            if self.scales.coordinates == "row":
                scales = file * part[:, None]
            else:
                is_relative = self.scales.coordinates == "relative"
                scales = part.view_as(file) * (file if is_relative else 1)
            made[f"{name}.weight"] = decoded * scales[:, group]
        return made

    def loss(self, values: Tensor, batch: list[EncodedExample]) -> Tensor:
        weights = self.weights(values)
        return torch.stack([self._example_loss(weights, e) for e in batch]).mean()

    def gradient(self, batch: list[EncodedExample]) -> Tensor:
        leaf = self.scales.values.double().requires_grad_()
        slopes: Tensor = torch.autograd.grad(self.loss(leaf, batch), [leaf])[0]
        return slopes

    def _example_loss(self, weights: Mapping[str, Tensor], example: EncodedExample) -> Tensor:
        scores: list[Tensor] = []
        for candidate in example.candidates:
            ids = torch.tensor([example.rows[candidate.row]])
            logits = functional_call(self.model, dict(weights), (ids,)).logits[0]
            chosen = logits.log_softmax(-1)[list(candidate.positions), list(candidate.targets)]
            scores.append(chosen.mean())
        if len(scores) == 1:
            return -scores[0]
        log_probabilities: Tensor = torch.stack(scores).log_softmax(0)
        return -log_probabilities[example.label]


@every_coordinates
@pytest.mark.parametrize("records", [RECORDS, COMPLETIONS], ids=["classes", "completions"])
@pytest.mark.usefixtures("layout")
def test_the_gradient_is_that_of_a_dense_model(
    base: Path, tmp_path: Path, coordinates: Coordinates, records: Any
) -> None:
    trainer = trainer_of(base, tmp_path, coordinates, train=records)
    batch = trainer.objective.batch(0)

    loss, gradient = trainer.objective.gradient(batch, range(len(trainer.scales.names)))

    dense = Dense(base, trainer)
    assert relative_error(gradient, dense.gradient(batch[0])) < TOLERANCE
    assert loss == pytest.approx(float(dense.loss(trainer.scales.values.double(), batch[0])), 1e-5)


@every_coordinates
@pytest.mark.usefixtures("layout")
def test_slopes_are_the_gradient_along_the_directions(
    base: Path, tmp_path: Path, coordinates: Coordinates
) -> None:
    trainer = trainer_of(base, tmp_path, coordinates, gradient_accumulation_steps=2)
    scales, batch = trainer.scales, trainer.objective.batch(0)
    picked = [example for part in batch for example in part]
    probes = [
        Probe(5, 0.0, is_tangent=True),
        Probe(5, 1e-3, is_tangent=True),
        Probe(6, 0.0, examples=(2, 4), is_tangent=True),  # of both micro-batches
        Probe(6, 0.0),
    ]

    *slopes, loss = trainer.objective.losses(probes, batch)

    dense = Dense(base, trainer)
    z5, z6 = scales.directions.draw([Probe(5, 0.1), Probe(6, 0.1)], 0, len(scales)).double()
    wants = [float(dense.gradient(picked) @ z5), 0.0, float(dense.gradient(picked[2:4]) @ z6)]
    scales.move(0, len(scales), (1e-3 * z5).float())
    wants[1] = float(dense.gradient(picked) @ z5)
    size = max(map(abs, wants))
    assert slopes == pytest.approx(wants, abs=1e-4 * size)
    assert wants[0] != pytest.approx(wants[1], abs=3e-4 * size)
    scales.move(0, len(scales), (-1e-3 * z5).float())
    assert loss == pytest.approx(float(dense.loss(scales.values.double(), picked)), 1e-5)


@every_coordinates
def test_the_finite_difference_tends_to_the_slope(
    base: Path, tmp_path: Path, coordinates: Coordinates
) -> None:
    trainer = trainer_of(base, tmp_path, coordinates)
    batch = trainer.objective.batch(0)
    (slope,) = trainer.objective.losses([Probe(9, 0.0, is_tangent=True)], batch)
    unit = 1e-2 if coordinates != "absolute" else 1e-4

    def difference(epsilon: float) -> float:
        plus, minus = trainer.objective.losses([Probe(9, epsilon), Probe(9, -epsilon)], batch)
        return (plus - minus) / (2 * epsilon)

    # the error of a two-sided difference is of second order: two radii take it away
    limit = (4 * difference(unit) - difference(2 * unit)) / 3
    assert limit == pytest.approx(slope, rel=2e-2)
    assert abs(difference(unit) - slope) < abs(difference(4 * unit) - slope)


@every_coordinates
def test_the_loss_of_the_gradient_is_the_loss_at_the_master(
    base: Path, tmp_path: Path, coordinates: Coordinates
) -> None:
    trainer = trainer_of(base, tmp_path, coordinates, train=COMPLETIONS)
    batch = trainer.objective.batch(0)
    loss, _ = trainer.objective.gradient(batch, [0])
    assert loss == pytest.approx(trainer.objective.losses([Probe(0, 0.0)], batch)[0], rel=1e-6)


def test_micro_batches_are_one_batch(base: Path, tmp_path: Path) -> None:
    whole = trainer_of(base, tmp_path, "relative", per_device_train_batch_size=6).objective
    batch = whole.batch(0)
    places = range(7 * NUM_LAYERS)
    loss, gradient = whole.gradient(batch, places)
    parts_loss, parts = whole.gradient([batch[0][:1], batch[0][1:4], batch[0][4:]], places)
    assert parts_loss == pytest.approx(loss, rel=1e-6)
    assert relative_error(parts, gradient) < 1e-5


def test_a_backward_stops_in_front_of_the_last_blocks(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(base, tmp_path, "row")
    scales, batch = trainer.scales, trainer.objective.batch(0)
    last = [i for i, name in enumerate(scales.names) if "layers.1." in name]
    traced: list[bool] = []
    handles = [
        block.register_forward_hook(
            lambda *given: traced.append(
                (given[2][0] if isinstance(given[2], tuple) else given[2]).requires_grad
            )
        )
        for block in decoder_blocks(trainer.model)
    ]
    try:
        _, gradient = trainer.objective.gradient(batch, last)
    finally:
        for handle in handles:
            handle.remove()

    _, everything = trainer.objective.gradient(batch, range(len(scales.names)))
    assert traced == [False, True]
    want = torch.cat([everything[start:stop] for start, stop in scales.parts(last)])
    assert relative_error(gradient, want) < 1e-6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", [GPTQVariant(), GPTQVariant(desc_act=True)], ids=str)
def test_both_directions_of_autograd_agree_on_every_architecture(
    tmp_path: Path, architecture: str, variant: GPTQVariant
) -> None:
    write_gptq(tmp_path, tiny_model(architecture, num_layers=2), variant)
    model: Any = qzo.load(tmp_path)
    layers = trained_layers(model, None)
    scales = Scales.of_layers(layers, coordinates="relative", direction="gaussian")
    made = Objective(model, layers[0].live, scales, from_encoded(examples()), batch_size=3)

    slopes = made.losses([Probe(s, 0.0, is_tangent=True) for s in (1, 2)], made.batch(0))
    _, gradient = made.gradient(made.batch(0), range(len(layers)))

    z = directions("gaussian", [1, 2], 0, len(scales))
    assert slopes == pytest.approx((z @ gradient).tolist(), rel=1e-3, abs=1e-5)


def test_a_model_computes_bitwise_the_same_where_it_is_differentiated(
    base: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(base, tmp_path, "absolute")
    ids = torch.tensor([[1, 5, 9, 7, 30]])
    at_master = (Probe(0, 0.0),)
    with torch.inference_mode(), trainer.scales.shifted(trainer._live, at_master):
        want = trainer.model(input_ids=ids).logits

    places = range(len(trainer.scales.names))
    with trainer.scales.differentiable(trainer._live, places):
        got = trainer.model(input_ids=ids).logits

    assert got.requires_grad
    assert torch.equal(got, want)


def test_a_broken_loss_is_not_finite(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(base, tmp_path, "row")
    trainer.scales.values[:] = math.inf
    loss, _ = trainer.objective.gradient(trainer.objective.batch(0), [0])
    assert not math.isfinite(loss)


def test_held_parts_have_no_direction(base: Path, tmp_path: Path) -> None:
    scales = trainer_of(base, tmp_path, "relative").scales
    free = scales.directions.draw([Probe(7, 0.1)], 0, len(scales))[0]
    scales.directions.still = [(3, 10), (20, 21)]

    z = scales.directions.draw([Probe(7, 0.1)], 0, len(scales))[0]
    window = scales.directions.draw([Probe(7, 0.1)], 5, 40)[0]

    want = free.clone()
    want[3:10] = want[20] = 0
    assert torch.equal(z, want)
    assert torch.equal(window, want[5:40])
    [(start, stop)] = scales.parts([0])
    (moved,) = scales.effective(0, [Probe(7, 0.5)]).scales  # type: ignore[union-attr]
    file = scales._file_scales[0].float()
    expected = file * (scales.values[start:stop] + 0.5 * want[start:stop]).view_as(file)
    assert torch.equal(moved, expected)


@pytest.mark.parametrize(
    ("probes", "backward", "want"),
    [
        ([Probe(1, 0.1), Probe(1, -0.1)], 0.0, 2.0),
        ([Probe(i, 0.1, (i, i + 1)) for i in range(4)], 0.0, 1.0),
        ([Probe(1, 0.0, is_tangent=True)], 0.0, 2.0),
        ([Probe(1, 0.0, (1, 3), is_tangent=True)], 0.0, 1.0),
        ([], 1.0, 3.0),
        ([Probe(1, 0.1), Probe(1, -0.1)], 0.25, 3.5),
    ],
)
def test_forwards_are_counted_in_whole_batches(
    probes: list[Probe], backward: float, want: float
) -> None:
    assert forwards_of(probes, 4, backward) == want
