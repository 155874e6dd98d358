"""What is minimised at one token: a divergence between student and teacher, its support and its clips."""

import difflib
from dataclasses import dataclass, replace

from opsd_kernels import divergences
from opsd_kernels.checks import is_finite, shown

CLIP_MODES = ("zero", "scale", "ratio")
DEFAULT_BETA = 0.5
OWNERS = ("student", "teacher", "union", "intersection", "given")
RESTS = ("tail", "renormalise", "drop", "renormalise_teacher")
# Where a divergence is one: at the ends that are left out it vanishes, or its formula is 0 / 0.
BETAS = {"skew_forward": "[0, 1)", "skew_reverse": "(0, 1]", "skew_reverse_sg": "(0, 1]", "alpha": "(0, 1)"}
_FORWARD = ("forward_kl", "jsd", "skew_forward", "mixed")  # that are KL(t || s) at beta = 0
_REVERSE = ("reverse_kl", "jsd", "skew_reverse", "skew_reverse_sg", "mixed")  # KL(s || t) at beta = 1


@dataclass(frozen=True)
class Support:
    """The K vocabulary entries of a token over which the divergence is taken, instead of all V.

    Args:
        k: entries per token, at most V; of each side for `"union"` and `"intersection"`; None for `"given"`,
            where an entry that is given twice counts once.
        of: whose most likely entries: `"student"`, `"teacher"`, the `"union"` or `"intersection"` of both,
            or those `"given"` by `loss(support_ids=...)`.
        rest: what happens to the other entries. `"tail"`: they count as one more entry with their exact mass,
            so that the loss is a divergence of distributions. `"renormalise"`: both distributions are
            renormalised on the K entries. `"drop"`: the published signed terms of the K entries are summed as
            they are. The descent of a reverse KL then also lowers the student's own mass on them;
            `"reverse_kl_sg"` has no such leak (arXiv 2605.11182). `"renormalise_teacher"`: the signed terms,
            with the teacher renormalised on the K entries and the student's probabilities those of its whole
            softmax. The loss may be below 0; the gradient of the student's normaliser reaches the rest.
    """

    k: int | None
    of: str = "student"
    rest: str = "tail"

    def __post_init__(self) -> None:
        if self.of not in OWNERS:
            raise ValueError(f"of: expected one of {', '.join(OWNERS)}; got {self.of!r}")
        if self.rest not in RESTS:
            raise ValueError(f"rest: expected one of {', '.join(RESTS)}; got {self.rest!r}")
        if self.of == "given":
            if self.k is not None:
                raise ValueError(f"k: expected None with of='given'; got {self.k!r}")
        elif type(self.k) is not int or self.k < 1:
            raise ValueError(f"k: expected an int of at least 1; got {self.k!r}")

    @property
    def is_whole(self) -> bool:
        """Whether the loss compares two distributions, rather than parts whose masses differ."""
        return self.rest in ("tail", "renormalise")


