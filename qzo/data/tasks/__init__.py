"""The tasks of MeZO and QZO, SST-2, RTE, BoolQ, COPA, SQuAD and TREC, and E2E: one file each."""

from pathlib import Path

from qzo.data.tasks.boolq import BoolQ
from qzo.data.tasks.copa import Copa
from qzo.data.tasks.e2e import E2E
from qzo.data.tasks.files import Example
from qzo.data.tasks.rte import RTE
from qzo.data.tasks.squad import SQuAD
from qzo.data.tasks.sst2 import SST2
from qzo.data.tasks.task import Kind, Loss, Metric, Task, encode_task_example
from qzo.data.tasks.trec import TREC
from qzo.errors import ConfigError

__all__ = [
    "TASKS",
    "Example",
    "Kind",
    "Loss",
    "Metric",
    "Task",
    "encode_task_example",
    "examples_from_file",
    "load_task",
]

TASKS: dict[
    str,
    type[SST2] | type[RTE] | type[BoolQ] | type[Copa] | type[SQuAD] | type[TREC] | type[E2E],
] = {
    "sst2": SST2,
    "rte": RTE,
    "boolq": BoolQ,
    "copa": Copa,
    "squad": SQuAD,
    "trec": TREC,
    "e2e": E2E,
}


def load_task(name: str, place: str | None = None, *, is_prompted: bool = True) -> Task:
    """Make a task by its name; nothing is read yet.

    Args:
        name: A key of ``TASKS``.
        place: A folder with the data set's official files, a hub id, or None for the data set's
            own place on the hub.
        is_prompted: Whether prompts have the words of the task's template.

    Raises:
        ConfigError: There is no task of that name.
    """
    if name not in TASKS:
        raise ConfigError(
            f"task: expected one of {', '.join(TASKS)}, got {name!r}; "
            "for data of your own give a file instead"
        )
    return TASKS[name](place, is_prompted=is_prompted)


def examples_from_file(task: Task, path: str | Path, split: str = "validation") -> list[Example]:
    """Read examples of a task from one file, whatever its name.

    Args:
        task: Says how to read the file.
        path: A file in an official layout, or with a row per example in any record format.
        split: What for: ``train`` keeps each row an example where a question has several.
    """
    return task.source.read_file(Path(path).expanduser(), split)
