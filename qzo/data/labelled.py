"""Labelled text: rows of a text and its class, as prompts with the names of the classes to choose.

A row ``{text: Win a prize!, label: spam}`` becomes a prompt, its text, a line break and ``Label:``,
with the candidates `` ham`` and `` spam``. Columns, template and words may be given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any

from qzo.data.records import Record
from qzo.errors import DataError

NO_LABEL = "none"  # as label_column: the text alone is learned
TEMPLATE = "{text}\nLabel:"
_TEXT_COLUMNS = ("text", "sentence")
_LABEL_COLUMN = "label"
# What data sets call a label besides ``label``; such a column is never passed over in silence.
_LIKE_LABELS = (
    *("labels", "label_text", "class", "classes", "category", "target", "sentiment", "intent"),
)
_LABELS_MAX = 200
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class Labelling:
    """How rows of text and label are read; what is None is found in the data.

    Attributes:
        text_column: Where the text is; the template calls it ``{text}`` too.
        label_column: Where the label is; ``none`` for rows whose label is not to be learned.
        template: The prompt, with columns in braces.
        label_words: The answer for each label, in the order of the candidates.
    """

    text_column: str | None = None
    label_column: str | None = None
    template: str | None = None
    label_words: Mapping[str, str] | None = None

    @property
    def is_given(self) -> bool:
        """Whether anything was said."""
        return self != OPEN


OPEN = Labelling()


def found_labelling(records: Sequence[Record], given: Labelling) -> Labelling | None:
    """Return how these rows are to be read, with nothing left open; None if they have no labels.

    Args:
        records: Rows; the first says which columns there are.
        given: What is known already.
    """
    columns = _columns(records[0], given)
    if columns is None:
        return None
    text, label = columns
    template = TEMPLATE if given.template is None else given.template
    result = Labelling(text, label, template, given.label_words)
    _check_template(result, records[0])
    return result if result.label_words else replace(result, label_words=_words(records, result))


def unlabelled(given: Labelling) -> Labelling:
    """Return how rows are read that have no labels to learn."""
    return replace(given, label_column=NO_LABEL)


def labelled_prompts(
    records: Sequence[Record], labelling: Labelling, numbers: Sequence[int]
) -> list[Record]:
    """Return rows with ``prompt``, ``completion`` and ``candidates`` beside their own columns.

    Args:
        records: Rows; not modified.
        labelling: From ``found_labelling``.
        numbers: Of the rows, in messages.

    Raises:
        DataError: A row has no text, or a label without a word.
    """
    words = labelling.label_words
    assert words is not None
    assert labelling.template is not None
    space = "" if labelling.template[-1:].isspace() else " "
    answers = {label: word if word[:1].isspace() else space + word for label, word in words.items()}
    prompts = []
    for number, record in zip(numbers, records, strict=True):
        try:
            label = _label(record, labelling)
            completion = answers[label]
            prompt = _prompt(record, labelling)
        except KeyError:
            raise DataError(
                f"row {number}: {labelling.label_column}: expected one of {', '.join(words)}, got "
                f"{label}; give it a word in label_words, or remove the row"
            ) from None
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error
        own = {"prompt": prompt, "completion": completion, "candidates": list(answers.values())}
        prompts.append({**record, **own})
    return prompts


def key_of(label: Any) -> str | None:
    """Return the name of a label in ``label_words``; None for what is no label."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():  # as tables with gaps store them
        label = int(label)
    if isinstance(label, int):
        return str(label)
    return label.strip() or None if isinstance(label, str) else None


def _columns(record: Record, given: Labelling) -> tuple[str, str] | None:
    """Return the columns of text and label, or None where none is to be learned.

    Raises:
        DataError: A column is not there.
    """
    text = given.text_column or next((name for name in _TEXT_COLUMNS if name in record), None)
    label = given.label_column or (_LABEL_COLUMN if _LABEL_COLUMN in record else None)
    is_other = "messages" in record or {"prompt", "completion"} <= {*record}
    is_other = is_other and (not given.is_given or text not in record)
    if label == NO_LABEL or is_other:
        return None
    if text is None and label is not None and given.template is not None:
        text = next(iter(_fields(given.template)), None)
    if label is None or text is None:
        _check_no_label(record, text)
        return None
    for key, column in (("text_column", text), ("label_column", label)):
        if column not in record:
            raise DataError(
                f"{key}: expected a column of the data, got {column!r}; its columns are "
                f"{', '.join(map(str, record))}"
            )
    return text, label


