"""Weights of tokens against the papers' formulas, token by token in plain Python."""

import math

import pytest
import torch
from torch import Tensor

from opsd_kernels.tokens import Batch
from opsd_kernels.weights import weight
from weight_cases import CORRECT, MASK, assert_weights, batch, by_row, by_token, with_data


@pytest.fixture
def b() -> Batch:
    return batch()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def best(scores: list[float], count: int) -> list[float]:
    """1 for the `count` largest, of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
    return [float(i in order) for i in range(len(scores))]


def over_batch(b: Batch, function, *columns: Tensor) -> Tensor:
    """`[B, C]` of a function of all live tokens' values at once."""
    found = torch.zeros(b.mask.shape, dtype=torch.float64)
    found[b.mask] = torch.tensor(function(*(c[b.mask].tolist() for c in columns)), dtype=torch.float64)
    return found


def at_quantile(values: list[float], q: float) -> float:
    values = sorted(values)
    place = q * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


@pytest.mark.parametrize(("floor", "center", "width"), [(0.25, 0.30, 0.10), (0.0, 0.5, 0.02)])
def test_position_sigmoid(b, floor, center, width):
    def row(x: list[float]) -> list[float]:
        n = len(x)
        return [floor + (1 - floor) * sigmoid(((i - 0.5) / n - center) / width) for i in range(1, n + 1)]

    expected = by_row(b, row, b.stats.jsd)
    assert_weights(weight["position_sigmoid"](b, floor=floor, center=center, width=width), expected)
    if floor == 0.25:
        assert_weights(weight["position_sigmoid"](b), expected)


@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_counted_tokens(b, tokens):
    first = by_row(b, lambda x: [float(i < tokens) for i in range(len(x))], b.stats.jsd)
    assert_weights(weight["horizon"](b, tokens=tokens), first)
    assert_weights(weight["skip_first"](b, tokens=tokens), MASK.double() - first)
    gate = by_row(b, lambda x: [float(len(x) <= tokens)] * len(x), b.stats.jsd)
    assert_weights(weight["length_gate"](b, tokens=tokens), gate)
    ramp = by_row(b, lambda x: [(i + 1) / tokens for i in range(len(x))], b.stats.jsd)
    assert_weights(weight["ramp"](b, length=tokens), ramp)
    decay = by_row(b, lambda x: [math.exp(-0.7 * i / tokens) for i in range(len(x))], b.stats.jsd)
    assert_weights(weight["position_decay"](b, rate=0.7, length=tokens), decay)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.6, 1.0])
def test_horizon_by_share(b, share):
    def row(x: list[float]) -> list[float]:
        return [float(i < math.ceil(round(share * len(x), 9))) for i in range(len(x))]

    assert_weights(weight["horizon"](b, share=share), by_row(b, row, b.stats.jsd))


def test_shares_are_not_thrown_off_by_rounding():
    """0.07 * 100 is 7.000000000000001, and 7 tokens are meant."""
    long = batch(mask=torch.ones(1, 100, dtype=torch.bool))
    assert weight["horizon"](long, share=0.07).sum() == 7
    assert weight["top_entropy"](long, share=0.07).sum() == 7


@pytest.mark.parametrize(("top", "boost", "decay"), [(3, 2.0, 0.0), (20, 1.5, 1.0), (2, 4.0, 3.0)])
def test_cord(b, top, boost, decay):
    def row(kl: list[float]) -> list[float]:
        chosen = best(kl, top)
        factors = [boost if c else 1.0 for c in chosen]
        return [w * math.exp(-decay * i / len(kl)) for i, w in enumerate(factors)]

    found = weight["cord"](b, top=top, boost=boost, decay=decay)
    assert_weights(found, by_row(b, row, b.stats.reverse_kl))


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_prefix_trust(b, gain):
    def row(t: list[float], s: list[float]) -> list[float]:
        gaps = [abs(x - y) for x, y in zip(t, s, strict=True)]
        return [1 + gain * (1 - sum(gaps[:i]) / sum(gaps)) for i in range(len(gaps))]

    found = weight["prefix_trust"](b, gain=gain)
    assert_weights(found, by_row(b, row, b.stats.teacher_logprob, b.stats.student_logprob))


