"""Entries of `methods/privileged.py` against definitions written from the papers."""

import pytest
import torch
from torch import Tensor

from method_cases import View, check
from opsd_kernels import methods


def jsd_terms(ls: Tensor, lt: Tensor, beta: float) -> Tensor:
    """Signed terms of beta KL(t || m) + (1 - beta) KL(s || m); forward and reverse KL at the ends."""
    s, t = ls.exp(), lt.exp()
    if beta in (0, 1):
        return t * (lt - ls) if beta == 0 else s * (ls - lt)
    lm = (beta * t + (1 - beta) * s).log()
    return beta * t * (lt - lm) + (1 - beta) * s * (ls - lm)


def on_best(ls: Tensor, lt: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides renormalised on some entries."""
    return ls.gather(-1, ids).log_softmax(-1), lt.gather(-1, ids).log_softmax(-1)


def grpo(v: View, low: float = 0.2, high: float = 0.2, log_below: Tensor | None = None) -> Tensor:
    below = v.data["old_logprob"] if log_below is None else log_below
    ratio, a = (v.at_y(v.ls) - below).exp(), v.data["advantage"]
    return -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


def clipped_forward_kl(v: View, tau: float) -> Tensor:
    return jsd_terms(v.ls, v.t, 0).clamp(max=tau).sum(-1)


def test_opsd() -> None:
    check("opsd", lambda v: v.token_mean(clipped_forward_kl(v, 0.05)), temperature=1.1)
    early = {"beta": 0.5, "entry_clip": None}
    check("opsd", lambda v: v.token_mean(jsd_terms(v.ls, v.t, 0.5).sum(-1)), options=early)

    def on_top(v: View) -> Tensor:
        pair = on_best(v.ls, v.t, v.t.topk(8).indices)
        return v.token_mean(jsd_terms(*pair, 0).clamp(max=0.05).sum(-1))

    check("opsd", on_top, options={"top_k": 8})

    def sampled(v: View) -> Tensor:
        advantage = (v.at_y(v.t) - v.at_y(v.ls)).detach()
        return v.token_mean(-advantage * v.at_y(v.ls))

    check("opsd", sampled, options={"sampled": True})


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.0}, {"alpha": 0.3, "skip": 2}, {"alpha": 0.5, "top_k": 9}]
)
def test_sdft(options: dict[str, float]) -> None:
    def define(v: View) -> Tensor:
        ls, lt = v.ls, v.t
        if "top_k" in options:
            ids = ls.detach().topk(9).indices
            ls, lt = (
                torch.cat((x.gather(-1, ids), (1 - x.gather(-1, ids).exp().sum(-1, keepdim=True)).log()), -1)
                for x in (ls, lt)
            )
        loss = jsd_terms(ls, lt, options.get("alpha", 1.0)).sum(-1)
        rows = [loss[b][v.mask[b]][int(options.get("skip", 0)) :] for b in range(len(loss))]
        return torch.stack([row.mean() for row in rows if len(row)]).mean()

    check("sdft", define, options=options)


def test_opsd_clip_mode_scale_keeps_a_share_of_the_gradient() -> None:
    def define(v: View) -> Tensor:
        terms = jsd_terms(v.ls, v.t, 0)
        factor = torch.where(terms > 0.05, 0.05 / terms, 1.0).detach()
        return v.token_mean((terms * factor).sum(-1))

    check("opsd", define, options={"clip_mode": "scale"})


@pytest.mark.parametrize("normaliser", ["sequences", "tokens"])
def test_pw_opsd(normaliser: str) -> None:
    def define(v: View) -> Tensor:
        weight = torch.zeros_like(v.at_y(v.t))
        for b in range(len(weight)):
            live = [i for i in range(weight.shape[1]) if v.mask[b, i]]
            for place, i in enumerate(live, start=1):
                r = torch.tensor((place - 0.5) / len(live), dtype=torch.float64)
                weight[b, i] = 0.25 + 0.75 * torch.sigmoid((r - 0.30) / 0.10)
        loss = weight * clipped_forward_kl(v, 0.05)
        return v.sequence_mean(loss) if normaliser == "sequences" else v.token_mean(loss)

    check("pw_opsd", define, options={"normaliser": normaliser}, close=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"strength": 0.2, "key_spans": 0.7, "error_spans": 1.3}, {"key_spans": 0.0, "error_spans": 1.0}],
)
def test_trace(options: dict[str, float]) -> None:
    strength, key, error = (
        options.get(n, x) for n, x in (("strength", 0.5), ("key_spans", 1.0), ("error_spans", 0.0))
    )

    def define(v: View) -> Tensor:
        rl = grpo(v, 0.2, 0.28)
        forward = clipped_forward_kl(v, 0.05)
        reverse = jsd_terms(v.ls, v.t, 1).clamp(max=0.05).sum(-1)
        rows = []
        for b in range(len(rl)):
            live, code = v.mask[b], v.data["span"][b]
            rest, spans = live & (code == 0), live & (code > 0)
            total = rl[b][rest].sum() + (1 - strength / 0.5) * rl[b][spans].sum()
            for inside, loss, share in ((code == 1, forward, key), (code == 2, reverse, error)):
                if bool((live & inside).any()):
                    # Mean over the span times the span's share of the rollout.
                    mean = loss[b][live & inside].mean()
                    total = total + strength * share * mean * (live & inside).sum()
            rows.append(total / live.sum())
        return torch.stack(rows).mean()

    check("trace", define, columns=("old_logprob", "advantage", "span"), options=options)


def test_atesd() -> None:
    check("atesd", lambda v: v.token_mean(clipped_forward_kl(v, 0.05)))


@pytest.mark.parametrize("ratio", ["live", "detached"])
def test_skill_sd(ratio: str) -> None:
    def define(v: View) -> Tensor:
        rho = (v.at_y(v.ls) - v.data["old_logprob"]).exp()
        log_ratio = v.at_y(v.ls) - v.at_y(v.t)
        k3 = (-log_ratio).exp() - 1 + log_ratio
        return v.token_mean(grpo(v) + 0.001 * (rho if ratio == "live" else rho.detach()) * k3)

    check("skill_sd", define, columns=("old_logprob", "advantage"), options={"ratio": ratio})


def test_mixsd() -> None:
    check("mixsd", lambda v: v.token_mean(-v.at_y(v.ls)), roles=())


@pytest.mark.parametrize("side", ["student", "teacher", "on_policy"])
def test_pi_distill(side: str) -> None:
    def define(v: View) -> Tensor:
        below = v.at_y(v.t) if side == "student" else None
        kl = jsd_terms(v.ls, v.t, 0 if side == "student" else 1).sum(-1)
        return v.token_mean(grpo(v, log_below=below) + 0.3 * kl)

    columns = ("advantage",) if side == "student" else ("advantage", "old_logprob")
    check("pi_distill", define, columns=columns, options={"side": side, "beta": 0.3})


def test_pi_distill_names_its_sides() -> None:
    with pytest.raises(ValueError, match=r"side: expected one of student, teacher, on_policy; got 'both'"):
        methods.recipe("pi_distill", side="both")


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_rcsd(beta: float) -> None:
    def define(v: View) -> Tensor:
        return v.token_mean(jsd_terms(v.ls, v.t, beta).clamp(max=0.05).sum(-1))

    check("rcsd", define, options={"beta": beta}, temperature=1.2)


def test_ccopd() -> None:
    check("ccopd", lambda v: v.token_mean(jsd_terms(v.ls, v.t, 1).sum(-1)))


@pytest.mark.parametrize("beta", [1.0, 0.0])
def test_d_opsd(beta: float) -> None:
    def define(v: View) -> Tensor:
        pair = on_best(v.ls, v.t, v.t.topk(20).indices)
        loss = jsd_terms(*pair, beta).clamp(max=0.05).sum(-1)
        kept = v.mask & (v.data["reward"] > 0)[:, None]
        return loss[kept].sum() / kept.sum()

    reward = torch.tensor([1.0, 0.0, 0.5, 0.0])
    check("d_opsd", define, options={"beta": beta}, data={"reward": reward})


@pytest.mark.parametrize(("future", "discount"), [(1.0, 1.0), (0.5, 0.9), (0.0, 1.0)])
def test_distil(future: float, discount: float) -> None:
    def define(v: View) -> Tensor:
        kl = jsd_terms(v.ls, v.t, 0).sum(-1)
        cross_entropy = -(v.t.exp() * v.ls).sum(-1).detach()
        loss = kl.clone()
        for b in range(len(loss)):
            live = [i for i in range(loss.shape[1]) if v.mask[b, i]]
            for place, i in enumerate(live):
                cost = sum(discount**n * cross_entropy[b, j] for n, j in enumerate(live[place + 1 :]))
                loss[b, i] = loss[b, i] + future * cost * v.at_y(v.ls)[b, i]
        return v.token_mean(loss)

    check("distil", define, options={"future": future, "discount": discount}, close=1e-6)
