"""A linear layer over 4-bit codes whose scales are arguments of the product.

In a stacked forward the tokens of all probes follow one another. The layer reads its codes once and
applies each probe's scales to that probe's tokens; nothing else in the model knows about probes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantizers.errors import FormatError
from quantizers.weight import QuantizedWeight
from qzo.checkpoint.stored_layer import StoredLayer
from qzo.errors import CheckpointError
from qzo.model.attention import PackedRows
from qzo.model.autograd import ScaledProduct, frozen_product, is_differentiated
from qzo.model.by_probe import RowFactors, multiplied, multiply
from qzo.model.kernels.current_device import on_device

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
class Multipliers:
    """Effective scales of one layer as those of the file times factors.

    With ``r`` of the output rows and ``c`` of the groups of inputs, ``y = r * ((c * x) W^T)``: one
    product with the matrix of the file serves every probe.

    Attributes:
        rows: A factor per probe and output row, or None: all 1.
        columns: A factor per probe and group of inputs, or None: all 1.
    """

    rows: Float[Tensor, "probes out"] | None = None
    columns: Float[Tensor, "probes groups"] | None = None

    @property
    def num_probes(self) -> int:
        """Probes that the multipliers are for."""
        factors = self.rows if self.rows is not None else self.columns
        return 0 if factors is None else len(factors)


EffectiveScales = ProbeScales | Multipliers


@runtime_checkable
class Master(Protocol):
    """What is trained at the moment, as it stands between two steps: ``Scales``."""

    @property
    def instead_of_scales(self) -> str:
        """What is trained instead of the scales, in words; empty if they are."""
        ...

    def tuned(self, layer: int) -> Float[Tensor, "out groups"]:
        """Return the effective scales of one layer."""
        ...

    def unquantized(self, stored: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """Return the unquantized tensors that are trained, by key, as files would hold them."""
        ...


@dataclass
class Live:
    """What the layers of one model see at the moment; shared by all of them.

    Attributes:
        effective: Gives the effective scales of a layer by its index, or None: those of the file.
        bounds: Tokens of probe ``p`` are ``bounds[p]`` to ``bounds[p + 1]``; None: one probe.
        attention: Which tokens see which, or None: the rows of the batch as they are.
        forked: The decoder blocks whose tokens are repeated once per probe; see ``stacked``.
        trained: Those of them that the recipe trains: all, or all but the last ones.
        sections: Gives what is trained besides scales by its place: a set of values per probe.
        trained_prefixes: Number of the section with the keys of an attention layer; that with its
            values follows.
        fixed_prefixes: Keys and values in front of the texts outside of training.
        hooks: Of modules that see ``sections`` or an adapter, by who put them there.
        master: What a trainer is training; None outside of training.
        replaced: Unquantized tensors that an adapter puts in the place of the model's, by key.
        unfoldable: What an adapter adds that no checkpoint can hold, in words; or empty.
    """

    effective: Callable[[int], EffectiveScales] | None = None
    bounds: Sequence[int] | None = None
    attention: PackedRows | None = None
    forked: Sequence[nn.Module] = ()
    trained: Sequence[nn.Module] = ()
    buffers: dict[str, Tensor] = field(default_factory=dict)
    sections: Callable[[int], Float[Tensor, "probes ..."]] | None = None
    trained_prefixes: dict[nn.Module, int] = field(default_factory=dict)
    fixed_prefixes: dict[nn.Module, Sequence[Tensor]] = field(default_factory=dict)
    hooks: dict[str, Sequence[RemovableHandle]] = field(default_factory=dict)
    master: Master | None = None
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    unfoldable: str = ""

    @property
    def has_prefixes(self) -> bool:
        """Tell whether an attention layer may see a prefix."""
        return bool(self.trained_prefixes or self.fixed_prefixes)

    def renew_hooks(self, owner: str, hooks: Sequence[RemovableHandle]) -> None:
        """Keep the hooks of an owner and remove those that it had before."""
        for hook in self.hooks.get(owner, ()):
            hook.remove()
        self.hooks[owner] = hooks

    def buffer(self, name: str, count: int, device: torch.device) -> Float[Tensor, " n"]:
        """Return a scratch buffer that all layers share."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < count or buffer.device != device:
            with torch.inference_mode(False):
                buffer = torch.empty(count, dtype=torch.float32, device=device)
            self.buffers[name] = buffer
        return buffer


