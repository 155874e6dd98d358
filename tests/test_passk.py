"""pass@k against its definition by enumeration, and the bootstrap against known intervals."""

import math
from itertools import combinations

import numpy as np
import pytest

from opsd_train.evaluation.passk import bootstrap, mean_pass_at_k, pass_at_k


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_share_of_the_subsets_with_a_right_sample(samples: int) -> None:
    for correct in range(samples + 1):
        right = [1] * correct + [0] * (samples - correct)
        for k in range(1, samples + 1):
            subsets = list(combinations(right, k))
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(max, subsets)) / len(subsets))


def test_unbiased_where_one_minus_the_failure_rate_to_the_k_is_not() -> None:
    p, samples, k = 0.3, 6, 4
    chances = [math.comb(samples, c) * p**c * (1 - p) ** (samples - c) for c in range(samples + 1)]
    expected = sum(chance * pass_at_k(samples, c, k) for c, chance in enumerate(chances))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    plug_in = sum(chance * (1 - (1 - c / samples) ** k) for c, chance in enumerate(chances))
    assert abs(plug_in - (1 - (1 - p) ** k)) > 0.02


def test_many_samples() -> None:
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)
    assert pass_at_k(10_000, 9_999, 2) == 1.0


@pytest.mark.parametrize(
    ("samples", "correct", "k", "message"),
    [
        (4, 5, 1, "correct: expected 0 to 4; got 5"),
        (4, -1, 1, "correct: expected 0 to 4; got -1"),
        (4, 2, 5, "k: expected 1 to 4"),
        (4, 2, 0, "k: expected 1 to 4"),
    ],
)
def test_wrong_counts(samples: int, correct: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(samples, correct, k)


def test_bootstrap_has_the_width_of_the_normal_interval_and_obeys_its_seed() -> None:
    values = np.random.default_rng(1).normal(size=400).tolist()
    found = bootstrap(values, seed=3)
    half = 1.96 * np.std(values) / math.sqrt(len(values))
    assert found["value"] == pytest.approx(np.mean(values))
    assert found["low"] == pytest.approx(np.mean(values) - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(np.mean(values) + half, abs=0.1 * half)
    assert bootstrap(values, seed=3) == found
    assert bootstrap(values, seed=4)["low"] != found["low"]
    with pytest.raises(ValueError, match="values: expected at least one problem"):
        bootstrap([])


def test_mean_over_problems() -> None:
    found = mean_pass_at_k([0, 2, 4, 1], samples=4, k=2)
    assert found["value"] == pytest.approx((0 + 5 / 6 + 1 + 1 / 2) / 4)
    assert found["low"] < found["value"] < found["high"]
