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

from qzo.directions import combine
from qzo.laws import Law
from qzo.probes import DirectionalDerivative, Probe


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

    def mean_slope(
        self, derivatives: Sequence[DirectionalDerivative], start: int, stop: int
    ) -> Float[Tensor, " length"]:
        """Return elements of the gradient estimate ``mean_i d_i z_i`` (QZO, eq. 4)."""
        weights = [derivative.value / len(derivatives) for derivative in derivatives]
        slope = combine(self.unstretched(derivatives, start, stop), weights)
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
