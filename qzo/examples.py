"""A set of examples, encoded, with the loss that they are meant for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Literal

from qzo.data import encode_records, hold_out, is_file, load_records
from qzo.encoding import EncodedExample, Tokenizer, last_turn
from qzo.errors import DataError
from qzo.tasks import examples_from_file, load_task
from qzo.tasks.source import Example
from qzo.tasks.task import Task, encode_task_example

LossName = Literal["language_modeling", "classification"]


@dataclass(frozen=True)
class Question:
    """What a model writes an answer to.

    Attributes:
        prompt: The text before the answer; a ``RenderedPrompt`` if from a conversation.
        answers: Gold answers, any of which is right.
        example: The record or the task's example that it is from.
    """

    prompt: str
    answers: tuple[str, ...]
    example: Mapping[str, Any]


@dataclass(frozen=True)
class ExampleSet:
    """Examples to train or evaluate on.

    Attributes:
        examples: Encoded examples.
        loss: Which loss; under ``classification`` the candidates are classes.
        task: For tasks: what scores an output.
        questions: One per example, for tasks and records but those with ``text``; of a conversation
            it is the assistant's last turn.
    """

    examples: Sequence[EncodedExample]
    loss: LossName
    task: Task | None = None
    questions: Sequence[Question] = ()

    @property
    def is_generation(self) -> bool:
        """Answers are written, not chosen."""
        return self.task is not None and self.task.kind == "generation"

    def sha256(self) -> str:
        """Return the digest of the encoded examples and their loss."""
        digest = sha256(self.loss.encode("utf-8"))
        for example in self.examples:
            candidates = [(c.row, c.positions, c.targets) for c in example.candidates]
            digest.update(json.dumps([example.rows, candidates, example.label]).encode("utf-8"))
        return digest.hexdigest()

    def questions_sha256(self) -> str:
        """Return the digest of the questions, with all columns of their examples."""
        asked = [(q.prompt, q.answers, dict(q.example)) for q in self.questions]
        return sha256(json.dumps(asked, sort_keys=True, default=str).encode("utf-8")).hexdigest()

    def first(self, count: int | None) -> "ExampleSet":
        """Return the first examples, or all."""
        return replace(self, examples=self.examples[:count], questions=self.questions[:count])


def from_encoded(examples: Sequence[EncodedExample]) -> ExampleSet:
    """Take encoded examples as they are; with candidates they are classification examples."""
    is_classification = all(len(example.candidates) > 1 for example in examples)
    return ExampleSet(examples, "classification" if is_classification else "language_modeling")


def from_records(
    records: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, max_length: int
) -> ExampleSet:
    """Encode the user's own records; see ``from_encoded``."""
    examples = encode_records(
        [dict(record) for record in records], tokenizer, max_length=max_length
    )
    return replace(from_encoded(examples), questions=_questions_of(records, tokenizer))


def _questions_of(records: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[Question]:
    if {"prompt", "completion"} <= set(records[0]):
        return [Question(r["prompt"], (r["completion"].strip(),), dict(r)) for r in records]
    if "messages" not in records[0]:
        return []
    turns = [last_turn(tokenizer, record["messages"]) for record in records]
    return [
        Question(prompt, (answer.strip(),), dict(record))
        for (prompt, answer), record in zip(turns, records, strict=True)
    ]


def from_task(
    task: Task, examples: Sequence[Example], tokenizer: Tokenizer, *, max_length: int
) -> ExampleSet:
    """Encode examples of a task."""
    encoded = [
        encode_task_example(task, example, tokenizer=tokenizer, max_length=max_length)
        for example in examples
    ]
    return ExampleSet(encoded, task.loss, task, [_question(task, e) for e in examples])


def _question(task: Task, example: Example) -> Question:
    answers = [answer.strip() for answer in task.candidates(example)]
    if task.kind != "generation":
        answers = [answers[task.label(example)]]
    return Question(task.prompt(example), tuple(answers), example)


def read_set(
    *,
    task: str | None,
    data: str | None,
    split: str,
    tokenizer: Tokenizer,
    max_length: int,
    num_examples: int | None = None,
    is_prompted: bool = True,
) -> ExampleSet:
    """Read one split of a task, or of the user's data.

    Args:
        task: Name of a task, or None for the user's own records.
        data: A file, folder or hub id; None for a task's data on the hub.
        split: ``train`` or ``validation``, where the source has splits.
        tokenizer: A transformers tokenizer.
        max_length: Tokens of a row at most.
        num_examples: Only so many, the first.
        is_prompted: Whether the prompts of a task have the words of its template.

    Raises:
        DataError: The source is missing, empty or malformed.
    """
    if task is not None:
        is_one = data is not None and is_file(data)
        loaded = load_task(task, None if is_one else data, is_prompted=is_prompted)
        raw = examples_from_file(loaded, str(data), split) if is_one else loaded.examples(split)
        return from_task(loaded, raw[:num_examples], tokenizer, max_length=max_length)
    if data is None:
        raise DataError("data: expected a file, a folder or a hub id, or a task")
    records = load_records(data, None if is_file(data) else split)
    return from_records(records[:num_examples], tokenizer, max_length=max_length)


def split_records(
    data: str, tokenizer: Tokenizer, *, max_length: int, num_eval: int, seed: int
) -> tuple[ExampleSet, ExampleSet | None]:
    """Read the user's records and hold some out for evaluation: at most a tenth of them."""
    records = load_records(data)
    num_eval = min(num_eval, len(records) // 10)
    if num_eval == 0:
        return from_records(records, tokenizer, max_length=max_length), None
    train, held_out = hold_out(records, num_eval=num_eval, seed=seed)
    return (
        from_records(train, tokenizer, max_length=max_length),
        from_records(held_out, tokenizer, max_length=max_length),
    )
