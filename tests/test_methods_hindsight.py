"""Entries of `methods/hindsight.py` against definitions written from the papers and their code."""

import pytest
import torch
from torch import Tensor

from method_cases import BATCH, LENGTH, View, check
from opsd_kernels import methods


def reverse(ls: Tensor, lt: Tensor) -> Tensor:
    return (ls.exp() * (ls - lt)).sum(-1)


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("clip", [0.4, None])
def test_user_hindsight(skip: int, clip: float | None) -> None:
    def define(v: View) -> Tensor:
        signal = (v.at_y(v.t) - v.at_y(v.ls)).detach()
        signal = signal if clip is None else signal.clamp(-clip, clip)
        rows = []
        for b in range(len(signal)):
            kept = v.mask[b].nonzero()[skip:, 0]
            if len(kept):
                rows.append(-(signal[b] * v.at_y(v.ls)[b])[kept].mean())
        return torch.stack(rows).mean()

    check("user_hindsight", define, options={"skip": skip, "clip": clip}, close=1e-6)


def test_step_critique() -> None:
    check("step_critique", lambda v: v.token_mean(reverse(v.t, v.ls)))

    def clipped(v: View) -> Tensor:
        return v.token_mean((v.ls.exp() * (v.ls - v.t)).clamp(max=0.05).sum(-1))

    check("step_critique", clipped, options={"beta": 1.0, "entry_clip": 0.05})


@pytest.mark.parametrize(
    ("base", "alpha", "largest", "bins"), [(0.2, 3.0, 3.0, 5), (0.1, 3.0, 0.4, 2), (0.1, 0.2, 3.0, 5)]
)
def test_acpo(base: float, alpha: float, largest: float, bins: int) -> None:
    def define(v: View) -> Tensor:
        log_y, old = v.at_y(v.ls), v.data["old_logprob"]
        ratio, p = (log_y - old).exp(), log_y.detach().exp()
        part = (p * bins).floor().clamp(max=bins - 1)
        width = torch.full_like(p, base)
        for number in range(bins):
            inside = v.mask & (part == number)
            if bool(inside.any()):
                r = ratio.detach()[inside]
                deviation = ((r - r.mean()).square().mean() + 1e-8).sqrt()
                width[inside] = min(max(base + alpha * float(deviation), 0.0), largest)
        a = v.data["advantage"]
        cut = torch.minimum(torch.maximum(ratio, 1 - width), 1 + width)
        return v.token_mean(-torch.minimum(ratio * a, cut * a))

    options = {"base": base, "alpha": alpha, "largest": largest, "bins": bins}
    g = torch.Generator().manual_seed(3)
    data = {
        "advantage": torch.randn(BATCH, LENGTH, generator=g).double(),
        "old_logprob": -1 - 6 * torch.rand(BATCH, LENGTH, generator=g).double(),
    }
    check("acpo", define, roles=(), data=data, options=options, close=1e-6)


@pytest.mark.parametrize(("beta", "reward"), [(1.0, 0.5), (0.0, 0.2)])
def test_sleep(beta: float, reward: float) -> None:
    def define(v: View) -> Tensor:
        kl = reverse(v.ls, v.t) if beta else reverse(v.t, v.ls)
        ratio, a = (v.at_y(v.ls) - v.data["old_logprob"]).exp(), v.data["advantage"]
        rl = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        return v.token_mean((1 - reward) * kl + reward * rl)

    check("sleep", define, columns=("advantage", "old_logprob"), options={"beta": beta, "reward": reward})


def test_systems_out_of_scope_have_a_reason_and_no_entry() -> None:
    systems = methods.out_of_scope.OUT_OF_SCOPE
    assert len(dict(systems)) == len(systems) == 23
    for name, reason in systems:
        assert name not in methods.names()
        assert reason.endswith(".")
        assert len(reason) > 30
