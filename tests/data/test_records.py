import json
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support.forked import read_bomb

from qzo.data.records import READERS, read_hub, read_json, read_records
from qzo.errors import DataError

ROWS = [{"prompt": "Größe?", "completion": "12"}, {"prompt": 'a "b"\nc', "completion": " d"}]


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def write_parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


CSV = 'prompt,completion\nGröße?,12\n"a ""b""\nc"," d"\n'
WRITERS: dict[str, Callable[[Path], Path]] = {
    ".jsonl": lambda path: write(
        path,
        '{"prompt": "Größe?", "completion": "12"}\n\n'
        '{"prompt": "a \\"b\\"\\nc", "completion": " d"}',
    ),
    ".json": lambda path: write(
        path,
        '[{"prompt": "Größe?", "completion": "12"},'
        '{"prompt": "a \\"b\\"\\nc", "completion": " d"}]',
    ),
    ".csv": lambda path: write(path, CSV),
    ".tsv": lambda path: write(path, CSV.replace(",", "\t")),
    ".parquet": write_parquet,
}


def refusal(message: str) -> Any:
    return pytest.raises(DataError, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize("suffix", list(READERS))
def test_read_records_gives_the_same_rows_from_every_kind_of_file(
    suffix: str, tmp_path: Path
) -> None:
    assert len(READERS) == 5
    assert read_records(WRITERS[suffix](tmp_path / f"data{suffix}")) == ROWS
    assert read_records(WRITERS[suffix](tmp_path / f"DATA{suffix.upper()}")) == ROWS


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_read_records_ignores_a_byte_order_mark_and_windows_line_ends(
    suffix: str, tmp_path: Path
) -> None:
    path = WRITERS[suffix](tmp_path / f"data{suffix}")
    content = path.read_bytes().replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + content)

    rows = read_records(path)

    assert [row["prompt"].replace("\r", "") for row in rows] == [row["prompt"] for row in ROWS]


def test_read_records_keeps_unicode_line_separators_in_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", '{"text": "one\u2028two\x85"}\n')

    assert read_records(path) == [{"text": "one\u2028two\x85"}]


def test_read_records_can_take_quotes_in_tsv_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "data.tsv", 'sentence\tlabel\n"good\t1\nbad"\t0\n')

    rows = read_records(path, is_quoted=False)

    assert rows == [{"sentence": '"good', "label": "1"}, {"sentence": 'bad"', "label": "0"}]


def test_read_records_refuses_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    with refusal(f"{path}: expected a file, got nothing there; check the path"):
        read_records(path)


def test_read_records_refuses_a_folder_named_like_a_file(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.mkdir()
    message = f"{path}: expected a file that can be read, got 'Is a directory'; check the path"
    with refusal(message):
        read_records(path)


def test_read_records_refuses_another_kind_of_file(tmp_path: Path) -> None:
    path = write(tmp_path / "data.txt", "text")
    message = (
        f"{path}: expected a name that ends in .jsonl, .json, .csv, .tsv, .parquet, "
        "got 'data.txt'; convert the file or rename it"
    )
    with refusal(message):
        read_records(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("b.jsonl", "\n\n"), ("c.json", "[]"), ("d.csv", ""), ("e.tsv", "a\tb\n")],
)
def test_read_records_refuses_a_file_without_rows(name: str, content: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    message = f"{path}: expected at least one row, got none; is this the right file?"
    with refusal(message):
        read_records(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_read_records_names_the_line_that_is_not_utf8(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(b"\xef\xbb\xbftext\nGr\xf6\xdfe\n")
    message = f"{path}: expected UTF-8 text, got byte 0xf6 in line 2; save the file as UTF-8"
    with refusal(message):
        read_records(path)


def test_read_records_names_the_line_of_bad_json(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", '{"text": "a"}\n\n{"text": "b"\n')
    message = (
        f"{path}: expected one JSON object per line, got \"Expecting ',' delimiter\" in line 3; "
        "correct that line"
    )
    with refusal(message):
        read_records(path)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("value", "reason"),
    [(r'"\ud800"', r"surrogates not allowed"), (DEEP, r"recursion"), ("1" * 5000, r"4300 digits")],
    ids=["surrogate", "deep", "long"],
)
def test_read_records_refuses_json_that_nothing_can_use(
    tmp_path: Path, value: str, reason: str
) -> None:
    lines, whole = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text('{"text": "x"}\n{"text": ' + value + "}\n")
    whole.write_text('[{"text": ' + value + "}]")

    message = rf"^{lines}: expected one JSON object per line, got .*{reason}.* in line 2; .*$"
    with pytest.raises(DataError, match=message):
        read_records(lines)
    with pytest.raises(DataError, match=rf"^{whole}: expected JSON, got .*{reason}.*; .*$"):
        read_records(whole)


def test_read_records_takes_a_whole_surrogate_pair(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(r'{"text": "\ud83d\ude00"}' + "\n")
    assert read_records(tmp_path / "rows.jsonl") == [{"text": "\U0001f600"}]


def test_read_records_names_the_line_that_is_no_object(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", '{"text": "a"}\n["b"]\n')
    message = (
        f"{path}: expected one JSON object per line, got list in line 2; "
        "write each row as {column: value}"
    )
    with refusal(message):
        read_records(path)


INDENTED = json.dumps(ROWS, indent=2)
LINES = "\n".join(json.dumps(row) for row in ROWS)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        INDENTED,
        INDENTED.replace("\n", "\r\n"),
        LINES,
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
        "\n\n".join(json.dumps(row, indent=2) for row in ROWS) + "\n\n",
        "\n".join(json.dumps(row).replace(", ", ",\n ") for row in ROWS),
        json.dumps({"version": "1", "data": ROWS}),
        json.dumps({"version": "1", "data": ROWS}, indent=1),
    ],
)
def test_read_records_reads_what_json_is_written_as(
    content: str, suffix: str, tmp_path: Path
) -> None:
    assert read_records(write(tmp_path / f"data{suffix}", content)) == ROWS


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize(
    ("suffix", "content"), [(".jsonl", LINES), (".json", INDENTED), (".csv", CSV)]
)
def test_read_records_reads_utf16_with_its_mark(
    suffix: str, content: str, encoding: str, tmp_path: Path
) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""  # utf-16 writes it itself
    path = tmp_path / f"data{suffix}"
    path.write_bytes((mark + content).encode(encoding))

    assert read_records(path) == ROWS


def test_a_row_with_a_list_of_messages_alone_in_its_file_is_a_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}]}

    assert read_records(write(tmp_path / "data.jsonl", json.dumps(row))) == [row]


