"""The user's own data: records from a file, a folder or the hub, and their tokenised examples.

A record has one of these layouts, told apart by its columns, the first that fits:

- ``prompt`` and ``completion``: the completion is learned. With a third column ``candidates``, a
  list of answers that holds the completion, the record is a classification example.
- ``messages``: a list of ``{role, content}``; the assistant's turns are learned.
- ``text`` and ``label``: the class is chosen after the text; see ``labelled``, which makes prompts
  and candidates of such rows.
- ``text``: all of it is learned.

Completions and texts end with the end-of-text token, so that generation learns to stop.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

from qzo.data.records import READERS, Record, read_hub, read_records
from qzo.data.tokenize import (
    EncodedExample,
    Texts,
    Tokenizer,
    conversation_texts,
    encode_candidates,
    encode_messages,
    encode_text,
)
from qzo.errors import DataError

Item = TypeVar("Item")
_BATCH_ROWS = 256  # tokenized in one call
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Batch(NamedTuple):
    """Records that were tokenized together.

    Attributes:
        records: The rows.
        examples: One for each row; but for long texts several, and for blank ones none.
        numbers: Row that each example is from.
    """

    records: Sequence[Record]
    examples: list[EncodedExample]
    numbers: list[int]


def is_file(data: str) -> bool:
    """Return whether data is one file, which has no splits."""
    return Path(data).expanduser().is_file()


def load_records(source: str | Path, split: str | None = None) -> list[Record]:
    """Read the records of a file, a folder or a data set on the hub, in their own order.

    In a folder a split is the files named after it, ``train.jsonl`` or
    ``train-00000-of-00002.parquet``, in the folder itself or in ``data`` below it.

    Args:
        source: A path, or a hub id.
        split: Which split of a folder or a hub data set; ``train`` if not given. A folder with one
            file needs none.

    Raises:
        DataError: The source is missing, empty or malformed, or has no such split.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, split)
    is_hub_id = _HUB_ID.fullmatch(str(source)) and path.suffix.lower() not in READERS
    if is_hub_id and not path.exists():
        return read_hub(str(source), split=split or "train", is_named=True)
    if split is not None and path.exists():
        raise DataError(
            f"{path}: expected a folder or a hub id to take split {split!r} from, got a file; "
            "name the file of that split"
        )
    return read_records(path)


def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, *, max_length: int
) -> list[EncodedExample]:
    """Encode records of any layout but labelled text, in order; see ``encoded_batches``."""
    batches = encoded_batches(records, Texts(tokenizer), max_length=max_length)
    return [example for batch in batches for example in batch.examples]


def encoded_batches(
    records: Sequence[Record],
    texts: Texts,
    *,
    max_length: int,
    numbers: Sequence[int] | None = None,
    num_examples: int | None = None,
) -> Iterator[Batch]:
    """Encode records batch by batch, each tokenized at once.

    Args:
        records: Rows of one layout, which the first row decides; not modified.
        texts: Tokenizes; holds what the present batch needs.
        max_length: The largest number of tokens of a row of an example.
        numbers: Those of the rows in their file; counted from 1 unless given.
        num_examples: Enough; no batch is begun behind so many.

    Yields:
        Batches, in order.

    Raises:
        DataError: A column is missing or holds something else; the message names the row. Or
            there is no example.
    """
    if not records:
        raise DataError("data: expected at least one row, got none; is this the right file?")
    encode, expect = _find_layout(records[0])
    numbers, count = numbers or range(1, len(records) + 1), 0
    for start in range(0, len(records), _BATCH_ROWS):
        batch = Batch(records[start : start + _BATCH_ROWS], [], [])
        texts.forget()
        expect(batch.records, texts)
        for number, record in zip(numbers[start:], batch.records, strict=False):
            try:
                made = encode(record, texts, max_length)
            except DataError as error:
                raise DataError(f"row {number}: {error}") from error
            batch.examples.extend(made)
            batch.numbers.extend([number] * len(made))
        yield batch
        count += len(batch.examples)
        if num_examples is not None and count >= num_examples:
            break
    if count == 0:
        raise DataError("text: expected at least one text that is not blank, got none; add one")


def hold_out(
    examples: Sequence[Item], *, num_eval: int, seed: int
) -> tuple[list[Item], list[Item]]:
    """Split examples in two, for training and for evaluation; both keep their order.

    Held out are the ``num_eval`` indices with the smallest SHA-256 of ``seed:index``: the same on
    every machine and Python version. Split records rather than encoded examples where a record may
    give several examples, or parts of one text land on both sides.

    Args:
        examples: Anything in a fixed order; not modified.
        num_eval: How many to hold out.
        seed: Chooses which ones.

    Returns:
        The training part, then the part held out.

    Raises:
        DataError: Nothing would be left for training, or ``num_eval`` is negative.
    """
    if not 0 <= num_eval < len(examples):
        raise DataError(
            f"num_eval: expected 0 to {len(examples) - 1} of the {len(examples)} examples, "
            f"got {num_eval}; hold out fewer or add data"
        )
    keys = [hashlib.sha256(f"{seed}:{index}".encode()).digest() for index in range(len(examples))]
    held_out = set(sorted(range(len(examples)), key=keys.__getitem__)[:num_eval])
    train = [item for index, item in enumerate(examples) if index not in held_out]
    return train, [item for index, item in enumerate(examples) if index in held_out]


