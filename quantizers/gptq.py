"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

Stored tensors of a layer: ``qweight`` (in * bits / 32, out) int32, ``qzeros``
(groups, out * bits / 32) int32, ``scales`` (groups, out) fp16, ``g_idx`` (in,) int32 and, if the
layer has one, ``bias`` (out,).
``W[o, i] = scales[g_idx[i], o] * (codes[i, o] - zeros[g_idx[i], o])``.

Zero points: ``gptq_v2`` stores them as they are, ``gptq`` (v1) stores the packed words minus a
constant that subtracts one from every element. Reading v1 adds the same constant to the whole
word, so that a borrow between elements is undone as well.

Source: AutoGPTQ 9f7d370, ``auto_gptq/nn_modules/qlinear/qlinear_cuda.py``; GPTQModel f4c327a,
``utils/model.py`` for the constants.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from quantizers import packing
from quantizers.errors import FormatError, ScaleRangeError

QUANT_METHOD = "gptq"
SCALE_ROLE = "scales"
SCALE_ROLES = frozenset({"scales"})

# What v1 subtracts from each packed word. 3 bits: three words hold one run. AutoGPTQ subtracts one
# from each element of the stream; GPTQModel uses the same three constants in the reverse order.
_V1_CONSTANTS = {2: (0x55555555,), 4: (0x11111111,), 8: (0x01010101,)}
_V1_CONSTANTS_3BIT = {
    "auto_gptq": (0x49249249, 0x92492492, 0x24924924),
    "gptqmodel": (0x24924924, 0x92492492, 0x49249249),
}


@dataclass(frozen=True)
class GPTQSpec:
    """What the config says about every quantized layer.

    Attributes:
        bits: Width of a code.
        group_size: Input columns sharing one scale; -1 for a single group.
        is_symmetric: All zero points are ``2 ** (bits - 1)``.
        checkpoint_format: ``gptq`` (v1 zero points) or ``gptq_v2``.
        writer: ``auto_gptq`` or ``gptqmodel``; they differ in 3-bit v1 zero points.
    """

    bits: int
    group_size: int
    is_symmetric: bool
    checkpoint_format: str
    writer: str

    @property
    def v1_constants(self) -> tuple[int, ...]:
        """What v1 subtracts from the words of one run."""
        return _V1_CONSTANTS_3BIT[self.writer] if self.bits == 3 else _V1_CONSTANTS[self.bits]


def spec(config: Mapping[str, Any]) -> GPTQSpec:
    """Read a ``quantization_config`` (or ``quantize_config.json``).

    Raises:
        FormatError: A value is missing or is one that this reader does not know.
    """
    bits = _integer(config, "bits")
    if bits not in packing.BITS:
        raise FormatError(f"bits: expected one of {packing.BITS}, got {bits}")
    group_size = _integer(config, "group_size")
    if group_size != -1 and group_size < 1:
        raise FormatError(f"group_size: expected -1 or a positive integer, got {group_size}")
    checkpoint_format = config.get("checkpoint_format", config.get("format", "gptq"))
    if checkpoint_format not in ["gptq", "gptq_v2"]:
        raise FormatError(
            f"checkpoint_format: expected 'gptq' or 'gptq_v2', got {checkpoint_format!r}; "
            "convert the checkpoint to one of them"
        )
    if config.get("pack_dtype", "int32") != "int32":
        raise FormatError(f"pack_dtype: expected 'int32', got {config['pack_dtype']!r}")
    dynamic = _mapping(config, "dynamic")
    overrides = [name for name in dynamic if not name.startswith("-:")]
    if overrides:
        raise FormatError(
            f"dynamic: expected the same bits and group size in every layer, got overrides for "
            f"{overrides[0]!r}"
        )
    is_symmetric = bool(config.get("sym", True))  # old files without the field are symmetric
    return GPTQSpec(bits, group_size, is_symmetric, checkpoint_format, _writer(config))


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise FormatError(f"{key}: expected an integer in the quantization config, got {value!r}")
    return value


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise FormatError(f"{key}: expected keys and values, got {type(value).__name__}")
    return value


def _writer(config: Mapping[str, Any]) -> str:
    quantizer = _mapping(config, "meta").get("quantizer", "")
    return "gptqmodel" if "gptqmodel" in str(quantizer) else "auto_gptq"


