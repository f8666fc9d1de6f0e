"""Records: the rows of a data set, one dict of columns each, from a file or from the hub.

A file is read by its suffix: ``.jsonl`` and ``.json`` (an object per line, objects over several
lines, a list of them, or such a list as ``data`` of one object), ``.csv`` and ``.tsv`` (a header
line, then a row per line), ``.parquet``. Text is UTF-8, or UTF-16 with a byte order mark.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

from qzo.errors import DataError

Record: TypeAlias = dict[str, Any]

_PARQUET_BYTES_MAX = 2**30
_BATCH_ROWS = 1024
_SPACE = re.compile(r"[ \t\r\n]*")


class _PlainTab(csv.excel_tab):
    quoting = csv.QUOTE_NONE


def read_records(path: Path, *, is_quoted: bool = True) -> list[Record]:
    """Read all rows of one file, in the order of the file.

    Args:
        path: A file with one of the suffixes named above.
        is_quoted: Whether a double quote opens a quoted field in ``.tsv`` files. Spreadsheets and
            pandas write them so; GLUE's files hold plain quotes instead.

    Raises:
        DataError: The file is missing, of another kind, malformed or empty.
    """
    suffix = path.suffix.lower()
    if not path.exists():
        raise DataError(f"{path}: expected a file, got nothing there; check the path")
    if suffix not in READERS:
        raise DataError(
            f"{path}: expected a name that ends in {', '.join(READERS)}, got {path.name!r}; "
            "convert the file or rename it"
        )
    records = _read_tsv(path, is_quoted=is_quoted) if suffix == ".tsv" else READERS[suffix](path)
    if not records:
        raise DataError(f"{path}: expected at least one row, got none; is this the right file?")
    return records


def read_hub(
    hub_id: str, *, config: str | None = None, split: str, is_named: bool = False
) -> list[Record]:
    """Download one split of a data set from the Hugging Face hub, or take it from the cache.

    Code that comes with a data set is never run.

    Args:
        hub_id: The name on the hub, ``owner/name``.
        config: Which subset, for a data set that has several.
        split: Which split, as the data set names it.
        is_named: Whether classes are given by their names, where the data set has names for them.

    Raises:
        DataError: The hub cannot be reached, or has no such data set, subset or split.
    """
    import datasets

    try:
        rows = datasets.load_dataset(hub_id, config, split=split)
    except (OSError, RuntimeError, ValueError) as error:  # offline; a script; a wrong split
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{hub_id}: expected a local path, or a data set on the hub with a split {split!r}, "
            f"got {reason!r}; check the name and the connection"
        ) from error
    if is_named:
        rows = _with_names(rows)
    records: list[Record] = rows.to_list()
    return records


def _with_names(rows: Any) -> Any:
    """Put the names of classes in the place of their numbers; -1, an unknown class, is None."""
    import datasets

    for column, feature in dict(rows.features).items():
        if isinstance(feature, datasets.ClassLabel) and feature.names:
            names = dict(enumerate(feature.names))
            values = [names.get(number) for number in rows[column]]
            rows = rows.remove_columns(column).add_column(column, values)
    return rows


def read_text(path: Path, *, fallback: str | None = None) -> str:
    """Read a text file as it is; a byte order mark is dropped, line ends are kept.

    It is UTF-8, or UTF-16 if it starts with that byte order mark.

    Args:
        path: The file.
        fallback: The encoding of a file that is not UTF-8; None makes that an error.

    Raises:
        DataError: The file cannot be opened, or has another encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: expected a file that can be read, got {error.strerror!r}; check the path"
        ) from error
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        if fallback is not None:
            return content.decode(fallback)
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise DataError(
            f"{path}: expected UTF-8 text, got byte 0x{byte:02x} in line {line}; "
            "save the file as UTF-8"
        ) from error


def read_json(path: Path) -> Any:
    """Read a file that holds one JSON value.

    Raises:
        DataError: The file cannot be read or is not JSON.
    """
    text = read_text(path)
    try:
        return _parse(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: expected JSON, got {error.msg!r} in line {error.lineno}; "
            "a file with one object per line must be named .jsonl"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON, got {str(error)!r}; correct the file") from error


def _parse(text: str) -> Any:
    """Parse JSON; where a half of a surrogate pair stands alone, that is a ValueError too."""
    value = json.loads(text)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _read_json_rows(path: Path) -> list[Record]:
    text = read_text(path)
    rows = _json_values(path, text) if _is_spread(text) else _json_lines(path, text)
    if len(rows) == 1 and isinstance(rows[0], dict) and isinstance(rows[0].get("data"), list):
        rows = rows[0]["data"]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: expected a list of objects, got {type(row).__name__} as item {number}; "
                "write each row as {column: value}"
            )
    return rows