@pytest.mark.parametrize("inside", [True, False])
def test_trust_region_and_contrast_gate(b, inside):
    t, s = b.stats.teacher_logprob, b.stats.student_logprob

    def trusted(t: float, s: float, u: float) -> float:
        return float((u < min(math.exp(t - s), 1)) == inside)

    def told_apart(t: float, bad: float) -> float:
        return float((abs(0.5 * math.tanh((t - bad) / 3.0)) > 0.25) == inside)

    assert_weights(weight["trust_region"](b, inside=inside), by_token(b, trusted, t, s, b.data["draw"]))
    found = weight["contrast_gate"](b, tau=3.0, strength=0.5, threshold=0.25, inside=inside)
    assert_weights(found, by_token(b, told_apart, t, b.data["negative_logprob"]))


@pytest.mark.parametrize(("limit", "of"), [(0.1, "student"), (0.5, "student"), (0.5, "teacher")])
def test_entropy_prefix(b, limit, of):
    def row(h: list[float]) -> list[float]:
        return [float(sum(h[: i + 1]) / sum(h) < limit) for i in range(len(h))]

    entropy = b.stats.student_entropy if of == "student" else b.stats.teacher_entropy
    assert_weights(weight["entropy_prefix"](b, limit=limit, of=of), by_row(b, row, entropy))


@pytest.mark.parametrize("routed", [True, False])
def test_srpo(b, routed):
    rows = [not c and p for c, p in zip(CORRECT, b.data["privileged"], strict=True)] if routed else [True] * 7
    mask = MASK & torch.tensor(rows)[:, None]
    kept = [math.exp(-0.7 * h) for h in b.stats.teacher_entropy[mask].tolist()]
    expected = torch.zeros(MASK.shape, dtype=torch.float64)
    expected[mask] = torch.tensor(kept, dtype=torch.float64) / (sum(kept) / len(kept))
    found = weight["srpo"](b, beta=0.7, routed=routed)
    assert_weights(found, expected)
    assert found[mask].mean() == pytest.approx(1)


def test_entropy_gates(b):
    student, teacher = b.stats.student_entropy, b.stats.teacher_entropy
    assert_weights(weight["entropy_gate"](b), by_token(b, lambda h: float(h > 0.8), teacher))
    found = weight["entropy_gate"](b, of="student", threshold=1.2, above=False)
    assert_weights(found, by_token(b, lambda h: float(h <= 1.2), student))
    found = weight["entropy_difference"](b)
    assert_weights(found, by_token(b, lambda s, t: sigmoid(s - t), student, teacher))


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("of", ["student", "teacher"])
def test_top_entropy(b, share, of):
    def rule(h: list[float]) -> list[float]:
        return best(h, math.ceil(round(share * len(h), 9)))

    entropy = b.stats.student_entropy if of == "student" else b.stats.teacher_entropy
    assert_weights(weight["top_entropy"](b, share=share, of=of), over_batch(b, rule, entropy))
    assert_weights(weight["top_entropy"](b, share=share, of=of, per_row=True), by_row(b, rule, entropy))


def test_equal_scores_keep_the_earlier_tokens(b):
    b.stats.student_entropy[:] = 1.0
    count = math.ceil(MASK.sum() / 2)
    assert weight["top_entropy"](b, share=0.5)[MASK].tolist() == [1.0] * count + [0.0] * (MASK.sum() - count)


def test_wiener(b):
    def gate(log_s: float, log_t: float, h: float) -> float:
        m = max(log_t - log_s, 0)
        return m / (m + h + 1e-8)

    columns = (b.stats.student_logprob, b.stats.teacher_logprob, b.stats.teacher_entropy)
    expected = by_token(b, gate, *columns)
    assert_weights(weight["wiener"](b), expected)
    assert_weights(weight["wiener"](b, complement=True), MASK.double() - expected)


@pytest.mark.parametrize("per_row", [True, False])
def test_fire(b, per_row):
    def rule(s: list[float], t: list[float]) -> list[float]:
        raw = [(1 - y / max(t)) * (x / max(s)) for x, y in zip(s, t, strict=True)]
        mean = sum(raw) / len(raw)
        return [w / mean if mean else w for w in raw]

    place = by_row if per_row else over_batch
    expected = place(b, rule, b.stats.student_entropy, b.stats.teacher_entropy)
    assert_weights(weight["fire"](b, per_row=per_row), expected)


def scaled(x: list[float], low: float, high: float) -> list[float]:
    return [min(max((v - low) / (high - low), 0), 1) for v in x]


@pytest.mark.parametrize("share", [0.5, 0.2])
@pytest.mark.parametrize("overconfident", [False, True])
def test_tip(b, share, overconfident):
    def rule(h: list[float], d: list[float]) -> list[float]:
        h, d = (scaled(x, min(x), max(x)) for x in (h, d))
        pairs = list(zip(h, d, strict=True))
        scores = [(1 - x) * y if overconfident else x + y - x * y for x, y in pairs]
        return best(scores, math.ceil(round(share * len(h), 9)))

    found = weight["tip"](b, share=share, overconfident=overconfident)
    assert_weights(found, over_batch(b, rule, b.stats.student_entropy, b.stats.reverse_kl))


