"""What can be told of a solution's text without knowing its subject: thoughts, steps, the final answer."""

import re
from collections.abc import Sequence

# How a thought begins and ends, unless a chat template says otherwise.
MARKERS = tuple((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning"))
STATED = re.compile(r"(?:####|[Aa]nswer\s*(?:is|:|=)+)\s*([^\n]+)")


def without_thoughts(text: str, markers: Sequence[tuple[str, str]] = MARKERS, opened: bool = False) -> str:
    """The text without its thoughts; those that never end are thoughts to the end.

    An end without a beginning ends a thought that began in front of the text, where chat templates begin it.

    Args:
        text: what was written.
        markers: how thoughts begin and end.
        opened: whether a thought is known to have begun before.
    """
    begins, ends = ("|".join(map(re.escape, names)) for names in zip(*markers, strict=True))
    first = re.search(f"(?P<begin>{begins})|(?P<end>{ends})", text)
    if opened and first is None:
        return ""
    if first is not None and (opened or first["end"]):
        text = re.sub(rf"\A.*?(?:{ends}|\Z)", "", text, count=1, flags=re.DOTALL)
    return re.sub(rf"(?:{begins}).*?(?:{ends}|\Z)", "", text, flags=re.DOTALL).strip()


def steps(text: str) -> list[str]:
    """The paragraphs of a text, or its lines if it is one paragraph; none of them is blank."""
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(paragraphs) > 1:
        return paragraphs
    return [line.strip() for line in text.splitlines() if line.strip()]


def final_answer(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, else what stands behind the last `####`, `answer is` or `answer:`.

    A text of a single word is its own answer; None without any of these.
    """
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        held = _until_closed(text, start)
        if held is not None and held.strip():
            return held.strip()
    stated = [found for found in STATED.findall(text) if found.strip(" .*$")]
    if stated:
        return stated[-1].strip(" .*$")
    return text.strip() if len(text.split()) == 1 else None


def _until_closed(text: str, start: int) -> str | None:
    """From behind an opening brace to the one that closes it; None if it stays open."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None