def _is_spread(text: str) -> bool:
    """Whether the first line is not a row of its own, but the beginning of a list or object."""
    first = text.lstrip().partition("\n")[0].rstrip()
    return first.startswith("[") or first.endswith(("{", ","))


def _json_values(path: Path, text: str) -> list[Any]:
    """Return the values of a file, one behind the other, or the items of its only list.

    Raises:
        DataError: It is not JSON.
    """
    decoder, values = json.JSONDecoder(), list[Any]()
    place = _next_place(text, 0)
    try:
        while place < len(text):
            value, end = decoder.raw_decode(text, place)
            values.append(value)
            place = _next_place(text, end)
        if "\\u" in text:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: expected JSON, got {error.msg!r} in line {error.lineno}; correct that line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON, got {str(error)!r}; correct the file") from error
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _next_place(text: str, place: int) -> int:
    """Return where the next value begins: behind the white space of JSON."""
    found = _SPACE.match(text, place)
    return place if found is None else found.end()


def _json_lines(path: Path, text: str) -> list[Record]:
    records = []
    # not splitlines(): JSON strings may hold U+2028 and other line ends that are no line ends here
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(
                f"{path}: expected one JSON object per line, got {reason!r} in line {number}; "
                "correct that line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: expected one JSON object per line, got {type(row).__name__} "
                f"in line {number}; write each row as {{column: value}}"
            )
        records.append(row)
    return records


def _read_csv(path: Path) -> list[Record]:
    return _read_separated(path, csv.reader(_lines(path), strict=True))


def _read_tsv(path: Path, *, is_quoted: bool = True) -> list[Record]:
    dialect = csv.excel_tab if is_quoted else _PlainTab
    return _read_separated(path, csv.reader(_lines(path), dialect, strict=True))


def _lines(path: Path) -> io.StringIO:
    return io.StringIO(read_text(path), newline="")  # the csv module splits the lines itself


def _read_separated(path: Path, reader: Any) -> list[Record]:
    records: list[Record] = []
    try:
        header: list[str] = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(
                f"{path}: expected different column names, got {', '.join(header)}; rename one"
            )
        for row in filter(None, reader):  # an empty line is no row
            if len(row) != len(header):
                raise DataError(
                    f"{path}: expected {len(header)} columns as in the header, got {len(row)} "
                    f"in line {reader.line_num}; quote fields that hold the separator"
                )
            records.append(dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise DataError(
            f"{path}: expected rows of fields, got {str(error)!r} in line {reader.line_num}; "
            "correct the quotes or use .jsonl"
        ) from error
    return records


def _read_parquet(path: Path) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    records: list[Record] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_size(path, _least_bytes(file.metadata))
            texts = _text_columns(file.metadata)
        size = 0
        # A dictionary stays one, so that a text which repeats takes its room once until counted.
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            for batch in file.iter_batches(_BATCH_ROWS):
                size += sum(_decoded_bytes(column) for column in batch.columns)
                _check_size(path, size)
                records += batch.to_pylist()
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{path}: expected a Parquet file, got {reason!r}; write the file again"
        ) from error
    return records


def _check_size(path: Path, size: int) -> None:
    """Stop before a small file of repeated values fills the memory.

    Raises:
        DataError: The values take too many bytes.
    """
    if size > _PARQUET_BYTES_MAX:
        raise DataError(
            f"{path}: expected values of at most {_PARQUET_BYTES_MAX} bytes, got more; keep fewer "
            "rows, or write them as JSONL"
        )


def _column_chunks(metadata: Any) -> list[Any]:
    places = product(range(metadata.num_row_groups), range(metadata.num_columns))
    return [metadata.row_group(group).column(column) for group, column in places]


def _least_bytes(metadata: Any) -> int:
    """Return a lower bound of the bytes that the values take, by the footer of a file."""
    return sum(max(c.total_uncompressed_size, c.num_values) for c in _column_chunks(metadata))


def _text_columns(metadata: Any) -> list[str]:
    chunks = _column_chunks(metadata)
    return sorted({c.path_in_schema for c in chunks if c.physical_type == "BYTE_ARRAY"})


def _decoded_bytes(array: Any) -> int:
    """Return the bytes of the values of an Arrow array, each text as often as it occurs."""
    import pyarrow
    import pyarrow.compute

    types = pyarrow.types
    if types.is_dictionary(array.type):
        lengths = pyarrow.compute.binary_length(array.dictionary).take(array.indices)
        return 8 * len(array) + (pyarrow.compute.sum(lengths).as_py() or 0)
    if types.is_list(array.type):
        return 8 * len(array) + _decoded_bytes(array.flatten())
    if types.is_struct(array.type):
        return 8 * len(array) + sum(_decoded_bytes(part) for part in array.flatten())
    return int(array.nbytes)


READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".jsonl": _read_json_rows,
    ".json": _read_json_rows,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
