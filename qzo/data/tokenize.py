"""Text to tokens: which rows of token ids go into the model, and which predictions are scored.

Token t of a text is predicted at position t - 1, so the last token is never an input. An answer's
tokens are those of ``prompt + answer`` behind the tokens that ``prompt`` alone has in common with
it; if a token spans the border between the two, it belongs to the answer. The tokenizer adds its
special tokens as it does by default, except an end-of-text token: that is added by request only.
A row longer than ``max_length`` loses tokens on the left, behind the beginning-of-text token.

Source: MeZO (arXiv 2305.17333) encodes its prompts and answers so.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

from transformers import PreTrainedTokenizerBase

from qzo.data.chat import Message, Render, assistant_spans, num_shared, turn_span
from qzo.errors import DataError

Tokenizer: TypeAlias = PreTrainedTokenizerBase

_SHOWN_CHARACTERS = 40


class RenderedPrompt(str):
    """A prompt as a chat template wrote it: its special tokens are in the text.

    Attributes:
        end: What the template puts behind the answer.
    """

    end: str = ""


@dataclass(frozen=True)
class Candidate:
    """One possible answer: the predictions that are scored for it."""

    row: int
    """Index into ``EncodedExample.rows``."""
    positions: tuple[int, ...]
    """Positions of that row whose next-token prediction is scored."""
    targets: tuple[int, ...]
    """The tokens to be predicted there."""


@dataclass(frozen=True)
class EncodedExample:
    """A tokenised example."""

    rows: tuple[tuple[int, ...], ...]
    """Token ids of the inputs, without padding."""
    candidates: tuple[Candidate, ...]
    """Several for classification and choice, one otherwise."""
    label: int
    """Index of the right candidate."""


class Texts:
    """What a tokenizer makes of the texts and conversations of a batch, each computed once.

    Args:
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[tuple[str, bool], list[int]] = {}
        self._rendered: dict[str, str] = {}
        self._render = _renderer(tokenizer)

    @property
    def bos_token_id(self) -> int | None:
        """Token that the tokenizer puts first, if it has one."""
        return cast("int | None", self._tokenizer.bos_token_id)

    @property
    def eos_token_id(self) -> int | None:
        """Token that ends a text, if the tokenizer has one."""
        return cast("int | None", self._tokenizer.eos_token_id)

    @property
    def chat_template(self) -> object:
        """That of the tokenizer."""
        return getattr(self._tokenizer, "chat_template", None)

    def expect(self, texts: Iterable[str], *, add_special_tokens: bool = True) -> None:
        """Tokenize texts that will be asked for in one call, which a fast tokenizer shares out."""
        keys = [*dict.fromkeys((text, add_special_tokens) for text in texts)]
        new = [key for key in keys if key not in self._ids]
        if new:
            found = self._tokenizer(
                [text for text, _ in new], add_special_tokens=add_special_tokens, verbose=False
            )
            self._ids.update(zip(new, map(list, found["input_ids"]), strict=True))

    def ids(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the tokens of a text, a list of its own."""
        self.expect([text], add_special_tokens=add_special_tokens)
        return [*self._ids[text, add_special_tokens]]

    def render(self, conversation: Sequence[Message], add_generation_prompt: bool) -> str:
        """Return a conversation as the chat template writes it."""
        key = repr((add_generation_prompt, [dict(message) for message in conversation]))
        if key not in self._rendered:
            self._rendered[key] = self._render(conversation, add_generation_prompt)
        return self._rendered[key]

    def forget(self) -> None:
        """Keep nothing of the batch."""
        self._ids.clear()
        self._rendered.clear()


def encode_candidates(
    tokenizer: Tokenizer | Texts,
    prompt: str,
    *,
    candidates: Sequence[str],
    label: int,
    max_length: int,
    add_eos: bool = False,
) -> EncodedExample:
    """Encode a prompt and its possible answers; answers with the same input share a row.

    All candidates see the same part of a prompt that had to be cut.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: The text before the answer.
        candidates: The answers, written so that ``prompt + answer`` is the full text.
        label: Index of the right candidate.
        max_length: The largest number of tokens of a row.
        add_eos: Whether an answer ends with the end-of-text token, so that generation learns to
            stop.

    Raises:
        DataError: There is no candidate with that label; an answer has no tokens, nothing before
            it, or leaves no room for the prompt.
    """
    if not 0 <= label < len(candidates):
        raise DataError(
            f"label: expected the index of one of {len(candidates)} candidates, got {label}; "
            "check the labels of the data"
        )
    prompt_tokens = _tokens(tokenizer, prompt)
    texts = [_tokens(tokenizer, prompt + answer) for answer in candidates]
    starts = [num_shared(prompt_tokens, tokens) for tokens in texts]
    if add_eos:
        texts = [_with_eos(tokenizer, tokens) for tokens in texts]
    num_dropped = max(0, max(map(len, texts)) - 1 - max_length)
    num_kept = _num_bos(tokenizer, texts[0])
    rows: dict[tuple[int, ...], int] = {}
    encoded = []
    for answer, tokens, start in zip(candidates, texts, starts, strict=True):
        _check_answer(answer, num_tokens=len(tokens) - start, num_before=start)
        if num_dropped and start - num_dropped <= num_kept:
            raise DataError(
                f"answer {_shown(answer)}: expected at most {max_length - num_kept} tokens, so "
                f"that the end of the prompt fits before it, got {len(tokens) - start}; "
                "raise max_length or shorten the answer"
            )
        cut, first = _without(tokens, num_kept, num_dropped), start - num_dropped
        row = rows.setdefault(tuple(cut[:-1]), len(rows))
        encoded.append(Candidate(row, tuple(range(first - 1, len(cut) - 1)), tuple(cut[first:])))
    return EncodedExample(rows=tuple(rows), candidates=tuple(encoded), label=label)


def encode_prompt(tokenizer: Tokenizer | Texts, prompt: str, *, max_length: int) -> list[int]:
    """Encode a prompt to generate from, as ``encode_candidates`` encodes it before an answer.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: Any text; special tokens are added unless a chat template wrote it.
        max_length: The largest number of tokens; leave room for those to be generated.
    """
    is_rendered = isinstance(prompt, RenderedPrompt)
    tokens = _tokens(tokenizer, prompt, add_special_tokens=not is_rendered)
    num_dropped = max(0, len(tokens) - max_length)
    return _without(tokens, _num_bos(tokenizer, tokens), num_dropped)


def encode_messages(
    tokenizer: Tokenizer | Texts, messages: Sequence[Message], *, max_length: int
) -> EncodedExample:
    """Encode a conversation with the tokenizer's chat template; the assistant's turns are scored.

    A turn is scored up to and including its end-of-turn token. What follows the last assistant turn
    is left out, because nothing is scored there.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        messages: Dicts with ``role`` and ``content``, both strings; not modified.
        max_length: The largest number of tokens of the row.

    Raises:
        DataError: The tokenizer has no chat template, the template refuses the conversation, or no
            assistant token is left to be predicted.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "messages: expected a tokenizer with a chat template, got one without; "
            "use the columns prompt and completion"
        )
    text, spans = _render_spans(tokenizer, messages)
    tokens = _tokens(tokenizer, text, add_special_tokens=False)
    scored: list[int] = []
    for span in spans:
        parts = (_tokens(tokenizer, text[:end], add_special_tokens=False) for end in span)
        scored.extend(range(*(num_shared(part, tokens) for part in parts)))
    tokens = tokens[: scored[-1] + 1] if scored else []
    num_kept = _num_bos(tokenizer, tokens)
    num_dropped = max(0, len(tokens) - 1 - max_length)
    first = num_kept + 1 if num_dropped else 1  # nothing is left to predict earlier ones from
    targets = [index - num_dropped for index in scored if index - num_dropped >= first]
    if not targets:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"messages: expected a message of the assistant to learn from, got roles {roles}; "
            "add one or remove the row"
        )
    return _single(_without(tokens, num_kept, num_dropped), targets)


