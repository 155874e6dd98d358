"""pass@k, the chance that one of k samples is right, and bootstrap intervals over problems."""

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from opsd_train.evaluation.judge import wilson

RESAMPLES = 2_000


class Interval(TypedDict):
    """A mean over problems with its 95 % interval."""

    value: float
    low: float
    high: float


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of pass@k of one problem from `correct` of `samples` independent samples.

    1 - C(n - c, k) / C(n, k): the share of the subsets of k samples that hold a right one (arXiv 2107.03374,
    equation 1). Exact integers until the division, so that large n do no harm.

    Raises ValueError unless 0 <= correct <= samples and 1 <= k <= samples.
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"correct: expected 0 to {samples}; got {correct}")
    if not 1 <= k <= samples:
        raise ValueError(f"k: expected 1 to {samples}, the number of samples; got {k}")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_pass_at_k(counts: Sequence[int], samples: int, k: int, seed: int = 0) -> Interval:
    """pass@k over problems, `counts` of whose `samples` were right each; the interval as `bootstrap`."""
    return bootstrap([pass_at_k(samples, correct, k) for correct in counts], seed)


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of one value per problem, and the 95 % percentile interval over resampled problems.

    The interval is a function of the values and the seed. Where every value is 0, or every one 1, resampling
    cannot tell how sure that is: the interval is Wilson's then. Raises ValueError without values.
    """
    if not len(values):
        raise ValueError("values: expected at least one problem; got none")
    drawn = np.asarray(values, dtype=np.float64)
    if drawn.mean() in (0.0, 1.0) and np.isin(drawn, (0.0, 1.0)).all():
        found = wilson(int(drawn.sum()), len(drawn))
        return Interval(value=found["accuracy"], low=found["low"], high=found["high"])
    generator = np.random.default_rng(seed)
    count = len(drawn)
    means = [drawn[generator.integers(count, size=count)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(value=float(drawn.mean()), low=float(low), high=float(high))