class QuantLinear(nn.Module):
    """``y = x W^T + bias`` with ``W`` quantized; takes the place of ``nn.Linear``.

    Args:
        name: The layer's name in the checkpoint.
        weight: Codes and the scales of the file.
        bias: Bias in the dtype of the model, or None.
        live: What the layers of this model see; shared.
        stored: The tensors that it was made from, for ``state_dict``; without them it has none.
    """

    bias: Tensor | None

    def __init__(
        self,
        name: str,
        weight: QuantizedWeight,
        bias: Float[Tensor, " out"] | None,
        live: Live,
        stored: StoredLayer | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.index = -1  # place in the trained vector, set when scales are attached
        self.quantized = weight
        self.live = live
        self.tuned: Tensor | None = None  # scales to compute with outside of training
        self.stored = stored
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

    def standing_scales(self) -> Float[Tensor, "out groups"] | None:
        """Return the scales as training left them, or None: those of the file."""
        if self.live.master is None:
            return self.tuned
        return self.live.master.tuned(self.index) if self.index >= 0 else None

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Add codes and scales in the layout of the file; what training left as it is uncopied."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.stored is not None:
            tensors = self.stored.with_scales(self.standing_scales())
            destination |= {prefix + key: tensor for key, tensor in tensors.items()}

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take over scales; codes have to be those that the layer has."""
        own = (
            {}
            if self.stored is None
            else {key: prefix + key for key in self.stored.keys().values()}
        )
        found = {key: state_dict[name] for key, name in own.items() if name in state_dict}
        rest = {name: value for name, value in state_dict.items() if name not in own.values()}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.stored is None:
            return
        if not found:
            missing_keys += [prefix + self.stored.key(role) for role in self.stored.tensors]
            return
        try:
            weight = self.stored.read(found)
        except (CheckpointError, FormatError) as error:
            error_msgs.append(str(error))
            return
        device = self.quantized.scales.device
        self.tuned = None if weight is None else weight.scales.clone().to(device)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the product; each probe's tokens see that probe's scales."""
        flat = x.reshape(-1, self.in_features)
        y = self._product(flat).view(*x.shape[:-1], -1)
        return y if self.bias is None else y.add_(self.bias)

    def _product(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        effective = self._effective()
        num_probes = 1 if effective is None else effective.num_probes
        bounds = token_bounds(self.name, self.live, len(x), num_probes)
        is_exact = is_differentiated(x, *_trained(effective))
        if x.is_cuda and not is_exact and num_probes == 1 and isinstance(effective, Multipliers):
            effective = self._folded(effective)
        if isinstance(effective, Multipliers) and effective.columns is not None:
            columns = effective.columns[:, self.quantized.input_groups]
            x = multiplied(x, columns, bounds) if is_exact else multiply(x.clone(), columns, bounds)
        if is_exact:
            return self._exact_product(x, effective, bounds)
        return self._values(x, effective, bounds)

    def _folded(self, multipliers: Multipliers) -> ProbeScales:
        """Return the scales of one probe, as an export computes them."""
        scales = self.quantized.scales.float()
        if multipliers.rows is not None:
            scales = scales * multipliers.rows.T
        return ProbeScales(
            [scales if multipliers.columns is None else scales * multipliers.columns]
        )

    def _exact_product(
        self,
        x: Float[Tensor, "tokens in"],
        effective: EffectiveScales | None,
        bounds: Sequence[int],
    ) -> Float[Tensor, "tokens out"]:
        """Return the same product, to be differentiated."""
        if isinstance(effective, ProbeScales):
            product = ScaledProduct(
                lambda x: self._values(x, effective, bounds),
                self.quantized,
                list(self._tiles()),
                bounds,
                self._buffer,
            )
            return product(x, effective.scales)
        y = frozen_product(x, lambda x: self._values(x, None, (0, len(x))), self._dense_tiles)
        if effective is None or effective.rows is None:
            return y
        return multiplied(y, effective.rows, bounds)

    def _dense_tiles(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the matrix of the file, some rows at a time, in a buffer near ``x``."""
        if x.is_cuda:
            from qzo.model.kernels.product import (
                cuda_dense_tiles,  # here only: CPU runs need none of it
            )

            tiles = cuda_dense_tiles(self.quantized, x.dtype)
            if tiles is not None:
                yield from tiles
                return
        for rows in self._tiles():
            yield rows, self.quantized.dequantize(rows, self._buffer("decoded", rows, x))

    def _values(
        self,
        x: Float[Tensor, "tokens in"],
        effective: EffectiveScales | None,
        bounds: Sequence[int],
    ) -> Float[Tensor, "tokens out"]:
        if x.is_cuda:
            with on_device(x.device):
                y = self._kernel_product(x, effective, bounds)
            if y is not None:
                return y
        y = x.new_empty(len(x), self.out_features)
        for rows in self._tiles():
            if isinstance(effective, ProbeScales):
                self._scaled_product(x, rows, bounds, effective.scales, y)
                continue
            if effective is None or effective.rows is None:
                self._file_product(x, rows, y[:, rows])
                continue
            part = y[:, rows]
            dtype = torch.promote_types(part.dtype, torch.float32)  # rounded once, at the end
            wide = part if part.dtype == dtype else part.new_empty(part.shape, dtype=dtype)
            self._file_product(x, rows, wide)
            multiply(wide, effective.rows[:, rows], bounds)
            if wide is not part:
                part.copy_(wide)
        return y

    def _kernel_product(
        self,
        x: Float[Tensor, "tokens in"],
        effective: EffectiveScales | None,
        bounds: Sequence[int],
    ) -> Float[Tensor, "tokens out"] | None:
        """Return the product by a kernel for CUDA, or None where none fits the layer."""
        from qzo.model.kernels.product import cuda_product  # here only: CPU runs need none of it

        if isinstance(effective, ProbeScales):
            return cuda_product(self.quantized, x, bounds, effective.scales)
        rows = None
        if effective is not None and effective.rows is not None:
            rows = RowFactors(effective.rows, bounds)
        return cuda_product(self.quantized, x, (0, len(x)), [self.quantized.scales], rows)

    def _effective(self) -> EffectiveScales | None:
        """Return what to compute with, or None for the scales of the file."""
        if self.live.effective is not None:
            return self.live.effective(self.index) if self.index >= 0 else None
        return None if self.tuned is None else ProbeScales([self.tuned.float()])

    def _file_product(
        self, x: Float[Tensor, "tokens in"], rows: slice, y: Float[Tensor, "tokens rows"]
    ) -> None:
        """Fill ``y``, in the dtype of ``x`` or wider, with the scales of the file."""
        dense = self.quantized.dequantize(rows, self._buffer("decoded", rows, x))
        _matmul(x, dense, y)

    def _scaled_product(
        self,
        x: Float[Tensor, "tokens in"],
        rows: slice,
        bounds: Sequence[int],
        scales: Sequence[Float[Tensor, "scale_rows groups"]],
        y: Float[Tensor, "tokens out"],
    ) -> None:
        """Fill the columns ``rows`` of ``y``: decode once, then scales and product per probe."""
        decoded = self.quantized.decode(rows, self._buffer("decoded", rows, x))
        buffer = None if len(scales) == 1 else self._buffer("scaled", rows, x)
        for of_probe, (start, stop) in zip(scales, pairwise(bounds), strict=True):
            dense = self.quantized.apply_scales(decoded, of_probe, rows, buffer)
            _matmul(x[start:stop], dense, y[start:stop, rows])

    def _buffer(self, name: str, rows: slice, x: Tensor) -> Float[Tensor, " n"]:
        return self.live.buffer(name, (rows.stop - rows.start) * self.in_features, x.device)

    def _tiles(self) -> Iterator[slice]:
        step = max(TILE_ELEMENTS // self.in_features // _TILE_STEP, 1) * _TILE_STEP
        for start in range(0, self.out_features, step):
            yield slice(start, min(start + step, self.out_features))


def _matmul(
    x: Float[Tensor, "tokens in"], dense: Float[Tensor, "rows in"], y: Float[Tensor, "tokens rows"]
) -> None:
    """Write ``x dense^T`` to ``y``: weights in the dtype of ``x``, sums in fp32, rounded to ``y``.

    On a CPU, 16-bit numbers are multiplied as fp32: many times faster, and with the sums of a GPU.
    """
    weights = dense.T.to(x.dtype)
    if x.dtype.itemsize > 2 or (x.is_cuda and y.dtype == x.dtype):
        torch.mm(x, weights, out=y)
    elif x.is_cuda:
        torch.mm(x, weights, out_dtype=y.dtype, out=y)
    else:
        y.copy_(x.float() @ weights.float())


def _trained(effective: EffectiveScales | None) -> Sequence[Tensor]:
    """Return the tensors that the effective scales consist of."""
    if effective is None:
        return ()
    if isinstance(effective, ProbeScales):
        return effective.scales
    return [factors for factors in (effective.rows, effective.columns) if factors is not None]


def token_bounds(name: str, live: Live, num_tokens: int, num_probes: int) -> Sequence[int]:
    """Return where each probe begins among the tokens that a module sees, and the end.

    Raises:
        CheckpointError: Nothing says which token belongs to which probe.
    """
    if num_probes == 1:
        return (0, num_tokens)
    bounds = live.bounds
    if bounds is None or len(bounds) != num_probes + 1 or bounds[-1] != num_tokens:
        expected = "one probe" if bounds is None else f"{bounds[-1]} tokens"
        raise CheckpointError(
            f"{name}: expected {expected} of {num_probes} probes, got {num_tokens}; a "
            "layer that sees only some tokens, as in a mixture of experts, cannot be trained"
        )
    return bounds
