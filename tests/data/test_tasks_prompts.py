"""Prompts are compared with text written out by hand, as in MeZO's templates where it has one."""

from collections.abc import Mapping
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from qzo.data.tasks import TASKS, Task, encode_task_example, load_task

SQUAD = {
    "title": "Super_Bowl_50",
    "context": "The game was played on February 7, 2016.",
    "question": " When was the game? ",
    "answers": ("February 7, 2016", "February 7"),
}
COPA = {
    "premise": "The man turned on the faucet.",
    "choice1": "The toilet filled with water.",
    "choice2": "I saw Water.",
    "question": "effect",
    "label": 1,
}
TREC = {"text": "How far is it from Denver to Aspen ? ", "label": 5}
E2E = {
    "mr": "name[Blue Spice], area[riverside]",
    "refs": ("Blue Spice is by the river.", " By the river:\nBlue Spice. "),
}


class Words(PreTrainedTokenizerBase):
    """A tokenizer with one token per word, line end or other run without spaces, numbered anew."""

    bos_token_id = 0
    eos_token_id = None

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        self.words = ["<s>"]

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, verbose: bool = True
    ) -> Mapping[str, Any]:
        del verbose
        words = text.replace("\n", " \n ").split(" ")
        self.words += [word for word in words if word and word not in self.words]
        return {"input_ids": [0] * add_special_tokens + [self.words.index(w) for w in words if w]}

    def spelled(self, tokens: tuple[int, ...]) -> str:
        return "_".join(self.words[token] for token in tokens)


@pytest.mark.parametrize(
    ("name", "example", "prompt", "candidates", "label"),
    [
        (
            "sst2",
            {"sentence": " a fine film . ", "label": 1},
            "a fine film . It was",
            (" terrible", " great"),
            1,
        ),
        (
            "rte",
            {"premise": "Cats sleep.", "hypothesis": "Cats rest.", "label": 0},
            'Cats sleep.\nDoes this mean that "Cats rest." is true? Yes or No?\n',
            ("Yes", "No"),
            0,
        ),
        (
            "boolq",
            {"passage": "Cats -- Cats sleep.", "question": "do cats sleep", "label": 1},
            "Cats -- Cats sleep. Do cats sleep?\n",
            ("No", "Yes"),
            1,
        ),
        (
            "boolq",
            {"passage": "Cats sleep.", "question": "éclairs too?", "label": 0},
            "Cats sleep. Éclairs too?\n",
            ("No", "Yes"),
            0,
        ),
        (
            "copa",
            COPA,
            "The man turned on the faucet so",
            (" the toilet filled with water.", " I saw Water."),
            1,
        ),
        (
            "copa",
            {**COPA, "premise": "He left ", "question": "cause", "label": 0},
            "He left because",
            (" the toilet filled with water.", " I saw Water."),
            0,
        ),
        (
            "squad",
            SQUAD,
            "Title: Super_Bowl_50\nContext: The game was played on February 7, 2016.\n"
            "Question: When was the game?\nAnswer:",
            (" February 7, 2016\n", " February 7\n"),
            0,
        ),
        (
            "trec",
            TREC,
            "How far is it from Denver to Aspen ? It was about",
            (" Expression", " Entity", " Description", " Human", " Location", " Number"),
            5,
        ),
        (
            "e2e",
            E2E,
            "Data: name[Blue Spice], area[riverside]\nText:",
            (" Blue Spice is by the river.\n", " By the river: Blue Spice.\n"),
            0,
        ),
    ],
)
def test_task_writes_its_prompt_and_answers(
    name: str, example: dict[str, Any], prompt: str, candidates: tuple[str, ...], label: int
) -> None:
    task = load_task(name)

    assert task.prompt(example) == prompt
    assert task.candidates(example) == candidates
    assert task.label(example) == label


