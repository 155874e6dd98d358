"""Whether student and teacher think before they answer: the switch `enable_thinking` of a chat template."""

from typing import Any

from transformers import PreTrainedTokenizerBase

SWITCH = "enable_thinking"
SAMPLE = [{"role": "user", "content": "1+1="}]


def has_switch(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `enable_thinking` changes what the chat template writes; a tokenizer without one has none."""
    if tokenizer.chat_template is None:
        return False
    on, off = (_written(tokenizer, **{SWITCH: value}) for value in (True, False))
    return on != off


def has_header(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template opens the assistant's turn when it is asked to."""
    if tokenizer.chat_template is None:
        return False
    return _written(tokenizer) != _written(tokenizer, add_generation_prompt=False)


def ignored(tokenizer: PreTrainedTokenizerBase, **chat_kwargs: Any) -> list[str]:
    """A sentence for each reader whose `chat_kwargs` set a switch that the chat template does not have."""
    asked = [reader for reader, given in chat_kwargs.items() if SWITCH in given]
    if not asked or has_switch(tokenizer):
        return []
    return [
        f"{reader}_thinking: the tokenizer's chat template has no switch {SWITCH}; "
        f"{chat_kwargs[reader][SWITCH]} changes nothing"
        for reader in asked
    ]


def sample(tokenizer: PreTrainedTokenizerBase, **given: Any) -> str:
    """What the chat template makes of a message, up to the completion; empty without a template."""
    return "" if tokenizer.chat_template is None else _written(tokenizer, **given)


def _written(tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = True, **given: Any) -> str:
    return str(
        tokenizer.apply_chat_template(
            SAMPLE, tokenize=False, add_generation_prompt=add_generation_prompt, **given
        )
    )


def header(tokenizer: PreTrainedTokenizerBase, **given: Any) -> str:
    """What the chat template writes to open the assistant's turn; empty without a template."""
    if tokenizer.chat_template is None:
        return ""
    opened = _written(tokenizer, **given)
    return opened.removeprefix(_written(tokenizer, add_generation_prompt=False, **given))