@dataclass(frozen=True)
class Objective:
    """Token loss L = sum_v min(l_v, entry_clip), then min(L, token_clip); another with `clip_mode="ratio"`.

    No clip of the signed terms keeps the direction of the gradient. For the forward KL, s and t of an entry,
    dL/dz_v = s_v sum_u a_u - a_v with a_u = t_u where l_u <= tau. What clips take from the sum is missing in
    the first part of every entry's gradient and only the clipped entry's own part shrinks with it:

    - `"zero"`: a_v = 0, so a clipped entry has the gradient s_v sum_u a_u >= 0: it is pushed *down*, although
      l_v > tau > 0 means that the teacher wants more of it.
    - `"scale"`: a_v = tau / ln(t_v / s_v). It is pushed down where s_v sum_u a_u > a_v. With all other terms
      whole that is s (1 - t) ln(t / s) > (1 - s) tau: at tau = 0.05 possible for teachers between 15 and
      92 %, from tau = 0.12 on never. Where other entries are clipped too it happens less.

    On a real model (SmolLM2-135M on word problems, README) the published clip left 18.0 % of 23.8 % greedy
    accuracy and the scaled one 40.2 %, where forward KL without a clip came to 60.2 %.

    `"ratio"` cannot do that. It is the forward KL to a target whose log-ratio to the student is bounded:
    with r_v = log t_v - log s_v and s detached, t'_v = s_v exp(clip(r_v, -c, c)) / Z,
    Z = sum_u s_u exp(clip(r_u, -c, c)), and dL/dz = s - t'. Let v* be the entry of the largest log-ratio:
    Z is a mean of exp(clip(r_u)) under s, hence Z <= exp(clip(r_v*)), t'_v* >= s_v* and dL/dz_v* <= 0: what
    the teacher raises most is never pushed down. No divergence of t' from s exceeds that of t.

    Args:
        divergence: a name of `divergences.def`: `"forward_kl"` is KL(t || s), `"reverse_kl"` is KL(s || t),
            `"jsd"` is beta KL(t || m) + (1 - beta) KL(s || m) with m = beta t + (1 - beta) s;
            `"reverse_kl_sg"` is sum_v s_v (sg[log s_v] - log t_v), which has the reverse KL's value, and over
            the whole vocabulary its gradient; `"skew_forward"` is KL(t || m), `"skew_reverse"` KL(s || m)
            (DistiLLM, arXiv 2402.03898), `"skew_reverse_sg"` the same with the student's part of m detached
            (the code of DistiLLM-2, arXiv 2503.07067); `"total_variation"` is sum_v |s_v - t_v| / 2;
            `"alpha"` is Amari's (1 - sum_v t_v^beta s_v^(1 - beta)) / (beta (1 - beta)); `"mixed"` is
            beta KL(s || t) + (1 - beta) KL(t || s).
        beta: the teacher's share of m, or the weight that the formula names, in [0, 1]; of a divergence
            whose formula has none anything but the default is refused. As in GKD (arXiv
            2306.13649) and OPSD, a JSD at 0 stands for forward KL and at 1 for reverse KL, where the formula
            itself would vanish. DistiLLM's alpha is the share of the first distribution: beta for
            `"skew_forward"`, in [0, 1) and forward KL at 0; 1 - beta for `"skew_reverse"`, in (0, 1] and
            reverse KL at 1. That of `"alpha"` is in (0, 1): towards 1 forward KL, towards 0 reverse KL.
        entry_clip: tau, an upper bound of the *signed* term l_v of each vocabulary entry, applied before the
            sum (OPSD, arXiv 2601.18734; tau 0.05). The sum of a token may then be negative, and the loss
            fall while the divergence rises. With `"ratio"` it is c, in nats, say 1.
        clip_mode: what happens to the gradient of a clipped term. `"zero"`, as published: the entry's own
            gradient is dropped and the softmax normaliser's stays. `"scale"`: the term is multiplied by
            tau / l_v with the factor detached; the value is the same. Both also apply to `token_clip`.
            `"ratio"`: the forward KL to a teacher of bounded log-ratio, over the whole vocabulary; its
            `token_clip` scales. Excluded columns of the teacher count as those of the lowest ratio.
        token_clip: upper bound of the token's loss after the sum.
        support: the entries v of the sum; None for the whole vocabulary.
    """

    divergence: str = "forward_kl"
    beta: float = DEFAULT_BETA
    entry_clip: float | None = None
    clip_mode: str = "zero"
    token_clip: float | None = None
    support: Support | None = None

    def __post_init__(self) -> None:
        if self.divergence not in divergences.table():
            known = ", ".join(divergences.table())
            hint = "" if self.divergence not in _NAMED else f" (write {_NAMED[self.divergence]!r})"
            raise ValueError(f"divergence: expected one of {known}; got {self.divergence!r}{hint}")
        if self.beta != DEFAULT_BETA and not divergences.table()[self.divergence].uses_beta:
            raise ValueError(
                f"beta: expected none for {self.divergence}, whose formula has no beta; got {self.beta!r}"
            )
        interval = BETAS.get(self.divergence, "[0, 1]")
        if not _is_number(self.beta) or not _contains(interval, self.beta):
            raise ValueError(f"beta: expected a number in {interval}; got {self.beta!r}")
        if self.support is not None and not isinstance(self.support, Support):
            raise ValueError(f"support: expected a Support or None; got {self.support!r}")
        if self.clip_mode not in CLIP_MODES:
            raise ValueError(f"clip_mode: expected one of {', '.join(CLIP_MODES)}; got {self.clip_mode!r}")
        for name in ("entry_clip", "token_clip"):
            bound = getattr(self, name)
            if bound is not None and not (is_finite(bound) and bound > 0):
                raise ValueError(f"{name}: expected a number above 0 or None; got {shown(bound)}")
        if self.clip_mode == "ratio":
            self._check_ratio()

    def _check_ratio(self) -> None:
        """What `clip_mode="ratio"` needs."""
        if self.entry_clip is None:
            raise ValueError(
                "entry_clip: expected the bound of the log-ratio for clip_mode 'ratio'; got None"
            )
        if self.term.name != "forward_kl":
            raise ValueError(
                f"clip_mode: expected zero or scale for {self.divergence!r}, 'ratio' is of the forward KL; "
                "got 'ratio'"
            )
        if self.support is not None:
            raise ValueError(f"support: expected None for clip_mode 'ratio'; got {self.support}")

    @property
    def ratio_bound(self) -> float | None:
        """c of `clip_mode="ratio"`; None with another clip or none."""
        return self.entry_clip if self.clip_mode == "ratio" else None

    @property
    def of_rows(self) -> "Objective":
        """What a backend's row functions evaluate: the teacher's log-ratio has been bounded before."""
        return self if self.ratio_bound is None else replace(self, entry_clip=None, clip_mode="scale")

    @property
    def term(self) -> divergences.Divergence:
        """The table's line that is evaluated: at an end of beta several are a KL divergence."""
        name = self.divergence
        if self.beta == 0 and name in _FORWARD:
            name = "forward_kl"
        elif self.beta == 1 and name in _REVERSE:
            name = "reverse_kl"
        return divergences.table()[name]


def _contains(interval: str, x: float) -> bool:
    """Whether x lies in an interval of 0 and 1, each with a bracket that includes it or a parenthesis."""
    return 0 < x < 1 or (x == 0 and interval[0] == "[") or (x == 1 and interval[-1] == "]")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Every divergence by itself, at beta = 1/2 where its formula has one.
_NAMED = {name: Objective(name) for name in divergences.table()} | {
    "opsd": Objective("forward_kl", entry_clip=0.05),
}


def named_objectives() -> dict[str, Objective]:
    """Every objective that `loss(objective=...)` takes by name."""
    return dict(_NAMED)


def get_objective(objective: object) -> Objective:
    """The objective itself, or the one of that name; ValueError lists the names."""
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, str) and objective in _NAMED:
        return _NAMED[objective]
    close = difflib.get_close_matches(str(objective), _NAMED, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    expected = f"an Objective or one of {', '.join(_NAMED)}"
    raise ValueError(f"objective: expected {expected}; got {objective!r}{hint}")
