"""``gradients.f32``: the exact gradients of a run, beside its journal.

One vector per step, float32, little-endian, nothing between them; zeros where a step had none. A
step's vector is on disk before its line in the journal, so bytes beyond the journal's last step are
of a step that was never made: they do not count, and the next step replaces them.
"""

import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qzo.checkpoint.atomic import WriteError
from qzo.errors import CheckpointError

NAME = "gradients.f32"


class Gradients:
    """The file of one run.

    Args:
        path: Where it is, or will be.
        size: Values of one vector.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self._num_bytes = path, 4 * size

    def append(self, step: int, gradient: Float[Tensor, " size"]) -> None:
        """Put the vector of a step on disk; what lies behind its place is cut off.

        Raises:
            WriteError: The disk is full or the file cannot be written.
        """
        start = step * self._num_bytes
        data = gradient.cpu().numpy().astype("<f4", copy=False).tobytes()
        assert len(data) == self._num_bytes
        try:
            with self.path.open("ab") as file:
                file.truncate(start)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, min(start, self.path.stat().st_size))
            raise WriteError(self.path, error) from error

    def read(self, step: int) -> Float[Tensor, " size"]:
        """Return the vector of a step.

        Raises:
            CheckpointError: The file does not hold it.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(step * self._num_bytes)
                data = file.read(self._num_bytes)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: expected the gradients of the run beside its journal: "
                f"{error.strerror}"
            ) from error
        if len(data) != self._num_bytes:
            raise CheckpointError(
                f"{self.path}: expected {self._num_bytes} bytes of step {step}, got {len(data)}; "
                "the file was cut, or belongs to another run"
            )
        return torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))
