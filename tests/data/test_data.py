import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.runs import write_lines
from transformers import PreTrainedTokenizerBase

from qzo.data import load as data
from qzo.data.chat import num_shared
from qzo.data.examples import from_encoded, from_records, split_records
from qzo.data.load import encode_records, hold_out, load_records
from qzo.errors import DataError

BOS, EOS = 1, 2


class Characters(PreTrainedTokenizerBase):
    """A tokenizer with one token per character, its code point."""

    bos_token_id = BOS
    eos_token_id = EOS

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        self.chat_template = "one line per message"

    def __call__(
        self, text: str | list[str], *, add_special_tokens: bool = True, verbose: bool = True
    ) -> Mapping[str, Any]:
        del verbose
        if isinstance(text, list):
            return {"input_ids": [[BOS] * add_special_tokens + codes(one) for one in text]}
        return {"input_ids": [BOS] * add_special_tokens + codes(text)}

    def apply_chat_template(  # type: ignore[override]  # the arguments that are used
        self,
        conversation: list[dict[str, str]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
    ) -> str:
        assert not tokenize
        lines = [f"{message['role'][0]}>{message['content']}|\n" for message in conversation]
        return "".join(lines) + "a>" * add_generation_prompt


def codes(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def refusal(message: str) -> Any:
    return pytest.raises(DataError, match=f"^{re.escape(message)}$")


def write(path: Path, content: str = '{"text": "a"}\n') -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def test_load_records_reads_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "reviews.csv", "prompt,completion\nGood?,yes\n")

    assert load_records(path) == [{"prompt": "Good?", "completion": "yes"}]
    assert load_records(str(path)) == load_records(path)


def test_load_records_reads_the_only_file_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt")
    write(tmp_path / "reviews.jsonl")

    assert load_records(tmp_path) == [{"text": "a"}]


@pytest.mark.parametrize("below", ["", "data/"])
def test_load_records_reads_all_files_of_a_split_in_order(below: str, tmp_path: Path) -> None:
    for number in (1, 0):
        write(tmp_path / f"{below}train-0000{number}-of-00002.jsonl", f'{{"text": "t{number}"}}')
    write(tmp_path / f"{below}trainer.jsonl", '{"text": "other"}')
    write(tmp_path / f"{below}validation.jsonl", '{"text": "v"}')

    assert load_records(tmp_path) == [{"text": "t0"}, {"text": "t1"}]
    assert load_records(tmp_path, "train") == [{"text": "t0"}, {"text": "t1"}]
    assert load_records(tmp_path, "validation") == [{"text": "v"}]


def test_load_records_refuses_a_split_that_a_folder_lacks(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    write(tmp_path / "dev.jsonl")
    message = (
        f"{tmp_path}: expected files of one kind named after the split 'test', "
        "got dev.jsonl, train.jsonl; name the file itself"
    )
    with refusal(message):
        load_records(tmp_path, "test")


def test_load_records_refuses_a_split_in_two_kinds_of_files(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    write(tmp_path / "train.csv")
    message = (
        f"{tmp_path}: expected files of one kind named after the split 'train', "
        "got train.csv, train.jsonl; name the file itself"
    )
    with refusal(message):
        load_records(tmp_path)


def test_load_records_refuses_a_folder_without_data(tmp_path: Path) -> None:
    message = (
        f"{tmp_path}: expected files of one kind named after the split 'train', "
        "got no data file; name the file itself"
    )
    with refusal(message):
        load_records(tmp_path)


def test_load_records_refuses_to_take_a_split_from_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "reviews.jsonl")
    message = (
        f"{path}: expected a folder or a hub id to take split 'test' from, got a file; "
        "name the file of that split"
    )
    with refusal(message):
        load_records(path, "test")


@pytest.mark.parametrize("name", ["reviews.jsonl", "a/b/c", "../reviews"])
def test_load_records_takes_what_is_no_hub_id_for_a_path(name: str) -> None:
    with refusal(f"{name}: expected a file, got nothing there; check the path"):
        load_records(name)


def test_load_records_takes_other_names_for_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_hub(hub_id: str, *, split: str, is_named: bool) -> list[dict[str, Any]]:
        assert is_named
        return [{"text": f"{hub_id} {split}"}]

    monkeypatch.setattr(data, "read_hub", read_hub)

    assert load_records("owner/name") == [{"text": "owner/name train"}]
    assert load_records("squad", "validation") == [{"text": "squad validation"}]


def test_encode_records_learns_a_completion_and_its_end() -> None:
    records = [{"prompt": "ab", "completion": "cd", "other": 1}]

    (example,) = encode_records(records, Characters(), max_length=9)

    assert example.rows == ((BOS, *codes("abcd")),)
    assert example.candidates[0].positions == (2, 3, 4)
    assert example.candidates[0].targets == (*codes("cd"), EOS)


def test_encode_records_chooses_between_candidates_without_an_end() -> None:
    records = [{"prompt": "ab", "completion": "n", "candidates": ["y", "n"]}]

    (example,) = encode_records(records, Characters(), max_length=9)

    assert example.rows == ((BOS, *codes("ab")),)
    assert [candidate.targets for candidate in example.candidates] == [(ord("y"),), (ord("n"),)]
    assert example.label == 1


def test_encode_records_learns_what_the_assistant_says() -> None:
    records = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    ]

    (example,) = encode_records(records, Characters(), max_length=99)

    assert example.rows == (tuple(codes("u>x|\na>y")),)
    assert example.candidates[0].positions == (6, 7)
    assert example.candidates[0].targets == tuple(codes("y|"))


def test_encode_records_learns_all_of_a_text_in_chunks() -> None:
    records = [{"text": "abc"}, {"text": " \n"}, {"text": "d"}]

    examples = encode_records(records, Characters(), max_length=3)

    assert [example.rows for example in examples] == [
        ((BOS, *codes("ab")),),
        ((ord("c"),),),
        ((BOS, ord("d")),),
    ]
    assert [example.candidates[0].targets for example in examples] == [
        tuple(codes("abc")),
        (EOS,),
        (ord("d"), EOS),
    ]


def test_encode_records_prefers_prompt_and_completion_to_other_layouts() -> None:
    record = {"text": "t", "messages": [], "prompt": "p", "completion": "c"}

    (example,) = encode_records([record], Characters(), max_length=9)

    assert example.rows == ((BOS, ord("p"), ord("c")),)


GOOD = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "p"},
            "completion: expected this column as in row 1, got prompt; "
            "give all rows the same columns",
        ),
        (
            {"prompt": "", "completion": "c"},
            "prompt: expected some text, got ''; fill it or remove the row",
        ),
        (
            {"prompt": "p", "completion": " \n"},
            "completion: expected some text, got ' \\n'; fill it or remove the row",
        ),
        (
            {"prompt": "p", "completion": 12},
            "completion: expected a string, got int; put it in quotes",
        ),
        (
            {"prompt": None, "completion": "c"},
            "prompt: expected a string, got null; put it in quotes",
        ),
        (
            {**GOOD, "candidates": '["c", "d"]'},
            "candidates: expected a list of strings, got str; use .jsonl or .parquet",
        ),
        (
            {**GOOD, "candidates": ["c", 1]},
            "candidates: expected a list of strings, got list; use .jsonl or .parquet",
        ),
        (
            {**GOOD, "candidates": ["c"]},
            "candidates: expected two or more different answers, got ['c']; name every answer once",
        ),
        (
            {**GOOD, "candidates": ["c", "d", "d"]},
            "candidates: expected two or more different answers, got ['c', 'd', 'd']; "
            "name every answer once",
        ),
        (
            {**GOOD, "candidates": ["a", "b"]},
            "completion: expected one of the candidates ['a', 'b'], got 'c'; "
            "add it to the candidates",
        ),
        (
            {"prompt": "p", "completion": "long answer"},
            "answer 'long answer': expected at most 8 tokens, so that the end of the prompt fits "
            "before it, got 12; raise max_length or shorten the answer",
        ),
    ],
)
def test_encode_records_names_the_row_of_a_bad_completion(
    record: dict[str, Any], message: str
) -> None:
    with refusal(f"row 2: {message}"):
        encode_records([GOOD, record], Characters(), max_length=9)


