"""The trained vector: an fp32 master, and the effective scales that it gives at a probe.

Coordinates say how the trained vector ``v`` becomes the effective scales of a layer with file
scales ``D`` (Delta in the QZO paper):

- ``absolute``: ``v`` (starts at ``D``; the QZO paper),
- ``relative``: ``D * v`` (starts at 1, one element per scale),
- ``row``: ``D * v[:, None]`` (starts at 1, one element per output row).

A probe evaluates at ``v + offset * z(seed)``. That sum is made for the layer at hand and thrown
away: the master is never perturbed, so nothing has to be restored.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from qzo.checkpoint import Checkpoint
from qzo.directions import DirectionName, combine, directions
from qzo.errors import CheckpointError, ConfigError
from qzo.linear import EffectiveScales, Live, ProbeScales, QuantLinear, RowMultipliers
from qzo.probes import DirectionalDerivative, Probe
from qzo.tensor_files import tensor_bytes

Coordinates = Literal["absolute", "relative", "row"]

# Elements of a direction, and of a shifted vector per probe, that exist at one time; more where one
# layer has more. Small parts would cost more in calls than in numbers.
WINDOW = 2**18


class Scales:
    """The trained vector of one model.

    Args:
        names: The quantized layers, in the order of the vector.
        file_scales: Their scales as stored, ``(out, groups)`` each; kept, not copied.
        coordinates: How the vector becomes effective scales.
        direction: Distribution of the directions.

    Attributes:
        values: The fp32 master.
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
        direction: DirectionName,
    ) -> None:
        self.names = list(names)
        self.coordinates = coordinates
        self.direction: DirectionName = direction
        self._file_scales = list(file_scales)
        sizes = [len(s) if coordinates == "row" else s.numel() for s in file_scales]
        self._bounds = [0, *accumulate(sizes)]
        device = file_scales[0].device
        self.values = torch.empty(self._bounds[-1], dtype=torch.float32, device=device)
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
        direction: DirectionName,
    ) -> "Scales":
        """Read the scales of some layers of a checkpoint, without a model."""
        weights = [checkpoint.weight(layer) for layer in names]
        _check_rows(names, [w.blocks_cross_rows for w in weights], coordinates)
        return cls(
            names,
            [weight.scales for weight in weights],
            coordinates=coordinates,
            direction=direction,
        )

    @classmethod
    def of_layers(
        cls,
        layers: Sequence[QuantLinear],
        *,
        coordinates: Coordinates,
        direction: DirectionName,
    ) -> "Scales":
        """Take over the scales of a model's layers and number the layers."""
        names = [layer.name for layer in layers]
        weights = [layer.quantized for layer in layers]
        _check_rows(names, [w.blocks_cross_rows for w in weights], coordinates)
        for index, layer in enumerate(layers):
            layer.index = index
        return cls(
            names,
            [weight.scales for weight in weights],
            coordinates=coordinates,
            direction=direction,
        )

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
            z = self.direction_parts([probe.seed for probe in probes], start, stop)
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
        if self.coordinates == "row":
            return RowMultipliers(shifted)
        stored = self._file_scales[layer].float()
        by_group = [values.view(stored.shape) for values in shifted.unbind()]
        if self.coordinates == "relative":
            by_group = [stored * values for values in by_group]
        return ProbeScales(by_group)

    def tuned(self, layer: int) -> Float[Tensor, "out groups"]:
        """Return the effective scales of one layer at the master, in fp32."""
        stored = self._file_scales[layer].float()
        values = self.values[self._bounds[layer] : self._bounds[layer + 1]]
        if self.coordinates == "row":
            return stored * values[:, None]
        by_group = values.view(stored.shape)
        return stored * by_group if self.coordinates == "relative" else by_group.clone()

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yield the bounds of consecutive parts of the vector."""
        for start in range(0, len(self), WINDOW):
            yield start, min(start + WINDOW, len(self))

    def parts(self, layers: Sequence[int]) -> list[tuple[int, int]]:
        """Return the bounds of the values of some layers."""
        return [(self._bounds[layer], self._bounds[layer + 1]) for layer in layers]

    def direction_parts(
        self, seeds: Sequence[int], start: int, stop: int
    ) -> Float[Tensor, "seeds length"]:
        """Return elements of the direction of each seed; 0 where the vector is held still."""
        z = directions(self.direction, seeds, start, stop, self.values.device)
        self._hold(z, start, stop)
        return z

    def _hold(self, along: Float[Tensor, "*seeds length"], start: int, stop: int) -> None:
        """Set elements of directions to 0 where the vector is held still."""
        for first, last in self.still:
            along[..., max(first - start, 0) : max(min(last, stop) - start, 0)] = 0

    def mean_slope(
        self, derivatives: Sequence[DirectionalDerivative], start: int, stop: int
    ) -> Float[Tensor, " length"]:
        """Return elements of the gradient estimate ``mean_i d_i z_i`` (QZO, eq. 4)."""
        seeds = [derivative.seed for derivative in derivatives]
        weights = [derivative.value / len(derivatives) for derivative in derivatives]
        slope = combine(self.direction, seeds, weights, start, stop, self.values.device)
        self._hold(slope, start, stop)
        return slope

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
        seeds = list(dict.fromkeys(probe.seed for probe in probes if probe.offset))
        if not seeds:
            return master.expand(len(probes), -1)
        z = self.direction_parts(seeds, start, stop)
        place = {seed: row for row, seed in enumerate(seeds)}
        shifted = master.repeat(len(probes), 1)
        for row, probe in zip(shifted, probes, strict=True):
            if probe.offset:
                row.add_(z[place[probe.seed]] * probe.offset)
        return shifted


def _check_rows(names: Sequence[str], crossing: Sequence[bool], coordinates: str) -> None:
    if coordinates != "row":
        return
    for name, blocks_cross_rows in zip(names, crossing, strict=True):
        if blocks_cross_rows:
            raise ConfigError(
                f"zo.coordinates: expected 'absolute' or 'relative', got 'row': blocks of {name} "
                "cross its rows, so a factor per row cannot be written back exactly"
            )
