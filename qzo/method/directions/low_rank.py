"""Low-rank directions: how the matrix of a layer is made of thin factors, ``Z = L R^T``.

LOZO: ``Z = U V^T / sqrt(r)``; U (m x r) from the seed, V (n x r) from the basis, both Gaussian.
The paper perturbs by ``e U V^T`` and estimates ``c U V^T / r`` with ``c = (L+ - L-) / 2e``. This is
the same step for the same learning rate with ``epsilon = e sqrt(r)``: then ``d = c / sqrt(r)``.

SubZero: ``Z = mu U S V^T`` with ``mu = sqrt(m n / r^2)``; S (r x r) Gaussian from the seed, U
(m x r) and V (n x r) with orthonormal columns from the basis. A matrix of scales is long and thin,
so its values are first laid out by rows as a matrix that is as square as their number allows; where
this has fewer than r rows, r is their number.

In both ``E[Z_ij Z_kl] = 1`` for the same element, else 0. Sums run in a fixed order, products and
sums rounded apart, so all devices give the same bits.

Source: LOZO, arXiv 2410.07698; SubZero, arXiv 2410.08989, its norm alignment and its reshaping of
matrices that are not square included.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from qzo.method.directions.philox import directions
from qzo.method.exact_sums import tree_sum

_OWN_STREAM = 1  # of a seed; its stream 0 is the ordinary direction
_LEFT_STREAM, _RIGHT_STREAM = 3, 4  # of a basis


def product(
    left: Float[Tensor, "keys rows rank"], right: Float[Tensor, "keys columns rank"]
) -> Float[Tensor, "keys rows columns"]:
    """Return ``L R^T``, summed in the order of the rank."""
    lefts, rights = left.permute(2, 0, 1).contiguous(), right.permute(2, 0, 1).contiguous()
    total = lefts[0][:, None, :] * rights[0][:, :, None]  # the longer axis last: it is faster
    for u, v in zip(lefts[1:], rights[1:], strict=True):
        total += u[:, None, :] * v[:, :, None]
    return total.transpose(1, 2)


def orthonormal(
    matrices: Float[Tensor, "batch rows rank"],
) -> Float[Tensor, "batch rows rank"]:
    """Return float64 matrices with orthonormal columns, by modified Gram-Schmidt in float64.

    No column is dropped; one that depends on those before it has no meaning.
    """
    columns = matrices.double().permute(1, 2, 0).clone()  # rows, rank, batch
    for k in range(columns.shape[1]):
        length = tree_sum(columns[:, k] * columns[:, k]).sqrt().clamp(min=1e-300)
        columns[:, k] /= length
        overlap = tree_sum(columns[:, k, None] * columns[:, k + 1 :])
        columns[:, k + 1 :] -= columns[:, k, None] * overlap
    return columns.permute(2, 0, 1)


def near_square(size: int) -> tuple[int, int]:
    """Return the factors of a number that are closest to each other, the smaller one first."""
    rows = math.isqrt(size)
    while size % rows:
        rows -= 1
    return rows, size // rows


def own_values(
    factors: "LOZO | SubZero", seeds: Sequence[int], first: int, last: int, device: torch.device
) -> Float[Tensor, "seeds length"]:
    """Return what the seeds give to the matrices from ``first`` to before ``last``."""
    bounds = factors.bounds[first], factors.bounds[last]
    return directions("gaussian", seeds, *bounds, device, stream=_OWN_STREAM)


class LOZO:
    """The factors of LOZO, for matrices of some shapes; V of the last basis is kept.

    Args:
        shapes: ``(m, n)`` of every matrix.
        rank: Columns of the factors.

    Attributes:
        bounds: Where the values of U of every matrix start, all matrices in a row.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], rank: int) -> None:
        self.shapes, self.rank = list(shapes), rank
        self.bounds = _sums(m * rank for m, _ in shapes)
        self._right_bounds = _sums(n * rank for _, n in shapes)
        self._kept: tuple[int, torch.device, Tensor] | None = None

    def rows(
        self,
        own: Float[Tensor, "keys length"],
        basis: int,
        matrix: int,
        rows: tuple[int, int],
    ) -> Float[Tensor, "keys rows columns"]:
        """Return rows of Z, one matrix per key, given its U."""
        right = self.right(basis, matrix, own.device) * _fp32(self.rank**-0.5, own.device)
        left = own.view(len(own), -1, self.rank)[:, slice(*rows)]
        return product(left, right.expand(len(own), -1, -1))

    def right(self, basis: int, matrix: int, device: torch.device) -> Float[Tensor, "columns rank"]:
        """Return V."""
        if self._kept is None or self._kept[:2] != (basis, device):
            with torch.inference_mode(False):
                size = self._right_bounds[-1]
                v = directions("gaussian", [basis], 0, size, device, stream=_RIGHT_STREAM)[0]
            self._kept = (basis, device, v)
        first, last = self._right_bounds[matrix : matrix + 2]
        return self._kept[2][first:last].view(-1, self.rank)