TALK = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            "hello",
            "messages: expected a list of {role, content}, got str; use .jsonl or .parquet",
        ),
        (
            [],
            "messages: expected a list of {role, content}, got an empty list; "
            "use .jsonl or .parquet",
        ),
        (
            [*TALK, "z"],
            "messages: expected a list of {role, content}, got str as message 3; "
            "write each message as an object",
        ),
        (
            [{"from": "user", "content": "x"}],
            "messages: expected a string as role of message 1, got null; only text can be learned",
        ),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            "messages: expected a string as content of message 1, got list; "
            "only text can be learned",
        ),
        (
            TALK[:1],
            "messages: expected a message of the assistant to learn from, got roles user; "
            "add one or remove the row",
        ),
    ],
)
def test_encode_records_names_the_row_of_bad_messages(messages: Any, message: str) -> None:
    with refusal(f"row 2: {message}"):
        encode_records([{"messages": TALK}, {"messages": messages}], Characters(), max_length=9)


def test_encode_records_names_the_row_of_a_bad_text() -> None:
    with refusal("row 2: text: expected a string, got float; put it in quotes"):
        encode_records([{"text": "a"}, {"text": float("nan")}], Characters(), max_length=9)


def test_encode_records_names_the_columns_found_and_the_layouts() -> None:
    message = (
        "columns: expected prompt and completion; or messages; or text, got question, answer; "
        "rename the columns"
    )
    with refusal(message):
        encode_records([{"question": "q", "answer": "a"}], Characters(), max_length=9)


