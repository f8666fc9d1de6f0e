"""The kernel of directions gives the bits of the CPU: in Triton's interpreter, or on a GPU."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from qzo.method.directions import philox as module
from qzo.method.directions.distribution import Law, Part
from qzo.method.directions.philox import DirectionName, add_by_kernel, combine, directions
from qzo.method.directions.settings import DirectionSettings
from qzo.method.directions.shaping import ShapedDirections, Tilt
from qzo.method.probes import DirectionalDerivative, Probe

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; it comes for Linux on x86-64"
)

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES: tuple[DirectionName, ...] = ("rademacher", "gaussian")
SEEDS = (0, 1, 2**63 + 12345, 2**64 - 1)
every_law = pytest.mark.parametrize("name", NAMES)


def drawn(name: DirectionName, seeds: Sequence[int], start: int, stop: int, stream: int) -> Tensor:
    out = torch.full((len(seeds), stop - start), torch.nan, device=DEVICE)
    add_by_kernel(name, [[(seed, 1.0)] for seed in seeds], out, start, stream=stream)
    return out.cpu()


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Return whether all bits agree: also the sign of 0."""
    return torch.equal(got.cpu().view(torch.int32), want.cpu().view(torch.int32))


@every_law
@pytest.mark.parametrize(
    ("start", "count", "stream"),
    [
        (0, 1, 0),
        (31, 2, 1),
        (127, 130, 0),
        (2**18 - 3, 2600, 0),
        (8 * 2**32 - 5, 9, 0),  # Gaussian: beyond 2**32 counters
        (128 * 2**32 - 5, 9, 2),  # both
    ],
)
def test_the_kernel_draws_the_bits_of_the_cpu(
    name: DirectionName, start: int, count: int, stream: int
) -> None:
    want = directions(name, SEEDS, start, start + count, "cpu", stream=stream)
    assert same_bits(drawn(name, SEEDS, start, start + count, stream), want)


@every_law
def test_sums_are_rounded_as_on_the_cpu(name: DirectionName) -> None:
    weights = (0.1, -2.7e-3, 1 / 3, 1e4)
    z = directions(name, SEEDS, 33, 700)
    out = torch.empty(1, z.shape[1], device=DEVICE)
    add_by_kernel(name, [list(zip(SEEDS, weights, strict=True))], out, 33)
    assert same_bits(out[0], combine(z, weights))


def law(name: DirectionName, settings: DirectionSettings | None = None) -> Law:
    parts = [Part("model.layers.0.a", 0, 300), Part("model.layers.1.a", 300, 1000)]
    return Law(name, settings or DirectionSettings(), parts)


PROBES = [Probe(5, 1e-3), Probe(5, -1e-3), Probe(6, 0.0), Probe(2**64 - 1, 0.7)]
DERIVATIVES = [DirectionalDerivative(s, d, d) for s, d in ((5, 1.5), (6, 0.0), (2**63, 3e-3))]
START, STOP = 130, 990


def on_kernel(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let directions take the path of a GPU; return what the kernel was asked for."""
    calls: list[str] = []

    def add(name: DirectionName, *args: object, **kwargs: object) -> None:
        calls.append(name)
        add_by_kernel(name, *args, **kwargs)  # type: ignore[arg-type]  # as they came

    monkeypatch.setattr("qzo.method.directions.shaping.draws_by_kernel", lambda device: True)
    monkeypatch.setattr("qzo.method.directions.shaping.add_by_kernel", add)
    return calls


@every_law
def test_probes_and_steps_have_the_bits_of_the_cpu(
    name: DirectionName, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(STOP - START, generator=torch.Generator().manual_seed(1))
    values[:40] = -0.0
    shaped = ShapedDirections(law(name), CPU)
    shaped.factors = [(500, 1000, 1.0)]
    want = shaped.shifted(values, PROBES, START, STOP)
    step = shaped.mean_slope(DERIVATIVES, START, STOP)
    calls = on_kernel(monkeypatch)
    assert same_bits(shaped.shifted(values, PROBES, START, STOP), want)
    assert same_bits(shaped.mean_slope(DERIVATIVES, START, STOP), step)
    assert calls == [name, name]


def shaped_by(change: str) -> ShapedDirections:
    settings = {
        "mask": DirectionSettings(sparsity=0.5),
        "blocks": DirectionSettings(blocks_per_step=1),
    }
    shaped = ShapedDirections(law("gaussian", settings.get(change)), CPU)
    vector = 1 + torch.arange(1000) / 1000
    if change == "tilt":
        shaped.tilt = Tilt(vector, 0.5, 0.25)
    elif change == "still":
        shaped.still = [(200, 300)]
    elif change == "factors":
        shaped.factors = [(200, 300, 2.0)]
    elif change == "stretch":
        shaped.stretch = vector
    elif change == "optimizer stretch":
        shaped.optimizer_stretch = vector
    return shaped


@pytest.mark.parametrize(
    "change", ["tilt", "still", "factors", "stretch", "optimizer stretch", "mask", "blocks"]
)
def test_what_shapes_directions_has_the_bits_of_the_cpu(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, shaped = torch.ones(STOP - START), shaped_by(change)
    want = shaped.shifted(values, PROBES, START, STOP)
    step = shaped.mean_slope(DERIVATIVES, START, STOP)
    on_kernel(monkeypatch)
    assert same_bits(shaped.shifted(values, PROBES, START, STOP), want)
    assert same_bits(shaped.mean_slope(DERIVATIVES, START, STOP), step)


def test_seeds_are_uploaded_once_for_all_windows_of_a_step() -> None:
    uploads = import_module("qzo.method.directions.triton_kernel")._uploaded_seeds
    uploads.cache_clear()
    for start in range(0, 2000, 500):
        drawn("rademacher", SEEDS, start, start + 500, 0)
    assert uploads.cache_info().misses == 1


@every_law
def test_tables_are_copied_once_to_a_device(name: DirectionName) -> None:
    table = module._quantiles_on if name == "gaussian" else module._sign_table_on
    directions(name, [1], 0, 10)
    before = table.cache_info().misses
    directions(name, [2], 0, 10)
    assert table.cache_info().misses == before


@pytest.mark.gpu
@every_law
def test_directions_on_a_gpu_have_the_bits_of_the_cpu(name: DirectionName) -> None:
    got = directions(name, SEEDS, 2**18 - 7, 2**19, "cuda")
    assert got.is_cuda
    assert same_bits(got, directions(name, SEEDS, 2**18 - 7, 2**19))
