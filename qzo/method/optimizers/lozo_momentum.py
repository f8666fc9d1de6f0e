"""LOZO's momentum: a decaying average of directions, kept as thin as their left factors.

With ``g = mean_i d_i U_i V^T / sqrt(r)``: ``N <- b N + (1 - b) mean_i d_i U_i``,
``v <- max(v - learning_rate * N V^T / sqrt(r), 0)``. Where V changes, N is carried over first:
``N <- N (V_old^T V_new) / n``, since ``V_new^T V_new`` is about ``n``. The paper's N is sqrt(r)
times this one, as its derivative is sqrt(r) times this one's (``directions.low_rank``).

Source: LOZO-M of arXiv 2410.07698.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from qzo.errors import ConfigError
from qzo.method.directions.distribution import Law
from qzo.method.directions.low_rank import LOZO, own_values, product
from qzo.method.directions.philox import combine, directions
from qzo.method.exact_sums import tree_sum
from qzo.method.probes import DirectionalDerivative
from qzo.method.trained_vector import Scales

_WORD = 2**32


class LOZOMomentum:
    """Steps against an average of low-rank estimates; ``r`` values for every row of a matrix.

    A part of the vector that is no matrix has an average of its own size.

    Args:
        momentum: How much of the average a step keeps.
    """

    def __init__(self, momentum: float = 0.9) -> None:
        self.momentum = momentum
        self._average: Float[Tensor, " thin"] | None = None
        self._basis = 0

    def aim(self, scales: Scales) -> None:
        """Leave the directions as they are."""

    def step(
        self,
        scales: Scales,
        derivatives: Sequence[DirectionalDerivative],
        learning_rate: float,
    ) -> None:
        """Move the scales; no derivatives, no move.

        Raises:
            ConfigError: The directions are not LOZO's.
        """
        law = scales.directions.law
        if not isinstance(law.low_rank, LOZO):
            raise ConfigError(
                "zo.optimizer: expected 'lozo_momentum' with zo.direction 'lozo' only, got "
                f"{law.direction!r}; use 'momentum'"
            )
        if not derivatives:
            return
        basis, seeds = derivatives[0].basis, [d.seed for d in derivatives]
        weights = [d.value / len(derivatives) * (1 - self.momentum) for d in derivatives]
        bounds = _bounds(law)
        if self._average is None:
            self._average, self._basis = scales.values.new_zeros(bounds[-1]), basis
        for number, part in enumerate(law.parts):
            average = self._average[bounds[number] : bounds[number + 1]]
            if basis != self._basis and part.shape is not None:
                average.copy_(self._carried(average, law.low_rank, law.matrices[number], basis))
            seen = _thin(law, number, seeds, scales.values.device)
            average.mul_(self.momentum).add_(combine(seen, weights))
            change = _wide(law, number, average, basis)
            change = scales.directions.shaped_step(change, part.start, part.stop)
            scales.move(part.start, part.stop, change * -learning_rate)
        self._basis = basis

    def state(self) -> dict[str, Tensor]:
        """Return the average, and the basis that it belongs to as two words."""
        if self._average is None:
            return {}
        return {"average": self._average, "basis": torch.tensor(divmod(self._basis, _WORD))}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over the average and its basis."""
        average = state.get("average")
        self._average = None if average is None else average.clone()
        high, low = state["basis"].tolist() if "basis" in state else (0, 0)
        self._basis = high * _WORD + low

    def _carried(
        self, average: Float[Tensor, " thin"], factors: LOZO, matrix: int, basis: int
    ) -> Float[Tensor, " thin"]:
        """Return ``N (V_old^T V_new) / n``."""
        old, new = (factors.right(b, matrix, average.device) for b in (self._basis, basis))
        overlap = tree_sum(new[:, :, None] * old[:, None, :])  # V_new^T V_old
        overlap = overlap * (1 / len(old))  # a quotient is not rounded alike on all devices
        return product(average.view(1, -1, factors.rank), overlap[None]).reshape(-1)


def _bounds(law: Law) -> list[int]:
    """Return where the average of every part starts."""
    factors = law.low_rank
    assert isinstance(factors, LOZO)
    sizes = [
        part.stop - part.start if part.shape is None else part.shape[0] * factors.rank
        for part in law.parts
    ]
    return [0, *accumulate(sizes)]


def _thin(
    law: Law, number: int, seeds: Sequence[int], device: torch.device
) -> Float[Tensor, "seeds thin"]:
    """Return the left factors of a part, one per seed; ordinary directions without a matrix."""
    part, matrix = law.parts[number], law.matrices[number]
    if part.shape is None:
        return directions("gaussian", seeds, part.start, part.stop, device)
    assert isinstance(law.low_rank, LOZO)
    return own_values(law.low_rank, seeds, matrix, matrix + 1, device)


def _wide(
    law: Law, number: int, average: Float[Tensor, " thin"], basis: int
) -> Float[Tensor, " length"]:
    part = law.parts[number]
    if part.shape is None:
        return average.clone()  # what shapes a step may write into it
    assert isinstance(law.low_rank, LOZO)
    z = law.low_rank.rows(average[None], basis, law.matrices[number], (0, part.shape[0]))
    return z.flatten()
