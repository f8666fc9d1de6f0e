"""Files are written here in the official layouts, a row or two each."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.runs import write_tokenizer

from qzo.data.examples import ExampleSet, read_set
from qzo.data.tasks import examples_from_file, files, load_task
from qzo.errors import ConfigError, DataError

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
TREC_LINES = "DESC:manner How did it end ?\nABBR:exp What is N.A. ?\r\n\nNUM:dist How far : 1 ?\n"
TREC_ROWS = [
    {"text": "How did it end ?", "label": 2},
    {"text": "What is N.A. ?", "label": 0},
    {"text": "How far : 1 ?", "label": 5},
]
E2E_CSV = 'mr,ref\n"name[A], area[B]","A, in B."\nname[C],C it is.\n"name[A], area[B]",In B: A.\n'
E2E_TRAIN_ROWS = [
    {"mr": "name[A], area[B]", "refs": ("A, in B.",)},
    {"mr": "name[C]", "refs": ("C it is.",)},
    {"mr": "name[A], area[B]", "refs": ("In B: A.",)},
]
E2E_ROWS = [
    {"mr": "name[A], area[B]", "refs": ("A, in B.", "In B: A.")},
    {"mr": "name[C]", "refs": ("C it is.",)},
]


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
        ("trec", "train", "train.txt", TREC_LINES, TREC_ROWS),
        ("trec", "train", "train_5500.label", TREC_LINES, TREC_ROWS),
        ("trec", "validation", "test.txt", TREC_LINES, TREC_ROWS),
        ("trec", "validation", "TREC_10.label", TREC_LINES, TREC_ROWS),
        ("e2e", "train", "trainset.csv", E2E_CSV, E2E_TRAIN_ROWS),
        ("e2e", "validation", "devset.csv", E2E_CSV, E2E_ROWS),
        ("e2e", "test", "testset_w_refs.csv", E2E_CSV, E2E_ROWS),
    ],
)
def test_task_reads_its_official_files(
    name: str, split: str, file: str, content: str, rows: list[Any], tmp_path: Path
) -> None:
    path = write(tmp_path / file, content)
    task = load_task(name, str(tmp_path))

    assert task.examples(split) == rows
    assert examples_from_file(task, path, split) == rows


def test_trec_reads_a_file_that_is_not_utf_8_as_latin_1(tmp_path: Path) -> None:
    path = tmp_path / "train_5500.label"
    path.write_bytes(b"LOC:city Which sister\xf0city ?\n")
    utf_8 = write(tmp_path / "test.txt", "LOC:city Which caf\u00e9 ?\n")

    task = load_task("trec", str(tmp_path))

    assert task.examples("train") == [{"text": "Which sister\u00f0city ?", "label": 4}]
    assert examples_from_file(task, utf_8) == [{"text": "Which caf\u00e9 ?", "label": 4}]


@pytest.mark.parametrize("line", ["How far ?", "NUM How far ?", ":dist How far ?", "NUM:dist"])
def test_trec_names_the_line_that_is_no_question_with_a_class(line: str, tmp_path: Path) -> None:
    path = write(tmp_path / "train.txt", f"NUM:dist How far ?\n{line}\n")
    message = (
        f"{path}: expected lines COARSE:fine question, got {line!r} in line 2; "
        "is this the right file?"
    )
    with refusal(message):
        load_task("trec", str(tmp_path)).examples("train")


def test_trec_refuses_a_file_without_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "train.txt", "\n\n")
    with refusal(f"{path}: expected at least one row, got none; is this the right file?"):
        load_task("trec", str(tmp_path)).examples("train")


def test_trec_validates_on_the_hubs_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def read_hub(hub_id: str, *, config: str | None, split: str) -> list[Any]:
        del hub_id, config
        asked.append(split)
        return [{"text": "How far ?", "coarse_label": 5, "fine_label": 40}]

    monkeypatch.setattr(files, "read_hub", read_hub)

    assert load_task("trec").examples("train") == load_task("trec").examples("validation")
    assert asked == ["train", "test"]


@pytest.mark.parametrize(
    ("name", "coarse_label"),
    [("ABBR", 0), ("ENTY", 1), ("DESC", 2), ("HUM", 3), ("LOC", 4), ("NUM", 5)],
)
def test_trec_numbers_its_classes_as_the_hub_does(
    name: str, coarse_label: int, tmp_path: Path
) -> None:
    lines = write(tmp_path / "test.txt", f"{name}:x Q ?\n")
    row = write(tmp_path / "r.jsonl", json.dumps({"text": "Q ?", "coarse_label": coarse_label}))
    task = load_task("trec")

    want = [{"text": "Q ?", "label": coarse_label}]
    assert examples_from_file(task, lines) == examples_from_file(task, row) == want


def test_read_set_keeps_the_rows_of_a_file_to_train_on_and_joins_them_to_evaluate(
    tmp_path: Path,
) -> None:
    tokenizer: Any = write_tokenizer(tmp_path)
    path = write(tmp_path / "devset.csv", E2E_CSV)

    def read(split: str, **options: Any) -> ExampleSet:
        common: dict[str, Any] = {"tokenizer": tokenizer, "max_length": 200}
        return read_set(task="e2e", data=str(path), split=split, **common, **options)

    def asked(split: str, **options: Any) -> list[Any]:
        return [question.example for question in read(split, **options).questions]

    assert asked("train") == E2E_TRAIN_ROWS
    assert asked("validation") == E2E_ROWS
    assert asked("validation", num_examples=1) == E2E_ROWS[:1]
    assert len(read("train").examples) == 3
    (prompted,) = read("train").examples[0].rows
    (bare,) = read("train", is_prompted=False).examples[0].rows
    assert len(prompted) - len(bare) == len("Data: ") + len("\nText: ") - len("\n")


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
        ("trec", {"text": "How far : 1 ?", "coarse_label": 5, "fine_label": 40}, TREC_ROWS[2:]),
        (
            "e2e",
            {"meaning_representation": "name[C]", "human_reference": "C it is."},
            E2E_ROWS[1:],
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

    monkeypatch.setattr(files, "read_hub", read_hub)
    on_the_hub = {
        "sst2": ("nyu-mll/glue", "sst2"),
        "rte": ("aps/super_glue", "rte"),
        "boolq": ("aps/super_glue", "boolq"),
        "copa": ("aps/super_glue", "copa"),
        "squad": ("rajpurkar/squad", None),
        "trec": ("CogComp/trec", None),
        "e2e": ("tuetschek/e2e_nlg", None),
    }
    validation = "test" if name == "trec" else "validation"

    assert load_task(name).examples("validation") == rows
    assert load_task(name, "me/mine").examples("train") == rows
    _, config = on_the_hub[name]
    assert asked == [(*on_the_hub[name], validation), ("me/mine", config, "train")]
    path = write(tmp_path / "rows.jsonl", json.dumps(row))
    assert examples_from_file(load_task(name), path) == rows


def test_task_prefers_the_superglue_file_where_a_folder_has_both(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", RTE_TSV)
    write(tmp_path / "train.jsonl", RTE_JSONL.replace("P.", "from SuperGLUE"))

    (example,) = load_task("rte", str(tmp_path)).examples("train")

    assert example["premise"] == "from SuperGLUE"


def test_load_task_refuses_an_unknown_name() -> None:
    message = (
        "task: expected one of sst2, rte, boolq, copa, squad, trec, e2e, got 'mnli'; "
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
        (
            "trec",
            {"text": "Q ?", "coarse_label": 6},
            "coarse_label: expected one of abbr, 0, enty, 1, desc, 2, hum, 3, loc, 4, num, 5, "
            "got 6; test files without labels cannot be used",
        ),
        (
            "e2e",
            {"mr": "name[A]"},
            "column: expected ref or human_reference, got mr; is this the right task?",
        ),
        (
            "e2e",
            {"mr": "name[A]", "ref": " "},
            "ref: expected some text, got ' '; fill it or remove the row",
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
