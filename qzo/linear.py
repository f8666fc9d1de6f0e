"""A linear layer over 4-bit codes whose scales are arguments of the product.

In a stacked forward the batch is repeated once per probe. The layer reads its codes once and
applies each probe's scales to that probe's rows; nothing else in the model knows about probes.
Padding is dropped before the product and put back as zeros after it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from quantizers.weight import QuantizedWeight
from qzo.errors import CheckpointError

TILE_ELEMENTS = 4 * 2**20  # of the dense matrix that exist at one time
_TILE_STEP = 32  # rows; packed formats hold up to 32 elements in a run of words


@dataclass(frozen=True)
class ProbeScales:
    """Effective scales of one layer: one set per probe."""

    scales: Sequence[Float[Tensor, "out groups"]]

    @property
    def num_probes(self) -> int:
        """Probes that the scales are for."""
        return len(self.scales)


@dataclass(frozen=True)
class RowMultipliers:
    """Effective scales of one layer in row coordinates: common scales, then a factor per output."""

    scales: Float[Tensor, "out groups"]
    multipliers: Float[Tensor, "probes out"]

    @property
    def num_probes(self) -> int:
        """Probes that the multipliers are for."""
        return len(self.multipliers)


EffectiveScales = ProbeScales | RowMultipliers


@dataclass(frozen=True)
class Rows:
    """What the rows of a stacked forward are.

    Attributes:
        bounds: Rows of probe ``p`` are ``bounds[p]`` to ``bounds[p + 1]``.
        lengths: Tokens of each row; what follows in a row is padding.
    """

    bounds: Sequence[int]
    lengths: Sequence[int]

    def token_index(self, width: int, device: torch.device) -> Int[Tensor, " tokens"]:
        """Return the flat positions of the tokens in a ``(rows, width)`` batch."""
        lengths = torch.tensor(self.lengths, device=device)
        is_token = torch.arange(width, device=device)[None, :] < lengths[:, None]
        return is_token.view(-1).nonzero().view(-1)

    def token_bounds(self) -> list[int]:
        """Return ``bounds`` counted in tokens."""
        return [sum(self.lengths[:bound]) for bound in self.bounds]


@dataclass
class Live:
    """What the layers of one model see at the moment; shared by all of them.

    Attributes:
        effective: Gives the effective scales of a layer by its index, or None: those of the file.
        rows: What the rows of the batch are, or None: one probe, no padding.
        fork: The decoder block where the rows are repeated once per probe; see ``stack``.
    """

    effective: Callable[[int], EffectiveScales] | None = None
    rows: Rows | None = None
    fork: nn.Module | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)
    _index: tuple[Rows, int, Tensor, list[int]] | None = None

    def buffer(self, name: str, count: int, device: torch.device) -> Float[Tensor, " n"]:
        """Return a scratch buffer that all layers share."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < count or buffer.device != device:
            with torch.inference_mode(False):
                buffer = torch.empty(count, dtype=torch.float32, device=device)
            self.buffers[name] = buffer
        return buffer

    def tokens(self, width: int, device: torch.device) -> tuple[Int[Tensor, " tokens"], list[int]]:
        """Return the flat positions of the tokens and their bounds per probe."""
        assert self.rows is not None
        if self._index is None or self._index[0] is not self.rows or self._index[1] != width:
            index = self.rows.token_index(width, device)
            self._index = (self.rows, width, index, self.rows.token_bounds())
        return self._index[2], self._index[3]


