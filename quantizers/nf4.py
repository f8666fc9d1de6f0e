"""bitsandbytes NF4 and FP4 checkpoints, as transformers writes them.

Stored tensors of a layer: ``weight`` (out * in / 2, 1) bytes in any dtype, two codes a byte with
the first in the high half, the matrix flattened row by row; ``weight.absmax`` (blocks,) fp32, one
for each block of the flattened matrix; ``weight.quant_map`` (16,) fp32;
``weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``), JSON in bytes; and ``bias``.
``W.flatten()[i] = quant_map[codes[i]] * absmax[i // blocksize]``.

Double quantization stores ``absmax`` as uint8: ``absmax[b] = nested_quant_map[u8[b]] *
nested_absmax[b // nested_blocksize] + nested_offset``. It is un-nested to fp32 when read, which is
exact, and written back un-nested, since nesting again would round.

Source: bitsandbytes 95f9af3, ``bitsandbytes/functional.py`` (``QuantState.as_dict``).
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, TypeGuard

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from quantizers.errors import FormatError, ScaleRangeError

QUANT_METHOD = "bitsandbytes"
SCALE_ROLE = "absmax"
SCALE_ROLES = frozenset({"absmax", "nested_absmax", "nested_quant_map", "quant_state"})

_STATE_MARK = ".weight.quant_state.bitsandbytes__"
_STATE_BYTES_MAX = 4096
_FUSED_BLOCKS = (32, 64, 128, 256, 512, 1024)  # larger ones are less accurate there on AVX512
# What bitsandbytes' kernels have built in; NF4 is from QLoRA (arXiv 2305.14314), appendix E.
_FP4_MAGNITUDES = (0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
_CODEBOOKS = {
    "nf4": (
        *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ),
    "fp4": (*_FP4_MAGNITUDES, *(-value for value in _FP4_MAGNITUDES)),
}
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")


@dataclass(frozen=True)
class NF4Spec:
    """What the config says about every quantized layer; the rest stands in each quant_state.

    Attributes:
        quant_type: ``nf4`` or ``fp4``.
    """

    quant_type: str


def spec(config: Mapping[str, Any]) -> NF4Spec:
    """Read a ``quantization_config``.

    Raises:
        FormatError: The checkpoint is bitsandbytes, but not of 4 bits.
    """
    if not (config.get("load_in_4bit") or config.get("_load_in_4bit")):
        raise FormatError(
            "load_in_4bit: expected true, got false; bitsandbytes checkpoints of 8 bits have no "
            "continuous group scales to train"
        )
    quant_type = config.get("bnb_4bit_quant_type", "fp4")
    if quant_type not in ["nf4", "fp4"]:
        raise FormatError(f"bnb_4bit_quant_type: expected 'nf4' or 'fp4', got {quant_type!r}")
    return NF4Spec(quant_type)


def layer_names(keys: Iterable[str]) -> list[str]:
    """Return the quantized layers among the keys of a checkpoint, in order."""
    return [key.split(_STATE_MARK)[0] for key in keys if _STATE_MARK in key]


def tensor_names(layer: str, spec: NF4Spec) -> dict[str, str]:
    """Return the keys of one layer by role; the nested ones exist under double quantization."""
    names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    return {
        "weight": f"{layer}.weight",
        **{role: f"{layer}.weight.{role}" for role in names},
        "quant_state": f"{layer}{_STATE_MARK}{spec.quant_type}",
    }


@dataclass(frozen=True)
class NF4Weight:
    """One layer in its file layout; see ``QuantizedWeight``.

    Attributes:
        quant_type: ``nf4`` or ``fp4`` where the codebook is the published one, else None.
    """

    packed: UInt8[Tensor, " bytes"]
    codebook: Float[Tensor, " 16"]
    absmax: Float[Tensor, " blocks"]
    out_features: int
    in_features: int
    blocksize: int
    quant_type: str | None = None

    @property
    def blocks_cross_rows(self) -> bool:
        """True where the input size is no multiple of the block."""
        return self.in_features % self.blocksize != 0

    @property
    def scales(self) -> Float[Tensor, "out groups"]:
        """Scales of the file as ``(out, groups)``, or ``(1, blocks)`` where blocks cross rows."""
        return self.absmax.view(1 if self.blocks_cross_rows else self.out_features, -1)

    @property
    def input_groups(self) -> Int[Tensor, " in"]:
        """The block of every input, where no block crosses rows."""
        return torch.arange(self.in_features, device=self.absmax.device) // self.blocksize

    def decode(self, rows: slice, buffer: Float[Tensor, " n"]) -> Float[Tensor, "rows in"]:
        """Return ``codebook[codes]`` of some rows; see ``QuantizedWeight``."""
        if self._is_fused:
            ones = self.absmax.new_ones((rows.stop - rows.start) * self._blocks_per_row)
            return self._fused(rows, ones)
        start, stop = rows.start * self.in_features, rows.stop * self.in_features
        data = self.packed[start // 2 : -(-stop // 2)]
        halves = torch.stack((data >> 4, data & 15), dim=1).view(-1)[start % 2 :][: stop - start]
        decoded = buffer[: stop - start]
        torch.index_select(self.codebook, 0, halves.to(torch.int32), out=decoded)
        return decoded.view(-1, self.in_features)

    def dequantize(self, rows: slice, buffer: Float[Tensor, " n"]) -> Float[Tensor, "rows in"]:
        """Return some rows with the scales of the file; see ``QuantizedWeight``."""
        if self._is_fused:
            return self._fused(rows, self.scales[rows].reshape(-1))
        return self.apply_scales(self.decode(rows, buffer), self.scales, rows, None)

    def apply_scales(
        self,
        decoded: Float[Tensor, "rows in"],
        scales: Float[Tensor, "out groups"],
        rows: slice,
        buffer: Float[Tensor, " n"] | None,
    ) -> Float[Tensor, "rows in"]:
        """Multiply decoded rows by their scales; see ``QuantizedWeight``."""
        product = decoded.view(-1) if buffer is None else buffer[: decoded.numel()]
        if self.blocks_cross_rows:
            expanded = scales.reshape(-1)[self._blocks(rows)]
            torch.mul(decoded.reshape(-1), expanded, out=product)
        else:
            by_block = (decoded.shape[0], -1, self.blocksize)
            torch.mul(decoded.view(by_block), scales[rows, :, None], out=product.view(by_block))
        return product.view(-1, self.in_features)

    def add_by_scale(
        self,
        values: Float[Tensor, "rows in"],
        rows: slice,
        total: Float[Tensor, "out groups"],
    ) -> None:
        """Add values of weights to the total of their scales; see ``QuantizedWeight``."""
        if self.blocks_cross_rows:
            total.view(-1).index_add_(0, self._blocks(rows), values.reshape(-1))
        else:
            total[rows] += values.unflatten(1, (-1, self.blocksize)).sum(-1)

    def to(self, device: torch.device) -> "NF4Weight":
        """Return the same weight with its tensors on another device."""
        return replace(
            self,
            packed=self.packed.to(device),
            codebook=self.codebook.to(device),
            absmax=self.absmax.to(device),
        )

    def _blocks(self, rows: slice) -> Int[Tensor, " weights"]:
        """Return the block of every weight of some rows."""
        first, last = rows.start * self.in_features, rows.stop * self.in_features
        return torch.arange(first, last, device=self.absmax.device) // self.blocksize

    @property
    def _blocks_per_row(self) -> int:
        return self.in_features // self.blocksize

    @cached_property
    def _is_fused(self) -> bool:
        """Whether bitsandbytes' operator reads these codes as this class does."""
        return (
            self.packed.device.type == "cpu"
            and not self.blocks_cross_rows
            and self.blocksize in _FUSED_BLOCKS
            and _fused_quant_type(tuple(self.codebook.tolist())) is not None
        )

    def _fused(self, rows: slice, absmax: Float[Tensor, " blocks"]) -> Float[Tensor, "rows in"]:
        bytes_per_row = self.in_features // 2
        data = self.packed[rows.start * bytes_per_row : rows.stop * bytes_per_row]
        quant_type = _fused_quant_type(tuple(self.codebook.tolist()))
        assert quant_type is not None
        return _dequantize_4bit(data, absmax, self.blocksize, quant_type, self.in_features)


