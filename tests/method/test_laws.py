import json
import math
import re
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.runs import json_lines, tiny_checkpoint, tiny_trainer
from torch import Tensor

import qzo
from qzo.errors import CheckpointError, ConfigError
from qzo.method import trained_vector as scales_module
from qzo.method.coordinates import Coordinates
from qzo.method.directions.low_rank import near_square, orthonormal
from qzo.method.directions.masks import chosen_units, kept_words, magnitude_mask, random_mask
from qzo.method.directions.philox import DirectionName, directions, uniform16, uniform32
from qzo.method.directions.settings import DirectionSettings, LawName, basis_steps_of, settings_of
from qzo.method.exact_sums import tree_sum
from qzo.method.extra.section import Section
from qzo.method.optimizers.lozo_momentum import LOZOMomentum
from qzo.method.probes import DirectionalDerivative, Probe
from qzo.method.trained_vector import Scales
from qzo.run.journal.journal import Journal

pytestmark = pytest.mark.slow  # the file takes half a minute

NAMES = ("m.layers.0.a", "m.layers.0.b", "m.layers.1.a", "m.layers.10.a", "head")
SHAPES = ((6, 2), (4, 1), (5, 3), (3, 3), (7, 1))
SIZE = sum(rows * columns for rows, columns in SHAPES)
STARTS = np.cumsum([0, *(rows * columns for rows, columns in SHAPES)]).tolist()
CPU = torch.device("cpu")

LAWS: dict[str, tuple[LawName, DirectionSettings]] = {
    "rademacher": ("rademacher", DirectionSettings()),
    "gaussian": ("gaussian", DirectionSettings()),
    "blocks": ("rademacher", DirectionSettings(blocks_per_step=2)),
    "random mask": ("gaussian", DirectionSettings(sparsity=0.6, mask="random")),
    "both": ("rademacher", DirectionSettings(None, 0.5, "random", 3)),
    "magnitude mask": ("rademacher", DirectionSettings(sparsity=0.5, mask="magnitude")),
    "lozo": ("lozo", DirectionSettings(rank=2)),
    "subzero": ("subzero", DirectionSettings(rank=2)),
}
ALL = pytest.mark.parametrize("law", LAWS)

Vector = NDArray[np.float64]


def scales_of(law: str = "rademacher", *, coordinates: Coordinates = "relative") -> Scales:
    generator = torch.Generator().manual_seed(3)
    stored = [torch.rand(shape, generator=generator) + 0.1 for shape in SHAPES]
    direction, settings = LAWS[law]
    return Scales(
        NAMES, stored, coordinates=coordinates, direction=direction, direction_settings=settings
    )


def keys(count: int, *, bases: int | None = None, first: int = 1) -> list[Probe]:
    """Return probes with seeds of their own and, in turn, one of so many bases."""
    bases = bases or count
    return [Probe(first + i, 1.0, basis=10**6 + first + i % bases) for i in range(count)]


def whole(law: str, probes: Sequence[Probe]) -> Tensor:
    return scales_of(law).directions.draw(probes, 0, SIZE)


# --- every law

COUNT = 250


@cache
def sample(law: str) -> Vector:
    """Return directions of as many seeds and bases."""
    result: Vector = whole(law, keys(COUNT)).double().numpy()
    return result


@ALL
def test_any_window_equals_that_part_of_the_whole(law: str) -> None:
    scales, probes = scales_of(law), keys(3, bases=2)
    z = scales.directions.draw(probes, 0, SIZE)

    assert z.shape == (3, SIZE)
    for start in range(0, SIZE, 3):
        for stop in range(start + 1, SIZE + 1, 5):
            assert torch.equal(scales.directions.draw(probes, start, stop), z[:, start:stop])


@ALL
def test_a_direction_does_not_depend_on_the_other_keys_or_their_order(law: str) -> None:
    probes = keys(6, bases=3)

    together = whole(law, probes)

    assert torch.equal(together.flip(0), whole(law, probes[::-1]))
    for probe, row in zip(probes, together, strict=True):
        assert torch.equal(whole(law, [probe])[0], row)


