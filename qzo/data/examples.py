"""A set of examples, encoded, with the loss that they are meant for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Literal

from qzo.data.labelled import OPEN, Labelling, found_labelling, labelled_prompts, unlabelled
from qzo.data.load import encoded_batches, hold_out, is_file, load_records
from qzo.data.tasks import examples_from_file, load_task
from qzo.data.tasks.files import Example
from qzo.data.tasks.task import Task, encode_task_example
from qzo.data.tokenize import EncodedExample, Texts, Tokenizer, last_turn
from qzo.errors import DataError

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
        labelling: How rows of text and label were read, if they are such.
        numbers: Row of the data that each example is from; empty if not from records.
    """

    examples: Sequence[EncodedExample]
    loss: LossName
    task: Task | None = None
    questions: Sequence[Question] = ()
    labelling: Labelling | None = None
    numbers: Sequence[int] = ()

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
        return replace(
            self,
            examples=self.examples[:count],
            questions=self.questions[:count],
            numbers=self.numbers[:count],
        )


def from_encoded(examples: Sequence[EncodedExample]) -> ExampleSet:
    """Take encoded examples as they are; with candidates they are classification examples."""
    is_classification = _have_candidates([len(example.candidates) > 1 for example in examples])
    return ExampleSet(examples, "classification" if is_classification else "language_modeling")


def _have_candidates(found: Sequence[bool]) -> bool:
    """Return whether all have candidates to choose from.

    Args:
        found: Whether each has.

    Raises:
        DataError: Some have and some have not.
    """
    num_with = sum(found)
    if 0 < num_with < len(found):
        raise DataError(
            f"candidates: expected them in all rows or in none, got {num_with} rows with and "
            f"{len(found) - num_with} without; complete the rows to train a choice, or remove the "
            "column to train on the text of the completions"
        )
    return all(found)


def from_records(
    records: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    labelling: Labelling = OPEN,
    numbers: Sequence[int] | None = None,
    num_examples: int | None = None,
) -> ExampleSet:
    """Encode the user's own records; see ``from_encoded``.

    Args:
        records: Rows of one layout.
        tokenizer: A transformers tokenizer.
        max_length: Tokens of a row at most.
        labelling: What is said of rows with a text and its label.
        numbers: Those of the rows in their file, for messages.
        num_examples: Only so many, the first; rows behind them are not read.
    """
    rows, numbers = [dict(record) for record in records], numbers or range(1, len(records) + 1)
    found = found_labelling(rows, labelling) if rows else None
    if found is not None:
        rows = labelled_prompts(rows, found, numbers)
    elif labelling.text_column is not None:
        rows = [{"text": row.get(labelling.text_column)} for row in rows]
    texts, questions = Texts(tokenizer), list[Question]()
    examples, owners = list[EncodedExample](), list[int]()
    for batch in encoded_batches(
        rows, texts, max_length=max_length, numbers=numbers, num_examples=num_examples
    ):
        examples += batch.examples
        owners += batch.numbers
        questions += _questions_of(batch.records, texts)
    made = replace(from_encoded(examples), questions=questions, labelling=found, numbers=owners)
    return made.first(num_examples)


def _questions_of(records: Sequence[Mapping[str, Any]], tokenizer: Texts) -> list[Question]:
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
    labelling: Labelling = OPEN,
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
        labelling: What is said of rows with a text and its label.

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
    return from_records(
        records[:num_examples],
        tokenizer,
        max_length=max_length,
        labelling=found_labelling(records, labelling) or unlabelled(labelling),
    )


def split_records(
    data: str,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    num_eval: int,
    seed: int,
    num_train: int | None = None,
    labelling: Labelling = OPEN,
) -> tuple[ExampleSet, ExampleSet | None]:
    """Read the user's records and hold some out for evaluation: at most a tenth of them.

    Args:
        data: A file, a folder or a hub id.
        tokenizer: A transformers tokenizer.
        max_length: Tokens of a row at most.
        num_eval: Records to hold out.
        seed: Chooses which ones.
        num_train: Only so many examples of the others, the first.
        labelling: What is said of rows with a text and its label.
    """
    records = load_records(data)
    if {"prompt", "completion"} <= set(records[0]):
        complete = [record for record in records if {"prompt", "completion"} <= set(record)]
        _have_candidates([record.get("candidates") is not None for record in complete])
    labelling = found_labelling(records, labelling) or unlabelled(labelling)
    num_eval = min(num_eval, len(records) // 10)
    places, held_out = list(range(len(records))), list[int]()
    if num_eval > 0:
        places, held_out = hold_out(places, num_eval=num_eval, seed=seed)

    def encoded(places: Sequence[int], num_examples: int | None = None) -> ExampleSet:
        return from_records(
            [records[place] for place in places],
            tokenizer,
            max_length=max_length,
            labelling=labelling,
            numbers=[place + 1 for place in places],
            num_examples=num_examples,
        )

    return encoded(places, num_train), encoded(held_out) if held_out else None