def layer_names(keys: Iterable[str]) -> list[str]:
    """Return the quantized layers among the keys of a checkpoint, in order."""
    return [key.removesuffix(".qweight") for key in keys if key.endswith(".qweight")]


def tensor_names(layer: str, spec: GPTQSpec) -> dict[str, str]:
    """Return the keys of one layer by role; ``g_idx`` may be absent."""
    return {role: f"{layer}.{role}" for role in ("qweight", "qzeros", "scales", "g_idx")}


@dataclass(frozen=True)
class GPTQWeight:
    """One layer in its file layout; see ``QuantizedWeight``."""

    qweight: Int[Tensor, "packed_in out"]
    zeros: int | UInt8[Tensor, "groups out"]  # one number where all are equal
    file_scales: Float[Tensor, "groups out"]
    group_index: Int[Tensor, " in"] | None  # None: consecutive groups of equal size
    bits: int
    in_features: int
    blocks_cross_rows = False

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.qweight.shape[1]

    @property
    def scales(self) -> Float[Tensor, "out groups"]:
        """Scales of the file, a transposed view."""
        return self.file_scales.T

    @property
    def input_groups(self) -> Int[Tensor, " in"]:
        """The group of every input."""
        if self.group_index is not None:
            return self.group_index
        inputs = torch.arange(self.in_features, device=self.file_scales.device)
        return inputs // (self.in_features // len(self.file_scales))

    def decode(self, rows: slice, buffer: Float[Tensor, " n"]) -> Float[Tensor, "rows in"]:
        """Return ``codes - zeros`` of some rows; see ``QuantizedWeight``."""
        words = self.qweight[:, rows]
        if not packing.has_fused_unpack(self.bits, words.device):
            return self._decode_into(words, rows, buffer)
        if isinstance(self.zeros, int):
            return packing.unpack_affine(words, self.bits, 1.0, -self.zeros, 1)
        if self._has_whole_words():
            biases = self.zeros[:, rows].to(torch.float16).neg_()
            return packing.unpack_affine(words, self.bits, 1.0, biases, len(self.zeros))
        codes = packing.unpack_affine(words, self.bits, 1.0, 0.0, 1)
        return self._by_group(codes).sub_(self._expand(self.zeros[:, rows].T)).view(codes.shape)

    def dequantize(self, rows: slice, buffer: Float[Tensor, " n"]) -> Float[Tensor, "rows in"]:
        """Return some rows with the scales of the file; see ``QuantizedWeight``."""
        words, scales = self.qweight[:, rows], self.file_scales[:, rows]
        is_fused = packing.has_fused_unpack(self.bits, words.device) and self._has_exact_biases
        if not is_fused:
            return self.apply_scales(self.decode(rows, buffer), self.scales.float(), rows, None)
        return packing.unpack_affine(words, self.bits, scales, scales * -self.zeros, len(scales))

    def apply_scales(
        self,
        decoded: Float[Tensor, "rows in"],
        scales: Float[Tensor, "out groups"],
        rows: slice,
        buffer: Float[Tensor, " n"] | None,
    ) -> Float[Tensor, "rows in"]:
        """Multiply decoded rows by their scales; see ``QuantizedWeight``."""
        product = decoded if buffer is None else buffer[: decoded.numel()].view(decoded.shape)
        group_scales = self._expand(scales[rows])
        torch.mul(self._by_group(decoded), group_scales, out=self._by_group(product))
        return product

    def add_by_scale(
        self,
        values: Float[Tensor, "rows in"],
        rows: slice,
        total: Float[Tensor, "out groups"],
    ) -> None:
        """Add values of weights to the total of their scales; see ``QuantizedWeight``."""
        if self.group_index is not None:
            total[rows].index_add_(1, self.group_index, values)
        else:
            total[rows] += self._by_group(values).sum(-1)

    def to(self, device: torch.device) -> "GPTQWeight":
        """Return the same weight with its tensors on another device."""
        index = None if self.group_index is None else self.group_index.to(device)
        return replace(
            self,
            qweight=self.qweight.to(device),
            zeros=self.zeros if isinstance(self.zeros, int) else self.zeros.to(device),
            file_scales=self.file_scales.to(device),
            group_index=index,
        )

    def _decode_into(
        self, words: Int[Tensor, "packed rows"], rows: slice, buffer: Float[Tensor, " n"]
    ) -> Float[Tensor, "rows in"]:
        """Write ``codes - zeros`` into the buffer, inputs first, with elementary operations."""
        decoded = buffer[: self.in_features * words.shape[1]].view(self.in_features, -1)
        packing.unpack_into(words, self.bits, decoded)
        if isinstance(self.zeros, int):
            return decoded.sub_(self.zeros).T
        self._by_group(decoded.T).sub_(self._expand(self.zeros[:, rows].T))
        return decoded.T

    def _has_whole_words(self) -> bool:
        """Return whether groups are consecutive and begin at a word."""
        codes_per_word = 32 // self.bits
        group_size = self.in_features // len(self.file_scales)
        return self.group_index is None and group_size % codes_per_word == 0

    @cached_property
    def _has_exact_biases(self) -> bool:
        """Whether ``-zero * scale`` fits fp16: one zero point that is a power of two."""
        zero = self.zeros if isinstance(self.zeros, int) else 0
        limit = torch.finfo(torch.float16)
        return (
            self._has_whole_words()
            and self.file_scales.dtype == torch.float16
            and zero.bit_count() == 1
            and bool(self.file_scales.abs().max() * zero <= limit.max)
        )

    def _by_group(self, matrix: Float[Tensor, "rows in"]) -> Float[Tensor, "..."]:
        if self.group_index is not None:
            return matrix
        by_group: Tensor = matrix.unflatten(1, (len(self.file_scales), -1))
        return by_group

    def _expand(self, values: Shaped[Tensor, "rows groups"]) -> Shaped[Tensor, "..."]:
        if self.group_index is not None:
            return values[:, self.group_index]
        return values[..., None]


