"""What a run ends with: a result, or one of the errors that are its own."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qzo.errors import QZOError
from qzo.objective.evaluate import Evaluation


@dataclass(frozen=True)
class Result:
    """What a run ended with.

    Attributes:
        steps: Steps done.
        best_step: The step whose scales were kept.
        before: Evaluation of the base, if it was done in this call.
        after: Evaluation of the scales that were kept, if there is evaluation data.
        changed_fraction: Scales that differ from the base in the file's dtype.
        skipped_steps: Steps of this call without a finite loss.
        seconds: Time of the steps of this call.
        warnings: What to know before the result is used; empty if all is well.
    """

    steps: int
    best_step: int
    before: Evaluation | None
    after: Evaluation | None
    changed_fraction: float
    skipped_steps: int
    seconds: float
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        evaluations = {
            "before": None if self.before is None else self.before.to_dict(),
            "after": None if self.after is None else self.after.to_dict(),
        }
        return {**asdict(self), **evaluations}


def ahead_warnings(folders: Sequence[str], journal: str) -> tuple[str, ...]:
    """Say in words which snapshots were set aside; nothing where there are none."""
    if not folders:
        return ()
    return (
        f"{', '.join(folders)}: set aside, because {journal} ended before these snapshots; the "
        "missing steps were taken again. Delete the folders when nothing in them is needed",
    )


class DivergedError(QZOError):
    """The loss was not finite too many times in a row."""


class StoppedError(QZOError):
    """A signal asked for the end of a run; it can be continued."""