@ALL
def test_the_estimate_of_a_gradient_is_unbiased_on_a_quadratic(law: str) -> None:
    epsilon = 0.5
    generator = np.random.default_rng(5)
    root = generator.normal(size=(SIZE, SIZE))
    hessian, slope = root @ root.T / SIZE, generator.normal(size=SIZE)
    z = sample(law)

    def loss(points: Vector) -> Vector:
        quadratic: Vector = 0.5 * np.einsum("ni,ij,nj->n", points, hessian, points)
        return quadratic + points @ slope

    estimates = (loss(epsilon * z) - loss(-epsilon * z))[:, None] / (2 * epsilon) * z

    want = slope
    if law == "magnitude mask":  # a projection
        want = slope * kept_by_magnitude()
    error = np.abs(estimates.mean(0) - want)
    assert np.all(error <= 4 * estimates.std(0) / math.sqrt(COUNT) + 1e-12)


@pytest.mark.parametrize("law", sorted(set(LAWS) - {"magnitude mask"}))
def test_elements_have_unit_variance_and_are_uncorrelated(law: str) -> None:
    z = sample(law)

    products = z[:, :, None] * z[:, None, :]
    spread = products.std(0) / math.sqrt(COUNT)

    # 4.5: there are 861 pairs of elements. A product that does not vary is exact.
    assert np.all(np.abs(products.mean(0) - np.eye(SIZE)) <= 4.5 * spread + 1e-6)


@ALL
def test_one_and_two_threads_give_the_same_bits(law: str) -> None:
    before = torch.get_num_threads()
    try:
        drawn = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            stored = [torch.linspace(0.1, 1, 600 * 9).view(600, 9)] * 4
            direction, settings = LAWS[law]
            scales = Scales(
                [f"layers.{i}.a" for i in range(4)],
                stored,
                coordinates="relative",
                direction=direction,
                direction_settings=settings,
            )
            drawn.append(scales.directions.draw(keys(2), 0, len(scales)))
    finally:
        torch.set_num_threads(before)

    assert torch.equal(drawn[0], drawn[1])


@ALL
def test_bits_are_those_of_other_platforms(law: str) -> None:
    # Where this fails, journals of this platform cannot be replayed on others, or the reverse.
    digest = sha256((whole(law, keys(2)) + 0.0).numpy().astype("<f4").tobytes()).hexdigest()

    assert digest[:16] == DIGESTS[law]


DIGESTS: dict[str, str] = {
    "rademacher": "4024ec9209a93b5c",
    "gaussian": "736d5f26cf2f80d9",
    "blocks": "b035e428f4ea6211",
    "random mask": "c7f7d7e3fd01d2d2",
    "both": "711b7b693a71f6b5",
    "magnitude mask": "9a684c25a79eb9ba",
    "lozo": "fbf5501897be18a5",
    "subzero": "c2458fd1624c656e",
}


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_a_plain_law_is_the_direction_of_the_seed(law: DirectionName) -> None:
    probes = keys(3)

    z = whole(law, probes)

    assert torch.equal(z, directions(law, [p.seed for p in probes], 0, SIZE))


@ALL
def test_probes_of_several_bases_move_along_their_directions(
    law: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scales_module, "WINDOW", 10)
    scales, probes = scales_of(law), [Probe(5, 0.1, basis=1), Probe(5, 0.1, basis=2)]
    probes += [Probe(5, -0.1, basis=1), Probe(0, 0.0)]

    moved = torch.cat(
        [scales._shifted_values(layer, probes) for layer in range(len(SHAPES))], dim=1
    )

    z = whole(law, probes)
    for row, probe, direction in zip(moved, probes, z, strict=True):
        want = scales.values + direction * probe.offset if probe.offset else scales.values
        assert torch.equal(row, want)


# --- blocks


def units_of(z: Tensor) -> list[float]:
    """Return the size of the elements of every block, which is one for all of them."""
    parts = [z[STARTS[0] : STARTS[2]], *(z[a:b] for a, b in pairwise(STARTS[2:]))]
    sizes = [set(part.abs().tolist()) for part in parts]
    assert all(len(size) == 1 for size in sizes)
    return [size.pop() for size in sizes]


