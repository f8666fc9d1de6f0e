"""Rows of a text and its label: from every kind of file to a trained and evaluated run."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest
import yaml
from support.command import Run, command
from support.runs import json_lines, tiny_checkpoint, tiny_recipe, tiny_trainer, write_lines

from qzo.data.examples import ExampleSet, from_records
from qzo.data.labelled import Labelling, found_labelling, labelled_prompts
from qzo.errors import CheckpointError, ConfigError, DataError
from qzo.model.load import load_tokenizer
from qzo.run.launch import data_sets
from qzo.run.recipe.read import recipe

WORDS = {"ham": "ham", "spam": "spam"}
ROWS: list[dict[str, Any]] = [
    {"text": f"mail {i} {'ab'[i % 2] * 3}", "label": ("ham", "spam")[i % 2]} for i in range(12)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("labelled") / "base")


def prompts(rows: list[dict[str, Any]], **keys: Any) -> list[tuple[str, str, list[str]]]:
    """Return prompt, completion and candidates of each row."""
    found = found_labelling(rows, Labelling(**keys))
    assert found is not None
    made = labelled_prompts(rows, found, range(1, len(rows) + 1))
    return [(row["prompt"], row["completion"], row["candidates"]) for row in made]


def refused(rows: list[dict[str, Any]], **keys: Any) -> str:
    with pytest.raises(DataError) as error:
        prompts(rows, **keys)
    return str(error.value)


def labelled(labels: list[Any], column: str = "label") -> list[dict[str, Any]]:
    return [{"text": f"row {i}", column: label} for i, label in enumerate(labels, start=1)]


def test_a_class_is_chosen_after_the_text() -> None:
    assert prompts([{"text": "Win!", "label": "spam"}, {"text": "Hi", "label": "ham"}]) == [
        ("Win!\nLabel:", " spam", [" ham", " spam"]),
        ("Hi\nLabel:", " ham", [" ham", " spam"]),
    ]


def test_columns_template_and_words_can_be_given() -> None:
    rows = [{"title": "A", "body": "{b}", "kind": 1}, {"title": "C", "body": "d", "kind": 0}]

    made = prompts(
        rows,
        text_column="body",
        label_column="kind",
        template="{title}: {text} {{was}}\n",
        label_words={"1": "good", "0": "bad"},
    )

    assert made == [
        ("A: {b} {was}\n", "good", ["good", "bad"]),  # behind white space nothing is added
        ("C: d {was}\n", "bad", ["good", "bad"]),
    ]


def test_a_sentence_is_a_text_too() -> None:
    rows = [{"sentence": "fine", "label": "pos"}, {"sentence": "bad", "label": "neg"}]
    assert prompts(rows)[0] == ("fine\nLabel:", " pos", [" neg", " pos"])


@pytest.mark.parametrize("labels", [[0, 1], ["0", "1"], [0.0, 1.0], [1, 0]])
def test_numbers_take_the_words_that_are_given(labels: list[Any]) -> None:
    made = prompts(labelled(labels), label_words={"0": "bad", "1": "good"})
    assert [completion for _, completion, _ in made] == [
        {0: " bad", 1: " good"}[int(label)] for label in labels
    ]


@pytest.mark.parametrize(
    ("labels", "found"), [([0, 1], "0, 1"), (["0", "1"], "0, 1"), ([True, False], "false, true")]
)
def test_numbers_without_names_are_refused_with_the_key_to_write(
    labels: list[Any], found: str
) -> None:
    first = found.split(", ")
    row = 1 + [str(label).lower() for label in labels].index(first[0])
    assert refused(labelled(labels)) == (
        f"label: expected the names of classes, got {found}, as in 'row {row}' with label "
        f"{first[0]}; say what they mean, such as label_words: {{{first[0]}: negative, "
        f"{first[1]}: positive}}"
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", None], "got 1; name another"),
        ([None, None], "got 0; name another"),
        ([f"class {i}" for i in range(201)], "got 201; name another"),
        (["a", "b", None], "row 3: label: expected a name or a whole number, got nothing; label"),
        (["a", "b", ""], "row 3: label: expected a name or a whole number, got nothing; label"),
        (["a", "b", 0.5], "row 3: label: expected a name or a whole number, got float 0.5; label"),
        (["a", "b", ["a"]], "row 3: label: expected a name or a whole number, got list ['a']; "),
    ],
)
def test_labels_that_are_none_are_refused(labels: list[Any], message: str) -> None:
    assert message in refused(labelled(labels))


def test_a_label_without_a_word_names_the_row() -> None:
    assert refused(labelled(["ham", "spam", "eggs"]), label_words=WORDS) == (
        "row 3: label: expected one of ham, spam, got eggs; give it a word in label_words, or "
        "remove the row"
    )


@pytest.mark.parametrize("text", [None, " ", 3.5, float("nan"), ["a"]])
def test_a_text_that_is_none_names_the_row(text: Any) -> None:
    rows = [*labelled(["a", "b"]), {"text": text, "label": "a"}]
    if text == 3.5:  # a table's number among texts
        assert prompts(rows)[2][0] == "3.5\nLabel:"
        return
    assert refused(rows).startswith("row 3: text: expected some text, got ")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Review:", "columns of the data in braces, got 'Review:'; its columns are text"),
        ("{title}", "columns of the data in braces, got {title}; its columns are text"),
        ("{text} {label}", "a prompt without its answer, got {label}; use text"),
        ("{text.__class__}", "columns of the data in braces, got {text.__class__}; its columns"),
        ("{text!r}", "nothing but a column in braces, got '{text!r}'"),
        ("{text:>9}", "nothing but a column in braces, got '{text:>9}'"),
        ("{text", "names of columns in braces, got '{text': "),
        ("{}", "columns of the data in braces, got {}; its columns are text"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template: str, message: str) -> None:
    got = refused(labelled(["a", "b"]), template=template)
    assert got.startswith(f"template: expected {message}")


def test_a_column_that_is_not_there_is_refused() -> None:
    want = "label_column: expected a column of the data, got 'kind'; its columns are text, label"
    assert refused(labelled(["a", "b"]), label_column="kind") == want


@pytest.mark.parametrize("column", ["labels", "category", "Sentiment", "label_text"])
def test_what_looks_like_a_label_is_not_passed_over(column: str) -> None:
    rows = labelled(["a", "b"], column)
    with pytest.raises(DataError) as error:
        found_labelling(rows, Labelling())
    assert str(error.value) == (
        f"columns: 'text' and {column!r} look like a text and its label; write label_column: "
        f"{column} to learn the label, or label_column: none to learn the text alone"
    )
    assert found_labelling(rows, Labelling(label_column="none")) is None
    assert len(prompts(rows, label_column=column)) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a"},
        {"text": "a", "url": "b", "id": 3},
        {"prompt": "a", "completion": "b", "text": "c", "label": "d"},
        {"messages": [], "text": "c", "label": "d"},
        {"question": "a", "label": "b"},
    ],
)
def test_other_layouts_are_as_they_were(row: dict[str, Any]) -> None:
    assert found_labelling([row], Labelling()) is None


def test_any_column_can_be_the_text_that_is_learned(base: Path) -> None:
    rows = [{"body": "abc", "label": "x"}, {"body": "de", "label": "y"}]
    given = Labelling(text_column="body", label_column="none")
    tokenizer = load_tokenizer(base)

    got = from_records(rows, tokenizer, max_length=40, labelling=given)

    want = from_records([{"text": "abc"}, {"text": "de"}], tokenizer, max_length=40)
    assert got == want
    assert got.loss == "language_modeling"


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        return write_lines(path, rows)
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def sets(base: Path, folder: Path, data: str, **keys: Any) -> tuple[ExampleSet, ExampleSet | None]:
    made = tiny_recipe(base, folder / "run", data=data, **keys)
    return data_sets(made, load_tokenizer(base))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_classes(base: Path, tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, ROWS)

    train, held_out = sets(base, tmp_path, str(path))

    assert held_out is not None
    assert (train.loss, held_out.loss) == ("classification", "classification")
    assert len(train.examples) + len(held_out.examples) == len(ROWS)
    assert (
        train.labelling == held_out.labelling == Labelling("text", "label", "{text}\nLabel:", WORDS)
    )
    by_hand = [
        {
            "prompt": f"{row['text']}\nLabel:",
            "completion": f" {row['label']}",
            "candidates": [" ham", " spam"],
        }
        for row in ROWS
    ]
    plain = from_records(by_hand, load_tokenizer(base), max_length=40)
    assert set(train.examples) | set(held_out.examples) == set(plain.examples)


def test_the_names_of_a_hub_data_set_are_its_words(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    rows = [{"text": f"film {i}", "label": i % 2} for i in range(20)]
    stored = datasets.Dataset.from_list(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stored)

    train, _ = sets(base, tmp_path, "owner/films")

    assert train.labelling is not None
    assert train.labelling.label_words == {"neg": "neg", "pos": "pos"}
    assert train.questions[0].answers in {("neg",), ("pos",)}


def test_evaluation_has_the_classes_of_training(base: Path, tmp_path: Path) -> None:
    data, other = write(tmp_path, "csv", ROWS), tmp_path / "eval.jsonl"
    write_lines(other, [row for row in ROWS if row["label"] == "spam"])

    train, held_out = sets(base, tmp_path, str(data), eval_data=str(other), num_train_examples=1)

    assert held_out is not None
    assert len(train.examples) == 1
    assert {len(example.candidates) for example in (*train.examples, *held_out.examples)} == {2}
    assert {example.label for example in held_out.examples} == {1}


def test_a_run_says_how_its_rows_were_read_and_goes_on(base: Path, tmp_path: Path) -> None:
    def run(**more: Any) -> None:
        keys = {"lr_scheduler_type": "constant", "resume_from_checkpoint": True, **more}
        tiny_trainer(base, tmp_path, train=ROWS, evaluation=ROWS[:4], **keys).train()

    run(template="{text} is", max_steps=2)
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    run(template="{text} is", max_steps=3)

    names = ("text_column", "label_column", "template", "label_words")
    assert [written[name] for name in names] == ["text", "label", "{text} is", WORDS]
    assert sum("losses" in line for line in json_lines(tmp_path / "journal.jsonl")) == 3
    with pytest.raises(CheckpointError, match=r"^data: "):
        run(template="{text}", max_steps=4)


@pytest.fixture
def qzo(capsys: pytest.CaptureFixture[str]) -> Run:
    return command(capsys)


def test_eval_reads_rows_as_the_run_did(base: Path, tmp_path: Path, qzo: Run) -> None:
    run, data = tmp_path / "run", write(tmp_path, "csv", ROWS)
    keys: dict[str, Any] = {"template": "{text} is", "label_words": {"spam": "bad", "ham": "good"}}
    trainer = tiny_trainer(base, run, train=ROWS, max_steps=1, **keys)
    trainer.train()
    want = trainer.evaluate(trainer.train_set)

    as_run = qzo("eval", base, "--adapter", run, "--data", data, "--json")
    by_hand = qzo(
        *("eval", base, "--adapter", run, "--data", data, "--json"),
        *("--template", "{text} was", "--label-words", "{spam: dull, ham: fine}"),
    )

    assert (as_run.code, by_hand.code) == (0, 0), as_run.err + by_hand.err
    # the adapter holds the scales in half precision
    assert as_run.value["loss"] == pytest.approx(want.loss, abs=1e-3)
    assert as_run.value["accuracy"] is not None
    assert abs(by_hand.value["loss"] - want.loss) > 1e-3


def test_eval_refuses_what_a_task_has_itself(qzo: Run) -> None:
    ran = qzo("eval", "x", "--task", "sst2", "--label-words", "{0: a, 1: b}")
    assert (ran.code, ran.err) == (
        1,
        "qzo: --label-words cannot be combined with --task: a task has its own prompts and "
        "answers; leave out one of them\n",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({0: False, 1: True}, "a word for each label, in quotes as in {0: 'no', 1: 'yes'}, got "),
        ({0: "a", 1: "a"}, "two or more different words, got "),
        ({0: "a"}, "two or more different words, got "),
        ({}, "two or more different words, got "),
    ],
)
def test_words_that_are_none_are_refused(words: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe({"model": "m", "output_dir": "o", "data": "d", "label_words": words})
    assert str(error.value).startswith(f"label_words: expected {message}")


def test_a_task_has_its_own_prompts() -> None:
    with pytest.raises(ConfigError) as error:
        recipe({"model": "m", "output_dir": "o", "task": "sst2", "template": "{text}"})
    assert str(error.value) == (
        "template: '{text}' cannot be combined with task 'sst2': a task has its own prompts and "
        "answers; leave out template, or the task"
    )


def test_labels_of_a_recipe_are_text() -> None:
    made = recipe(
        {"model": "m", "output_dir": "o", "data": "d", "label_words": {0: "ham", True: "spam"}}
    )
    assert made.label_words == {"0": "ham", "true": "spam"}
    assert json.loads(made.model_dump_json())["label_words"] == made.label_words
