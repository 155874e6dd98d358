"""Entries of `methods/views.py` against definitions written from the papers and their code."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from method_cases import LENGTH, View, check

VIEWS = ("view1", "view2", "view3")


def reverse(ls: Tensor, lt: Tensor) -> Tensor:
    return (ls.exp() * (ls - lt)).sum(-1)


def agreed(log_s: Tensor, logs: Tensor) -> Tensor:
    """log q_G + lambda J of views along the last dimension."""
    d = logs - log_s[..., None]
    mean, spread = d.mean(-1), d.abs().mean(-1)
    geometric = logs.mean(-1)
    gap = (logs.exp().mean(-1).log() - geometric).clamp(min=0)
    return geometric + mean.abs() / (spread + 1e-8) * mean.abs() / (mean.abs() + gap + 1e-8) * gap


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_avsd(beta: float) -> None:
    def define(v: View) -> Tensor:
        target = agreed(v.ls.detach(), torch.stack([v.lt[name] for name in VIEWS], -1)).log_softmax(-1)
        if beta == 1:
            return v.token_mean(reverse(v.ls, target))
        m = (0.5 * v.ls.exp() + 0.5 * target.exp()).log()
        return v.token_mean(0.5 * reverse(v.ls, m) + 0.5 * reverse(target, m))

    check("avsd", define, roles=VIEWS, options={"beta": beta})


@pytest.mark.parametrize(("renormalise", "floor"), [(True, 1e-8), (True, 0.05), (False, 0.05)])
def test_avsd_as_released(renormalise: bool, floor: float) -> None:
    """q_G is normalised, and q_A floored, before one is compared with the other."""

    def define(v: View) -> Tensor:
        logs = torch.stack([v.lt[name] for name in VIEWS], -1)
        d = logs - v.ls.detach()[..., None]
        geometric = logs.mean(-1)
        if renormalise:
            geometric = geometric - geometric.exp().sum(-1, keepdim=True).log()
        gap = (logs.exp().mean(-1).clamp_min(floor).log() - geometric).clamp_min(0)
        mean = d.mean(-1).abs()
        share = mean / (d.abs().mean(-1) + 1e-8) * mean / (mean + gap + 1e-8)
        target = (geometric + share * gap).log_softmax(-1)
        return v.token_mean(reverse(v.ls, target))

    check("avsd", define, roles=VIEWS, options={"renormalise": renormalise, "floor": floor})


@pytest.mark.parametrize("gate", ["sigmoid", "consistency_exp"])
def test_avsd_gates(gate: str) -> None:
    def define(v: View) -> Tensor:
        logs = torch.stack([v.lt[name] for name in VIEWS[:2]], -1)
        d = logs - v.ls.detach()[..., None]
        mean, spread = d.mean(-1), d.var(-1, unbiased=False)
        gap = logs.exp().mean(-1).log() - logs.mean(-1)
        share = mean.abs() / (d.abs().mean(-1) + 1e-8) * (-spread).exp()
        if gate == "sigmoid":
            share = torch.sigmoid(6 * (d.sign().mean(-1).abs() - 0.8) - spread - gap)
        return v.token_mean(reverse(v.ls, (logs.mean(-1) + share * gap).log_softmax(-1)))

    check("avsd", define, roles=VIEWS[:2], options={"views": 2, "gate": gate})


def test_avsd_sampled() -> None:
    def define(v: View) -> Tensor:
        log_y = v.at_y(v.ls)
        advantage = agreed(log_y, v.data["teacher_logprobs"]) - log_y
        return v.token_mean(-advantage.detach() * log_y)

    check("avsd", define, roles=(), columns=("teacher_logprobs",), options={"sampled": True})


@pytest.mark.parametrize("weighed", [False, True])
def test_sgsd(weighed: bool) -> None:
    def define(v: View) -> Tensor:
        teachers, rows = v.data["teacher_logprobs"], []
        for b in range(len(teachers)):
            live, total = v.mask[b], 0
            for m in range(teachers.shape[-1]):
                gap = teachers[b, live, m] - v.at_y(v.ls)[b, live]
                score = gap.detach().clamp(-3, 3).mean()
                sign = 0 if abs(score) <= 0.05 else math.copysign(1, score)
                outcome = 1 if v.data["correct"][b] else -1
                phi = math.log(2) - F.softplus(-(gap**2) / (2 * 0.7))
                w = v.data["teacher_weight"][b, live, m] if weighed else 1
                total = total + sign * outcome * (w * phi).mean()
            rows.append(total)
        return torch.stack(rows).mean()

    columns = ("teacher_logprobs", "correct", *(("teacher_weight",) if weighed else ()))
    check("sgsd", define, roles=(), columns=columns, options={"tau": 0.7}, close=1e-6)


@pytest.mark.parametrize("k", [None, 10])
def test_demopsd(k: int | None) -> None:
    def define(v: View) -> Tensor:
        ids = v.ls.detach().topk(k or v.ls.shape[-1]).indices

        def buckets(log_p: Tensor) -> Tensor:
            inside = log_p.gather(-1, ids)
            if k is None:
                return inside
            return torch.cat((inside, (1 - inside.exp().sum(-1, keepdim=True)).log()), -1)

        ls, rich, plain = (buckets(x) for x in (v.ls, v.lt["privileged"], v.lt["plain"]))
        m = (0.5 * rich.exp() + 0.5 * plain.exp()).log()
        d = 0.5 * reverse(rich, m) + 0.5 * reverse(plain, m)
        alpha = (2 * 0.15 * (torch.sigmoid(30 * d) - 0.5))[..., None]
        floor = math.log(1e-8)
        mixed = (1 - alpha) * rich.clamp(min=floor) + alpha * plain.clamp(min=floor)
        ratio = (v.at_y(v.ls) - v.data["old_logprob"]).detach().exp().clamp(max=2)
        loss = ratio * reverse(ls, mixed.log_softmax(-1))
        kept = v.mask & v.data["privileged"][:, None]
        return loss[kept].sum() / kept.sum()

    check(
        "demopsd", define, roles=("privileged", "plain"), columns=("old_logprob", "privileged"),
        options={"beta": 30.0, "k": k}, close=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize(("c", "beta"), [(10.0, 1.0), (0.5, 2.0), (None, 1.0)])
def test_purified_opsd(c: float | None, beta: float) -> None:
    def define(v: View) -> Tensor:
        delta = v.lt["privileged"] - v.lt["context_only"]
        delta = delta - delta.mean(-1, keepdim=True)
        delta = delta if c is None else c * torch.tanh(delta / c)
        target = (v.lt["base"] + delta / beta).log_softmax(-1)
        m = (0.5 * v.ls.exp() + 0.5 * target.exp()).log()
        return v.token_mean(0.5 * reverse(v.ls, m) + 0.5 * reverse(target, m))

    roles = ("privileged", "context_only", "base")
    check("purified_opsd", define, roles=roles, options={"c": c, "beta": beta})


def credit(v: View, evidence: Tensor, mix: float, width: float, high: float) -> Tensor:
    """GRPO with each token's advantage moved towards or away from 1 - eps ... 1 + eps times itself."""
    a = v.data["advantage"]
    w = (a.sign() * evidence).exp().clamp(1 - width, 1 + width)
    a = (a * ((1 - mix) + mix * w)).detach()
    ratio = (v.at_y(v.ls) - v.data["old_logprob"]).exp()
    return -torch.minimum(ratio * a, ratio.clamp(0.8, 1 + high) * a)