def test_exactly_k_blocks_are_perturbed_and_all_get_their_turn() -> None:
    count = 200
    sizes = np.array([units_of(row) for row in whole("blocks", keys(count))])

    assert np.all((sizes > 0).sum(1) == 2)  # layers.0 is one block of two layers; so is the head
    assert set(sizes[sizes > 0].tolist()) == {float(np.float32(math.sqrt(4 / 2)))}
    turns = (sizes > 0).sum(0)
    # 200 choices of 2 in 4: a standard deviation of 7.1
    assert np.all(np.abs(turns - count / 2) < 4 * 7.1)


def test_the_chosen_blocks_have_the_smallest_words() -> None:
    words = uniform32(99, 7, stream=1)

    assert chosen_units(99, 7, 3) == sorted(np.argsort(words)[:3].tolist())
    assert chosen_units(99, 7, 7) == list(range(7))


def test_directions_of_one_basis_share_their_blocks_and_mask() -> None:
    z = whole("both", keys(8, bases=1))

    assert len({tuple((row != 0).tolist()) for row in z}) == 1
    assert len({tuple(row.tolist()) for row in z}) == 8


def test_more_blocks_than_there_are_is_refused() -> None:
    stored = [torch.ones(2, 2)] * 2
    with pytest.raises(
        ConfigError,
        match=r"^zo\.blocks_per_step: expected at most the 2 trained blocks and heads of the "
        r"model, got 3$",
    ):
        Scales(
            ["h.0.a", "lm_head"],
            stored,
            coordinates="row",
            direction="gaussian",
            direction_settings=DirectionSettings(blocks_per_step=3),
        )


# --- masks


@pytest.mark.parametrize(
    ("sparsity", "kept"), [(0.0, 65536), (0.75, 16384), (0.6, 26214), (1 - 1e-9, 1)]
)
def test_the_kept_fraction_is_a_multiple_of_one_in_65536(sparsity: float, kept: int) -> None:
    assert kept_words(sparsity) == kept


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75])
def test_a_random_mask_keeps_its_fraction(sparsity: float) -> None:
    count, q = 2**18, kept_words(sparsity) / 2**16

    mask = random_mask(5, sparsity, 0, count, CPU)

    fraction = (mask > 0).double().mean().item()
    assert abs(fraction - q) <= 4 * math.sqrt(q * (1 - q) / count)
    assert set(mask.tolist()) <= {0.0, float(np.float32(math.sqrt(1 / q)))}


def test_a_random_mask_compares_words_of_the_basis() -> None:
    words = uniform16(5, 17, 99, stream=2).tolist()

    mask = random_mask(5, 0.5, 17, 99, CPU)

    assert (mask > 0).tolist() == [word < 32768 for word in words]


def kept_by_magnitude() -> Vector:
    """Sort every layer's scales one by one; half of them, rounded up, are kept."""
    kept = []
    for stored in scales_of()._file_scales:
        values = stored.abs().view(-1).tolist()
        smallest = sorted(range(len(values)), key=lambda i: (values[i], i))
        count = math.floor(len(values) / 2 + 0.5)
        kept += [float(i in smallest[:count]) for i in range(len(values))]
    return np.array(kept)


def test_a_magnitude_mask_keeps_the_smallest_scales_of_every_layer_for_good() -> None:
    z = whole("magnitude mask", keys(4)).numpy()

    assert np.all(np.abs(z) == kept_by_magnitude())


def test_a_magnitude_mask_leaves_sections_whole() -> None:
    generator = torch.Generator().manual_seed(3)
    stored = [torch.rand(shape, generator=generator) + 0.1 for shape in SHAPES]
    direction, settings = LAWS["magnitude mask"]
    scales = Scales(
        NAMES,
        stored,
        coordinates="relative",
        direction=direction,
        direction_settings=settings,
        sections=[Section("norm.weight", "norm", (9,))],
    )

    z = scales.directions.draw(keys(2), 0, SIZE + 9).numpy()

    assert np.all(np.abs(z) == np.append(kept_by_magnitude(), np.ones(9)))


