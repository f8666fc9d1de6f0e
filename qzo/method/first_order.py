"""The part of the trained vector that exact gradients move: the last decoder blocks.

An importance-split hybrid: the layers of the last k blocks take first-order steps, all others
zeroth-order ones, both from the same point and batch. With all blocks it is first-order training.
k is given, or found from the importance of the blocks: with ``g`` the exact gradient and ``v`` the
trained values of a block, ``importance = mean over batches of sum |g v|`` (first-order Taylor
criterion: Molchanov et al., arXiv 1906.10771, section 3); k is the smallest number of last blocks
that have a given share of it.

Steps of the part, as torch.optim makes them, on ``g``:

- ``sgd``: ``u = g``.
- ``adam``: ``u`` as in ``moments``;

then ``v <- max(v - learning_rate * u, 0)``. Adam: arXiv 1412.6980, algorithm 1.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from qzo.errors import CheckpointError, QZOError
from qzo.method.optimizers.moments import Moments
from qzo.method.trained_vector import Scales

# What a replay and a resume read of a header.
_HEADER_TYPES: dict[str, type] = {
    **{"layers": list, "num_blocks": int, "num_values": int},
    **{"optimizer": str, "optimizer_settings": dict},
}
_SETTINGS: dict[str, tuple[str, ...]] = {
    "adam": ("adam_beta1", "adam_beta2", "adam_epsilon"),
    "sgd": (),
}


class FirstOrder:
    """What exact gradients move, and what the rule remembers.

    Directions leave this part of the vector alone from then on.

    Args:
        scales: Holds the trained vector.
        names: The layers of the part.
        optimizer: ``adam`` or ``sgd``.
        settings: ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` for ``adam``.

    Attributes:
        layers: Their places in the vector.
        size: Number of values.

    Raises:
        CheckpointError: A layer is not trained, or there is no such optimizer or setting.
    """

    def __init__(
        self,
        scales: Scales,
        names: Sequence[str],
        optimizer: str,
        settings: Mapping[str, Any],
    ) -> None:
        if optimizer not in _SETTINGS:
            raise CheckpointError(f"first_order: expected 'adam' or 'sgd', got {optimizer!r}")
        names_of = list(_SETTINGS[optimizer])
        is_valid = all(isinstance(v, float) and 0 <= v < 1 for v in settings.values())
        if sorted(settings) != names_of or not is_valid:
            raise CheckpointError(
                f"first_order: expected {names_of} from 0 to below 1 for {optimizer!r}, got "
                f"{settings!r}"
            )
        missing = [name for name in names if name not in scales.names]
        if missing or not names:
            raise CheckpointError(f"first_order: expected trained layers, got {missing or 'none'}")
        chosen = set(names)
        self.optimizer, self.settings = optimizer, dict(settings)
        self.layers = [place for place, name in enumerate(scales.names) if name in chosen]
        self._parts = scales.parts(self.layers)
        self.size = sum(stop - start for start, stop in self._parts)
        self._moments: Moments | None = None
        if optimizer == "adam":
            self._moments = Moments(*(settings[name] for name in _SETTINGS["adam"]))
        scales.directions.still = self._parts

    def step(self, scales: Scales, gradient: Float[Tensor, " size"], learning_rate: float) -> None:
        """Move the part against its gradient."""
        change = self._direction(gradient) * -learning_rate
        lengths = [stop - start for start, stop in self._parts]
        for (start, stop), part in zip(self._parts, change.split(lengths), strict=True):
            scales.move(start, stop, part)

    def state(self) -> dict[str, Tensor]:
        """Return what the rule remembers, for a snapshot."""
        return {} if self._moments is None else self._moments.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned; nothing: start again."""
        if self._moments is not None:
            self._moments.restore(state)

    def _direction(self, gradient: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
        if self._moments is None:
            return gradient
        self._moments.begin_step(self.size, gradient.device)
        return self._moments.direction(gradient, 0, self.size)


def first_order_of(header: Mapping[str, Any], scales: Scales) -> FirstOrder | None:
    """Return the first-order part of a journal, as it starts; None where there is none.

    Raises:
        CheckpointError: The header is damaged.
    """
    part = header.get("first_order")
    if part is None:
        return None
    for key, kind in _HEADER_TYPES.items():
        value = part.get(key) if isinstance(part, dict) else None
        if not isinstance(value, kind):
            raise CheckpointError(
                f"journal: first_order: expected {key} of type {kind.__name__}, got {value!r}"
            )
    made = FirstOrder(scales, part["layers"], part["optimizer"], part["optimizer_settings"])
    if made.size != part["num_values"]:
        raise CheckpointError(
            f"journal: first_order: expected {made.size} values of its layers, got "
            f"{part['num_values']}"
        )
    return made


def block_importance(
    values: Float[Tensor, " size"],
    gradients: Iterable[Float[Tensor, " size"]],
    parts: Sequence[tuple[int, int]],
    blocks: Sequence[int],
) -> list[float]:
    """Return the importance of every decoder block.

    Args:
        values: The trained vector.
        gradients: One per batch.
        parts: Bounds of the values of every layer.
        blocks: The block of every layer, counted from 0.

    Raises:
        QZOError: It is not finite.
    """
    totals, count = [0.0] * (max(blocks) + 1), 0
    for gradient in gradients:
        products, count = (gradient * values).abs(), count + 1
        for (start, stop), block in zip(parts, blocks, strict=True):
            totals[block] += float(products[start:stop].double().sum())
    importance = [total / count for total in totals]
    if not all(map(math.isfinite, importance)) or not any(importance):
        raise QZOError(
            "zo.first_order_layers: expected finite gradients to profile the blocks by, got "
            f"importances {importance}; name zo.first_order_blocks instead"
        )
    return importance


def num_last_blocks(importance: Sequence[float], share: float) -> int:
    """Return the smallest number of last blocks whose importance reaches a share of the total."""
    total = math.fsum(importance)
    for count in range(1, len(importance)):
        if math.fsum(importance[-count:]) >= share * total:
            return count
    return len(importance)
