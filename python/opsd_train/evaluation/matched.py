"""How accuracy is judged, in words, and whether another way of judging would have found any."""

from transformers import PreTrainedTokenizerBase

from opsd_train.evaluation.examine import Judged
from opsd_train.evaluation.judge import MATCHES
from opsd_train.reading.prompts import decode

HOW = {
    "exact": "it equals the answer, and says nothing besides",
    "number": "its last number is that of the answer",
    "math": "what it states last is mathematically equal to the answer",
    "reasoning_gym": "the package's score of it is at least 1/2",
}
TRIED = 32  # completions that other ways are tried on: one comparison of mathematics can take seconds


def how_judged(match: str, rows: int) -> str:
    """A sentence for the start of a run with so many held-out rows."""
    how = HOW.get(match, f"{match} gives it at least 1/2")
    return f"accuracy on {rows:,} held-out rows: a completion is right if {how} (--eval-match {match})"


def missed(found: Judged, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A sentence if no completion equals its answer, but some match it in another way; None otherwise."""
    if any(found.right):
        return None
    pairs = [
        (decode(tokenizer, one.completion, skip_special_tokens=True), one.prompt.answer or "")
        for one in found.rollouts[:TRIED]
    ]
    for match in ("number", "math"):
        count = sum(_matches(match, completion, answer) for completion, answer in pairs)
        if count:
            return (
                f"eval_match: none of {len(found.rollouts):,} greedy completions equals its answer (exact), "
                f"but {count} of the first {len(pairs)} would be right with --eval-match {match}"
            )
    return None


def _matches(match: str, completion: str, answer: str) -> bool:
    try:
        return MATCHES[match](completion, answer)
    except ValueError:  # an answer that is not mathematics
        return False
