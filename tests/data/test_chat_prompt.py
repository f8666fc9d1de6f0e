"""``qzo generate --chat``: what an instruct model is asked, and where its answer ends."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import Run, command
from support.runs import dense_equal, tiny_checkpoint

from qzo.data.chat_prompt import chat_prompt
from qzo.errors import ConfigError
from qzo.model.load import load_tokenizer

TEMPLATE = (
    "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{% for m in messages %}{{ m.role[:1] }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ 'zz9' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)


@pytest.fixture
def qzo(capsys: pytest.CaptureFixture[str]) -> Run:
    return command(capsys)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("plain") / "base")


@pytest.fixture
def base(plain: Path, tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer has the template."""
    for path in plain.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return with_template(tmp_path, TEMPLATE)


def with_template(folder: Path, template: str) -> Path:
    path = folder / "chat_template.jinja"
    path.write_text(template, encoding="utf-8")
    return folder


def greedy(base: Path, messages: list[dict[str, str]], num_tokens: int) -> str:
    """Answer a conversation with transformers alone, on the dense weights."""
    tokenizer: Any = load_tokenizer(base)
    tokens = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    model: Any = dense_equal(base)
    with torch.inference_mode():
        rows = model.generate(tokens, max_new_tokens=num_tokens, do_sample=False)
    text: str = tokenizer.decode(rows[0, tokens.shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("system", [None, "be brief"])
def test_a_user_turn_is_answered_as_transformers_does(
    qzo: Run, base: Path, system: str | None
) -> None:
    said = [] if system is None else [{"role": "system", "content": system}]
    want = greedy(base, [*said, {"role": "user", "content": "a film"}], 8)
    given = () if system is None else ("--system", system)
    arguments = ("generate", base, "--prompt", "a film", "--max-new-tokens", "8", "--chat", *given)

    ran, shown = qzo(*arguments, "--json"), qzo(*arguments)

    assert ran.value == {"prompt": "a film", "completion": want}
    assert (ran.err, shown.err) == ("", "")
    assert shown.out == f"{want}\n"
    assert len(want) > 2


def test_an_answer_stops_at_the_end_of_the_turn(qzo: Run, base: Path) -> None:
    arguments = ("generate", base, "--prompt", "a film", "--max-new-tokens", "8", "--chat")
    free = qzo(*arguments, "--json").value["completion"]
    end = free[3:5]
    assert end.strip() == end
    with_template(base, TEMPLATE.replace("zz9", end))

    stopped = qzo(*arguments, "--json").value["completion"]

    assert stopped == free[: free.index(end)]
    assert len(stopped) < len(free)


def test_plain_text_is_continued_without_the_template(qzo: Run, base: Path, plain: Path) -> None:
    arguments = ("--prompt", "a film", "--max-new-tokens", "8")
    want = qzo("generate", plain, *arguments)

    hinted, quiet = (qzo("generate", base, *arguments, *no) for no in ((), ("--no-chat",)))
    as_json = qzo("generate", base, *arguments, "--json")

    hint = "hint: the tokenizer has a chat template; --chat asks the model as a user would"
    assert want.out.startswith("a film")
    assert hinted.out == quiet.out == want.out
    assert hinted.err.startswith(hint)
    assert hinted.err.count("\n") == 1
    assert (want.err, quiet.err, as_json.err) == ("", "", "")
    assert f"a film{as_json.value['completion']}\n" == want.out


def test_the_conversation_ends_where_the_assistant_answers(base: Path) -> None:
    asked = chat_prompt(load_tokenizer(base), "so?", "be brief")

    assert (asked, asked.end) == ("s: be brief\nu: so?\na: ", "zz9")


def test_a_model_without_a_template_cannot_chat(qzo: Run, plain: Path) -> None:
    ran = qzo("generate", plain, "--prompt", "a film", "--chat")

    want = (
        "qzo: --chat: expected a tokenizer with a chat template, got one without; leave --chat out "
        "to continue the prompt as plain text\n"
    )
    assert (ran.code, ran.err) == (1, want)


def test_a_system_prompt_that_the_template_refuses_is_named(qzo: Run, base: Path) -> None:
    with_template(base, NO_SYSTEM + TEMPLATE)

    ran = qzo("generate", base, "--prompt", "a film", "--chat", "--system", "be brief")

    want = (
        "qzo: --system: expected a chat template that takes this conversation, got no system role; "
        "leave --system out\n"
    )
    assert (ran.code, ran.err) == (1, want)


def test_several_templates_need_a_default_one(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = {"tool_use": TEMPLATE, "rag": TEMPLATE}

    with pytest.raises(ConfigError, match=r"^--chat: expected a chat .*; leave --chat out$"):
        chat_prompt(tokenizer, "so?")


@pytest.mark.parametrize("option", [(), ("--no-chat",)])
def test_a_system_prompt_belongs_to_a_conversation(
    qzo: Run, base: Path, option: tuple[str, ...]
) -> None:
    ran = qzo("generate", base, "--prompt", "a film", "--system", "be brief", *option)

    want = (
        "qzo: --system cannot be combined with --no-chat, the default: plain text has no system "
        "prompt; add --chat\n"
    )
    assert (ran.code, ran.err) == (1, want)
