"""Templates are written here as plain functions: what a Jinja template of that family renders."""

from collections.abc import Sequence

import pytest

from qzo.data.chat import Message, Render, assistant_spans

BAKER = [
    {"role": "user", "content": "Who bakes?"},
    {"role": "assistant", "content": "A baker."},
    {"role": "user", "content": "And brews?"},
    {"role": "assistant", "content": "A brewer."},
]


def chatml(messages: Sequence[Message], add_generation_prompt: bool) -> str:
    turns = [f"<|{m['role']}|>\n{m['content']}<|end|>\n" for m in messages]
    return "".join(turns) + "<|assistant|>\n" * add_generation_prompt


def chatml_with_default_system_prompt(
    messages: Sequence[Message], add_generation_prompt: bool
) -> str:
    return "<|system|>\nYou are A baker.<|end|>\n" + chatml(messages, add_generation_prompt)


def instruction_brackets(messages: Sequence[Message], add_generation_prompt: bool) -> str:
    del add_generation_prompt  # this family has none
    forms = {"user": "<s>[INST] {} [/INST]", "assistant": " {} </s>"}
    return "".join(forms[m["role"]].format(m["content"].strip()) for m in messages)


def names_and_lines(messages: Sequence[Message], add_generation_prompt: bool) -> str:
    turns = [f"{m['role']}: {m['content']}\n" for m in messages]
    return "".join(turns) + "assistant: " * add_generation_prompt


def reasoning_in_the_last_turn_only(
    messages: Sequence[Message], add_generation_prompt: bool
) -> str:
    last = {**messages[-1]}
    if last["role"] == "assistant":
        last["content"] = "<think>\n\n</think>\n\n" + last["content"]
    return chatml([*messages[:-1], last], add_generation_prompt)


def reasoning_prompted(messages: Sequence[Message], add_generation_prompt: bool) -> str:
    return chatml(messages, add_generation_prompt) + "<think>\n" * add_generation_prompt


@pytest.mark.parametrize(
    ("render", "spoken"),
    [
        (chatml, ["A baker.<|end|>", "A brewer.<|end|>"]),
        (chatml_with_default_system_prompt, ["A baker.<|end|>", "A brewer.<|end|>"]),
        (instruction_brackets, [" A baker. </s>", " A brewer. </s>"]),
        (names_and_lines, ["A baker.\n", "A brewer.\n"]),
        (
            reasoning_in_the_last_turn_only,
            ["A baker.<|end|>", "<think>\n\n</think>\n\nA brewer.<|end|>"],
        ),
        (reasoning_prompted, ["A baker.<|end|>", "A brewer.<|end|>"]),
    ],
)
def test_assistant_spans_hold_each_turn_with_its_end(render: Render, spoken: list[str]) -> None:
    spans = assistant_spans(BAKER, render)

    text = render(BAKER, False)
    assert [text[start:end] for start, end in spans] == spoken
    assert [text[:start].count("Who bakes?") for start, _ in spans] == [1, 1]


@pytest.mark.parametrize("content", ["", "a", "b", "end", "<|end|>", " spaced ", "ab\ncd\n"])
def test_assistant_spans_find_a_content_that_looks_like_the_template(content: str) -> None:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]

    spans = assistant_spans(messages, chatml)

    text = f"<|user|>\n{content}<|end|>\n<|assistant|>\n{content}<|end|>\n"
    assert spans == [(len(f"<|user|>\n{content}<|end|>\n<|assistant|>\n"), len(text) - 1)]


def test_assistant_spans_find_a_greeting_before_any_other_message() -> None:
    messages = [{"role": "assistant", "content": "You are"}, {"role": "user", "content": "Hi"}]

    spans = assistant_spans(messages, chatml_with_default_system_prompt)

    text = chatml_with_default_system_prompt(messages, False)
    assert [text[start:end] for start, end in spans] == ["You are<|end|>"]
    assert text[: spans[0][0]].endswith("<|assistant|>\n")


def test_assistant_spans_are_empty_without_an_assistant() -> None:
    assert assistant_spans(BAKER[:1], chatml) == []


def test_assistant_spans_find_a_greeting_that_the_template_trims() -> None:
    messages = [{"role": "assistant", "content": " ab "}, {"role": "user", "content": "Hi"}]

    (span,) = assistant_spans(messages, instruction_brackets)

    assert instruction_brackets(messages, False) == " ab </s><s>[INST] Hi [/INST]"
    assert span == (1, len(" ab </s>"))