def _check_no_label(record: Record, text: str | None) -> None:
    """Refuse a text beside what looks like its label.

    Raises:
        DataError: There is such a column.
    """
    like = [name for name in record if str(name).lower() in _LIKE_LABELS]
    if text in record and like:
        raise DataError(
            f"columns: {text!r} and {like[0]!r} look like a text and its label; write "
            f"label_column: {like[0]} to learn the label, or label_column: {NO_LABEL} to learn the "
            "text alone"
        )


def _words(records: Sequence[Record], labelling: Labelling) -> dict[str, str]:
    """Return the labels of the data as their own words, in alphabetical order.

    Raises:
        DataError: There are fewer than two, too many, or numbers without names.
    """
    column = labelling.label_column
    assert column is not None
    keys = sorted({key for record in records if (key := key_of(record.get(column))) is not None})
    if not 2 <= len(keys) <= _LABELS_MAX:
        raise DataError(
            f"{column}: expected 2 to {_LABELS_MAX} different labels, got {len(keys)}; name "
            f"another label_column, or write label_column: {NO_LABEL} to learn the text alone"
        )
    unnamed = [key for key in keys if _is_bare(key)]
    if unnamed:
        row = next(record for record in records if key_of(record.get(column)) == unnamed[0])
        words = ", ".join(f"{key}: {word}" for key, word in zip(keys, _EXAMPLES, strict=False))
        more = ", ..." if len(keys) > len(_EXAMPLES) else ""
        raise DataError(
            f"{column}: expected the names of classes, got {', '.join(keys[:5])}, as in "
            f"{_shown(row[labelling.text_column or ''])} with {column} {unnamed[0]}; say what they "
            f"mean, such as label_words: {{{words}{more}}}"
        )
    return {key: key for key in keys}


_EXAMPLES = ("negative", "positive", "neutral")  # words, where only numbers are known


def _is_bare(key: str) -> bool:
    """Whether a label says nothing to a model: a number, true or false."""
    try:
        float(key)
    except ValueError:
        return key in {"true", "false"}
    return True


def _label(record: Record, labelling: Labelling) -> str:
    column = labelling.label_column
    assert column is not None
    key = key_of(record.get(column))
    if key is None:
        raise DataError(
            f"{column}: expected a name or a whole number, got {_kind(record.get(column))}; "
            "label the row or remove it"
        )
    return key


def _prompt(record: Record, labelling: Labelling) -> str:
    assert labelling.template is not None
    parts = []
    for literal, name, _, _ in Formatter().parse(labelling.template):
        parts.append(literal)
        if name is not None:
            parts.append(_value(record, _column(name, labelling)))
    return "".join(parts)


def _value(record: Record, column: str) -> str:
    value = record.get(column)
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return str(value)
    if not isinstance(value, str) or not value.strip():
        kind = "blank text" if isinstance(value, str) else _kind(value)
        raise DataError(f"{column}: expected some text, got {kind}; fill it or remove the row")
    return value


def _column(name: str, labelling: Labelling) -> str:
    """Return the column that a name in the template stands for."""
    assert labelling.text_column is not None
    return labelling.text_column if name == "text" else name


def _fields(template: str) -> list[str]:
    """Return the names in the braces of a template.

    Raises:
        DataError: A brace stands alone, or there is more than a name between two.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"template: expected names of columns in braces, got {template!r}: {error}; a brace of "
            "the text is written twice"
        ) from error
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise DataError(f"template: expected nothing but a column in braces, got {template!r}")
    return [name for _, name, _, _ in parts if name is not None]


def _check_template(labelling: Labelling, record: Record) -> None:
    """Refuse a template that cannot be filled.

    Raises:
        DataError: It names no column, one that is missing, or the label.
    """
    assert labelling.template is not None
    fields = _fields(labelling.template)
    columns = [_column(name, labelling) for name in fields]
    missing = [name for name, column in zip(fields, columns, strict=True) if column not in record]
    usable = ", ".join(str(column) for column in record if column != labelling.label_column)
    if not fields or missing:
        got = f"{{{missing[0]}}}" if missing else repr(labelling.template)
        raise DataError(
            f"template: expected columns of the data in braces, got {got}; its columns are {usable}"
        )
    if labelling.label_column in columns:
        raise DataError(
            f"template: expected a prompt without its answer, got {{{labelling.label_column}}}; "
            f"use {usable}"
        )


def _kind(value: Any) -> str:
    return "nothing" if value is None or value == "" else f"{type(value).__name__} {value!r}"


def _shown(value: Any) -> str:
    text = str(value)
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")