SIGNED = {"advantage": torch.tensor([[0.7], [-1.1], [0.4], [-0.2]]).double().repeat(1, LENGTH)}


@pytest.mark.parametrize(("mix", "width"), [(0.5, 0.2), (0.3, 0.6)])
def test_cepo(mix: float, width: float) -> None:
    def define(v: View) -> Tensor:
        return v.token_mean(credit(v, v.at_y(v.t) - v.data["negative_logprob"], mix, width, 0.28))

    check(
        "cepo", define, columns=("old_logprob", "negative_logprob"), options={"mix": mix, "width": width},
        data=SIGNED,
    )  # fmt: skip


@pytest.mark.parametrize(("mix", "width"), [(0.5, 0.2), (0.3, 0.6)])
def test_rlsd(mix: float, width: float) -> None:
    def define(v: View) -> Tensor:
        return v.token_mean(credit(v, v.at_y(v.t) - v.at_y(v.ls), mix, width, 0.2))

    check(
        "rlsd", define, columns=("old_logprob",), options={"mix": mix, "width": width},
        data=SIGNED,
    )  # fmt: skip


@pytest.mark.parametrize(("mix", "width"), [(0.5, 1.0), (0.3, 0.2)])
def test_rlrt(mix: float, width: float) -> None:
    def define(v: View) -> Tensor:
        gap = (v.at_y(v.ls) - v.at_y(v.t)) * v.data["correct"].double()[:, None]
        return v.token_mean(credit(v, gap, mix, width, 0.2))

    check(
        "rlrt", define, columns=("old_logprob", "correct"), options={"mix": mix, "width": width},
        data=SIGNED,
    )  # fmt: skip


@pytest.mark.parametrize(("tau", "strength", "threshold"), [(0.02, 0.5, 0.02), (2.0, 0.6, 0.25)])
def test_rlcsd(tau: float, strength: float, threshold: float) -> None:
    def define(v: View) -> Tensor:
        a, r = v.data["advantage"], strength * torch.tanh((v.at_y(v.t) - v.data["negative_logprob"]) / tau)
        moved = torch.where(a > 0, (a + r).clamp(min=0), torch.where(a < 0, (a + r).clamp(max=0), 0 * a))
        ratio = (v.at_y(v.ls) - v.data["old_logprob"]).exp()
        clipped = ratio.clamp(0.8, 1.2)
        apart = v.mask & (r.abs() > threshold)
        alike = v.mask & ~apart
        assert bool(apart.any())
        assert tau == 0.02 or (bool(alike.any()) and bool((moved[apart] == 0).any()))
        by_hint = -torch.minimum(ratio * moved, clipped * moved)[apart].sum() / apart.sum()
        plain = -torch.minimum(ratio * a, clipped * a)[alike].sum() / alike.sum().clamp(min=1)
        return plain + 0.7 * by_hint

    options = {"tau": tau, "strength": strength, "threshold": threshold, "coefficient": 0.7}
    check(
        "rlcsd", define, columns=("old_logprob", "negative_logprob"), options=options, data=SIGNED,
    )  # fmt: skip