def test_tip_sample_draws_by_the_odds():
    """Of 3 tokens with odds 1, 2 and 5, one is drawn each time; one with odds 0 never."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    b = batch(mask=mask)
    b.stats.student_entropy[:] = torch.tensor([1.0, 4.0, 5.0, 0.0])
    b.stats.jsd[:] = torch.tensor([1.0, 1.0, 5.0, 1.0])
    torch.manual_seed(1)
    drawn = sum(weight["tip_sample"](b, share=0.25, alpha=0.5, gamma=0.5) for _ in range(4000))[0]
    assert drawn.sum() == 4000
    torch.testing.assert_close(drawn / 4000, torch.tensor([1.0, 2.0, 5.0, 0.0]) / 8, atol=0.03, rtol=0)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "log_ratio"])
def test_shares_by_divergence(b, divergence):
    def rule(d: list[float], c: list[float]) -> list[float]:
        d, c = (scaled(x, at_quantile(x, 0.05), at_quantile(x, 0.95)) for x in (d, c))
        return best([x * y for x, y in zip(d, c, strict=True)], math.ceil(0.25 * len(d)))

    ratio = (b.stats.teacher_logprob - b.stats.student_logprob).abs()
    column = ratio if divergence == "log_ratio" else getattr(b.stats, divergence)
    found = weight["ta_opd"](b, share=0.25, divergence=divergence)
    assert_weights(found, over_batch(b, rule, column, b.data["teacher_mass"]))
    top = weight["top_divergence"](b, share=0.25, divergence=divergence)
    assert_weights(top, over_batch(b, lambda d: best(d, math.ceil(0.25 * len(d))), column))
    rows = weight["top_divergence"](b, share=0.25, divergence=divergence, per_row=True)
    assert_weights(rows, by_row(b, lambda d: best(d, math.ceil(0.25 * len(d))), column))


def test_logprob_gates(b):
    log_s, log_t = b.stats.student_logprob, b.stats.teacher_logprob
    floor = math.log(0.1) / 0.9
    assert_weights(weight["reward_above"](b), by_token(b, lambda s, t: float(t - s > floor), log_s, log_t))
    assert_weights(weight["likely"](b, floor=-2.0), by_token(b, lambda s: float(s >= -2), log_s))


def test_routes(b):
    column = b.stats.jsd

    def rows(values: list[bool]) -> Tensor:
        return MASK * torch.tensor(values, dtype=torch.float64)[:, None]

    right, told = CORRECT.tolist(), b.data["privileged"].tolist()
    routed = [not c and m for c, m in zip(right, told, strict=True)]
    for value in (True, False):
        assert_weights(weight["correct"](b, value=value), rows([c == value for c in right]))
        assert_weights(weight["privileged"](b, value=value), rows([m == value for m in told]))
        assert_weights(weight["sdpo_route"](b, value=value), rows([z == value for z in routed]))
    threshold = b.data["reward"][1].item()
    expected = rows([r >= threshold for r in b.data["reward"].tolist()])
    assert expected[1].sum() > 0
    assert_weights(weight["reward_at_least"](b, threshold=threshold), expected)
    expected = by_token(b, lambda chosen, _: 1.0 if chosen else 0.01, b.data["selected"], column)
    assert_weights(weight["selected"](b, reject=0.01), expected)
    whole = with_data(b, selected=CORRECT)
    assert_weights(weight["selected"](whole), rows(right))


def test_spans_and_turns(b):
    code = b.data["span"]
    inside = by_token(b, lambda c: float(c == 2), code)
    assert_weights(weight["span"](b, code=2), inside)
    expected = by_row(b, lambda c: [(x == 2) / len(c) for x in c], code)
    found = weight["span"](b, code=2, per_length=True)
    assert_weights(found, expected)
    losses = b.stats.jsd
    share = inside[0].sum() / MASK[0].sum()
    trace = losses[0][inside[0] > 0].mean() * share
    assert (found[0] * losses[0]).sum().item() == pytest.approx(trace.item(), rel=1e-6)
    turn = b.data["turn"]
    assert_weights(weight["turn"](b, first=1, last=2), by_token(b, lambda k: float(k in (1, 2)), turn))
    assert_weights(weight["turn"](b, first=2), by_token(b, lambda k: float(k >= 2), turn))