def conversation_texts(texts: Texts, messages: Sequence[Message]) -> list[str]:
    """Return all texts whose tokens ``encode_messages`` asks for."""
    text, spans = _render_spans(texts, messages)
    return [text, *(text[:end] for span in spans for end in span)]


def last_turn(
    tokenizer: Tokenizer | Texts, messages: Sequence[Message]
) -> tuple[RenderedPrompt, str]:
    """Return what stands before the assistant's last turn, and its content.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        messages: A conversation that ``encode_messages`` takes; not modified.
    """
    render = _renderer(tokenizer)
    turn = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    prompt = RenderedPrompt(render(messages[:turn], True) if turn > 0 else "")
    through = messages[: turn + 1]
    _, content_end, stop = turn_span(through, turn, render)
    end = render(through, False)[content_end:stop]
    prompt.end = end.strip() or end
    return prompt, messages[turn]["content"]


def encode_text(
    tokenizer: Tokenizer | Texts, text: str, *, max_length: int, add_eos: bool = False
) -> list[EncodedExample]:
    """Encode plain text, every token scored; a long text becomes several examples.

    No token is lost: the last target of a chunk is the first input of the next one. The first token
    of the text is a target only if a beginning-of-text token stands before it.

    Args:
        tokenizer: A transformers tokenizer.
        text: Any text; one without tokens to predict gives no example.
        max_length: The largest number of tokens of a row.
        add_eos: Whether the text ends with the end-of-text token.
    """
    tokens = _tokens(tokenizer, text)
    if add_eos:
        tokens = _with_eos(tokenizer, tokens)
    starts = range(0, len(tokens) - 1, max_length)
    chunks = [tokens[start : start + max_length + 1] for start in starts]
    return [_single(chunk, range(1, len(chunk))) for chunk in chunks]