def test_of_equal_magnitudes_the_first_are_kept() -> None:
    mask = magnitude_mask([torch.tensor([[2.0, 1.0, -1.0, 1.0, 1.0]])], 0.6)

    assert mask.tolist() == [False, True, True, False, False]


def test_a_layer_keeps_at_least_one_scale() -> None:
    assert magnitude_mask([torch.tensor([[3.0, 2.0]])], 0.99).tolist() == [False, True]


# --- low rank


def drawn(seed: int, stream: int, start: int, shape: tuple[int, ...]) -> Vector:
    size = math.prod(shape)
    z = directions("gaussian", [seed], start, start + size, stream=stream)[0]
    return z.double().numpy().reshape(shape)


def lozo_factors(seed: int, basis: int, rank: int = 2) -> list[tuple[Vector, Vector]]:
    result, rows, columns = [], 0, 0
    for m, n in SHAPES:
        u, v = drawn(seed, 1, rows * rank, (m, rank)), drawn(basis, 4, columns * rank, (n, rank))
        result.append((u, v))
        rows, columns = rows + m, columns + n
    return result


def test_lozo_is_its_formula() -> None:
    [probe] = keys(1)

    z = whole("lozo", [probe])[0].double().numpy()

    factors = lozo_factors(probe.seed, probe.basis)
    want = np.concatenate([(u @ v.T / math.sqrt(2)).ravel() for u, v in factors])
    np.testing.assert_allclose(z, want, rtol=1e-6, atol=1e-6)  # fp32 sums of two products


def test_lozo_steps_as_the_paper_does_with_epsilon_times_root_rank() -> None:
    [probe], paper_epsilon, rate = keys(1), 1e-2, 0.1
    slope = np.linspace(-1, 1, SIZE)
    factors = lozo_factors(probe.seed, probe.basis)
    uv = np.concatenate([(u @ v.T).ravel() for u, v in factors])
    z = whole("lozo", [probe])[0].double().numpy()

    def loss(point: Vector) -> float:
        return float(slope @ point + 0.5 * point @ point)

    c = (loss(paper_epsilon * uv) - loss(-paper_epsilon * uv)) / (2 * paper_epsilon)
    epsilon = paper_epsilon * math.sqrt(2)
    d = (loss(epsilon * z) - loss(-epsilon * z)) / (2 * epsilon)

    np.testing.assert_allclose(rate * d * z, rate * c * uv / 2, rtol=1e-5, atol=1e-6)


def test_lozo_draws_ordinary_gaussians_where_there_is_no_matrix() -> None:
    probes = keys(2)
    z = scales_of("lozo", coordinates="row").directions.draw(probes, 2, 20)

    assert torch.equal(z, directions("gaussian", [p.seed for p in probes], 2, 20))


def positive_qr(matrix: Vector) -> Vector:
    q, r = np.linalg.qr(matrix)
    result: Vector = q * np.sign(np.diag(r))
    return result


def test_subzero_is_its_formula() -> None:
    [probe] = keys(1)
    z = whole("subzero", [probe])[0].double().numpy()

    want, starts = [], [0, 0, 0]
    for size in (rows * columns for rows, columns in SHAPES):
        m = max(i for i in range(1, size + 1) if size % i == 0 and i * i <= size)
        n, r = size // m, min(2, m)
        u = positive_qr(drawn(probe.basis, 3, starts[0], (m, r)))
        v = positive_qr(drawn(probe.basis, 4, starts[1], (n, r)))
        s = drawn(probe.seed, 1, starts[2], (r, r))
        want.append((math.sqrt(m * n / r**2) * u @ s @ v.T).ravel())
        starts = [starts[0] + m * r, starts[1] + n * r, starts[2] + r * r]

    np.testing.assert_allclose(z, np.concatenate(want), rtol=1e-5, atol=1e-5)  # fp32 sums of four


