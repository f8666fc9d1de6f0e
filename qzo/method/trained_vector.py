"""The trained vector: an fp32 master, and the effective scales that it gives at a probe.

``coordinates`` says how the trained vector ``v`` becomes the effective scales of a layer: see
``effective``.

A probe evaluates at ``v + offset * z(seed)``. That sum is made for the layer at hand and thrown
away: the master is never perturbed, so nothing has to be restored.

Behind the values of the layers lie the sections of what else is trained (``extra.section``).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import accumulate, pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd import forward_ad

from qzo.checkpoint.checkpoint import Checkpoint
from qzo.checkpoint.tensors import tensor_bytes
from qzo.errors import CheckpointError, ConfigError
from qzo.method.coordinates import BY_FACTORS, Coordinates, crossing_message, num_values
from qzo.method.directions.distribution import Law, Part
from qzo.method.directions.settings import DirectionSettings, LawName
from qzo.method.directions.shaping import ShapedDirections
from qzo.method.effective import effective_scales, tuned_scales
from qzo.method.exact_sums import norm
from qzo.method.extra.section import UNQUANTIZED, Kind, Section
from qzo.method.probes import Probe
from qzo.model.linear import EffectiveScales, Live, QuantLinear

# Elements of a direction, and of a shifted vector per probe, that exist at one time; more where one
# layer has more. Windows are made of whole layers, so that nothing is drawn twice in a forward.
# Small parts would cost more in calls than in numbers.
WINDOW = 2**18

PLAIN = DirectionSettings()


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
        directions: Along which probes and steps move it.

    Raises:
        ConfigError: The law cannot be drawn for this vector.
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
        self._file_scales = list(file_scales)
        sizes = [num_values(coordinates, *stored.shape) for stored in file_scales]
        self._bounds = [0, *accumulate([*sizes, *(section.size for section in sections)])]
        device = file_scales[0].device if file_scales else device
        self.values = torch.empty(self._bounds[-1], dtype=torch.float32, device=device)
        law = Law(direction, direction_settings, self._parts(), file_scales)
        self.directions = ShapedDirections(law, self.values.device)
        self.directions.factors = self._section_factors()
        count = len(self.names)
        self._window_of = _windows_of(self._bounds[: count + 1]) + _windows_of(self._bounds[count:])
        # One of the layers and one of the sections: a forward pass goes through both side by side.
        self._windows: dict[bool, tuple[Sequence[Probe], int, int, Tensor]] = {}
        self.reset()
        self._is_negative = self._negative_in_file()

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

    def _negative_in_file(self) -> Bool[Tensor, " length"] | None:
        """Return which values of layers are negative scales of the file; None: there is none."""
        if self.coordinates != "absolute":
            return None  # the others are multipliers
        is_negative = self.values[: self._bounds[len(self.names)]] < 0
        return is_negative if is_negative.any() else None

    def _section_factors(self) -> list[tuple[int, int, float]]:
        bounds = pairwise(self._bounds[len(self.names) :])
        return [
            (*ends, section.factor) for ends, section in zip(bounds, self.sections, strict=True)
        ]

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

        What a model computes in the block, inside ``autograd.tangents``, carries its exact
        slopes along the directions.
        """

        def dual(layer: int) -> Float[Tensor, "probes length"]:
            start, stop = self._bounds[layer], self._bounds[layer + 1]
            z = self.directions.draw(probes, start, stop)
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

    def _effective(self, layer: int, values: Float[Tensor, "probes length"]) -> EffectiveScales:
        return effective_scales(self.coordinates, self._file_scales[layer], values)

    def tuned(self, layer: int) -> Float[Tensor, "out groups"]:
        """Return the effective scales of one layer at the master, in fp32."""
        values = self.values[self._bounds[layer] : self._bounds[layer + 1]]
        return tuned_scales(self.coordinates, self._file_scales[layer], values)

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

    def unquantized(self, stored: Callable[[Section], Tensor]) -> dict[str, Tensor]:
        """Return the unquantized tensors that are trained, by key, as files would hold them.

        Args:
            stored: Gives the tensor of the base that a section changes.
        """
        return {
            section.name: section.tuned(stored(section), self.tuned_section(number).cpu())
            for number, section in enumerate(self.sections)
            if section.kind in UNQUANTIZED
        }

    @property
    def instead_of_scales(self) -> str:
        """What is trained instead of the scales, in words; empty if they are."""
        kinds = {section.kind for section in self.sections}
        trained: dict[Kind, str] = {"lora_A": "LoRA factors", "prefix_key": "a prefix"}
        return next((words for kind, words in trained.items() if kind in kinds), "")

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yield the bounds of consecutive parts of the vector."""
        for start in range(0, len(self), WINDOW):
            yield start, min(start + WINDOW, len(self))

    def parts(self, layers: Sequence[int]) -> list[tuple[int, int]]:
        """Return the bounds of the values of some layers."""
        return [(self._bounds[layer], self._bounds[layer + 1]) for layer in layers]

    def by_layer(
        self, numbers: Sequence[float], on_sections: float = 1.0
    ) -> Float[Tensor, " size"]:
        """Return a vector that has one number on every layer, and another one on all sections."""
        result = torch.full_like(self.values, on_sections)
        for number, (start, stop) in zip(numbers, pairwise(self._bounds), strict=False):
            result[start:stop] = number
        return result

    def move(self, start: int, stop: int, change: Float[Tensor, " length"]) -> None:
        """Add to a part of the master; no value of a layer crosses 0.

        QZO, algorithm 1, keeps scales at 0 or above; those that are negative in the file (as in
        checkpoints made from GGUF) stay at 0 or below.
        """
        self._windows.clear()
        part = self.values[start:stop]
        part.add_(change)
        part = part[: max(self._bounds[len(self.names)] - start, 0)]
        if self._is_negative is None:
            part.clamp_(min=0)
            return
        is_negative = self._is_negative[start:stop]
        part.copy_(torch.where(is_negative, part.clamp(max=0), part.clamp(min=0)))

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
        self.directions.factors = self._section_factors()

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
            first, last = self._window_of[layer]
            shifted = self.directions.shifted(self.values[first:last], probes, first, last)
            window = (probes, first, last, shifted)
            self._windows[kind] = window
        _, offset, _, shifted = window
        return shifted[:, start - offset : stop - offset]


def _windows_of(bounds: Sequence[int]) -> list[tuple[int, int]]:
    """Return the window of each layer: as many whole layers as ``WINDOW`` holds, or just one."""
    starts: list[int] = []
    for first, stop in pairwise(bounds):
        starts.append(starts[-1] if starts and stop - starts[-1] <= WINDOW else first)
    ends = dict(zip(starts, bounds[1:], strict=True))  # of a window: that of its last layer
    return [(start, ends[start]) for start in starts]


def _check_factors(names: Sequence[str], crossing: Sequence[bool], coordinates: str) -> None:
    if coordinates not in BY_FACTORS:
        return
    for name, blocks_cross_rows in zip(names, crossing, strict=True):
        if blocks_cross_rows:
            raise ConfigError("zo." + crossing_message(coordinates, name))