def test_encode_records_refuses_an_empty_list() -> None:
    message = "data: expected at least one row, got none; is this the right file?"
    with refusal(message):
        encode_records([], Characters(), max_length=9)


def test_encode_records_refuses_only_blank_texts() -> None:
    message = "text: expected at least one text that is not blank, got none; add one"
    with refusal(message):
        encode_records([{"text": ""}, {"text": "\n"}], Characters(), max_length=9)


def test_hold_out_gives_the_same_two_parts_on_every_machine() -> None:
    train, held_out = hold_out("abcdefghij", num_eval=3, seed=0)

    # printf '0:INDEX' | sha256sum, the three smallest are 7, 4 and 9
    assert "".join(held_out) == "ehj"
    assert sorted([*train, *held_out]) == list("abcdefghij")
    assert train == sorted(train)


def test_hold_out_depends_on_the_seed() -> None:
    parts = {tuple(hold_out(range(100), num_eval=10, seed=seed)[1]) for seed in range(20)}

    assert len(parts) == 20


@pytest.mark.parametrize("num_eval", [-1, 3, 4])
def test_hold_out_leaves_something_to_train_on(num_eval: int) -> None:
    assert hold_out("abc", num_eval=0, seed=0) == (["a", "b", "c"], [])
    message = (
        f"num_eval: expected 0 to 2 of the 3 examples, got {num_eval}; hold out fewer or add data"
    )
    with refusal(message):
        hold_out("abc", num_eval=num_eval, seed=0)


