"""Where the assistant speaks in a conversation that a chat template has rendered.

Templates do as they like: they add a system prompt, trim messages, drop the reasoning of earlier
turns. So nothing is assumed about their text; it is found by rendering again. The turn begins where
a generation prompt would end, and its content is what changes when the message changes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]
Render: TypeAlias = Callable[[Sequence[Message], bool], str]
"""Messages, and whether to add a generation prompt, to text."""


def assistant_spans(messages: Sequence[Message], render: Render) -> list[tuple[int, int]]:
    """Find the characters of each assistant turn, its end-of-turn token included.

    White space between the end-of-turn token and the next turn belongs to the template, not to the
    turn: generation stops before it.

    Args:
        messages: The conversation, each message with ``role`` and ``content``; not modified.
        render: The chat template.

    Returns:
        Start and end in the rendered conversation, one pair for each assistant turn, in order.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = (turn_span(messages, turn, render) for turn in turns)
    return [(start, stop) for start, _, stop in spans]


def num_shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the length of the longest common prefix of two texts or token lists."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # slices are compared much faster than their items one by one
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def turn_span(messages: Sequence[Message], turn: int, render: Render) -> tuple[int, int, int]:
    """Find where a turn starts, where its content ends, and where it ends itself.

    See ``assistant_spans``.
    """
    text = render(messages, False)
    start, content_end = _content_span(messages, turn, render)
    before = render(messages[:turn], True) if turn > 0 else ""
    if before and text.startswith(before):  # not so if the template hides earlier reasoning
        start = len(before)
    through = render(messages[: turn + 1], False)
    ending = through[_content_span(messages[: turn + 1], turn, render)[1] :]
    ending = ending[: num_shared(ending, text[content_end:])]
    return start, content_end, content_end + len(ending.rstrip() or ending)


def _content_span(messages: Sequence[Message], turn: int, render: Render) -> tuple[int, int]:
    """Find the content of one message: what two renderings with different contents do not share."""
    content = messages[turn]["content"]
    edges = {content[:1], content[-1:], content.strip()[:1], content.strip()[-1:]}
    other = next(letter for letter in "abcde" if letter not in edges)
    changed = [*messages[:turn], {**messages[turn], "content": other}, *messages[turn + 1 :]]
    text, twin = render(messages, False), render(changed, False)
    start = num_shared(text, twin)
    return start, len(text) - num_shared(text[start:][::-1], twin[start:][::-1])