@pytest.mark.parametrize("law", ["lozo", "subzero"])
def test_directions_of_one_basis_stay_in_one_subspace(law: str) -> None:
    z = whole(law, keys(9, bases=1))[:, STARTS[2] : STARTS[3]].double()
    rows = z.view(-1, 3) if law == "lozo" else z.view(-1, 5)  # 15 values are 3 x 5 in SubZero

    assert int((torch.linalg.svdvals(rows) > 1e-5).sum()) == 2


def test_gram_schmidt_makes_orthonormal_columns_that_span_the_same() -> None:
    matrices = directions("gaussian", range(3), 0, 40 * 12).view(3, 40, 12)

    q = orthonormal(matrices)

    for matrix, columns in zip(matrices.double().numpy(), q.numpy(), strict=True):
        np.testing.assert_allclose(columns.T @ columns, np.eye(12), atol=1e-13)
        np.testing.assert_allclose(columns, positive_qr(matrix), atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 13])
def test_a_tree_sum_is_a_sum_and_leaves_its_argument_alone(length: int) -> None:
    values = torch.arange(length * 3, dtype=torch.float64).view(length, 3)
    before = values.clone()

    assert torch.equal(tree_sum(values), before.sum(0))
    assert torch.equal(values, before)


@pytest.mark.parametrize(
    ("size", "shape"), [(1, (1, 1)), (12, (3, 4)), (13, (1, 13)), (5184, (72, 72))]
)
def test_near_square_factors(size: int, shape: tuple[int, int]) -> None:
    assert near_square(size) == shape


# --- LOZO's momentum


def derivatives_at(step: int, basis: int) -> list[DirectionalDerivative]:
    values = (1.5 - step, 0.25 * step - 0.4)
    return [DirectionalDerivative(10 * step + i, d, d, basis=basis) for i, d in enumerate(values)]


def test_lozo_momentum_is_the_papers_on_dense_matrices() -> None:
    beta, rate, rank, bases = 0.8, 0.01, 2, (7, 7, 8, 8, 8, 2**64 - 1)
    scales, optimizer = scales_of("lozo"), LOZOMomentum(beta)
    dense = [np.ones(shape) for shape in SHAPES]
    averages = [np.zeros((m, rank)) for m, _ in SHAPES]
    old = lozo_factors(0, bases[0])

    for step, basis in enumerate(bases):
        optimizer.step(scales, derivatives_at(step, basis), rate)
        for i, (_, n) in enumerate(SHAPES):
            v = lozo_factors(0, basis)[i][1]
            if basis != bases[max(step - 1, 0)]:
                averages[i] = averages[i] @ (old[i][1].T @ v) / n
            # c of the paper, of an estimate along U V^T, is sqrt(r) d
            news = [
                math.sqrt(rank) * d.value * lozo_factors(d.seed, basis)[i][0]
                for d in derivatives_at(step, basis)
            ]
            averages[i] = beta * averages[i] + (1 - beta) * sum(news) / len(news)
            dense[i] = np.maximum(dense[i] - rate * averages[i] @ v.T / rank, 0)
        old = lozo_factors(0, basis)

    want = np.concatenate([matrix.ravel() for matrix in dense])
    assert np.abs(want - 1).max() > 0.01
    np.testing.assert_allclose(scales.values.double().numpy(), want, atol=1e-5)  # fp32 sums


def test_lozo_without_momentum_is_sgd_along_the_same_directions() -> None:
    scales, other = scales_of("lozo"), scales_of("lozo")
    for each in (scales, other):
        each.directions.stretch = torch.linspace(0.5, 2, SIZE)
        each.directions.factors = [(STARTS[1], STARTS[2], 3.0)]
        each.directions.still = [(STARTS[2], STARTS[3])]
    derivatives = derivatives_at(3, 9)

    LOZOMomentum(0.0).step(scales, derivatives, 0.01)
    other.move(0, SIZE, other.directions.mean_slope(derivatives, 0, SIZE) * -0.01)

    # the factors are averaged before they are multiplied, not after
    torch.testing.assert_close(scales.values, other.values, rtol=0, atol=1e-6)
    moved = scales.values != scales_of("lozo").values
    assert moved.tolist() == [not STARTS[2] <= place < STARTS[3] for place in range(SIZE)]


