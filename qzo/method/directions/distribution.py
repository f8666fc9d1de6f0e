"""Laws of directions: any window of ``z``, from its seed and its basis alone.

The seed is fresh for every direction; the basis stays for some steps (``probes.basis_seed``) and
gives what they share. A window has the same bits on every device, in any order of windows.
"""

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qzo.errors import ConfigError
from qzo.method.directions.low_rank import LOZO, SubZero, own_values
from qzo.method.directions.masks import chosen_units, magnitude_mask, random_mask
from qzo.method.directions.philox import DirectionName, directions
from qzo.method.directions.settings import DirectionSettings, LawName
from qzo.method.probes import DirectionalDerivative, Probe


@dataclass(frozen=True)
class Part:
    """The values of one layer in the trained vector.

    Attributes:
        name: Of the layer.
        start: Its first value.
        stop: One beyond its last value.
        shape: Rows and columns where the values are a matrix; without one, None, a low-rank law
            draws an ordinary Gaussian, as LOZO does for tensors of one dimension.
    """

    name: str
    start: int
    stop: int
    shape: tuple[int, int] | None = None

    @property
    def unit(self) -> str:
        """The decoder block that the layer is in, or the layer itself where it is in none."""
        found = re.match(r".*?\.\d+(?=\.)", self.name)
        return self.name if found is None else found.group()


class Law:
    """How the directions of one trained vector are drawn.

    Args:
        direction: Its name.
        settings: What else it is told.
        parts: The layers, one after the other.
        file_scales: Of the layers; read by a magnitude mask only.

    Attributes:
        parts: As given.
        matrices: How many matrices stand before each part, and in all.
        low_rank: The factors of a low-rank law, whose matrices are those of the parts that have
            one; None for another law.

    Raises:
        ConfigError: The model has fewer blocks than are to be perturbed.
    """

    def __init__(
        self,
        direction: LawName,
        settings: DirectionSettings,
        parts: Sequence[Part],
        file_scales: Sequence[Float[Tensor, "_ _"]] = (),
    ) -> None:
        self.direction, self.settings, self.parts = direction, settings, list(parts)
        self._bounds = [part.start for part in parts]
        self._units = list(dict.fromkeys(part.unit for part in parts))
        count = settings.blocks_per_step
        if count is not None and count > len(self._units):
            raise ConfigError(
                f"zo.blocks_per_step: expected at most the {len(self._units)} trained blocks and "
                f"heads of the model, got {count}"
            )
        shapes = [part.shape for part in parts if part.shape is not None]
        self.matrices = [0, *accumulate(part.shape is not None for part in parts)]
        self.low_rank = _low_rank(direction, settings.rank, shapes)
        self._mask: Bool[Tensor, " size"] | None = None
        if settings.sparsity is not None and settings.mask == "magnitude":
            mask = magnitude_mask(file_scales, settings.sparsity)
            sections = mask.new_ones((parts[-1].stop if parts else 0) - len(mask))
            self._mask = torch.cat([mask, sections])  # sections have no magnitude in the file

    def draw(
        self,
        keys: Sequence[Probe] | Sequence[DirectionalDerivative],
        start: int,
        stop: int,
        device: torch.device,
    ) -> Float[Tensor, "keys length"]:
        """Return elements ``start`` to ``stop`` of one direction per key."""
        places: dict[int, list[int]] = {}
        seeds, bases = [key.seed for key in keys], [key.basis for key in keys]
        for place, basis in enumerate(bases):
            places.setdefault(basis, []).append(place)
        if len(places) <= 1 or not self._uses_basis:
            return self._draw(seeds, bases[0], start, stop, device)
        z = torch.empty(len(keys), stop - start, device=device)
        for basis, rows in places.items():
            z[rows] = self._draw([seeds[row] for row in rows], basis, start, stop, device)
        return z

    @property
    def by_element(self) -> DirectionName | None:
        """The law of every element, where it depends on nothing but the seed and the place."""
        is_masked = self.settings.sparsity is not None or self.settings.blocks_per_step is not None
        if not is_masked and (self.direction == "rademacher" or self.direction == "gaussian"):
            return self.direction
        return None

    @property
    def _uses_basis(self) -> bool:
        is_random = self.settings.mask == "random"
        has_blocks = self.settings.blocks_per_step is not None
        return is_random or has_blocks or self.low_rank is not None

    def _draw(
        self, seeds: Sequence[int], basis: int, start: int, stop: int, device: torch.device
    ) -> Float[Tensor, "seeds length"]:
        if self.direction == "rademacher" or self.direction == "gaussian":
            z = directions(self.direction, seeds, start, stop, device)
            return self._masked(z, basis, start, stop)
        return torch.cat(list(self._low_rank_parts(seeds, basis, start, stop, device)), dim=1)

    def _low_rank_parts(
        self, seeds: Sequence[int], basis: int, start: int, stop: int, device: torch.device
    ) -> Iterator[Float[Tensor, "seeds length"]]:
        """Yield the parts of a window, each from the rows of its matrix that it touches."""
        assert self.low_rank is not None
        touched = self._overlapping(start, stop)
        first, last = self.matrices[touched[0]], self.matrices[touched[-1] + 1]
        own, bounds = own_values(self.low_rank, seeds, first, last, device), self.low_rank.bounds
        for number in touched:
            part, matrix = self.parts[number], self.matrices[number]
            low, high = max(start, part.start), min(stop, part.stop)
            if part.shape is None:
                yield directions("gaussian", seeds, low, high, device)
                continue
            values = own[:, bounds[matrix] - bounds[first] : bounds[matrix + 1] - bounds[first]]
            width = self.low_rank.shapes[matrix][1]
            low, high = low - part.start, high - part.start
            rows = (low // width, -(-high // width))
            z = self.low_rank.rows(values, basis, matrix, rows).flatten(1)
            yield z[:, low - rows[0] * width : high - rows[0] * width]

    def _overlapping(self, start: int, stop: int) -> range:
        """Return the numbers of the parts that have values of a window."""
        last = bisect_left(self._bounds, stop)
        return range(bisect_right(self._bounds, start) - 1, last)

    def _masked(
        self, z: Float[Tensor, "seeds length"], basis: int, start: int, stop: int
    ) -> Float[Tensor, "seeds length"]:
        if self._mask is not None:
            z = z * self._mask[start:stop]
        elif self.settings.sparsity is not None:
            z = z * random_mask(basis, self.settings.sparsity, start, stop, z.device)
        if self.settings.blocks_per_step is not None:
            z = z * self._blocks(basis, start, stop).to(z.device)
        return z

    def _blocks(self, basis: int, start: int, stop: int) -> Float[Tensor, " length"]:
        """Return 0 in blocks that are left alone, ``sqrt(n / k)`` in those that are perturbed."""
        n, k = len(self._units), self.settings.blocks_per_step
        assert k is not None
        chosen = {self._units[unit] for unit in chosen_units(basis, n, k)}
        factor = torch.zeros(stop - start)
        for part in (self.parts[number] for number in self._overlapping(start, stop)):
            if part.unit in chosen:
                factor[max(part.start - start, 0) : part.stop - start] = math.sqrt(n / k)
        return factor


def _low_rank(
    direction: LawName, rank: int | None, shapes: Sequence[tuple[int, int]]
) -> LOZO | SubZero | None:
    if direction == "lozo":
        assert rank is not None
        return LOZO(shapes, rank)
    if direction == "subzero":
        assert rank is not None
        return SubZero([rows * columns for rows, columns in shapes], rank)
    return None
