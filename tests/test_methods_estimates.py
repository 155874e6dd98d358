"""Entries of `methods/estimates.py` against definitions written from the papers and their code."""

import math

import pytest
import torch
from torch import Tensor

import opsd_kernels
from method_cases import BATCH, LENGTH, View, check
from opsd_kernels import Logits, methods


def forward(ls: Tensor, lt: Tensor) -> Tensor:
    return (lt.exp() * (lt - ls)).sum(-1)


def reverse(ls: Tensor, lt: Tensor) -> Tensor:
    return (ls.exp() * (ls - lt)).sum(-1)


def tail(log_p: Tensor, ids: Tensor) -> Tensor:
    """The entries and one more with the mass of all others."""
    inside = log_p.gather(-1, ids)
    return torch.cat((inside, (1 - inside.exp().sum(-1, keepdim=True)).log()), -1)


def intersection(v: View, k: int) -> Tensor:
    """Reverse KL of both sides renormalised on the entries that are among both sides' k best, one by one."""
    rows = []
    for ls, lt in zip(v.ls.flatten(0, 1), v.t.flatten(0, 1), strict=True):
        shared = sorted(set(ls.topk(k).indices.tolist()) & set(lt.topk(k).indices.tolist()))
        a, b = ls[shared].log_softmax(-1), lt[shared].log_softmax(-1)
        rows.append((a.exp() * (a.detach() - b)).sum() if shared else ls.sum() * 0)
    return torch.stack(rows).view(v.y.shape)


def wiener(v: View) -> Tensor:
    margin = (v.at_y(v.t) - v.at_y(v.ls)).clamp(min=0)
    entropy = -(v.t.exp() * v.t).sum(-1)
    w = (margin / (margin + entropy + 1e-8)).detach()
    return w * reverse(v.ls, v.t) + (1 - w) * forward(v.ls, v.t)


def kl_biased(v: View, k: int, eta: float, threshold: float) -> Tensor:
    ids = v.t.topk(k).indices
    gate = -(v.t.exp() * v.t).sum(-1) > threshold
    return reverse(v.ls, v.t) + eta * gate * forward(tail(v.ls, ids), tail(v.t, ids))


def top(v: View, k: int, of: Tensor) -> tuple[Tensor, Tensor]:
    ids = of.detach().topk(k).indices
    return v.ls.gather(-1, ids), v.t.gather(-1, ids)


def stopped(v: View) -> Tensor:
    ls, lt = top(v, 5, v.ls)
    return (ls.exp() * (ls.detach() - lt)).sum(-1)


def jsd(v: View, beta: float) -> Tensor:
    m = beta * v.t.exp() + (1 - beta) * v.ls.exp()
    return beta * (v.t.exp() * (v.t - m.log())).sum(-1) + (1 - beta) * (v.ls.exp() * (v.ls - m.log())).sum(-1)


MODES = {
    "notail_sg": stopped,
    "notail": lambda v: reverse(*top(v, 5, v.ls)),
    "tail": lambda v: reverse(*(tail(x, v.ls.detach().topk(5).indices) for x in (v.ls, v.t))),
    "intersect_sg_norm": lambda v: intersection(v, 5),
    "topk_forward": lambda v: forward(*top(v, 5, v.t)),
    "topk_forward_student": lambda v: forward(*top(v, 5, v.ls)),
    "reverse": lambda v: reverse(v.ls, v.t),
    "forward": lambda v: forward(v.ls, v.t),
    "jsd": lambda v: jsd(v, 0.3),
    "token_reverse_kl": lambda v: (v.at_y(v.ls) - v.at_y(v.t)).detach() * v.at_y(v.ls),
    "decoded": lambda v: v.at_y(v.t) - v.at_y(v.ls),
    "wiener": wiener,
    "kl_biased": lambda v: kl_biased(v, 5, 0.7, 1.0),
}


@pytest.mark.parametrize("mode", MODES)
def test_opd_topk_sg(mode: str) -> None:
    options = {"mode": mode, "k": 5, "beta": 0.3, "eta": 0.7, "threshold": 1.0}
    close = 1e-6 if mode in ("wiener", "kl_biased") else 1e-9
    check("opd_topk_sg", lambda v: v.sequence_mean(MODES[mode](v)), options=options, close=close)


def test_opd_topk_sg_normaliser() -> None:
    options = {"k": 5, "normaliser": "tokens"}
    check("opd_topk_sg", lambda v: v.token_mean(stopped(v)), options=options)


def test_opd_topk_sg_ends_and_gates() -> None:
    ends = torch.tensor([3, 17])

    def define(v: View) -> Tensor:
        place = v.mask.cumsum(1)
        loss = stopped(v) - 0.2 * place / 100 * v.ls[..., ends].mean(-1)
        short = v.mask.sum(1, keepdim=True) <= 5
        assert bool(short.any())
        assert not bool(short.all())
        return v.sequence_mean(loss * short)

    ids = ends.expand(BATCH, LENGTH, 2)
    options = {"k": 5, "eos": 0.2, "length": 100, "longest": 5}
    check("opd_topk_sg", define, options=options, support_ids=ids, close=1e-6)


def test_opd_topk_sg_has_every_mode() -> None:
    assert set(MODES) == set(methods.estimates.MODES)
    with pytest.raises(ValueError, match=r"mode: expected one of notail_sg, .*; got 'tali'"):
        methods.recipe("opd_topk_sg", mode="tali")