def test_lozo_momentum_keeps_the_average_of_a_section_as_it_is() -> None:
    """The factor of a section is that of its steps, not of what is remembered."""
    beta, rate, factor, size = 0.8, 0.01, 3.0, 5
    direction, settings = LAWS["lozo"]
    norm = Section("norm.weight", "norm", (size,), factor=factor)
    scales = Scales(
        NAMES,
        [torch.ones(shape) for shape in SHAPES],
        coordinates="relative",
        direction=direction,
        direction_settings=settings,
        sections=(norm,),
    )
    start, average = scales.values[SIZE:].double().numpy(), np.zeros(size)
    optimizer, want = LOZOMomentum(beta), start.copy()

    for step in range(6):
        derivatives = derivatives_at(step, 7)
        optimizer.step(scales, derivatives, rate)
        seeds = [d.seed for d in derivatives]
        z = directions("gaussian", seeds, SIZE, SIZE + size, CPU).double().numpy()
        news = [d.value * z[i] for i, d in enumerate(derivatives)]
        average = beta * average + (1 - beta) * sum(news) / len(news)
        want -= rate * factor * average

    assert np.abs(want - start).max() > 0.01
    np.testing.assert_allclose(scales.values[SIZE:].double().numpy(), want, atol=1e-5)


@pytest.mark.parametrize("bases", [(3, 3, 3, 3), (3, 3, 2**64 - 5, 2**64 - 5)])
def test_a_restored_lozo_momentum_goes_on_bitwise_across_bases(bases: tuple[int, ...]) -> None:
    straight, stopped = scales_of("lozo"), scales_of("lozo")
    optimizer, first, second = LOZOMomentum(), LOZOMomentum(), LOZOMomentum()
    for step, basis in enumerate(bases):
        optimizer.step(straight, derivatives_at(step, basis), 0.02)

    for step, basis in enumerate(bases):
        if step == 2:
            second.restore({key: tensor.clone() for key, tensor in first.state().items()})
        (first if step < 2 else second).step(stopped, derivatives_at(step, basis), 0.02)

    assert torch.equal(stopped.values, straight.values)


def test_lozo_momentum_wants_directions_of_lozo() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^zo\.optimizer: expected 'lozo_momentum' with zo\.direction 'lozo' only, got "
        r"'gaussian'; use 'momentum'$",
    ):
        LOZOMomentum().step(scales_of("gaussian"), derivatives_at(0, 1), 0.1)


# --- settings


@pytest.mark.parametrize(
    ("direction", "settings", "given", "steps"),
    [
        ("gaussian", DirectionSettings(), None, None),
        ("gaussian", DirectionSettings(), 3, 3),
        ("gaussian", DirectionSettings(sparsity=0.5, mask="random"), None, 1),
        ("gaussian", DirectionSettings(sparsity=0.5, mask="magnitude"), None, None),
        ("gaussian", DirectionSettings(blocks_per_step=1), None, 1),
        ("lozo", DirectionSettings(rank=2), None, 50),
        ("subzero", DirectionSettings(rank=2), None, 1000),
        ("subzero", DirectionSettings(rank=2), 7, 7),
    ],
)
def test_a_law_says_how_many_steps_share_a_basis(
    direction: str, settings: DirectionSettings, given: int | None, steps: int | None
) -> None:
    assert basis_steps_of(direction, settings, given) == steps


@ALL
def test_settings_read_as_they_were_written(law: str) -> None:
    direction, settings = LAWS[law]
    written = json.loads(json.dumps(settings.to_dict()))

    assert settings_of(written, direction, "relative") == settings


