"""Directions as probes and steps use them: drawn by their law, then shaped.

In this order: ``z`` of the law; the tilt of the optimizer; zeros in the parts that stay still; the
factors of sections; the stretch of layers and that of the optimizer. A step is a sum of ``z``
before the last three, which then shape it in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qzo.method.directions.distribution import Law
from qzo.method.directions.philox import DirectionName, add_by_kernel, combine, draws_by_kernel
from qzo.method.probes import DirectionalDerivative, Probe


@dataclass(frozen=True)
class Tilt:
    """Directions become ``z' = across z + along axis``.

    Attributes:
        axis: A vector as long as the trained one; kept, not copied.
        along: Factor of the axis.
        across: Factor of the direction of a seed.
    """

    axis: Float[Tensor, " size"]
    along: float
    across: float


class ShapedDirections:
    """The directions of one trained vector.

    Args:
        law: Draws them.
        device: Where.

    Attributes:
        law: As given.
        stretch: What every direction is multiplied by, or None: 1. A step along stretched
            directions is a step of gradient descent with ``stretch**2`` as its preconditioner.
        update_stretch: What the directions of a step are multiplied by instead, where it differs
            from the probes'.
        optimizer_stretch: A further factor of both, which the optimizer sets and changes.
        tilt: What the optimizer adds to directions before they are stretched.
        still: Parts of the vector, from a first to before a last element, that directions leave
            alone: something else moves them.
        factors: Parts of the vector that directions are multiplied on, and by what: the sections.
    """

    def __init__(self, law: Law, device: torch.device) -> None:
        self.law, self._device = law, device
        self.stretch: Float[Tensor, " size"] | None = None
        self.update_stretch: Float[Tensor, " size"] | None = None
        self.optimizer_stretch: Float[Tensor, " size"] | None = None
        self.tilt: Tilt | None = None
        self.still: Sequence[tuple[int, int]] = ()
        self.factors: Sequence[tuple[int, int, float]] = ()

    def draw(
        self, keys: Sequence[Probe] | Sequence[DirectionalDerivative], start: int, stop: int
    ) -> Float[Tensor, "keys length"]:
        """Return elements of one direction per key, as probes move along it."""
        z = self._with_factors(self.unstretched(keys, start, stop), start, stop)
        for factor in (self.stretch, self.optimizer_stretch):
            z = z if factor is None else z * factor[start:stop]
        return z

    def unstretched(
        self, keys: Sequence[Probe] | Sequence[DirectionalDerivative], start: int, stop: int
    ) -> Float[Tensor, "keys length"]:
        """Return elements of one direction per key, before factors and stretches."""
        z = self.law.draw(keys, start, stop, self._device)
        if self.tilt is not None:
            z = z * self.tilt.across + self.tilt.axis[start:stop] * self.tilt.along
        return self._with_rest(z, start, stop)

    def shifted(
        self, values: Float[Tensor, " length"], probes: Sequence[Probe], start: int, stop: int
    ) -> Float[Tensor, "probes length"]:
        """Return ``v + offset z`` of a window for every probe.

        Args:
            values: The window of ``v``; not modified.
            probes: Offsets and seeds.
            start: Of the window.
            stop: Behind its end.
        """
        moved = list({(p.seed, p.basis): p for p in probes if p.offset}.values())
        if not moved:
            return values.expand(len(probes), -1)
        law = self._drawn_by_kernel(start, stop)
        if law is not None and not self._is_stretched(start, stop):
            result = values.new_empty(len(probes), len(values))
            add_by_kernel(law, [[(p.seed, p.offset)] for p in probes], result, start, base=values)
            return result
        z = self.draw(moved, start, stop)
        place = {(probe.seed, probe.basis): row for row, probe in enumerate(moved)}
        result = values.repeat(len(probes), 1)
        for row, probe in zip(result, probes, strict=True):
            if probe.offset:
                row.add_(z[place[probe.seed, probe.basis]] * probe.offset)
        return result

    def _drawn_by_kernel(self, start: int, stop: int) -> DirectionName | None:
        """Return the law of a window that a kernel can draw and add up, if it is one."""
        is_plain = self.tilt is None and not any(
            first < stop and start < last for first, last in self.still
        )
        return self.law.by_element if is_plain and draws_by_kernel(self._device) else None

    def _is_stretched(self, start: int, stop: int) -> bool:
        """Return whether the directions of a window are multiplied by something."""
        return (
            self.stretch is not None
            or self.optimizer_stretch is not None
            or any(f != 1 and first < stop and start < last for first, last, f in self.factors)
        )

    def mean_slope(
        self, derivatives: Sequence[DirectionalDerivative], start: int, stop: int
    ) -> Float[Tensor, " length"]:
        """Return elements of the gradient estimate ``mean_i d_i z_i`` (QZO, eq. 4)."""
        weights = [derivative.value / len(derivatives) for derivative in derivatives]
        law = self._drawn_by_kernel(start, stop)
        if law is None:
            slope = combine(self.unstretched(derivatives, start, stop), weights)
        else:
            sums = torch.empty(1, stop - start, device=self._device)
            terms = zip((derivative.seed for derivative in derivatives), weights, strict=True)
            add_by_kernel(law, [list(terms)], sums, start)
            slope = sums[0]
        slope = self.shaped_step(slope, start, stop)
        factor = self.optimizer_stretch
        return slope if factor is None else slope * factor[start:stop]

    def shaped_step(
        self, slope: Float[Tensor, " length"], start: int, stop: int
    ) -> Float[Tensor, " length"]:
        """Shape a sum of directions as those of probes; the optimizer's stretch is not in it.

        Args:
            slope: May be modified.
            start: Of the window.
            stop: Behind its end.
        """
        slope = self._with_factors(self._with_rest(slope, start, stop), start, stop)
        factor = self.stretch if self.update_stretch is None else self.update_stretch
        return slope if factor is None else slope * factor[start:stop]

    def _with_rest(
        self, z: Float[Tensor, "*keys length"], start: int, stop: int
    ) -> Float[Tensor, "*keys length"]:
        for first, last in self.still:
            z[..., max(first - start, 0) : max(min(last, stop) - start, 0)] = 0
        return z

    def _with_factors(
        self, z: Float[Tensor, "*keys length"], start: int, stop: int
    ) -> Float[Tensor, "*keys length"]:
        for first, last, factor in self.factors:
            if factor != 1 and first < stop and start < last:
                z[..., max(first - start, 0) : last - start] *= factor
        return z