@lru_cache(maxsize=8)
def _fused_quant_type(codebook: tuple[float, ...]) -> str | None:
    """Return what bitsandbytes calls this codebook, if its operator computes with it, or None."""
    all_codes = torch.arange(16, dtype=torch.uint8).repeat(2).view(-1, 2)
    data = all_codes[:, 0] << 4 | all_codes[:, 1]
    for quant_type in ("nf4", "fp4"):
        values = _dequantize_4bit(data, torch.ones(1), 32, quant_type, 32)
        if values[0, :16].tolist() == list(codebook):
            return quant_type
    return None


def _dequantize_4bit(
    data: UInt8[Tensor, " bytes"],
    absmax: Float[Tensor, " blocks"],
    blocksize: int,
    quant_type: str,
    in_features: int,
) -> Float[Tensor, "rows in"]:
    """Return ``codebook[codes] * absmax`` by bitsandbytes' operator."""
    import bitsandbytes  # noqa: F401  # defines the operator

    shape = (2 * len(data) // in_features, in_features)
    result: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        data, absmax, blocksize, quant_type, shape, torch.float32
    )
    return result


def unpack(tensors: Mapping[str, Tensor], spec: NF4Spec, layer: str) -> NF4Weight:
    """Check the tensors of one layer (by role) and give them their meaning.

    Raises:
        FormatError: A tensor is missing, or contradicts the quant_state.
    """
    for role in ("weight", "absmax", "quant_map", "quant_state"):
        if role not in tensors:
            key = tensor_names(layer, spec)[role]
            raise FormatError(f"{key}: expected this tensor in the checkpoint, not found")
    state = read_quant_state(tensors["quant_state"], layer)
    out_features, in_features = state["shape"]
    blocksize = state["blocksize"]
    packed = tensors["weight"].contiguous().view(-1).view(torch.uint8)
    num_bytes = -(-out_features * in_features // 2)
    if packed.numel() != num_bytes:
        raise FormatError(
            f"{layer}.weight: expected {num_bytes} bytes for shape {(out_features, in_features)}, "
            f"got {packed.numel()}"
        )
    codebook = _codebook(tensors, "quant_map", 16, layer)
    absmax = _fp32_absmax(tensors, state, layer)
    num_blocks = -(-out_features * in_features // blocksize)
    if absmax.numel() != num_blocks:
        raise FormatError(
            f"{layer}.weight.absmax: expected {num_blocks} values for blocksize {blocksize}, "
            f"got {absmax.numel()}"
        )
    if not torch.stack(absmax.aminmax()).isfinite().all():  # NaN is both smallest and largest
        raise FormatError(f"{layer}.weight.absmax: expected finite values, got NaN or infinity")
    quant_type = _published_type(codebook)
    return NF4Weight(packed, codebook, absmax, out_features, in_features, blocksize, quant_type)


def read_quant_state(stored: Tensor, layer: str) -> dict[str, Any]:
    """Parse the JSON in a ``quant_state`` tensor and check its fields.

    Raises:
        FormatError: The bytes are no JSON object, or a field has an impossible value.
    """
    name = f"{layer}.weight.quant_state"
    if stored.dtype != torch.uint8 or stored.numel() > _STATE_BYTES_MAX:
        raise FormatError(f"{name}: expected up to {_STATE_BYTES_MAX} bytes of JSON")
    try:
        state = json.loads(bytes(stored.cpu().numpy().tobytes()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: expected JSON, got {error}") from error
    if not isinstance(state, dict):
        raise FormatError(f"{name}: expected a JSON object, got {type(state).__name__}")
    shape, blocksize = state.get("shape"), state.get("blocksize")
    is_matrix = (
        isinstance(shape, list)
        and len(shape) == 2
        and all(isinstance(size, int) and size > 0 for size in shape)
    )
    if not is_matrix:
        raise FormatError(f"{name}: expected a shape of two sizes, got {shape!r}")
    if not (isinstance(blocksize, int) and blocksize > 0):
        raise FormatError(f"{name}: expected a positive blocksize, got {blocksize!r}")
    return state


def _codebook(
    tensors: Mapping[str, Tensor], role: str, size: int, layer: str
) -> Float[Tensor, " codes"]:
    """Return the values that codes stand for.

    Raises:
        FormatError: There is another number of them, or one is not finite.
    """
    values = tensors[role].reshape(-1).float()
    if len(values) != size:
        raise FormatError(f"{layer}.weight.{role}: expected {size} values, got {len(values)}")
    if not torch.isfinite(values).all():
        raise FormatError(f"{layer}.weight.{role}: expected finite values, got NaN or infinity")
    return values


def _published_type(codebook: Float[Tensor, " 16"]) -> str | None:
    for quant_type, values in _CODEBOOKS.items():
        if torch.allclose(codebook.cpu(), torch.tensor(values), rtol=0, atol=1e-6):
            return quant_type
    return None


def _fp32_absmax(
    tensors: Mapping[str, Tensor], state: Mapping[str, Any], layer: str
) -> Float[Tensor, " blocks"]:
    stored = tensors["absmax"].reshape(-1)
    if stored.dtype.is_floating_point:
        return stored.float()
    if stored.dtype != torch.uint8:
        got = str(stored.dtype).removeprefix("torch.")
        raise FormatError(f"{layer}.weight.absmax: expected dtype float32 or uint8, got {got}")
    for role in ("nested_absmax", "nested_quant_map"):
        if role not in tensors:
            raise FormatError(
                f"{layer}.weight.{role}: expected this tensor beside a uint8 absmax, not found"
            )
    blocksize, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if not (isinstance(blocksize, int) and blocksize > 0 and _is_finite_number(offset)):
        raise FormatError(
            f"{layer}.weight.quant_state: expected nested_blocksize and nested_offset, got "
            f"{blocksize!r} and {offset!r}"
        )
    codebook = _codebook(tensors, "nested_quant_map", 256, layer)
    nested_absmax = tensors["nested_absmax"].reshape(-1).float()
    blocks = torch.arange(stored.numel()) // blocksize
    if nested_absmax.numel() != -(-stored.numel() // blocksize):
        raise FormatError(
            f"{layer}.weight.nested_absmax: expected one value for {blocksize} blocks, got "
            f"{nested_absmax.numel()} for {stored.numel()}"
        )
    return codebook[stored.int()] * nested_absmax[blocks] + offset


def _is_finite_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def repack_scales(
    tensors: Mapping[str, Tensor], scales: Float[Tensor, "out groups"], layer: str
) -> dict[str, Tensor]:
    """Return the stored tensors of one layer (by role), un-nested, with other scales.

    Raises:
        ScaleRangeError: A scale is not finite.
    """
    if not torch.isfinite(scales).all():
        raise ScaleRangeError(f"{layer}.weight.absmax: expected finite values, got NaN or infinity")
    kept = {role: tensor for role, tensor in tensors.items() if not role.startswith("nested")}
    kept["absmax"] = scales.reshape(-1).to(torch.float32).contiguous()
    if "nested_absmax" in tensors:
        kept["quant_state"] = _without_nesting(tensors["quant_state"], layer)
    return kept


def _without_nesting(stored: Tensor, layer: str) -> Tensor:
    state = read_quant_state(stored, layer)
    plain = {key: value for key, value in state.items() if key not in _NESTED_FIELDS}
    return torch.tensor(list(json.dumps(plain).encode("utf-8")), dtype=torch.uint8)


def export_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the quantization config of an exported checkpoint: no double quantization."""
    return {**config, "bnb_4bit_use_double_quant": False}
