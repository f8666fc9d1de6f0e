"""The tensors of one quantized layer as its files have them: what is saved, and read back."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from quantizers.weight import QuantizedWeight
from qzo.errors import CheckpointError


@dataclass(frozen=True)
class StoredLayer:
    """One quantized layer in the layout of its files.

    Attributes:
        name: The layer's name in the files.
        format: The module of ``quantizers`` that reads it.
        spec: What that module made of the quantization config.
        tensors: By role; usually views of the memory-mapped file.
    """

    name: str
    format: ModuleType
    spec: Any
    tensors: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def key(self, role: str) -> str:
        """Return the key of a role, without the layer's name."""
        names: dict[str, str] = self.format.tensor_names(self.name, self.spec)
        return names[role].removeprefix(f"{self.name}.")

    def keys(self) -> dict[str, str]:
        """Return the keys that a layer of this format may have, by role."""
        return {role: self.key(role) for role in self.format.tensor_names(self.name, self.spec)}

    def with_scales(self, scales: Float[Tensor, "out groups"] | None) -> dict[str, Tensor]:
        """Return the tensors by key with other scales; None: those of the file."""
        tensors: Mapping[str, Tensor] = self.tensors
        if scales is not None:
            device = tensors[self.format.SCALE_ROLE].device
            tensors = self.format.repack_scales(tensors, scales.float().to(device), self.name)
        return {self.key(role): tensor for role, tensor in tensors.items()}

    def read(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight | None:
        """Read tensors by key that hold the codes of this layer and scales of their own.

        Returns:
            The layer with these scales; None where they are those of the file.

        Raises:
            CheckpointError: The codes are others.
        """
        keys = self.keys()
        found = {role: tensors[key] for role, key in keys.items() if key in tensors}
        weight: QuantizedWeight = self.format.unpack(found, self.spec, self.name)
        for role, stored in self.tensors.items():
            is_code = role not in self.format.SCALE_ROLES
            if is_code and not (role in found and _is_same(found[role], stored)):
                raise CheckpointError(
                    f"{self.name}.{keys[role]}: expected the codes of this model, got others; load "
                    "the other checkpoint with qzo.load"
                )
        is_unchanged = found.keys() == self.tensors.keys() and all(
            _is_same(found[role], stored) for role, stored in self.tensors.items()
        )
        return None if is_unchanged else weight


def _is_same(one: Tensor, other: Tensor) -> bool:
    is_alike = one.dtype == other.dtype and one.shape == other.shape
    if not is_alike or one.data_ptr() == other.data_ptr():
        return is_alike
    return torch.equal(one.to(other.device), other)