def _single(tokens: Sequence[int], scored: Sequence[int]) -> EncodedExample:
    candidate = Candidate(
        row=0,
        positions=tuple(index - 1 for index in scored),
        targets=tuple(tokens[index] for index in scored),
    )
    return EncodedExample(rows=(tuple(tokens[:-1]),), candidates=(candidate,), label=0)


def _render_spans(
    tokenizer: Tokenizer | Texts, messages: Sequence[Message]
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2 import TemplateError

    render = _renderer(tokenizer)
    try:
        return render(messages, False), assistant_spans(messages, render)
    except TemplateError as error:
        raise DataError(
            f"messages: expected a conversation that the chat template accepts, got {error}; "
            "change the roles or their order"
        ) from error


def _renderer(tokenizer: Tokenizer | Texts) -> Render:
    if isinstance(tokenizer, Texts):
        return tokenizer.render

    def render(conversation: Sequence[Message], add_generation_prompt: bool) -> str:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in conversation],
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return cast(str, text)  # with tokenize=False

    return render


def _tokens(
    tokenizer: Tokenizer | Texts, text: str, *, add_special_tokens: bool = True
) -> list[int]:
    tokens = _ids(tokenizer, text, add_special_tokens)
    if add_special_tokens and len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id:
        plain = _ids(tokenizer, text, False)
        if tokens[-1 - len(plain) : -1] == plain:  # the tokenizer's own addition, not the text's
            return tokens[:-1]
    return tokens


def _ids(tokenizer: Tokenizer | Texts, text: str, add_special_tokens: bool) -> list[int]:
    if isinstance(tokenizer, Texts):
        return tokenizer.ids(text, add_special_tokens)
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def _with_eos(tokenizer: Tokenizer | Texts, tokens: list[int]) -> list[int]:
    eos = tokenizer.eos_token_id
    return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, eos]


def _num_bos(tokenizer: Tokenizer | Texts, tokens: Sequence[int]) -> int:
    return int(len(tokens) > 0 and tokens[0] == tokenizer.bos_token_id)


def _without(tokens: list[int], num_kept: int, num_dropped: int) -> list[int]:
    return tokens[:num_kept] + tokens[num_kept + num_dropped :]


def _check_answer(answer: str, *, num_tokens: int, num_before: int) -> None:
    if num_tokens == 0:
        raise DataError(
            f"answer {_shown(answer)}: expected at least one token, got none; write an answer"
        )
    if num_before == 0:
        raise DataError(
            f"answer {_shown(answer)}: expected a token of the prompt before it, got none; "
            "end the prompt with a space or a colon"
        )


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")
