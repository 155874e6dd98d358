"""The text that a tokenizer's chat template makes of messages and tools."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# A role and a content, and whatever else the chat template reads (`tool_calls`, say).
Message: TypeAlias = dict[str, Any]
Tools: TypeAlias = Sequence[Mapping[str, Any]]
# What changes the meaning of a conversation when it is left out.
MEANT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def written(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Sequence[Message]],
    chat_kwargs: Mapping[str, Any],
    tools: Sequence[Tools],
) -> list[str]:
    """The text of each chat, up to where the assistant's turn begins.

    Raises ValueError for messages that the template does not take, or has no words for.
    """
    template = tokenizer.chat_template
    if template is None:
        if any(len(chat) != 1 for chat in chats):
            raise ValueError("prompt: expected a single message, since the tokenizer has no chat template")
        for chat, told in zip(chats, tools, strict=True):
            _check_said("", chat, told)
        return [str(chat[0]["content"]) for chat in chats]
    for chat, told in zip(chats, tools, strict=True):
        _check_said(str(template), chat, told)
    given = {"tokenize": False, "add_generation_prompt": True, **chat_kwargs}
    try:
        if not any(tools):
            return list(tokenizer.apply_chat_template([list(chat) for chat in chats], **given))
        return [
            str(tokenizer.apply_chat_template(list(chat), tools=[*map(dict, told)] or None, **given))
            for chat, told in zip(chats, tools, strict=True)
        ]
    except TemplateError as error:
        raise ValueError(f"prompt: expected messages that the chat template takes; {error}") from error


def _check_said(template: str, chat: Sequence[Message], tools: Tools) -> None:
    """ValueError for a part of a conversation that the template would leave out."""
    held = [name for name in MEANT if any(message.get(name) for message in chat)]
    for name in [*held, *(["tools"] if tools else [])]:
        if name not in template:
            raise ValueError(
                f"prompt: expected messages that the chat template has words for; it has none for {name!r}, "
                "and would leave it out"
            )
