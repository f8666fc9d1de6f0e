import math
from collections.abc import Iterator

import pytest
import torch

from qzo.method import exact_sums as sums
from qzo.method.exact_sums import norm


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1001])
def test_a_norm_is_exact_to_the_last_digits_of_float64(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "_PART", 100)
    values = torch.linspace(-3.7, 11.1, size)

    want = math.sqrt(math.fsum(float(value) ** 2 for value in values))

    assert norm(values) == pytest.approx(want, rel=1e-15)


def test_a_norm_does_not_depend_on_the_number_of_threads(threads: None) -> None:
    values = torch.randn(300_001, generator=torch.Generator().manual_seed(1))
    got = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        got.append(norm(values))

    assert len(set(got)) == 1
