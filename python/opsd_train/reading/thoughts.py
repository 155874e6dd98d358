"""What a completion says beside its thoughts, in the markers of the tokenizer's chat template."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from opsd_train.reading.prompts import decode
from opsd_train.reading.texts import MARKERS, without_thoughts
from opsd_train.reading.thinking import sample

# The shapes of what ends a thought in a chat template, and of what then begins it.
THOUGHT = r"(?i:\w*(?:think|thought|reason)\w*)"
SHAPES = (
    (rf"<(?:/)(?P<name>(?:\w+:)?{THOUGHT})>", "<{name}>", "</{name}>"),
    (rf"\[/(?P<name>{THOUGHT})\]", "[{name}]", "[/{name}]"),
    (rf"◁/(?P<name>{THOUGHT})▷", "◁{name}▷", "◁/{name}▷"),
    (rf"<\|end_of_(?P<name>{THOUGHT})\|>", "<|begin_of_{name}|>", "<|end_of_{name}|>"),
    (rf"<\|END_(?P<name>{THOUGHT})\|>", "<|START_{name}|>", "<|END_{name}|>"),
    (r"<\|channel\|>(?P<name>analysis)", "<|channel|>{name}<|message|>", "<|end|>"),
)


@dataclass(frozen=True)
class Thoughts:
    """The markers between which a tokenizer's chat template has thoughts.

    Args:
        tokenizer: of the completions.
        markers: how thoughts begin and end.
        opened: whether a completion begins within a thought, which its prompt has begun.
    """

    tokenizer: PreTrainedTokenizerBase
    markers: tuple[tuple[str, str], ...]
    opened: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, chat_kwargs: Mapping[str, Any]) -> "Thoughts":
        """Those of the chat template beside the usual ones, where it writes what `chat_kwargs` ask for."""
        template = str(tokenizer.chat_template or "")
        found = [
            (begin.format(name=match["name"]), end.format(name=match["name"]))
            for shape, begin, end in SHAPES
            for match in re.finditer(shape, template)
        ]
        markers = tuple(dict.fromkeys([*found, *MARKERS]))
        ends_in = sample(tokenizer, **chat_kwargs).rstrip()
        return cls(tokenizer, markers, any(ends_in.endswith(begin) for begin, _ in markers))

    def left_out(self, completion: Sequence[int]) -> str:
        """What a completion says beside its thoughts, whose markers may be special tokens."""
        special = [str(one) for one in self.tokenizer.added_tokens_decoder.values() if one.special]
        said = without_thoughts(decode(self.tokenizer, completion), self.markers, self.opened)
        return re.sub("|".join(map(re.escape, special)), "", said).strip() if special else said