@pytest.mark.parametrize(
    ("name", "example", "prompt", "candidates"),
    [
        (
            "sst2",
            {"sentence": " a fine film . ", "label": 1},
            "a fine film .",
            (" terrible", " great"),
        ),
        (
            "rte",
            {"premise": "Cats sleep.", "hypothesis": "Cats rest.", "label": 0},
            'Cats sleep.\n"Cats rest."\n',
            ("Yes", "No"),
        ),
        (
            "boolq",
            {"passage": "Cats -- Cats sleep.", "question": "do cats sleep", "label": 1},
            "Cats -- Cats sleep. do cats sleep\n",
            ("No", "Yes"),
        ),
        (
            "copa",
            COPA,
            "The man turned on the faucet",
            (" the toilet filled with water.", " I saw Water."),
        ),
        (
            "squad",
            SQUAD,
            "Super_Bowl_50\nThe game was played on February 7, 2016.\nWhen was the game?\n",
            ("February 7, 2016\n", "February 7\n"),
        ),
        (
            "trec",
            TREC,
            "How far is it from Denver to Aspen ?",
            (" Expression", " Entity", " Description", " Human", " Location", " Number"),
        ),
        (
            "e2e",
            E2E,
            "name[Blue Spice], area[riverside]\n",
            ("Blue Spice is by the river.\n", "By the river: Blue Spice.\n"),
        ),
    ],
)
def test_task_leaves_out_the_words_of_its_template(
    name: str, example: dict[str, Any], prompt: str, candidates: tuple[str, ...]
) -> None:
    task, usual = load_task(name, is_prompted=False), load_task(name)

    assert (task.is_prompted, usual.is_prompted) == (False, True)
    assert task.prompt(example) == prompt
    assert task.candidates(example) == candidates
    assert task.label(example) == usual.label(example)


@pytest.mark.parametrize(
    ("name", "kind", "metric", "loss"),
    [
        ("sst2", "classification", "accuracy", "classification"),
        ("rte", "classification", "accuracy", "classification"),
        ("boolq", "classification", "accuracy", "classification"),
        ("copa", "choice", "accuracy", "language_modeling"),
        ("squad", "generation", "f1", "language_modeling"),
        ("trec", "classification", "accuracy", "classification"),
        ("e2e", "generation", "f1", "language_modeling"),
    ],
)
def test_task_states_its_kind_metric_and_loss(name: str, kind: str, metric: str, loss: str) -> None:
    task: Task = load_task(name)

    assert len(TASKS) == 7
    assert isinstance(task, Task)
    assert (task.name, task.kind, task.metric, task.loss) == (name, kind, metric, loss)


def test_encode_task_example_shares_the_row_of_a_classification() -> None:
    words = Words()
    example = {"sentence": "a fine film .", "label": 1}

    encoded = encode_task_example(load_task("sst2"), example, tokenizer=words, max_length=99)

    assert [words.spelled(row) for row in encoded.rows] == ["<s>_a_fine_film_._It_was"]
    assert [words.spelled(c.targets) for c in encoded.candidates] == ["terrible", "great"]
    assert [c.positions for c in encoded.candidates] == [(6,), (6,)]
    assert encoded.label == 1


def test_encode_task_example_gives_each_choice_its_row() -> None:
    words = Words()

    encoded = encode_task_example(load_task("copa"), COPA, tokenizer=words, max_length=99)

    before = "<s>_The_man_turned_on_the_faucet_so"
    assert [words.spelled(row) for row in encoded.rows] == [
        f"{before}_the_toilet_filled_with",
        f"{before}_I_saw",
    ]
    assert [words.spelled(c.targets) for c in encoded.candidates] == [
        "the_toilet_filled_with_water.",
        "I_saw_Water.",
    ]
    assert [c.positions for c in encoded.candidates] == [(7, 8, 9, 10, 11), (7, 8, 9)]
    assert encoded.label == 1


def test_encode_task_example_learns_the_first_gold_answer_of_a_generation() -> None:
    words = Words()

    encoded = encode_task_example(load_task("squad"), SQUAD, tokenizer=words, max_length=7)

    assert [words.spelled(row) for row in encoded.rows] == ["<s>_game?_\n_Answer:_February_7,_2016"]
    assert [words.spelled(c.targets) for c in encoded.candidates] == ["February_7,_2016_\n"]
    assert encoded.candidates[0].positions == (3, 4, 5, 6)
    assert encoded.label == 0