SPSA = {"estimator": "spsa", "coordinates": "relative"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rank": 2}, "zo.rank has no effect with zo.direction: rademacher; remove it or set "
        "zo.direction: lozo or subzero"),
    ({**SPSA, "direction": "lozo", "rank": 1025}, "zo.rank: expected a number less than or equal "
        "to 1024, got 1025"),
    ({"direction": "lozo"}, "zo.direction: lozo cannot be combined with zo.coordinates: row: a "
        "layer has no matrix of trained values there; set zo.coordinates: absolute or relative, or "
        "zo.direction: rademacher or gaussian"),
    ({**SPSA, "direction": "subzero", "sparsity": 0.5}, "zo.sparsity cannot be combined with "
        "zo.direction: subzero: it perturbs whole matrices in all layers; remove zo.sparsity or "
        "set zo.direction: rademacher or gaussian"),
    ({**SPSA, "direction": "lozo", "blocks_per_step": 1}, "zo.blocks_per_step cannot be combined "
        "with zo.direction: lozo: it perturbs whole matrices in all layers; remove "
        "zo.blocks_per_step or set zo.direction: rademacher or gaussian"),
    ({"mask": "random"}, "zo.mask has no effect without zo.sparsity; remove it or set both"),
    ({"sparsity": 1.0}, "zo.sparsity: expected a number less than 1, got 1.0"),
    ({"sparsity": 0.5, "mask": "magnitude"}, "zo.mask: magnitude cannot be combined with "
        "zo.coordinates: row: a trained value has no scale of the file there; set zo.mask: random, "
        "or zo.coordinates: absolute or relative"),
    ({"blocks_per_step": 0}, "zo.blocks_per_step: expected a number greater than or equal to 1, "
        "got 0"),
    ({"optimizer": "lozo_momentum"}, "zo.direction: rademacher cannot be combined with "
        "zo.optimizer: lozo_momentum: its momentum lies in the subspace of LOZO; set zo.direction: "
        "lozo or zo.optimizer: momentum"),
    ({**SPSA, "tuned": "lora", "direction": "lozo"}, "zo.direction: lozo cannot be combined with "
        "zo.tuned: lora: it factorizes matrices of scales; set zo.direction: rademacher or "
        "gaussian"),
    ({**SPSA, "tuned": "prefix", "sparsity": 0.5, "mask": "magnitude"}, "zo.mask: magnitude cannot "
        "be combined with zo.tuned: prefix: the magnitudes are those of scales; set zo.mask: "
        "random"),
    ({"blocks_per_step": 1, "first_order_blocks": 1}, "zo.blocks_per_step cannot be combined with "
        "first-order blocks: it would choose from these too; remove zo.blocks_per_step or the keys "
        "zo.first_order_*"),
    *(({"estimator": "spsa", "optimizer": "conmezo", key: value}, f"zo.{key} cannot be combined "
        "with zo.optimizer: conmezo: its momentum moves every value in every step; remove "
        f"zo.{key} or set another zo.optimizer")
        for key, value in (("sparsity", 0.5), ("blocks_per_step", 1))),
    *(({key: value, "layer_scaling": "grad_norm"}, "zo.layer_scaling: grad_norm cannot be combined "
        f"with {name}: it moves every layer to measure it; set zo.layer_scaling: param_norm or "
        "none")
        for key, value, name in (
            ("blocks_per_step", 1, "zo.blocks_per_step"),
            ("sparsity", 0.5, "zo.sparsity"),
            ("first_order_blocks", 1, "first-order blocks"),
        )),
]  # fmt: skip


