"""Snapshots: the state of a run between two steps, so that it need not be replayed from its start.

A folder ``checkpoint-N`` holds the state after N steps; ``best`` that of the best evaluation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from torch import Tensor

from qzo.checkpoint.atomic import read_json, remove, replaced_folder, settle, write_json
from qzo.checkpoint.tensors import TensorFiles, tensors_sha256, write_safetensors
from qzo.errors import CheckpointError
from qzo.method.first_order import FirstOrder
from qzo.method.optimizers import Optimizer
from qzo.method.trained_vector import Scales

BEST_NAME = "best"
_NUMBERED = "checkpoint-"
_SNAPSHOT_NAME = "scales.safetensors"
_STATE_NAME = "trainer_state.json"
_OPTIMIZER_PREFIX = "optimizer."
_DAMAGED = (
    "{folder}: expected a snapshot with values, step and fingerprint, got something else; "
    "remove the folder to replay from an earlier one"
)
_FIRST_ORDER_PREFIX = "first_order."  # of what its rule remembers, among the optimizer's


@dataclass(frozen=True)
class Snapshot:
    """The state of a run between two steps.

    Attributes:
        step: Steps done.
        values: The fp32 master.
        optimizer: What the optimizer remembers.
        fingerprint: The sha256 of the master.
    """

    step: int
    values: Tensor
    optimizer: Mapping[str, Tensor]
    fingerprint: str


def save_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Write a snapshot into a new folder."""
    remembered = ((_OPTIMIZER_PREFIX + k, t.cpu()) for k, t in snapshot.optimizer.items())
    tensors = [("values", snapshot.values.cpu()), *remembered]
    write_safetensors(folder / _SNAPSHOT_NAME, tensors)
    state = {
        **{"step": snapshot.step, "fingerprint": snapshot.fingerprint},
        "optimizer_sha256": tensors_sha256(snapshot.optimizer),
    }
    write_json(folder / _STATE_NAME, state)


def read_snapshot(folder: Path) -> Snapshot:
    """Read what ``save_snapshot`` wrote.

    Raises:
        CheckpointError: It is damaged.
    """
    step, fingerprint, optimizer_sha256 = _read_state(folder)
    tensors = TensorFiles(folder, [_SNAPSHOT_NAME])
    if "values" not in tensors.files:
        raise CheckpointError(_DAMAGED.format(folder=folder))
    remembered = {
        key.removeprefix(_OPTIMIZER_PREFIX): tensors[key]
        for key in tensors.files
        if key.startswith(_OPTIMIZER_PREFIX)
    }
    if optimizer_sha256 != tensors_sha256(remembered):
        raise CheckpointError(
            f"{folder}: what the optimizer remembers was changed; remove the folder to replay from "
            "an earlier one"
        )
    return Snapshot(step, tensors["values"], remembered, fingerprint)


def _read_state(folder: Path) -> tuple[int, str, object]:
    """Return the step, the fingerprint and the digest of what the optimizer remembers.

    Raises:
        CheckpointError: They are damaged.
    """
    state = read_json(folder / _STATE_NAME)
    step, fingerprint = state.get("step"), state.get("fingerprint")
    if type(step) is not int or not isinstance(fingerprint, str):
        raise CheckpointError(_DAMAGED.format(folder=folder))
    return step, fingerprint, state.get("optimizer_sha256")


class Snapshots:
    """The snapshots in a run folder.

    Args:
        folder: Of the run.
        scales: Its trained vector.
        optimizer: Moves it.
        first_order: What exact gradients move, if there is such a part.
    """

    def __init__(
        self, folder: Path, scales: Scales, optimizer: Optimizer, first_order: FirstOrder | None
    ) -> None:
        self.folder = folder
        self._scales, self._optimizer, self._first_order = scales, optimizer, first_order

    def write(self, name: str, step: int) -> None:
        """Write the present state as that after a number of steps; an older one is replaced."""
        scales, part = self._scales, self._first_order
        exact = {} if part is None else part.state()
        remembered = {_FIRST_ORDER_PREFIX + key: tensor for key, tensor in exact.items()}
        remembered |= self._optimizer.state()
        state = Snapshot(step, scales.values, remembered, scales.fingerprint())
        with replaced_folder(self.folder / name) as partial:
            save_snapshot(partial, state)

    def write_numbered(self, step: int, *, limit: int) -> bool:
        """Write a snapshot unless it is there, and remove the oldest ones; return whether it was.

        Args:
            step: Steps done.
            limit: How many are kept.
        """
        name = f"{_NUMBERED}{step}"
        if (self.folder / name).exists():
            return False
        self.write(name, step)
        for old in self.numbered()[:-limit]:
            remove(old)
        return True

    def numbered(self) -> list[Path]:
        """Return the folders of the numbered ones, in the order of their steps."""
        folders = self.folder.glob(f"{_NUMBERED}*")
        return sorted((f for f in folders if _after(f.name).isdecimal()), key=step_of)

    def set_aside(self, journal_steps: int) -> list[str]:
        """Rename the numbered ones of steps that the journal does not have.

        Returns:
            Where they are now.
        """
        names = []
        for folder in self.numbered():
            if step_of(folder) > journal_steps:
                names.append(_free_name(folder))
                folder.rename(folder.with_name(names[-1]))
        return names

    def best_step(self) -> int | None:
        """Return how many steps were done at the snapshot ``best``; None where there is none."""
        folder = self.folder / BEST_NAME
        settle(folder)
        return _read_state(folder)[0] if folder.exists() else None

    def take(self, snapshot: Snapshot) -> None:
        """Set scales, optimizer and first-order part to a snapshot."""
        device = self._scales.values.device
        self._scales.restore(snapshot.values)
        state = {key: tensor.to(device) for key, tensor in snapshot.optimizer.items()}
        prefix = _FIRST_ORDER_PREFIX
        self._optimizer.restore({k: t for k, t in state.items() if not k.startswith(prefix)})
        if self._first_order is not None:
            self._first_order.restore(
                {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
            )


def step_of(folder: Path) -> int:
    """Return how many steps were done at a numbered snapshot, by its name."""
    return int(_after(folder.name))


def _free_name(folder: Path) -> str:
    names = (f"{folder.name}.ahead{number or ''}" for number in count())
    return next(name for name in names if not folder.with_name(name).exists())


def _after(name: str) -> str:
    return name.removeprefix(_NUMBERED)