@pytest.mark.parametrize("entry", [{}, {"candidates": None}])
def test_rows_with_and_without_candidates_are_counted_and_refused(
    tmp_path: Path, entry: dict[str, Any]
) -> None:
    """All rows of a file, though some are held out or left out."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"p{i}", "completion": "a", "candidates": ["a", "b"]} for i in range(60)
    ]
    for place in range(0, 60, 5):
        rows[place] = {"prompt": f"p{place}", "completion": "a", **entry}
    path = write_lines(tmp_path / "rows.jsonl", rows)
    message = (
        "candidates: expected them in all rows or in none, got 48 rows with and 12 without; "
        "complete the rows to train a choice, or remove the column to train on the text of the "
        "completions"
    )

    with refusal(message):
        split_records(str(path), Characters(), max_length=99, num_eval=6, seed=0, num_train=1)
    with refusal(message):
        from_records(rows, Characters(), max_length=99)
    with refusal(message):
        from_encoded(encode_records(rows, Characters(), max_length=99))


class Counting(Characters):
    """Counts the calls, and the conversations that it renders."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.renders = 0, 0

    def __call__(self, *given: Any, **named: Any) -> Mapping[str, Any]:
        self.calls += 1
        return super().__call__(*given, **named)

    def apply_chat_template(self, *given: Any, **named: Any) -> str:
        self.renders += 1
        return super().apply_chat_template(*given, **named)


@pytest.mark.parametrize("layout", ["completion", "messages", "text"])
def test_a_batch_is_tokenized_in_one_call_and_gives_the_examples_of_its_rows(layout: str) -> None:
    layouts: dict[str, list[dict[str, Any]]] = {
        "completion": [{"prompt": f"p{i}", "completion": " a"} for i in range(300)],
        "messages": [
            {"messages": [*TALK, {"role": "user", "content": str(i)}]} for i in range(300)
        ],
        "text": [{"text": f"t{i}"} for i in range(300)],
    }
    rows = layouts[layout]
    counting = Counting()

    got = from_records(rows, counting, max_length=99)

    alone = [from_records([row], Characters(), max_length=99) for row in rows]
    assert list(got.examples) == [one.examples[0] for one in alone]
    assert list(got.questions) == [one.questions[0] for one in alone if one.questions]
    assert counting.calls == 2  # a batch of 256 rows, and the rest


def test_a_conversation_is_rendered_as_few_times_as_it_takes() -> None:
    """As it is, with another answer, and up to the answer."""
    counting = Counting()

    from_records([{"messages": TALK}], counting, max_length=99)

    assert counting.renders == 3


def test_rows_behind_the_last_example_asked_for_are_not_read(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": f"t{i}"} for i in range(600)]
    rows[400] = {"text": None}
    counting = Counting()

    got = from_records(rows, counting, max_length=99, num_examples=5)

    assert got.examples == from_records(rows[:5], Characters(), max_length=99).examples
    assert counting.calls == 1
    with refusal("row 401: text: expected a string, got null; put it in quotes"):
        from_records(rows, Characters(), max_length=99)


@pytest.mark.parametrize("num_train", [None, 7])
def test_a_bad_row_is_called_as_in_its_file_though_rows_were_held_out(
    tmp_path: Path, num_train: int | None
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"p{i}", "completion": "a"} for i in range(60)]
    train, _ = hold_out(range(60), num_eval=6, seed=0)
    number = train[-1] + 1
    assert number > len(train)
    rows[number - 1] = {"prompt": "p", "completion": None}
    path = write_lines(tmp_path / "rows.jsonl", rows)
    common: dict[str, Any] = {"max_length": 99, "num_eval": 6, "seed": 0, "num_train": num_train}

    with refusal(f"row {number}: completion: expected a string, got null; put it in quotes"):
        split_records(str(path), Characters(), **common)


@pytest.mark.parametrize(
    ("first", "second"),
    [("", ""), ("abc", ""), ("abc", "abc"), ("abcd", "abxd"), ("xbc", "abc"), ([1, 2], [1, 3, 4])],
)
def test_what_two_sequences_share_at_their_start(first: Any, second: Any) -> None:
    want = 0
    while want < min(len(first), len(second)) and first[want] == second[want]:
        want += 1
    assert num_shared(first, second) == num_shared(second, first) == want
