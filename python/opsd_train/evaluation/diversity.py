"""How much the completions of a problem differ."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TypedDict


class Diversity(TypedDict):
    """Of the completions of a problem, averaged over problems.

    `distinct`: share of answers that are different, in (0, 1]. `entropy`: of the answers' frequencies, in
    nats. `majority`: share of the most frequent answer. `distinct_pairs`: share of pairs of neighbouring
    words in all completions that are different.
    """

    distinct: float
    entropy: float
    majority: float
    distinct_pairs: float


def diversity(answers: Sequence[Sequence[str]], texts: Sequence[Sequence[str]]) -> Diversity:
    """How much the completions of a problem differ.

    Args:
        answers: final answers of the completions of each problem, at least one; equal ones are equal strings.
        texts: the completions themselves.
    """
    if not answers or not all(answers):
        raise ValueError("answers: expected at least one problem with at least one answer each; got none")
    counts = [Counter(group) for group in answers]
    return {
        "distinct": _mean([len(count) / count.total() for count in counts]),
        "entropy": _mean([_entropy(count) for count in counts]),
        "majority": _mean([max(count.values()) / count.total() for count in counts]),
        "distinct_pairs": _mean([_distinct_pairs(group) for group in texts]),
    }


def _entropy(count: Counter[str]) -> float:
    shares = [times / count.total() for times in count.values()]
    return sum(-share * math.log(share) for share in shares)


def _distinct_pairs(texts: Sequence[str]) -> float:
    words = [text.split() for text in texts]
    pairs = [pair for text in words for pair in pairwise(text)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
