"""The tokenizer of these tests knows single characters, the merges given, and special tokens."""

import re
import string

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, processors
from transformers import PreTrainedTokenizerFast

from qzo.data.tokenize import (
    EncodedExample,
    encode_candidates,
    encode_messages,
    encode_prompt,
    encode_text,
    last_turn,
)
from qzo.errors import DataError

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_of(
    *merges: str, template: str | None = "<s> $A", chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Build a tokenizer; a merge is written as its two parts, ``a+b``."""
    pairs = [(left, right) for left, right in (merge.split("+") for merge in merges)]
    letters = SPECIAL + list(string.printable) + [left + right for left, right in pairs]
    fast = FastTokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=pairs))
    fast.add_special_tokens(SPECIAL)
    fast.decoder = decoders.Fuse()
    if template:
        ends = [("<s>", 0), ("</s>", 1)]
        fast.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def spelled(tokenizer: PreTrainedTokenizerFast, example: EncodedExample) -> list[list[str]]:
    return [list(map(str, tokenizer.convert_ids_to_tokens(list(row)))) for row in example.rows]


def scored(tokenizer: PreTrainedTokenizerFast, example: EncodedExample) -> list[list[str]]:
    return [
        list(map(str, tokenizer.convert_ids_to_tokens(list(candidate.targets))))
        for candidate in example.candidates
    ]


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def test_encode_candidates_shares_one_row_between_answers_of_one_token() -> None:
    tokenizer = tokenizer_of()

    example = encode_candidates(tokenizer, "ok:", candidates=["y", "n", "m"], label=1, max_length=9)

    assert spelled(tokenizer, example) == [["<s>", "o", "k", ":"]]
    assert [candidate.row for candidate in example.candidates] == [0, 0, 0]
    assert [candidate.positions for candidate in example.candidates] == [(3,), (3,), (3,)]
    assert scored(tokenizer, example) == [["y"], ["n"], ["m"]]
    assert example.label == 1


def test_encode_candidates_never_feeds_the_last_token() -> None:
    tokenizer = tokenizer_of()

    example = encode_candidates(tokenizer, "q", candidates=[" abc", " d"], label=0, max_length=9)

    assert spelled(tokenizer, example) == [["<s>", "q", " ", "a", "b"], ["<s>", "q", " "]]
    assert [candidate.row for candidate in example.candidates] == [0, 1]
    assert [candidate.positions for candidate in example.candidates] == [(1, 2, 3, 4), (1, 2)]
    assert scored(tokenizer, example) == [[" ", "a", "b", "c"], [" ", "d"]]


def test_encode_candidates_shares_rows_only_where_inputs_are_equal() -> None:
    tokenizer = tokenizer_of()

    example = encode_candidates(tokenizer, "q", candidates=["ab", "ac", "b"], label=0, max_length=9)

    assert spelled(tokenizer, example) == [["<s>", "q", "a"], ["<s>", "q"]]
    assert [candidate.row for candidate in example.candidates] == [0, 0, 1]


def test_encode_candidates_counts_a_token_across_the_border_to_the_answer() -> None:
    tokenizer = tokenizer_of("b+c")

    example = encode_candidates(tokenizer, "ab", candidates=["cd", "d"], label=0, max_length=9)

    assert spelled(tokenizer, example) == [["<s>", "a", "bc"], ["<s>", "a", "b"]]
    assert [candidate.positions for candidate in example.candidates] == [(1, 2), (2,)]
    assert scored(tokenizer, example) == [["bc", "d"], ["d"]]


def test_encode_candidates_adds_no_token_that_the_tokenizer_does_not_add() -> None:
    tokenizer = tokenizer_of(template=None)

    example = encode_candidates(tokenizer, "q", candidates=["ab"], label=0, max_length=9)

    assert spelled(tokenizer, example) == [["q", "a"]]
    assert [candidate.positions for candidate in example.candidates] == [(0, 1)]


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_encode_candidates_ends_an_answer_only_on_request(template: str) -> None:
    tokenizer = tokenizer_of(template=template)

    plain = encode_candidates(tokenizer, "q", candidates=["a"], label=0, max_length=9)
    ended = encode_candidates(tokenizer, "q", candidates=["a"], label=0, max_length=9, add_eos=True)

    assert (spelled(tokenizer, plain), scored(tokenizer, plain)) == ([["<s>", "q"]], [["a"]])
    assert spelled(tokenizer, ended) == [["<s>", "q", "a"]]
    assert scored(tokenizer, ended) == [["a", "</s>"]]


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_encode_candidates_keeps_an_end_that_the_answer_has_itself(template: str) -> None:
    tokenizer = tokenizer_of(template=template)

    example = encode_candidates(
        tokenizer, "q", candidates=["a</s>"], label=0, max_length=9, add_eos=True
    )

    assert scored(tokenizer, example) == [["a", "</s>"]]


def test_encode_candidates_cuts_the_prompt_behind_its_first_token() -> None:
    tokenizer = tokenizer_of()

    example = encode_candidates(tokenizer, "abcdef", candidates=["xyz"], label=0, max_length=5)

    assert spelled(tokenizer, example) == [["<s>", "e", "f", "x", "y"]]
    assert [candidate.positions for candidate in example.candidates] == [(2, 3, 4)]
    assert scored(tokenizer, example) == [["x", "y", "z"]]


def test_encode_candidates_shows_all_candidates_the_same_part_of_a_cut_prompt() -> None:
    tokenizer = tokenizer_of(template=None)

    example = encode_candidates(tokenizer, "abcdef", candidates=["xyz", "u"], label=0, max_length=5)

    assert spelled(tokenizer, example) == [["d", "e", "f", "x", "y"], ["d", "e", "f"]]
    assert [candidate.positions for candidate in example.candidates] == [(2, 3, 4), (2,)]


@pytest.mark.parametrize(("template", "room"), [("<s> $A", 3), (None, 4)])
def test_encode_candidates_refuses_an_answer_without_room(template: str | None, room: int) -> None:
    tokenizer = tokenizer_of(template=template)
    answer = "uvwxyz"

    encode_candidates(tokenizer, "abcd", candidates=[answer[:room]], label=0, max_length=4)
    message = (
        f"answer '{answer[: room + 1]}': expected at most {room} tokens, so that the end of the "
        f"prompt fits before it, got {room + 1}; raise max_length or shorten the answer"
    )
    with pytest.raises(DataError, match=exactly(message)):
        encode_candidates(tokenizer, "abcd", candidates=[answer[: room + 1]], label=0, max_length=4)


def test_encode_candidates_shortens_a_long_answer_in_its_message() -> None:
    message = (
        f"answer '{'x' * 40}...': expected at most 3 tokens, so that the end of the prompt fits "
        "before it, got 50; raise max_length or shorten the answer"
    )
    with pytest.raises(DataError, match=exactly(message)):
        encode_candidates(tokenizer_of(), "a", candidates=["x" * 50], label=0, max_length=4)


def test_encode_candidates_refuses_an_empty_answer() -> None:
    message = "answer '': expected at least one token, got none; write an answer"
    with pytest.raises(DataError, match=exactly(message)):
        encode_candidates(tokenizer_of(), "q", candidates=["a", ""], label=0, max_length=9)


def test_encode_candidates_refuses_an_answer_with_nothing_before_it() -> None:
    message = (
        "answer 'bc': expected a token of the prompt before it, got none; "
        "end the prompt with a space or a colon"
    )
    with pytest.raises(DataError, match=exactly(message)):
        encode_candidates(
            tokenizer_of("a+b", template=None), "a", candidates=["bc"], label=0, max_length=9
        )


@pytest.mark.parametrize("label", [-1, 2])
def test_encode_candidates_refuses_a_label_without_candidate(label: int) -> None:
    message = (
        f"label: expected the index of one of 2 candidates, got {label}; "
        "check the labels of the data"
    )
    with pytest.raises(DataError, match=exactly(message)):
        encode_candidates(tokenizer_of(), "q", candidates=["a", "b"], label=label, max_length=9)


@pytest.mark.parametrize("max_length", [6, 7, 30])
def test_encode_candidates_targets_are_the_inputs_one_position_later(max_length: int) -> None:
    tokenizer = tokenizer_of("t+h", "th+e", " +t", template="<s> $A")

    example = encode_candidates(
        tokenizer,
        "what is the ",
        candidates=["theme", "other"],
        label=0,
        max_length=max_length,
    )

    assert len(example.candidates) == 2
    for candidate in example.candidates:
        row = example.rows[candidate.row]
        assert len(row) <= max_length
        assert row[0] == tokenizer.bos_token_id
        assert candidate.positions[-1] == len(row) - 1
        assert [row[p + 1] for p in candidate.positions[:-1]] == list(candidate.targets[:-1])


def test_encode_prompt_is_the_row_of_an_answer_of_one_token() -> None:
    tokenizer = tokenizer_of(template="<s> $A </s>")
    example = encode_candidates(tokenizer, "abcdef", candidates=["x"], label=0, max_length=4)

    assert encode_prompt(tokenizer, "abcdef", max_length=4) == list(example.rows[0])
    assert encode_prompt(tokenizer, "abcdef", max_length=9) == tokenizer("abcdef")["input_ids"][:-1]


@pytest.mark.parametrize("chat_template", [CHATML, "<s>" + CHATML])
def test_the_last_turn_is_written_from_what_training_put_before_it(chat_template: str) -> None:
    tokenizer = tokenizer_of(chat_template=chat_template)
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "so"},
        {"role": "assistant", "content": "n"},
        {"role": "user", "content": "thanks"},
    ]
    trained = encode_messages(tokenizer, messages, max_length=99)

    prompt, answer = last_turn(tokenizer, messages)

    assert (answer, prompt.end) == ("n", "<|im_end|>")
    assert encode_prompt(tokenizer, prompt, max_length=99) == list(trained.rows[0][:-1])


def test_encode_messages_scores_assistant_turns_and_their_end() -> None:
    tokenizer = tokenizer_of(chat_template=CHATML)
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "so"},
        {"role": "assistant", "content": "no"},
    ]

    example = encode_messages(tokenizer, messages, max_length=99)

    user, assistant = ["<|im_start|>", *"user\n"], ["<|im_start|>", *"assistant\n"]
    first = [*user, *"hi", "<|im_end|>", "\n", *assistant]
    second = [*first, *"yo", "<|im_end|>", "\n", *user, *"so", "<|im_end|>", "\n", *assistant]
    assert spelled(tokenizer, example) == [[*second, *"no"]]
    assert scored(tokenizer, example) == [["y", "o", "<|im_end|>", "n", "o", "<|im_end|>"]]
    starts = [len(first) - 1, len(second) - 1]
    assert example.candidates[0].positions == tuple(s + i for s in starts for i in range(3))


def test_encode_messages_leaves_out_what_follows_the_last_assistant_turn() -> None:
    tokenizer = tokenizer_of(chat_template=CHATML)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]

    short = encode_messages(tokenizer, messages, max_length=99)
    long = encode_messages(
        tokenizer, [*messages, {"role": "user", "content": "thanks"}], max_length=99
    )

    assert long == short


def test_encode_messages_cuts_on_the_left_and_scores_what_is_left() -> None:
    tokenizer = tokenizer_of(chat_template="<s>" + CHATML)
    messages = [{"role": "assistant", "content": "abcdef"}]

    example = encode_messages(tokenizer, messages, max_length=4)

    # "<s>" stays; "d" has lost what it would be predicted from, so it is an input only
    assert spelled(tokenizer, example) == [["<s>", "d", "e", "f"]]
    assert scored(tokenizer, example) == [["e", "f", "<|im_end|>"]]
    assert example.candidates[0].positions == (1, 2, 3)


def test_encode_messages_refuses_a_tokenizer_without_template() -> None:
    message = (
        "messages: expected a tokenizer with a chat template, got one without; "
        "use the columns prompt and completion"
    )
    with pytest.raises(DataError, match=exactly(message)):
        encode_messages(tokenizer_of(), [{"role": "user", "content": "hi"}], max_length=9)


def test_encode_messages_refuses_a_conversation_that_the_template_refuses() -> None:
    tokenizer = tokenizer_of(chat_template=CHATML)
    message = (
        "messages: expected a conversation that the chat template accepts, got no tools here; "
        "change the roles or their order"
    )
    with pytest.raises(DataError, match=exactly(message)):
        encode_messages(tokenizer, [{"role": "tool", "content": "hi"}], max_length=9)


def test_encode_messages_refuses_a_conversation_without_assistant() -> None:
    tokenizer = tokenizer_of(chat_template=CHATML)
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    message = (
        "messages: expected a message of the assistant to learn from, got roles system, user; "
        "add one or remove the row"
    )
    with pytest.raises(DataError, match=exactly(message)):
        encode_messages(tokenizer, messages, max_length=99)


def test_encode_text_scores_every_token_behind_the_first() -> None:
    tokenizer = tokenizer_of()

    (example,) = encode_text(tokenizer, "abc", max_length=9)

    assert spelled(tokenizer, example) == [["<s>", "a", "b"]]
    assert example.candidates[0].positions == (0, 1, 2)
    assert scored(tokenizer, example) == [["a", "b", "c"]]


@pytest.mark.parametrize("max_length", [1, 2, 3, 5, 26, 27, 99])
def test_encode_text_loses_no_token_between_chunks(max_length: int) -> None:
    tokenizer = tokenizer_of()
    text = string.ascii_lowercase

    examples = encode_text(tokenizer, text, max_length=max_length, add_eos=True)

    targets = [token for example in examples for token in scored(tokenizer, example)[0]]
    inputs = [token for example in examples for token in spelled(tokenizer, example)[0]]
    assert targets == [*text, "</s>"]
    assert inputs == ["<s>", *text]
    assert max(len(example.rows[0]) for example in examples) <= max_length


def test_encode_text_gives_nothing_where_nothing_can_be_predicted() -> None:
    assert encode_text(tokenizer_of(template=None), "a", max_length=9) == []
    assert encode_text(tokenizer_of(), "", max_length=9) == []