class QuantLinear(nn.Module):
    """``y = x W^T + bias`` with ``W`` quantized; takes the place of ``nn.Linear``.

    Args:
        name: The layer's name in the checkpoint.
        weight: Codes and the scales of the file.
        bias: Bias in the dtype of the model, or None.
        live: What the layers of this model see; shared.
    """

    bias: Tensor | None

    def __init__(
        self, name: str, weight: QuantizedWeight, bias: Float[Tensor, " out"] | None, live: Live
    ) -> None:
        super().__init__()
        self.name = name
        self.index = -1  # place in the trained vector, set when scales are attached
        self.quantized = weight
        self.live = live
        self.tuned: Tensor | None = None  # scales to compute with outside of training
        self.stored: dict[str, Tensor] = {}  # by key, where the codes were adopted from memory
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.register_buffer("bias", bias)

    def extra_repr(self) -> str:
        """Name the sizes in the printed model."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        device = fn(torch.empty(0, dtype=torch.uint8)).device  # dtypes of codes and scales stay
        self.quantized = self.quantized.to(device)
        self.tuned = None if self.tuned is None else self.tuned.to(device)
        return self

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the product; each probe's rows see that probe's scales."""
        rows, flat = self.live.rows, x.reshape(-1, self.in_features)
        effective = self._effective()
        if rows is None:
            return self._product(flat, [0, len(flat)], effective).view(*x.shape[:-1], -1)
        assert effective.num_probes in {1, len(rows.bounds) - 1}, self.name
        width = max(rows.lengths)
        if len(flat) == len(rows.lengths) * width:  # also where a model flattens its rows (OPT)
            index, bounds = self.live.tokens(width, x.device)
            if len(index) == len(flat):
                return self._product(flat, bounds, effective).view(*x.shape[:-1], -1)
            result = x.new_zeros(len(flat), self.out_features)
            result[index] = self._product(flat[index], bounds, effective)
        else:
            result = self._product(flat, self._loose_bounds(x, rows, effective), effective)
        return result.view(*x.shape[:-1], -1)

    def _loose_bounds(self, x: Tensor, rows: Rows, effective: EffectiveScales) -> Sequence[int]:
        """Return the bounds of the probes among inputs that are not all tokens of the rows.

        Raises:
            CheckpointError: Nothing says which input belongs to which probe.
        """
        if effective.num_probes == 1:
            return [0, x.numel() // self.in_features]
        if x.dim() > 2 and len(x) == len(rows.lengths):  # a head that sees answer positions only
            return [bound * x.shape[1] for bound in rows.bounds]
        raise CheckpointError(
            f"{self.name}: expected {len(rows.lengths)} rows of {max(rows.lengths)} tokens, got "
            f"shape {tuple(x.shape)}; a layer that sees only some tokens, as in a mixture of "
            "experts, cannot be trained"
        )

    def _effective(self) -> EffectiveScales:
        if self.live.effective is not None and self.index >= 0:
            return self.live.effective(self.index)
        is_training = self.live.effective is not None
        tuned = None if is_training else self.tuned
        return ProbeScales([(self.quantized.scales if tuned is None else tuned).float()])

    def _product(
        self, x: Float[Tensor, "tokens in"], bounds: Sequence[int], effective: EffectiveScales
    ) -> Float[Tensor, "tokens out"]:
        y = _cuda_product(self.quantized, x, bounds, effective) if x.is_cuda else None
        if y is None:
            y = x.new_empty(len(x), self.out_features)
            for rows in self._tiles():
                decoded = self.quantized.decode(rows, self._buffer("decoded", rows, x))
                self._tile_product(x, decoded, rows, bounds, effective, y)
        if isinstance(effective, RowMultipliers):
            multipliers = effective.multipliers.to(x.dtype)
            for p, (start, stop) in enumerate(pairwise(bounds)):
                y[start:stop] *= multipliers[p]
        return y if self.bias is None else y.add_(self.bias)

    def _tile_product(
        self,
        x: Float[Tensor, "tokens in"],
        decoded: Float[Tensor, "rows in"],
        rows: slice,
        bounds: Sequence[int],
        effective: EffectiveScales,
        y: Float[Tensor, "tokens out"],
    ) -> None:
        """Fill the columns ``rows`` of ``y``."""
        sets, bounds = _scale_sets(effective, bounds, len(x))
        name = "decoded" if len(sets) == 1 else "scaled"  # one set: scale in place
        for scales, start, stop in zip(sets, bounds, bounds[1:], strict=False):
            buffer = self._buffer(name, rows, x)
            dense = self.quantized.apply_scales(decoded, scales, rows, buffer)
            torch.mm(x[start:stop], dense.T.to(x.dtype), out=y[start:stop, rows])

    def _buffer(self, name: str, rows: slice, x: Tensor) -> Float[Tensor, " n"]:
        return self.live.buffer(name, (rows.stop - rows.start) * self.in_features, x.device)

    def _tiles(self) -> Iterator[slice]:
        step = max(TILE_ELEMENTS // self.in_features // _TILE_STEP, 1) * _TILE_STEP
        for start in range(0, self.out_features, step):
            yield slice(start, min(start + step, self.out_features))


def _scale_sets(
    effective: EffectiveScales, bounds: Sequence[int], num_tokens: int
) -> tuple[Sequence[Float[Tensor, "scale_rows groups"]], Sequence[int]]:
    """Return the sets of scales that a product needs, and the bounds of the tokens of each."""
    if isinstance(effective, RowMultipliers):
        return [effective.scales], [0, num_tokens]
    return effective.scales, bounds if len(effective.scales) > 1 else [0, num_tokens]


def _cuda_product(
    weight: QuantizedWeight,
    x: Float[Tensor, "tokens in"],
    bounds: Sequence[int],
    effective: EffectiveScales,
) -> Float[Tensor, "tokens out"] | None:
    """Return the product before row multipliers and bias, or None where no kernel fits."""
    from qzo.cuda_product import cuda_product  # here only: CPU runs need none of it

    sets, bounds = _scale_sets(effective, bounds, len(x))
    return cuda_product(weight, x, bounds, sets)