class SubZero:
    """The factors of SubZero, for matrices of some shapes; U and V of the last basis are kept.

    Args:
        sizes: Values of every matrix.
        rank: Columns of the factors, where the matrix is large enough.

    Attributes:
        shapes: Of the matrices, near-square.
        bounds: Where the values of S of every matrix start, all matrices in a row.
    """

    def __init__(self, sizes: Sequence[int], rank: int) -> None:
        self.shapes = [near_square(size) for size in sizes]
        self._ranks = [min(rank, rows) for rows, _ in self.shapes]
        self.bounds = _sums(rank**2 for rank in self._ranks)
        self._kept: tuple[int, torch.device, list[tuple[Tensor, Tensor]]] | None = None

    def rows(
        self,
        own: Float[Tensor, "keys length"],
        basis: int,
        matrix: int,
        rows: tuple[int, int],
    ) -> Float[Tensor, "keys rows columns"]:
        """Return rows of Z, one matrix per key, given its S."""
        rank, count = self._ranks[matrix], len(own)
        left, right = self._factors(basis, own.device)[matrix]
        lifted = product(right.expand(count, -1, -1), own.view(count, rank, rank))  # V S^T
        return product(left[slice(*rows)].expand(count, -1, -1), lifted)

    def _factors(self, basis: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Return ``mu U`` and V of every matrix, in fp32."""
        if self._kept is None or self._kept[:2] != (basis, device):
            with torch.inference_mode(False):
                factors = [(u.to(device), v.to(device)) for u, v in self._make_factors(basis)]
            self._kept = (basis, device, factors)
        return self._kept[2]

    def _make_factors(self, basis: int) -> Iterator[tuple[Tensor, Tensor]]:
        lefts = self._bases(basis, _LEFT_STREAM, [m for m, _ in self.shapes])
        rights = self._bases(basis, _RIGHT_STREAM, [n for _, n in self.shapes])
        for u, v, (m, n), r in zip(lefts, rights, self.shapes, self._ranks, strict=True):
            yield (u * math.sqrt(m * n / r**2)).float(), v.float()

    def _bases(self, basis: int, stream: int, rows: Sequence[int]) -> list[Tensor]:
        """Orthonormalise one matrix per layer, those of one shape together, on the CPU."""
        bounds = _sums(m * r for m, r in zip(rows, self._ranks, strict=True))
        drawn = directions("gaussian", [basis], 0, bounds[-1], stream=stream)[0]
        groups: dict[tuple[int, int], list[int]] = {}
        for place, shape in enumerate(zip(rows, self._ranks, strict=True)):
            groups.setdefault(shape, []).append(place)
        result: list[Tensor] = [drawn] * len(rows)
        for shape, places in groups.items():
            stacked = torch.stack([drawn[bounds[p] : bounds[p + 1]].view(shape) for p in places])
            for place, matrix in zip(places, orthonormal(stacked), strict=True):
                result[place] = matrix
        return result


def _fp32(value: float, device: torch.device) -> Float[Tensor, ""]:
    return torch.tensor(value, dtype=torch.float32, device=device)


def _sums(sizes: Iterable[int]) -> list[int]:
    return [0, *accumulate(sizes)]
