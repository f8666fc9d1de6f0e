"""A question to an instruct model: a user turn, written by the tokenizer's chat template."""

from qzo.data.tokenize import RenderedPrompt, Tokenizer, last_turn
from qzo.errors import ConfigError

_ANSWER = "a"  # any: what the template puts behind it is where an answer ends


def chat_prompt(tokenizer: Tokenizer, question: str, system: str | None = None) -> RenderedPrompt:
    """Return a conversation up to the point where the assistant answers.

    Args:
        tokenizer: A transformers tokenizer.
        question: What the user says.
        system: The system prompt; None for that of the template, if it has one.

    Raises:
        ConfigError: The tokenizer has no chat template, or the template refuses the conversation.
    """
    from jinja2 import TemplateError

    if not has_chat_template(tokenizer):
        raise ConfigError(
            "--chat: expected a tokenizer with a chat template, got one without; leave --chat out "
            "to continue the prompt as plain text"
        )
    turns = [("system", system), ("user", question), ("assistant", _ANSWER)]
    messages = [{"role": role, "content": text} for role, text in turns if text is not None]
    try:
        return last_turn(tokenizer, messages)[0]
    except (TemplateError, ValueError) as error:  # ValueError: several templates, no default one
        flag = "--chat" if system is None else "--system"
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{flag}: expected a chat template that takes this conversation, got {reason}; "
            f"leave {flag} out"
        ) from error


def has_chat_template(tokenizer: Tokenizer) -> bool:
    """Tell whether a tokenizer knows how conversations are written."""
    return bool(getattr(tokenizer, "chat_template", None))