@pytest.mark.parametrize("rest", ["drop", "renormalise_teacher"])
@pytest.mark.parametrize("switch", [False, True])
def test_eopd(rest: str, switch: bool) -> None:
    threshold = 1.0

    def define(v: View) -> Tensor:
        old = v.data["old_logprob"]
        ratio, a = (v.at_y(v.ls) - old).exp(), v.at_y(v.t) - old
        sampled = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        ls, lt = top(v, 16, v.t)
        if rest == "renormalise_teacher":
            lt = lt.log_softmax(-1)
        unsure = -(v.t.exp() * v.t).sum(-1) > threshold
        assert bool(unsure[v.mask].any())
        assert not bool(unsure[v.mask].all())
        return v.token_mean(sampled * (~unsure if switch else 1) + unsure * forward(ls, lt))

    options = {"threshold": threshold, "rest": rest, "switch": switch}
    check("eopd", define, columns=("old_logprob",), options=options)


@pytest.mark.parametrize("phase", [1, 2])
def test_reopold(phase: int) -> None:
    # A mixture that leaves tokens on both sides of the floor.
    mixing = 0.7
    floor = math.log(mixing) / (1 - mixing)

    def define(v: View) -> Tensor:
        reward = (v.at_y(v.t) - v.at_y(v.ls)).detach()
        entropy = (-(v.ls.exp() * v.ls).sum(-1)).detach().masked_fill(~v.mask, -math.inf)
        if phase == 1:
            kept = v.mask & (reward > floor)
        else:
            best = entropy.flatten().topk(math.ceil(0.6 * int(v.mask.sum()))).indices
            kept = torch.isin(torch.arange(entropy.numel()), best).view(entropy.shape)
        assert 0 < int(kept.sum()) < int(v.mask.sum())
        assert phase == 1 or bool((reward[kept] < floor).any())
        return -(reward.clamp(min=floor) * v.at_y(v.ls))[kept].sum() / kept.sum()

    check("reopold", define, options={"phase": phase, "mixing": mixing, "share": 0.6})


def test_reopold_names_its_phases() -> None:
    with pytest.raises(ValueError, match=r"phase: expected 1 or 2; got 3"):
        methods.recipe("reopold", phase=3)


@pytest.mark.parametrize(("gain", "cap"), [(0.5, None), (2.0, 0.8)])
def test_iw_opd(gain: float, cap: float | None) -> None:
    def define(v: View) -> Tensor:
        reward = (v.at_y(v.t) - v.at_y(v.ls)).detach()
        weights = torch.ones_like(reward)
        for b in range(BATCH):
            live = v.mask[b].nonzero()[:, 0].tolist()
            whole = sum(abs(float(reward[b, i])) for i in live)
            for n, i in enumerate(live):
                passed = sum(abs(float(reward[b, j])) for j in live[:n])
                weights[b, i] = 1 + gain * (1 - passed / whole)
        if cap is not None:
            weights = weights * (v.data["old_logprob"] - v.data["rollout_logprob"]).exp().clamp(max=cap)
        return v.token_mean(-weights * reward * v.at_y(v.ls))

    columns = () if cap is None else ("old_logprob", "rollout_logprob")
    check("iw_opd", define, columns=columns, options={"gain": gain, "rollout_cap": cap}, close=1e-6)


@pytest.mark.parametrize("guidance", [0.001, 0.5, 0])
def test_tropd(guidance: float) -> None:
    def define(v: View) -> Tensor:
        log_y, log_t = v.at_y(v.ls), v.at_y(v.t)
        trusted = v.data["draw"] < (log_t - log_y).exp().clamp(max=1)
        top = v.t.topk(5)
        covering = (top.values.exp() * (top.values - v.ls.gather(-1, top.indices))).sum(-1)
        own = torch.where(trusted, -(log_t - log_y).detach() * log_y, covering)
        assert bool((v.mask & ~trusted).any())
        if not guidance:
            return v.token_mean(own)
        return v.token_mean(torch.where(v.data["selected"], guidance * (log_t - log_y), own))

    columns = ("draw", "selected") if guidance else ("draw",)
    check("tropd", define, columns=columns, options={"k": 5, "guidance": guidance})


def test_tropd_draws_once_for_both_of_its_losses() -> None:
    """Every token has one of the two, of a draw that the data does not hold."""
    g = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(2, 500, 6, generator=g) for _ in range(2))
    ids = torch.randint(6, (2, 500), generator=g)
    ls, lt = (x.double().log_softmax(-1) for x in (student, teacher))
    at_y = [x.gather(-1, ids[..., None])[..., 0] for x in (ls, lt)]
    k1, covering = (at_y[1] - at_y[0]) * -at_y[0], (lt.exp() * (lt - ls)).sum(-1)
    recipe = methods.recipe("tropd", k=6, guidance=0)
    given = {"objective": recipe, "token_ids": ids, "reduction": "none"}
    found = opsd_kernels.loss(Logits(student), {"teacher": Logits(teacher)}, **given).double()
    drawn = (found - k1).abs() < 1e-5
    torch.testing.assert_close(found, torch.where(drawn, k1, covering), rtol=1e-4, atol=1e-5)
    chance = (at_y[1] - at_y[0]).exp().clamp(max=1)
    assert abs(float(drawn.double().mean() - chance.mean())) < 0.05
