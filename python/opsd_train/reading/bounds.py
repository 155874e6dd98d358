"""How few tokens a text can have, without reading it: reading a million characters takes minutes."""

import functools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

COMPOSED = 4  # characters that NFC makes one of, at most


def fewest_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """A number of tokens that no reading of the text falls below; 0 if nothing is known of the tokenizer."""
    longest = _longest_token(tokenizer)
    return 0 if longest is None else math.ceil(sum(map(len, text.split())) / longest)


@functools.lru_cache(maxsize=4)
def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Characters that one token stands for, at most; None where it may stand for any number, or none be read.

    White space is left out, since some tokenizers drop it. What is known is byte-pair encoding in which every
    character has tokens, behind a normalizer that leaves all others in their place.
    """
    if not tokenizer.is_fast:
        return None
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    model, steps = made["model"], list(_steps(made["normalizer"]))
    spaces = all(one["type"] != "Replace" or one["pattern"] == {"String": " "} for one in steps)
    known = spaces and all(one["type"] in ("NFC", "Prepend", "Replace") for one in steps)
    parts = list(_steps(made["pre_tokenizer"]))
    by_byte = any(one["type"] == "ByteLevel" for one in parts)
    whole = by_byte or (model.get("byte_fallback") and "<0x00>" in model["vocab"])
    keeps = all(one["type"] in ("ByteLevel", "Split", "Digits", "Metaspace") for one in parts)
    keeps &= all(one.get("behavior") != "Removed" for one in parts)
    if model["type"] != "BPE" or not (known and whole and keeps):
        return None
    longest = max(map(len, [*model["vocab"], *(one["content"] for one in made["added_tokens"])]))
    return int(longest * (COMPOSED if steps else 1))


def _steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or of what splits words, those within sequences too."""
    if part is None:
        return
    within = part.get("normalizers") or part.get("pretokenizers")
    if within is None:
        yield part
    for step in within or ():
        yield from _steps(step)