@pytest.mark.parametrize(("zo", "message"), REFUSED)
def test_a_recipe_whose_settings_do_not_go_together_is_refused(
    zo: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        qzo.recipe({"model": "m", "output_dir": "o", "zo": zo})


@pytest.mark.parametrize(
    ("zo", "settings", "basis_steps"),
    [
        ({}, {}, None),
        ({"sparsity": 0.5}, {"sparsity": 0.5, "mask": "random"}, 1),
        ({"blocks_per_step": 2, "basis_steps": 4}, {"blocks_per_step": 2}, 4),
        ({**SPSA, "direction": "lozo"}, {"rank": 2}, 50),
        ({**SPSA, "direction": "subzero", "rank": 24}, {"rank": 24}, 1000),
        ({**SPSA, "direction": "subzero"}, {"rank": 8}, 1000),
    ],
)
def test_a_recipe_fills_in_what_the_law_needs(
    zo: dict[str, Any], settings: dict[str, Any], basis_steps: int | None
) -> None:
    recipe = qzo.recipe({"model": "m", "output_dir": "o", "zo": zo})

    assert recipe.zo.direction_settings.to_dict() == settings
    assert recipe.zo.basis_steps == basis_steps


# --- runs

RUNS: dict[str, dict[str, Any]] = {
    "blocks": {"blocks_per_step": 1, "basis_steps": 2},
    "random mask": {"sparsity": 0.5},
    "magnitude mask": {**SPSA, "sparsity": 0.5, "mask": "magnitude"},
    "lozo": {**SPSA, "direction": "lozo", "basis_steps": 2},
    "subzero": {**SPSA, "direction": "subzero", "rank": 3, "basis_steps": 2},
    "lozo_momentum": {
        **{**SPSA, "direction": "lozo", "basis_steps": 2},
        **{"optimizer": "lozo_momentum", "num_directions": 2},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("laws") / "base", num_layers=2)


@pytest.mark.parametrize("law", RUNS)
def test_a_run_resumes_and_replays_bitwise(law: str, base: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"zo": RUNS[law], "lr_scheduler_type": "constant"}
    straight = tiny_trainer(base, tmp_path / "straight", max_steps=5, **common)
    straight.train()
    values = straight.scales.values.clone()

    tiny_trainer(base, tmp_path / "run", max_steps=3, **common).train()
    again = tiny_trainer(base, tmp_path / "run", max_steps=5, resume_from_checkpoint=True, **common)
    again.train()

    assert torch.equal(again.scales.values, values)
    assert not torch.equal(values, torch.ones_like(values))
    assert qzo.replay(tmp_path / "run").adapter == "equal"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction_settings": 3}, "direction_settings: expected some of the keys rank, sparsity, "
            "mask, blocks_per_step, got 3"),
        ({"direction_settings": {"depth": 1}}, "direction_settings: expected some of the keys "
            "rank, sparsity, mask, blocks_per_step, got {'depth': 1}"),
        ({"direction_settings": {"rank": True}}, "direction_settings: rank: expected int, got "
            "True"),
        ({"direction_settings": {"sparsity": 1}}, "direction_settings: sparsity: expected float, "
            "got 1"),
        ({"direction_settings": {"mask": ["random"]}}, "direction_settings: mask: expected one of "
            "['random', 'magnitude'], got ['random']"),
        ({"direction_settings": {"sparsity": 0.5}}, "direction_settings: mask: expected one of "
            "['random', 'magnitude'] with a sparsity, got none"),
        ({"direction_settings": {"sparsity": -0.5, "mask": "random"}}, "direction_settings: "
            "sparsity: expected a number from 0 to below 1, got -0.5"),
        ({"direction_settings": {"blocks_per_step": 0}}, "direction_settings: blocks_per_step: "
            "expected a number above 0, got 0"),
        ({"direction": "lozo", "coordinates": "absolute"}, "direction_settings: rank: expected a "
            "number from 1 to 1024, got None"),
        ({"direction": "lozo", "coordinates": "absolute", "direction_settings": {"rank": 10**9}},
            "direction_settings: rank: expected a number from 1 to 1024, got 1000000000"),
        ({"basis_steps": 0}, "expected basis_steps to be a number above 0 or null, got 0"),
        ({"basis_steps": True}, "expected basis_steps to be a number above 0 or null, got True"),
    ],
)  # fmt: skip
def test_a_header_with_other_settings_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tiny_trainer(base, tmp_path / "run", max_steps=1).train()
    path = tmp_path / "run" / "journal.jsonl"
    lines = json_lines(path)
    path.write_text("".join(json.dumps(line) + "\n" for line in [lines[0] | changes, *lines[1:]]))

    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{path}: line 1: {message}')}$"):
        Journal.open(path)


def test_a_journal_from_before_the_laws_replays(base: Path, tmp_path: Path) -> None:
    tiny_trainer(base, tmp_path / "run", max_steps=2).train()
    path = tmp_path / "run" / "journal.jsonl"
    header, *steps = json_lines(path)
    del header["direction_settings"], header["basis_steps"]
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *steps]))

    assert qzo.replay(tmp_path / "run").adapter == "equal"