def test_read_records_names_the_line_of_bad_json_over_several_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", '[\n{"text": "a"},\n{"text" "b"}\n]')
    with refusal(
        f"{path}: expected JSON, got \"Expecting ':' delimiter\" in line 3; correct that line"
    ):
        read_records(path)


def test_read_records_refuses_json_that_is_no_row(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", '"text"')
    message = (
        f"{path}: expected one JSON object per line, got str in line 1; "
        "write each row as {column: value}"
    )
    with refusal(message):
        read_records(path)


def test_read_records_refuses_a_json_list_of_other_things(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", '[{"text": "a"}, "b"]')
    message = (
        f"{path}: expected a list of objects, got str as item 2; "
        "write each row as {column: value}"
    )
    with refusal(message):
        read_records(path)


def test_read_records_names_the_line_with_a_wrong_number_of_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", "prompt,completion\na,b\na, and b,c\n")
    message = (
        f"{path}: expected 2 columns as in the header, got 3 in line 3; "
        "quote fields that hold the separator"
    )
    with refusal(message):
        read_records(path)


def test_read_records_refuses_two_columns_of_one_name(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", "text,text\na,b\n")
    message = f"{path}: expected different column names, got text, text; rename one"
    with refusal(message):
        read_records(path)


def test_read_records_refuses_a_quote_that_does_not_close(tmp_path: Path) -> None:
    path = write(tmp_path / "data.tsv", 'text\n"a\nb\n')
    message = (
        f"{path}: expected rows of fields, got 'unexpected end of data' in line 3; "
        "correct the quotes or use .jsonl"
    )
    with refusal(message):
        read_records(path)


def test_read_records_refuses_a_damaged_parquet_file(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", "no parquet")
    start = re.escape(f"{path}: expected a Parquet file, got ")
    with pytest.raises(DataError, match=f"^{start}.*; write the file again$"):  # pyarrow's words
        read_records(path)


def parquet_bomb(path: Path, kind: str) -> None:
    """Write a small file whose values take hundreds of MiB."""
    one = pyarrow.array(["ab" * 512])
    texts = pyarrow.DictionaryArray.from_arrays([0] * 300_000, one)
    column: Any = {
        "one text in many rows": lambda: texts,
        "one text in a list": lambda: pyarrow.ListArray.from_arrays([0, 300_000], texts),
        "one long text": lambda: pyarrow.array(["a" * 300_000_000]),
        "many numbers": lambda: pyarrow.array(bytes(300_000_000), pyarrow.uint8()),
    }[kind]()
    table = pyarrow.table({"prompt": column})
    pyarrow.parquet.write_table(table, path, compression="zstd", row_group_size=10**9)
    assert path.stat().st_size < 2**20


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["one text in many rows", "one text in a list", "one long text", "many numbers"]
)
def test_read_records_refuses_parquet_that_unpacks_to_far_more(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bomb.parquet"
    parquet_bomb(path, kind)

    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        message, growth = pool.apply(read_bomb, (path, 100_000_000))

    assert message == (
        f"{path}: expected values of at most 100000000 bytes, got more; keep fewer rows, or write "
        "them as JSONL"
    )
    assert growth < 150_000_000


def test_read_records_refuses_parquet_values_that_python_does_not_have(tmp_path: Path) -> None:
    texts = pyarrow.array([b"x", b"\xff"]).cast(pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, texts.buffers())
    far = pyarrow.array([2**62], pyarrow.int64()).cast(pyarrow.timestamp("us"))
    for number, column in enumerate((text, far)):
        path = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        with pytest.raises(DataError, match=rf"^{path}: expected a Parquet file, got .*; .*$"):
            read_records(path)


def test_read_records_keeps_texts_that_repeat(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}] * (i % 3), "n": i} for i in range(3000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")

    assert read_records(tmp_path / "a.parquet") == rows


def test_read_json_gives_any_value(tmp_path: Path) -> None:
    assert read_json(write(tmp_path / "a.json", '{"data": [1]}')) == {"data": [1]}


def test_read_hub_asks_for_one_split_and_never_runs_code(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    assert read_hub("owner/name", config="subset", split="validation") == ROWS
    assert asked == [(("owner/name", "subset"), {"split": "validation"})]


@pytest.mark.parametrize("kind", [ConnectionError, FileNotFoundError, ValueError, RuntimeError])
def test_read_hub_turns_its_errors_into_one_line(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise kind("first line\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = (
        "owner/name: expected a local path, or a data set on the hub with a split 'train', "
        "got 'first line'; check the name and the connection"
    )
    with refusal(message):
        read_hub("owner/name", split="train")