def _read_folder(folder: Path, split: str | None) -> list[Record]:
    files = sorted(
        path
        for place in (folder, folder / "data")
        for path in place.glob("*")
        if path.suffix.lower() in READERS
    )
    wanted = re.compile(rf"{re.escape(split or 'train')}([-_.].*)?")
    chosen = files if split is None and len(files) == 1 else []
    chosen = chosen or [path for path in files if wanted.fullmatch(path.stem)]
    if not chosen or len({path.suffix.lower() for path in chosen}) > 1:
        found = ", ".join(path.name for path in chosen or files) or "no data file"
        raise DataError(
            f"{folder}: expected files of one kind named after the split {split or 'train'!r}, "
            f"got {found}; name the file itself"
        )
    return [record for path in chosen for record in read_records(path)]


_Encode: TypeAlias = Callable[[Record, Texts, int], list[EncodedExample]]
_Expect: TypeAlias = Callable[[Sequence[Record], Texts], None]


def _expect_completions(records: Sequence[Record], texts: Texts) -> None:
    """Tokenize what ``_encode_completion`` will ask for; what is no text it will refuse itself."""
    expected = []
    for record in records:
        prompt, answers = record.get("prompt"), record.get("candidates") or []
        answers = [record.get("completion"), *(answers if isinstance(answers, list) else [])]
        if isinstance(prompt, str):
            expected.append(prompt)
            expected += [prompt + answer for answer in answers if isinstance(answer, str)]
    texts.expect(expected)


def _expect_conversations(records: Sequence[Record], texts: Texts) -> None:
    expected = []
    for record in records:
        if _is_conversation(record.get("messages")):
            with suppress(DataError):
                expected += conversation_texts(texts, record["messages"])
    texts.expect(expected, add_special_tokens=False)


def _is_conversation(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(message, Mapping)
        and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in messages
    )


def _expect_documents(records: Sequence[Record], texts: Texts) -> None:
    found = [record.get("text") for record in records]
    texts.expect(text for text in found if isinstance(text, str) and text.strip())


def _encode_completion(record: Record, tokenizer: Texts, max_length: int) -> list[EncodedExample]:
    prompt, completion = _filled_text(record, "prompt"), _filled_text(record, "completion")
    candidates = _candidates(record, completion)
    example = encode_candidates(
        tokenizer,
        prompt,
        candidates=candidates,
        label=candidates.index(completion),
        max_length=max_length,
        add_eos=len(candidates) == 1,
    )
    return [example]


def _encode_conversation(record: Record, tokenizer: Texts, max_length: int) -> list[EncodedExample]:
    messages = _value(record, "messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"messages: expected a list of {{role, content}}, got {_kind(messages)}; "
            "use .jsonl or .parquet"
        )
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise DataError(
                f"messages: expected a list of {{role, content}}, got {_kind(message)} as message "
                f"{number}; write each message as an object"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(
                    f"messages: expected a string as {key} of message {number}, "
                    f"got {_kind(message.get(key))}; only text can be learned"
                )
    return [encode_messages(tokenizer, messages, max_length=max_length)]


def _encode_document(record: Record, tokenizer: Texts, max_length: int) -> list[EncodedExample]:
    text = _text(record, "text")
    if not text.strip():
        return []
    return encode_text(tokenizer, text, max_length=max_length, add_eos=True)


_LAYOUTS: dict[tuple[str, ...], tuple[_Encode, _Expect]] = {
    ("prompt", "completion"): (_encode_completion, _expect_completions),
    ("messages",): (_encode_conversation, _expect_conversations),
    ("text",): (_encode_document, _expect_documents),
}


def _find_layout(record: Record) -> tuple[_Encode, _Expect]:
    for columns, functions in _LAYOUTS.items():
        if all(column in record for column in columns):
            return functions
    layouts = "; or ".join(" and ".join(columns) for columns in _LAYOUTS)
    raise DataError(
        f"columns: expected {layouts}, got {', '.join(map(str, record)) or 'none'}; "
        "rename the columns"
    )


def _candidates(record: Record, completion: str) -> list[str]:
    candidates = record.get("candidates")
    if candidates is None:
        return [completion]
    if not isinstance(candidates, list) or not all(isinstance(one, str) for one in candidates):
        raise DataError(
            f"candidates: expected a list of strings, got {_kind(candidates)}; "
            "use .jsonl or .parquet"
        )
    if len(candidates) < 2 or len(set(candidates)) < len(candidates):
        raise DataError(
            f"candidates: expected two or more different answers, got {candidates}; "
            "name every answer once"
        )
    if completion not in candidates:
        raise DataError(
            f"completion: expected one of the candidates {candidates}, got {completion!r}; "
            "add it to the candidates"
        )
    return candidates


def _value(record: Record, column: str) -> Any:
    if column not in record:
        found = ", ".join(map(str, record))
        raise DataError(
            f"{column}: expected this column as in row 1, got {found}; "
            "give all rows the same columns"
        )
    return record[column]


def _text(record: Record, column: str) -> str:
    value = _value(record, column)
    if not isinstance(value, str):
        raise DataError(f"{column}: expected a string, got {_kind(value)}; put it in quotes")
    return value


def _filled_text(record: Record, column: str) -> str:
    text = _text(record, column)
    if not text.strip():
        raise DataError(f"{column}: expected some text, got {text!r}; fill it or remove the row")
    return text


def _kind(value: Any) -> str:
    if value == []:
        return "an empty list"
    return "null" if value is None else type(value).__name__
