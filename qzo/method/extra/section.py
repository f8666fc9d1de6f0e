"""What is trained besides the scales: sections that follow them in the trained vector.

How the values ``v`` of a section change a tensor ``w`` of the file, by kind:

- ``norm``: ``(w + offset) v - offset`` (starts at 1; offset 1 where a norm multiplies by 1 + w),
- ``bias``: ``w + unit v`` (starts at 0; the unit is the root mean square of w, or 1 if w is 0),
- ``head``: ``w v[:, None]`` (starts at 1, one element per token of the vocabulary),
- ``lora_A``, ``lora_B``: the factors of ``unit B A``, which is added to a matrix; A starts normal
  with the variance ``1 / (3 inputs)`` that it has in PEFT (there uniform), B at 0,
- ``prefix_key``, ``prefix_value``: keys and values of an attention layer, ``(heads, n, width)``.

Directions of a section are multiplied by its factor: the radius of a probe grows by it, a step of
gradient descent by its square.
"""

import base64
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from qzo.errors import CheckpointError, TrainedRangeError
from qzo.method.directions.philox import directions

Kind = Literal["norm", "bias", "head", "lora_A", "lora_B", "prefix_key", "prefix_value"]
UNQUANTIZED: tuple[Kind, ...] = ("norm", "bias", "head")
_SIZE_MAX = 2**31


@dataclass(frozen=True)
class Section:
    """One section; the journal's header holds all of it.

    Attributes:
        name: Key of the tensor in the files, or name of a LoRA factor in the model.
        kind: What its values are.
        shape: Their shape.
        unit: What they are multiplied by where they are used.
        factor: What their directions are multiplied by.
        offset: What a norm adds to its weight.
        seed: Of the start, where it is random.
        data: The start, where it comes from the model: fp16 in base64.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    unit: float = 1.0
    factor: float = 1.0
    offset: float = 0.0
    seed: int = 0
    data: str = field(default="", repr=False)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def start(self) -> Float[Tensor, "..."]:
        """Return the values that training starts from, in fp32."""
        if self.kind == "lora_A":
            z = directions("gaussian", [self.seed], 0, self.size).view(self.shape)
            return z * math.sqrt(1 / (3 * self.shape[1]))
        if self.data:
            stored = bytearray(base64.b64decode(self.data, validate=True))
            return torch.frombuffer(stored, dtype=torch.float16).float().view(self.shape)
        return torch.full(self.shape, 1.0 if self.kind in {"norm", "head"} else 0.0)

    def tuned(
        self, stored: Float[Tensor, "..."], values: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Return an unquantized tensor with trained values, in its dtype.

        Args:
            stored: As in the file; not modified.
            values: Of the section, without the unit.

        Raises:
            TrainedRangeError: A number does not fit the dtype of the file.
        """
        wide = stored.float()
        if self.kind == "norm":
            wide = (wide + self.offset) * values - self.offset
        elif self.kind == "bias":
            wide = wide + values * self.unit
        else:
            wide = wide * values[:, None]
        result = wide.to(stored.dtype)
        if not bool(result.isfinite().all()):
            raise TrainedRangeError(
                f"{self.name}: expected trained numbers that fit {stored.dtype}, got larger ones; "
                "lower learning_rate or zo.unquantized_factor"
            )
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return what the header of a journal holds."""
        return {**asdict(self), "shape": list(self.shape)}


def sections_of(header: Mapping[str, Any]) -> tuple[Section, ...]:
    """Read the sections of a journal's header; older ones have none.

    Raises:
        CheckpointError: They are damaged.
    """
    entries = header.get("sections", [])
    try:
        return tuple(_section(entry) for entry in entries)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "journal: line 1: expected sections with name, kind, shape, unit, factor, offset and "
            f"seed, got something else: {error!r}"
        ) from error


def _section(entry: Mapping[str, Any]) -> Section:
    """Return a section of a header.

    Raises:
        ValueError: A value is not of its type or beyond its bounds.
    """
    shape = tuple(entry["shape"])
    numbers = {key: float(entry[key]) for key in ("unit", "factor", "offset")}
    is_sound = (
        set(entry) == {"name", "kind", "shape", "unit", "factor", "offset", "seed", "data"}
        and type(entry["name"]) is str
        and entry["kind"] in get_args(Kind)
        and type(entry["seed"]) is int
        and 0 <= entry["seed"] < 2**64
        and all(type(size) is int and size > 0 for size in shape)
        and len(shape) == {"lora": 2, "pref": 3}.get(entry["kind"][:4], 1)
        and _has_start(entry["kind"], entry["data"], math.prod(shape))
        and math.prod(shape) < _SIZE_MAX
        and all(map(math.isfinite, numbers.values()))
    )
    if not is_sound:
        raise ValueError(entry)
    return Section(**{**entry, **numbers, "shape": shape})


def _has_start(kind: str, data: str, size: int) -> bool:
    if not kind.startswith("prefix"):
        return data == ""
    return len(base64.b64decode(data, validate=True)) == 2 * size