def unpack(tensors: Mapping[str, Tensor], spec: GPTQSpec, layer: str) -> GPTQWeight:
    """Check the tensors of one layer (by role) and give them their meaning.

    Raises:
        FormatError: A tensor is missing, has another shape or dtype than the config says, or a
            scale or group index is out of range.
    """
    _check_present(tensors, layer)
    qweight, scales = tensors["qweight"], tensors["scales"]
    _check(layer, "qweight", qweight, dtypes=(torch.int32,), shape=(None, None))
    run, words = packing.run_length(spec.bits), packing.words_per_run(spec.bits)
    in_features, out_features = qweight.shape[0] * run // words, qweight.shape[1]
    if qweight.shape[0] % words or not qweight.numel():
        raise FormatError(f"{layer}.qweight: expected whole runs of words, got {qweight.shape[0]}")
    group_size = in_features if spec.group_size == -1 else spec.group_size
    groups = -(-in_features // group_size)
    floats = (torch.float16, torch.bfloat16, torch.float32)
    _check(layer, "scales", scales, dtypes=floats, shape=(groups, out_features), spec=spec)
    packed_out = -(-out_features // run) * words
    _check(
        layer, "qzeros", tensors["qzeros"], dtypes=(torch.int32,), shape=(groups, packed_out),
        spec=spec,
    )  # fmt: skip
    if not torch.stack(scales.aminmax()).isfinite().all():  # NaN is both smallest and largest
        raise FormatError(f"{layer}.scales: expected finite values, got NaN or infinity")
    index = _group_index(tensors.get("g_idx"), layer, in_features, group_size, groups)
    zeros = _zeros(tensors["qzeros"], spec, out_features)
    return GPTQWeight(qweight, zeros, scales, index, spec.bits, in_features)


def _zeros(
    qzeros: Int[Tensor, "groups packed_out"], spec: GPTQSpec, out_features: int
) -> int | UInt8[Tensor, "groups out"]:
    """Return the zero points, or one number where all are equal.

    Words that are all equal are unpacked once: so it is in symmetric checkpoints.
    """
    is_one_word = packing.words_per_run(spec.bits) == 1 and bool((qzeros == qzeros[0, 0]).all())
    words = qzeros[:1, :1] if is_one_word else qzeros
    count = min(out_features, packing.run_length(spec.bits)) if is_one_word else out_features
    zeros = unpack_zeros(words, spec, count)
    first = int(zeros[0, 0])
    if (zeros == first).all():
        return first
    return unpack_zeros(qzeros, spec, out_features) if is_one_word else zeros


def _check_present(tensors: Mapping[str, Tensor], layer: str) -> None:
    for role in ("qweight", "qzeros", "scales"):
        if role not in tensors:
            raise FormatError(f"{layer}.{role}: expected this tensor in the checkpoint, not found")


def _check(
    layer: str,
    role: str,
    tensor: Tensor,
    *,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    spec: GPTQSpec | None = None,
) -> None:
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(tensor.dtype).removeprefix("torch.")
        raise FormatError(f"{layer}.{role}: expected dtype {names}, got {got}")
    fits = len(shape) == tensor.dim() and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        hint = (
            "" if spec is None else f"; are bits {spec.bits}, group_size {spec.group_size} right?"
        )
        want = tuple("any" if size is None else size for size in shape)
        raise FormatError(f"{layer}.{role}: expected shape {want}, got {tuple(tensor.shape)}{hint}")


def _group_index(
    stored: Tensor | None, layer: str, in_features: int, group_size: int, groups: int
) -> Int[Tensor, " in"] | None:
    """Return the group of every input, or None where groups are consecutive and equal.

    Raises:
        FormatError: An index is out of range.
    """
    plain = torch.arange(in_features) // group_size
    is_even = in_features % group_size == 0
    if stored is None:
        return None if is_even else plain
    _check(layer, "g_idx", stored, dtypes=(torch.int32, torch.int64), shape=(in_features,))
    index = stored.to(torch.int64)
    if torch.equal(index.cpu(), plain) and is_even:
        return None
    if index.min() < 0 or index.max() >= groups:
        raise FormatError(
            f"{layer}.g_idx: expected groups 0 to {groups - 1}, got {int(index.min())} to "
            f"{int(index.max())}"
        )
    return index


def unpack_zeros(
    qzeros: Int[Tensor, "groups packed_out"], spec: GPTQSpec, out_features: int
) -> UInt8[Tensor, "groups out"]:
    """Return the zero points of every group and output."""
    words = qzeros.T.contiguous()  # packed along the outputs: unpack along the first axis
    if spec.checkpoint_format == "gptq":
        words = _add_v1_constants(words, spec, sign=1)
    zeros = torch.empty(out_features, qzeros.shape[0], dtype=torch.float32, device=qzeros.device)
    packing.unpack_into(words, spec.bits, zeros)
    return zeros.T.to(torch.uint8).contiguous()


def _add_v1_constants(
    words: Int[Tensor, "packed groups"], spec: GPTQSpec, *, sign: int
) -> Int[Tensor, "packed groups"]:
    constants = torch.tensor(spec.v1_constants, dtype=torch.int64, device=words.device)
    tiled = constants.repeat(words.shape[0] // len(constants))[:, None]
    return packing.as_int32((words.to(torch.int64) + sign * tiled) & 0xFFFFFFFF)


def pack_codes(codes: Int[Tensor, "in out"], bits: int) -> Int[Tensor, "packed_in out"]:
    """Pack codes ``0 .. 2**bits - 1`` into ``qweight``."""
    return packing.pack(codes, bits)


def pack_zeros(
    zeros: Int[Tensor, "groups out"], spec: GPTQSpec
) -> Int[Tensor, "groups packed_out"]:
    """Pack zero points into ``qzeros``, minus one in v1; the inverse of ``unpack_zeros``."""
    words = packing.pack(zeros.T.contiguous(), spec.bits)
    if spec.checkpoint_format == "gptq":
        words = _add_v1_constants(words, spec, sign=-1)
    return words.T.contiguous()


def repack_scales(
    tensors: Mapping[str, Tensor], scales: Float[Tensor, "out groups"], layer: str
) -> dict[str, Tensor]:
    """Return the stored tensors of one layer (by role) with other scales, rounded to their dtype.

    Raises:
        ScaleRangeError: A scale is not finite or does not fit fp16.
    """
    stored = tensors["scales"]
    largest = scales.abs().max().item()
    limit = torch.finfo(stored.dtype).max
    if not largest <= limit:  # also true for NaN
        raise ScaleRangeError(
            f"{layer}.scales: expected finite values up to {limit:g}, got {largest}"
        )
    return {**tensors, "scales": scales.T.to(stored.dtype).contiguous()}


def export_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the quantization config of an exported checkpoint: the same."""
    return dict(config)
