"""The trained vector: an fp32 master, and the effective scales that it gives at a probe.

``coordinates`` says how the trained vector ``v`` becomes the effective scales of a layer.

A probe evaluates at ``v + offset * z(seed)``. That sum is made for the layer at hand and thrown
away: the master is never perturbed, so nothing has to be restored.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from qzo.checkpoint import Checkpoint
from qzo.coordinates import BY_FACTORS, Coordinates, crossing_message, num_values
from qzo.direction_settings import DirectionSettings, LawName
from qzo.directions import combine
from qzo.errors import CheckpointError, ConfigError
from qzo.laws import Law, Part
from qzo.linear import EffectiveScales, Live, Multipliers, ProbeScales, QuantLinear
from qzo.probes import DirectionalDerivative, Probe
from qzo.sums import norm
from qzo.tensor_files import tensor_bytes

# Elements of a direction, and of a shifted vector per probe, that exist at one time; more where one
# layer has more. Small parts would cost more in calls than in numbers.
WINDOW = 2**18

PLAIN = DirectionSettings()


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


class Scales:
    """The trained vector of one model.

    Args:
        names: The quantized layers, in the order of the vector.
        file_scales: Their scales as stored, ``(out, groups)`` each; kept, not copied.
        coordinates: How the vector becomes effective scales.
        direction: Law of the directions.
        direction_settings: What else the law is told.

    Attributes:
        values: The fp32 master.
        law: Draws the directions.
        stretch: What every direction is multiplied by, or None: 1. A step along stretched
            directions is a step of gradient descent with ``stretch**2`` as its preconditioner.
        update_stretch: What the directions of a step are multiplied by instead, where it differs
            from the probes'.
        optimizer_stretch: A further factor of both, which the optimizer sets and changes.
        tilt: What the optimizer adds to directions before they are stretched.
        still: Parts of the vector, from a first to before a last element, that directions leave
            alone: something else moves them.

    Raises:
        ConfigError: Row coordinates on a layer whose blocks cross rows.
    """

    def __init__(
        self,
        names: Sequence[str],
        file_scales: Sequence[Float[Tensor, "_ _"]],  # every layer has its own shape
        *,
        coordinates: Coordinates,
        direction: LawName,
        direction_settings: DirectionSettings = PLAIN,
    ) -> None:
        self.names = list(names)
        self.coordinates = coordinates
        self.direction: LawName = direction
        self._file_scales = list(file_scales)
        self._bounds = [0, *accumulate(num_values(coordinates, *s.shape) for s in file_scales)]
        self.law = Law(direction, direction_settings, self._parts(), file_scales)
        device = file_scales[0].device
        self.values = torch.empty(self._bounds[-1], dtype=torch.float32, device=device)
        self.stretch: Float[Tensor, " size"] | None = None
        self.update_stretch: Float[Tensor, " size"] | None = None
        self.optimizer_stretch: Float[Tensor, " size"] | None = None
        self.tilt: Tilt | None = None
        self.still: Sequence[tuple[int, int]] = ()
        self._window: tuple[Sequence[Probe], int, int, Tensor] | None = None
        self.reset()

    @classmethod
    def of_checkpoint(
        cls,
        checkpoint: Checkpoint,
        names: Sequence[str],
        *,
        coordinates: Coordinates,
        direction: LawName,
        direction_settings: DirectionSettings = PLAIN,
    ) -> "Scales":
        """Read the scales of some layers of a checkpoint, without a model."""
        weights = [checkpoint.weight(layer) for layer in names]
        _check_factors(names, [w.blocks_cross_rows for w in weights], coordinates)
        return cls(
            names,
            [weight.scales for weight in weights],
            coordinates=coordinates,
            direction=direction,
            direction_settings=direction_settings,
        )

    @classmethod
    def of_layers(
        cls,
        layers: Sequence[QuantLinear],
        *,
        coordinates: Coordinates,
        direction: LawName,
        direction_settings: DirectionSettings = PLAIN,
    ) -> "Scales":
        """Take over the scales of a model's layers and number the layers."""
        names = [layer.name for layer in layers]
        weights = [layer.quantized for layer in layers]
        _check_factors(names, [w.blocks_cross_rows for w in weights], coordinates)
        for index, layer in enumerate(layers):
            layer.index = index
        return cls(
            names,
            [weight.scales for weight in weights],
            coordinates=coordinates,
            direction=direction,
            direction_settings=direction_settings,
        )

    def _parts(self) -> list[Part]:
        """Return the layout of the vector; factors of rows and columns are no matrix."""
        has_matrices = self.coordinates not in BY_FACTORS
        parts = []
        for i, (name, (out, groups)) in enumerate(
            zip(self.names, (scales.shape for scales in self._file_scales), strict=True)
        ):
            shape = (out, groups) if has_matrices else None
            parts.append(Part(name, self._bounds[i], self._bounds[i + 1], shape))
        return parts

    def __len__(self) -> int:
        """Return the number of trained values."""
        return self._bounds[-1]

    @contextmanager
    def shifted(self, live: Live, probes: Sequence[Probe]) -> Iterator[None]:
        """Let the layers see the scales at the probes while the block runs."""
        live.effective = lambda layer: self.effective(layer, probes)
        self._window = None
        try:
            yield
        finally:
            live.effective = None
            self._window = None

    @contextmanager
    def with_tangents(self, live: Live, probes: Sequence[Probe]) -> Iterator[None]:
        """Let the layers see the scales at the probes, with the directions as their tangents.

        What a model computes in the block, inside ``exact.tangents``, carries its exact
        slopes along the directions.
        """

        def dual(layer: int) -> Float[Tensor, "probes length"]:
            start, stop = self._bounds[layer], self._bounds[layer + 1]
            z = self.draw(probes, start, stop)
            shifted = self._shifted_values(layer, probes).contiguous()
            made: Tensor = forward_ad.make_dual(shifted, z)
            return made

        with self.shifted(live, probes):
            live.effective = lambda layer: self._effective(layer, dual(layer))
            yield

    @contextmanager
    def differentiable(
        self, live: Live, layers: Sequence[int]
    ) -> Iterator[list[Float[Tensor, " _"]]]:
        """Let the layers see the scales at the master, those of some as leaves of autograd.

        Yields:
            The leaves: the trained values of the layers.
        """
        values = {
            layer: self.values[self._bounds[layer] : self._bounds[layer + 1]].clone()
            for layer in layers
        }
        leaves = {layer: part.requires_grad_() for layer, part in values.items()}

        def at_master(layer: int) -> EffectiveScales:
            start, stop = self._bounds[layer], self._bounds[layer + 1]
            return self._effective(layer, leaves.get(layer, self.values[start:stop])[None])

        with self.shifted(live, ()):
            live.effective = at_master
            yield list(leaves.values())

    def effective(self, layer: int, probes: Sequence[Probe]) -> EffectiveScales:
        """Return the effective scales of one layer at every probe."""
        return self._effective(layer, self._shifted_values(layer, probes))

    def _effective(self, layer: int, shifted: Float[Tensor, "probes length"]) -> EffectiveScales:
        if self.coordinates in BY_FACTORS:
            return Multipliers(*self._factors(layer, shifted))
        stored = self._file_scales[layer].float()
        by_group = [values.view(stored.shape) for values in shifted.unbind()]
        if self.coordinates == "relative":
            by_group = [stored * values for values in by_group]
        return ProbeScales(by_group)

    def tuned(self, layer: int) -> Float[Tensor, "out groups"]:
        """Return the effective scales of one layer at the master, in fp32."""
        stored = self._file_scales[layer].float()
        values = self.values[self._bounds[layer] : self._bounds[layer + 1]]
        if self.coordinates in BY_FACTORS:
            rows, columns = self._factors(layer, values[None])
            stored = stored if rows is None else stored * rows.T
            return stored if columns is None else stored * columns
        by_group = values.view(stored.shape)
        return stored * by_group if self.coordinates == "relative" else by_group.clone()

    def file_norms(self) -> list[float]:
        """Return the Euclidean norm of the scales in the file, by layer."""
        return [norm(stored.reshape(-1)) for stored in self._file_scales]

    def _factors(
        self, layer: int, values: Float[Tensor, "probes length"]
    ) -> tuple[Float[Tensor, "probes out"] | None, Float[Tensor, "probes groups"] | None]:
        """Return the factors of rows and of columns that values of one layer stand for."""
        if self.coordinates == "row":
            return values, None
        if self.coordinates == "column":
            return None, values
        out_features = len(self._file_scales[layer])
        return values[:, :out_features], values[:, out_features:]

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yield the bounds of consecutive parts of the vector."""
        for start in range(0, len(self), WINDOW):
            yield start, min(start + WINDOW, len(self))

    def parts(self, layers: Sequence[int]) -> list[tuple[int, int]]:
        """Return the bounds of the values of some layers."""
        return [(self._bounds[layer], self._bounds[layer + 1]) for layer in layers]

    def mean_slope(
        self, derivatives: Sequence[DirectionalDerivative], start: int, stop: int
    ) -> Float[Tensor, " length"]:
        """Return elements of the gradient estimate ``mean_i d_i z_i`` (QZO, eq. 4)."""
        weights = [derivative.value / len(derivatives) for derivative in derivatives]
        slope = combine(self.unstretched(derivatives, start, stop), weights)
        slope = self.stretched_for_step(slope, start, stop)
        factor = self.optimizer_stretch
        return slope if factor is None else slope * factor[start:stop]

    def draw(
        self, keys: Sequence[Probe] | Sequence[DirectionalDerivative], start: int, stop: int
    ) -> Float[Tensor, "keys length"]:
        """Return elements of one direction per key, as probes move along it."""
        z = self.unstretched(keys, start, stop)
        for factor in (self.stretch, self.optimizer_stretch):
            z = z if factor is None else z * factor[start:stop]
        return z

    def unstretched(
        self, keys: Sequence[Probe] | Sequence[DirectionalDerivative], start: int, stop: int
    ) -> Float[Tensor, "keys length"]:
        """Return elements of one direction per key, before they are multiplied by anything."""
        z = self.law.draw(keys, start, stop, self.values.device)
        if self.tilt is not None:
            z = z * self.tilt.across + self.tilt.axis[start:stop] * self.tilt.along
        for first, last in self.still:
            z[:, max(first - start, 0) : max(min(last, stop) - start, 0)] = 0
        return z

    def stretched_for_step(
        self, slope: Float[Tensor, " length"], start: int, stop: int
    ) -> Float[Tensor, " length"]:
        """Multiply a part of a step by its stretch; that of the optimizer is not in it."""
        factor = self.stretch if self.update_stretch is None else self.update_stretch
        return slope if factor is None else slope * factor[start:stop]

    def by_layer(self, numbers: Sequence[float]) -> Float[Tensor, " size"]:
        """Return a vector that has one number on every layer."""
        result = torch.empty_like(self.values)
        for number, (start, stop) in zip(numbers, pairwise(self._bounds), strict=True):
            result[start:stop] = number
        return result

    def move(self, start: int, stop: int, change: Float[Tensor, " length"]) -> None:
        """Add to a part of the master; no value goes below 0 (QZO, algorithm 1)."""
        self._window = None
        part = self.values[start:stop]
        part.add_(change).clamp_(min=0)

    def fingerprint(self) -> str:
        """Return the sha256 of the master's bytes."""
        return sha256(tensor_bytes(self.values)).hexdigest()

    def reset(self) -> None:
        """Set the master to where training starts: the scales of the file."""
        self._window = None
        if self.coordinates != "absolute":
            self.values.fill_(1.0)
            return
        for start, stored in zip(self._bounds, self._file_scales, strict=False):
            self.values[start : start + stored.numel()] = stored.float().reshape(-1)

    def restore(self, values: Float[Tensor, " size"]) -> None:
        """Set the master to stored values.

        Raises:
            CheckpointError: The number of values is not that of this model.
        """
        if values.shape != self.values.shape:
            raise CheckpointError(
                f"trained vector: expected {len(self)} values, got {values.numel()}; was it made "
                "from another base or with other coordinates?"
            )
        self._window = None
        self.values.copy_(values)

    def _shifted_values(
        self, layer: int, probes: Sequence[Probe]
    ) -> Float[Tensor, "probes length"]:
        """Return ``v + offset z`` of one layer, from a window of consecutive layers."""
        start, stop = self._bounds[layer], self._bounds[layer + 1]
        if self._window is None or not (
            self._window[0] == probes and self._window[1] <= start < stop <= self._window[2]
        ):
            first = start // WINDOW * WINDOW  # the same windows whatever the order of the layers
            last = min(max(first + WINDOW, stop), len(self))
            self._window = (probes, first, last, self._shift(probes, first, last))
        _, offset, _, shifted = self._window
        return shifted[:, start - offset : stop - offset]

    def _shift(
        self, probes: Sequence[Probe], start: int, stop: int
    ) -> Float[Tensor, "probes length"]:
        master = self.values[start:stop]
        moved = list({(p.seed, p.basis): p for p in probes if p.offset}.values())
        if not moved:
            return master.expand(len(probes), -1)
        z = self.draw(moved, start, stop)
        place = {(probe.seed, probe.basis): row for row, probe in enumerate(moved)}
        shifted = master.repeat(len(probes), 1)
        for row, probe in zip(shifted, probes, strict=True):
            if probe.offset:
                row.add_(z[place[probe.seed, probe.basis]] * probe.offset)
        return shifted


def _check_factors(names: Sequence[str], crossing: Sequence[bool], coordinates: str) -> None:
    if coordinates not in BY_FACTORS:
        return
    for name, blocks_cross_rows in zip(names, crossing, strict=True):
        if blocks_cross_rows:
            raise ConfigError("zo." + crossing_message(coordinates, name))
