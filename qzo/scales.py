"""The trained vector: an fp32 master, and the effective scales that it gives at a probe.

``coordinates`` says how the trained vector ``v`` becomes the effective scales of a layer.

A probe evaluates at ``v + offset * z(seed)``. That sum is made for the layer at hand and thrown
away: the master is never perturbed, so nothing has to be restored.

Behind the values of the layers lie the sections of what else is trained (``sections``).
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
from qzo.sections import Section
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
        sections: What else is trained.
        device: Where the master lies if no layer says so.

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
        sections: Sequence[Section] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.names = list(names)
        self.sections = tuple(sections)
        self.coordinates = coordinates
        self.direction: LawName = direction
        self._file_scales = list(file_scales)
        sizes = [num_values(coordinates, *stored.shape) for stored in file_scales]
        self._bounds = [0, *accumulate([*sizes, *(section.size for section in sections)])]
        self.law = Law(direction, direction_settings, self._parts(), file_scales)
        device = file_scales[0].device if file_scales else device
        self.values = torch.empty(self._bounds[-1], dtype=torch.float32, device=device)
        self.stretch: Float[Tensor, " size"] | None = None
        self.update_stretch: Float[Tensor, " size"] | None = None
        self.optimizer_stretch: Float[Tensor, " size"] | None = None
        self.tilt: Tilt | None = None
        self.still: Sequence[tuple[int, int]] = ()
        # One of the layers and one of the sections: a forward pass goes through both side by side.
        self._windows: dict[bool, tuple[Sequence[Probe], int, int, Tensor]] = {}
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
        sections: Sequence[Section] = (),
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
            sections=sections,
        )

    @classmethod
    def of_layers(
        cls,
        layers: Sequence[QuantLinear],
        *,
        coordinates: Coordinates,
        direction: LawName,
        direction_settings: DirectionSettings = PLAIN,
        sections: Sequence[Section] = (),
        device: torch.device | str = "cpu",
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
            sections=sections,
            device=device,
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
        for i, section in enumerate(self.sections, start=len(parts)):
            parts.append(Part(section.name, self._bounds[i], self._bounds[i + 1], None))
        return parts

    def __len__(self) -> int:
        """Return the number of trained values."""
        return self._bounds[-1]

    @contextmanager
    def shifted(self, live: Live, probes: Sequence[Probe]) -> Iterator[None]:
        """Let the layers see the scales at the probes while the block runs."""
        live.effective = lambda layer: self.effective(layer, probes)
        live.sections = lambda number: self.section(number, probes)
        self._windows.clear()
        try:
            yield
        finally:
            live.effective = live.sections = None
            self._windows.clear()

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

    def section(self, number: int, probes: Sequence[Probe]) -> Float[Tensor, "probes ..."]:
        """Return the values of one section at every probe, times their unit."""
        section = self.sections[number]
        values = self._shifted_values(len(self.names) + number, probes)
        shaped = values.view(len(probes), *section.shape)
        return shaped if section.unit == 1 else shaped * section.unit

    def tuned_section(self, number: int) -> Float[Tensor, "..."]:
        """Return the values of one section at the master."""
        start, stop = self._bounds[len(self.names) + number :][:2]
        return self.values[start:stop].view(self.sections[number].shape)

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
        """Return elements of one direction per key, before they are stretched."""
        z = self.law.draw(keys, start, stop, self.values.device)
        if self.tilt is not None:
            z = z * self.tilt.across + self.tilt.axis[start:stop] * self.tilt.along
        for first, last in self.still:
            z[:, max(first - start, 0) : max(min(last, stop) - start, 0)] = 0
        return self._by_section(z, start, stop)

    def stretched_for_step(
        self, slope: Float[Tensor, " length"], start: int, stop: int
    ) -> Float[Tensor, " length"]:
        """Multiply a part of a step by its stretch; that of the optimizer is not in it."""
        factor = self.stretch if self.update_stretch is None else self.update_stretch
        return slope if factor is None else slope * factor[start:stop]

    def by_layer(self, numbers: Sequence[float]) -> Float[Tensor, " size"]:
        """Return a vector that has one number on every layer, and 1 elsewhere."""
        result = torch.ones_like(self.values)
        for number, (start, stop) in zip(numbers, pairwise(self._bounds), strict=False):
            result[start:stop] = number
        return result

    def _by_section(
        self, z: Float[Tensor, "keys length"], start: int, stop: int
    ) -> Float[Tensor, "keys length"]:
        """Multiply what lies in the sections by their factors; ``z`` is modified."""
        for number, section in enumerate(self.sections):
            first, last = self._bounds[len(self.names) + number :][:2]
            if section.factor != 1 and first < stop and start < last:
                z[:, max(first - start, 0) : last - start] *= section.factor
        return z

    def move(self, start: int, stop: int, change: Float[Tensor, " length"]) -> None:
        """Add to a part of the master; no value of a layer goes below 0 (QZO, algorithm 1)."""
        self._windows.clear()
        part = self.values[start:stop]
        part.add_(change)
        part[: max(self._bounds[len(self.names)] - start, 0)].clamp_(min=0)

    def fingerprint(self) -> str:
        """Return the sha256 of the master's bytes."""
        return sha256(tensor_bytes(self.values)).hexdigest()

    def reset(self) -> None:
        """Set the master to where training starts: the scales of the file."""
        self._windows.clear()
        for number, section in enumerate(self.sections):
            self.tuned_section(number).copy_(section.start())
        if self.coordinates != "absolute":
            self.values[: self._bounds[len(self.names)]] = 1.0
            return
        for start, stored in zip(self._bounds, self._file_scales, strict=False):
            self.values[start : start + stored.numel()] = stored.float().reshape(-1)

    def take_sections(self, sections: Sequence[Section]) -> None:
        """Take over the sections of a journal: their starts may come from another computer.

        Raises:
            CheckpointError: They are others.
        """
        if [(s.name, s.shape) for s in sections] != [(s.name, s.shape) for s in self.sections]:
            raise CheckpointError(
                "journal: expected the sections of this recipe and model, got others; the journal "
                "was changed, or the model is another one"
            )
        self.sections = tuple(sections)

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
        self._windows.clear()
        self.values.copy_(values)

    def _shifted_values(
        self, layer: int, probes: Sequence[Probe]
    ) -> Float[Tensor, "probes length"]:
        """Return ``v + offset z`` of one layer or section, from a window of consecutive ones."""
        start, stop = self._bounds[layer], self._bounds[layer + 1]
        kind = layer >= len(self.names)
        window = self._windows.get(kind)
        if window is None or not (window[0] == probes and window[1] <= start < stop <= window[2]):
            first = start // WINDOW * WINDOW  # the same windows whatever the order of the layers
            last = min(max(first + WINDOW, stop), len(self))
            window = (probes, first, last, self._shift(probes, first, last))
            self._windows[kind] = window
        _, offset, _, shifted = window
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
