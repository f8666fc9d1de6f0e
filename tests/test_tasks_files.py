"""Files are written here in the official layouts, a row or two each."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qzo.errors import ConfigError, DataError
from qzo.tasks import examples_from_file, load_task, source

SST2_TSV = 'sentence\tlabel\n"bad\t0\na good one \t1\n'
SST2_ROWS = [{"sentence": '"bad', "label": 0}, {"sentence": "a good one ", "label": 1}]
RTE_JSONL = '{"premise": "P.", "hypothesis": "H.", "label": "not_entailment", "idx": 0}\n'
RTE_TSV = "index\tsentence1\tsentence2\tlabel\n0\tP.\tH.\tnot_entailment\n"
RTE_ROWS = [{"premise": "P.", "hypothesis": "H.", "label": 1}]
BOOLQ_JSONL = '{"question": "q", "passage": "P", "idx": 0, "label": true}\n'
BOOLQ_ROWS = [{"passage": "P", "question": "q", "label": 1}]
COPA_ROWS = [{"premise": "P.", "choice1": "A.", "choice2": "B.", "question": "cause", "label": 1}]
COPA_JSONL = json.dumps({**COPA_ROWS[0], "idx": 0})
ANSWERS = [{"answer_start": 0, "text": "a1"}, {"answer_start": 3, "text": "a2"}]
QUESTIONS = [{"id": "1", "question": "Q1", "answers": ANSWERS}]
SQUAD_JSON = json.dumps(
    {
        "version": "1.1",
        "data": [{"title": "T", "paragraphs": [{"context": "C", "qas": QUESTIONS}]}],
    }
)
SQUAD_ROWS = [{"title": "T", "context": "C", "question": "Q1", "answers": ("a1", "a2")}]


def refusal(message: str) -> Any:
    return pytest.raises(DataError, match=f"^{re.escape(message)}$")


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "split", "file", "content", "rows"),
    [
        ("sst2", "train", "train.tsv", SST2_TSV, SST2_ROWS),
        ("sst2", "validation", "dev.tsv", SST2_TSV, SST2_ROWS),
        ("rte", "train", "train.jsonl", RTE_JSONL, RTE_ROWS),
        ("rte", "validation", "val.jsonl", RTE_JSONL, RTE_ROWS),
        ("rte", "validation", "dev.tsv", RTE_TSV, RTE_ROWS),
        ("boolq", "validation", "val.jsonl", BOOLQ_JSONL, BOOLQ_ROWS),
        ("copa", "test", "test.jsonl", COPA_JSONL, COPA_ROWS),
        ("squad", "train", "train-v1.1.json", SQUAD_JSON, SQUAD_ROWS),
        ("squad", "validation", "dev-v1.1.json", SQUAD_JSON, SQUAD_ROWS),
    ],
)
def test_task_reads_its_official_files(
    name: str, split: str, file: str, content: str, rows: list[Any], tmp_path: Path
) -> None:
    path = write(tmp_path / file, content)
    task = load_task(name, str(tmp_path))

    assert task.examples(split) == rows
    assert examples_from_file(task, path) == rows


@pytest.mark.parametrize(
    ("name", "row", "rows"),
    [
        ("sst2", {"sentence": "s", "label": 1, "idx": 0}, [{"sentence": "s", "label": 1}]),
        ("rte", {"premise": "P.", "hypothesis": "H.", "label": 1, "idx": 0}, RTE_ROWS),
        ("boolq", {"question": "q", "passage": "P", "label": 1, "idx": 0}, BOOLQ_ROWS),
        ("copa", COPA_ROWS[0], COPA_ROWS),
        (
            "squad",
            {
                "id": "1",
                "title": "T",
                "context": "C",
                "question": "Q1",
                "answers": {"text": ["a1", "a2"], "answer_start": [0, 3]},
            },
            SQUAD_ROWS,
        ),
    ],
)
def test_task_reads_rows_as_on_the_hub(
    name: str, row: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def read_hub(hub_id: str, *, config: str | None, split: str) -> list[Any]:
        asked.append((hub_id, config, split))
        return [row]

    monkeypatch.setattr(source, "read_hub", read_hub)
    on_the_hub = {
        "sst2": ("nyu-mll/glue", "sst2"),
        "rte": ("aps/super_glue", "rte"),
        "boolq": ("aps/super_glue", "boolq"),
        "copa": ("aps/super_glue", "copa"),
        "squad": ("rajpurkar/squad", None),
    }

    assert load_task(name).examples("validation") == rows
    assert load_task(name, "me/mine").examples("train") == rows
    _, config = on_the_hub[name]
    assert asked == [(*on_the_hub[name], "validation"), ("me/mine", config, "train")]
    path = write(tmp_path / "rows.jsonl", json.dumps(row))
    assert examples_from_file(load_task(name), path) == rows


def test_task_prefers_the_superglue_file_where_a_folder_has_both(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", RTE_TSV)
    write(tmp_path / "train.jsonl", RTE_JSONL.replace("P.", "from SuperGLUE"))

    (example,) = load_task("rte", str(tmp_path)).examples("train")

    assert example["premise"] == "from SuperGLUE"


def test_load_task_refuses_an_unknown_name() -> None:
    message = (
        "task: expected one of sst2, rte, boolq, copa, squad, got 'mnli'; "
        "for data of your own give a file instead"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load_task("mnli")


def test_task_names_the_files_that_it_looked_for(tmp_path: Path) -> None:
    write(tmp_path / "train32.jsonl", RTE_JSONL)
    write(tmp_path / "README.md", "")
    message = (
        f"{tmp_path}: expected train.jsonl or train.tsv for split 'train', "
        "got README.md, train32.jsonl; put the official file there"
    )
    with refusal(message):
        load_task("rte", str(tmp_path)).examples("train")


def test_task_says_that_a_folder_is_empty(tmp_path: Path) -> None:
    message = (
        f"{tmp_path}: expected dev-v1.1.json for split 'validation', got an empty folder; "
        "put the official file there"
    )
    with refusal(message):
        load_task("squad", str(tmp_path)).examples("validation")


def test_task_refuses_a_file_for_a_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "train.tsv", SST2_TSV)
    message = f"{path}: expected a folder to take split 'train' from, got a file; name its folder"
    with refusal(message):
        load_task("sst2", str(path)).examples("train")


def test_task_refuses_an_unknown_split(tmp_path: Path) -> None:
    message = (
        "split: expected one of train, validation, got 'test'; "
        "name a file instead to read other data"
    )
    with refusal(message):
        load_task("squad", str(tmp_path)).examples("test")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "sst2",
            {"index": "0", "sentence": "s"},
            "label: expected one of 0, 1, got None; test files without labels cannot be used",
        ),
        (
            "sst2",
            {"sentence": "s", "label": -1},
            "label: expected one of 0, 1, got -1; test files without labels cannot be used",
        ),
        (
            "rte",
            {"premise": "P", "hypothesis": "H", "label": "neutral"},
            "label: expected one of entailment, 0, not_entailment, 1, got 'neutral'; "
            "test files without labels cannot be used",
        ),
        (
            "rte",
            {"premise": "P", "label": "entailment"},
            "column: expected hypothesis or sentence2, got premise, label; is this the right task?",
        ),
        (
            "boolq",
            {"passage": 3, "question": "q", "label": True},
            "passage: expected a string, got int; correct the file",
        ),
        (
            "copa",
            {**COPA_ROWS[0], "question": "reason"},
            "question: expected effect or cause, got 'reason'; correct the file",
        ),
        (
            "squad",
            {"title": "T", "context": "C", "question": "Q", "answers": []},
            "answers: expected at least one answer with its text, got []; use SQuAD 1.1, not 2.0",
        ),
        (
            "squad",
            {"title": "T", "context": "C", "question": "Q", "answers": {"text": []}},
            "answers: expected at least one answer with its text, got {'text': []}; "
            "use SQuAD 1.1, not 2.0",
        ),
        (
            "squad",
            {"title": "T", "context": "C", "question": "Q", "answers": "a1"},
            "answers: expected at least one answer with its text, got 'a1'; use SQuAD 1.1, not 2.0",
        ),
    ],
)
def test_examples_from_file_names_the_row_and_column_that_are_wrong(
    name: str, row: Any, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", json.dumps(row))
    with refusal(f"{path}, row 1: {message}"):
        examples_from_file(load_task(name), path)


@pytest.mark.parametrize(
    ("content", "error"),
    [({"data": [{"title": "T"}]}, "KeyError('paragraphs')"), ({}, "KeyError('data')")],
)
def test_squad_refuses_another_json_file(content: Any, error: str, tmp_path: Path) -> None:
    path = write(tmp_path / "dev-v1.1.json", json.dumps(content))
    message = (
        f"{path}: expected the nested lists data, paragraphs and qas of SQuAD 1.1, got {error}; "
        "is this the right file?"
    )
    with refusal(message):
        load_task("squad", str(tmp_path)).examples("validation")
