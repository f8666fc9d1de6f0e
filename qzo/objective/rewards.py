"""What can be trained on although it has no derivative: a reward of the answer, often 0 or 1.

==============  ==========================================================  ====================
objective       reward of an example                                        the model
==============  ==========================================================  ====================
``accuracy``    1 if the likeliest candidate is the right one               chooses
``f1``          SQuAD F1 with the gold answer that fits best                writes, greedily
``exact_match`` 1 if the answer is a gold answer, but for blanks around it  writes, greedily
``reward``      what a function of the user's returns                       writes, greedily
==============  ==========================================================  ====================

"Likeliest" is by the mean log-probability of a candidate's tokens. What is minimised is minus the
mean reward over the examples of a probe; a reward that is not finite makes it NaN, and the probe
is left out.

The user's function is ``reward(prompt: str, output: str, example: dict) -> float``: ``output`` is
the text up to ``generation_stop`` or the end-of-text token, ``example`` the record, or the task's
example, with all its columns. Of a conversation the assistant's last turn is written; ``prompt`` is
what the chat template puts before it. The function may be random. The journal holds what it gave,
so a stopped run continues from exactly the scales it had; but a repeat of the run is another run.

Source: ES at Scale, arXiv 2509.24372, which trains on such rewards with many probes.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from qzo.data.examples import ExampleSet, Question
from qzo.data.tasks.squad import token_f1
from qzo.errors import ConfigError, DataError, QZOError

ObjectiveName = Literal["loss", "accuracy", "f1", "exact_match", "reward"]
WRITTEN = ("f1", "exact_match", "reward")  # objectives for which the model writes

RewardFunction = Callable[[str, str, dict[str, Any]], float]
Judge = Callable[[Question, str], float]


def load_reward(place: str) -> RewardFunction:
    """Load a function of the user's own: the file is run as Python.

    Args:
        place: ``path/to/file.py:function``.

    Raises:
        ConfigError: There is no such function, or the file cannot be run.
    """
    path, _, name = place.rpartition(":")
    if not path.endswith(".py") or not name:
        raise ConfigError(f"reward: expected path/to/file.py:function, got {place!r}")
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ConfigError(f"reward: expected the file {path}, not found")
    function = getattr(_module(file), name, None)
    if not callable(function):
        raise ConfigError(f"reward: expected a function {name!r} in {path}, not found")
    loaded: RewardFunction = function
    return loaded


def _module(file: Path) -> Any:
    name = f"qzo_reward_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # classes of the file look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"reward: {file} cannot be run: {_described(error)}") from error
    return module


def check_objective(
    objective: ObjectiveName, data: ExampleSet, reward: RewardFunction | None
) -> None:
    """Refuse data without what an objective reads.

    Raises:
        ConfigError: The function is missing.
        DataError: The examples have no candidates, or no prompts, or one of these is empty.
    """
    if objective == "reward" and reward is None:
        raise ConfigError(
            "reward: expected a function with objective 'reward', got none; run the recipe with "
            "qzo train, or give the function to Trainer(reward=...)"
        )
    if objective == "accuracy" and any(len(e.candidates) < 2 for e in data.examples):
        raise DataError(
            "objective: expected examples with candidates to choose from for 'accuracy', got one "
            "without; use 'exact_match' or give the column candidates"
        )
    if objective in WRITTEN and not data.questions:
        raise DataError(
            f"objective: expected prompt and completion, messages, or a task, for {objective!r}, "
            "got texts without prompts; rename the columns of training and evaluation data"
        )
    for row, question in enumerate(data.questions if objective in WRITTEN else (), start=1):
        if not question.prompt:
            raise DataError(
                f"row {row}: messages: expected a message in front of the assistant's last one for "
                f"{objective!r}, got none; add one or remove the row"
            )


def make_judge(objective: ObjectiveName, data: ExampleSet, reward: RewardFunction | None) -> Judge:
    """Return what gives the reward of a written answer.

    Args:
        objective: One for which the model writes.
        data: Where the questions are from; a task that is written has a score of its own.
        reward: The user's function, for ``reward``.
    """
    if objective == "exact_match":
        return exact_match
    if objective == "f1":
        task = data.task if data.is_generation else None
        return best_f1 if task is None else lambda q, text: task.score(q.example, text.strip())
    assert reward is not None
    return lambda question, text: _checked(reward, question, text)


def exact_match(question: Question, text: str) -> float:
    """Return 1 if the text is a gold answer, but for blanks around it."""
    return float(text.strip() in [answer.strip() for answer in question.answers])


def best_f1(question: Question, text: str) -> float:
    """Return the F1 with the gold answer that fits best."""
    return max(token_f1(text, answer) for answer in question.answers)


def is_right(scores: Sequence[float], label: int) -> float:
    """Return 1 if the largest score is that of the label; the first one wins a tie."""
    if not all(map(math.isfinite, scores)):
        return math.nan
    return float(max(range(len(scores)), key=scores.__getitem__) == label)


def reward_name(reward: RewardFunction) -> str:
    """Return file and name of a function, for messages."""
    name = getattr(reward, "__qualname__", type(reward).__qualname__)
    code = getattr(reward, "__code__", None)
    return name if code is None else f"{Path(code.co_filename).name}:{name}"


def _checked(reward: RewardFunction, question: Question, text: str) -> float:
    """Return the reward of a text; NaN where it is not finite.

    Raises:
        QZOError: The function fails, or gives something else than a number.
    """
    example: Mapping[str, Any] = question.example
    try:
        value: object = reward(question.prompt, text, deepcopy(dict(example)))
    except Exception as error:
        raise QZOError(
            f"{reward_name(reward)}: expected a number for the output {text[:40]!r}, got "
            f"{_described(error)}"
        ) from error
    if not isinstance(value, Real):
        raise QZOError(
            f"{reward_name(reward)}: expected a number for the output {text[:40]!r}, got "
            f"{type(value).__name__}"
        )
    try:
        number = float(value)
    except OverflowError:  # an integer beyond all floats
        return math.nan
    return number if math.isfinite(number) else math.nan


def _described(error: Exception) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
