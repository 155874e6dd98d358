"""One teacher, many estimates of the divergence to it: on whose entries, by which sample, whose gradient."""

import math

from opsd_kernels.methods.registry import method
from opsd_kernels.methods.terms import importance
from opsd_kernels.objectives import Objective, Support
from opsd_kernels.recipes import Estimator, Prepare, Recipe, Term, Weight

# Modes of the code of arXiv 2605.11182 that are one divergence: its name, whose entries, what of the others.
_OF_ENTRIES = {
    "notail_sg": ("reverse_kl_sg", "student", "drop"),
    "notail": ("reverse_kl", "student", "drop"),
    "tail": ("reverse_kl", "student", "tail"),
    "intersect_sg_norm": ("reverse_kl_sg", "intersection", "renormalise"),
    "topk_forward": ("forward_kl", "teacher", "drop"),
    "topk_forward_student": ("forward_kl", "student", "drop"),
}
_WHOLE = {"reverse": "reverse_kl", "forward": "forward_kl", "jsd": "jsd"}
_SAMPLED = {"token_reverse_kl": "k1", "decoded": "decoded"}
_TWO = ("wiener", "kl_biased")
MODES = (*_OF_ENTRIES, *_WHOLE, *_SAMPLED, *_TWO)


@method(
    "The Many Faces of On-Policy Distillation: stop-gradient top-k reverse KL", "2605.11182",
    teacher="a larger model, or initial weights with the answer",
    driver=("teacher model", "context answer_only", "teacher initial"),
    published="k 1, 5, 20 and 50 compared",
    scope="modes of its code: notail_sg, notail, tail, intersect_sg_norm, topk_forward, "
    "topk_forward_student, reverse, forward, jsd, token_reverse_kl, decoded, wiener, kl_biased; eos > 0 "
    "with a given support of the end tokens adds its -i / length log s(EOS). Left out: a divergence "
    "subtracted from an advantage of rewards, and the likelihood of the teacher's own rollouts, which is "
    "another batch (method mixsd)",
    differs="the code's floor of 1e-8 under both tails is left out; the text's topk_forward renormalises "
    "neither side either; kl_biased's second term has a tail in the code",
)  # fmt: skip
def opd_topk_sg(
    mode: str = "notail_sg", k: int = 50, *, beta: float = 0.5, eta: float = 1.0, threshold: float = 0.0,
    eos: float = 0.0, length: int = 8192, longest: int | None = None, normaliser: str = "sequences",
) -> Recipe:  # fmt: skip
    """sum_v s_v (sg[log s_v] - log t_v) over the student's top k, both of the whole softmax: without the
    stop the student's own mass on them would be lowered."""
    gate = () if longest is None else (Weight("length_gate", {"tokens": longest}),)
    terms = [
        Term(loss, factor, weights=(*weights, *gate), normaliser=normaliser)
        for loss, factor, weights in _mode(mode, k, beta, eta, threshold)
    ]
    if eos:
        end = Estimator("imitation", {"target": "uniform"}, Support(None, "given"))
        late = Weight("ramp", {"length": length})
        terms.append(Term(end, eos, weights=(late, *gate), normaliser=normaliser))
    return Recipe(tuple(terms))


def _mode(
    name: str, k: int, beta: float, eta: float, threshold: float
) -> list[tuple[Objective | Estimator, float, tuple[Weight, ...]]]:
    """Loss, coefficient and weights of each term of a mode."""
    reverse, forward = Objective("reverse_kl"), Objective("forward_kl")
    if name in _OF_ENTRIES:
        divergence, of, rest = _OF_ENTRIES[name]
        return [(Objective(divergence, support=Support(k, of, rest)), 1.0, ())]
    if name in _WHOLE:
        return [(Objective("jsd", beta) if name == "jsd" else Objective(_WHOLE[name]), 1.0, ())]
    if name in _SAMPLED:
        return [(Estimator(_SAMPLED[name]), 1.0, ())]
    if name == "wiener":
        return [
            (reverse, 1.0, (Weight("wiener"),)),
            (forward, 1.0, (Weight("wiener", {"complement": True}),)),
        ]
    if name == "kl_biased":
        unsure = Weight("entropy_gate", {"of": "teacher", "threshold": threshold})
        return [
            (reverse, 1.0, ()),
            (Objective("forward_kl", support=Support(k, "teacher", "tail")), eta, (unsure,)),
        ]
    raise ValueError(f"mode: expected one of {', '.join(MODES)}; got {name!r}")


@method(
    "Entropy-Aware On-Policy Distillation", "2603.07079",
    teacher="a larger model",
    driver=("teacher model", "old_logprob"),
    published="threshold 0.8 nats, top 16",
    differs="its code adds the forward KL, of entries as they are; switch=True replaces the reverse KL by "
    "it. PW-OPSD's baseline (arXiv 2605.21606) has rest='renormalise_teacher'",
)  # fmt: skip
def eopd(
    threshold: float = 0.8, k: int = 16, rest: str = "drop", switch: bool = False, clip: float = 0.2
) -> Recipe:
    """PPO-clipped sampled reverse KL, plus the forward KL on the teacher's top 16 where its entropy is
    high."""
    options = {"student": "old", "surrogate": "ppo", "low": clip, "high": clip}
    sure = (Weight("entropy_gate", {"threshold": threshold, "above": False}),)
    sampled = Term(Estimator("policy_gradient", options), weights=sure if switch else ())
    covering = Objective("forward_kl", support=Support(k, "teacher", rest))
    return Recipe((sampled, Term(covering, weights=(Weight("entropy_gate", {"threshold": threshold}),))))


@method(
    "REOPOLD: relaxed on-policy distillation", "2603.11137",
    teacher="a larger model",
    driver=("teacher model",),
    published="lambda 0.1; phase 1 up to step 50",
    schedule={"phase": {"start": 1, "end": 2, "steps": 1, "hold": 49}},
)  # fmt: skip
def reopold(phase: int = 1, mixing: float = 0.1, share: float = 0.2) -> Recipe:
    """-sum M max(R, floor) log s / sum M, R = log t - log s, floor = log(lambda) / (1 - lambda). M is 1
    above the floor in phase 1, on the 20 % of tokens with the highest student entropy in phase 2."""
    if phase not in (1, 2):
        raise ValueError(f"phase: expected 1 or 2; got {phase!r}")
    floor = math.log(mixing) / (1 - mixing)
    kept = Weight("reward_above", {"floor": floor}) if phase == 1 else Weight("top_entropy", {"share": share})
    loss = Estimator("policy_gradient", {"advantage": "teacher", "floor": floor})
    return Recipe((Term(loss, weights=(kept,), normaliser="selected"),))


@method(
    "The position bias of on-policy distillation: importance weights (IW-OPD)", "2606.22600",
    teacher="a larger model",
    driver=("teacher model",),
    published="weights from 1.5 to 1, lr 1e-5, 1,024 rollouts a step, 16,384 tokens",
    differs="the released script cuts s_old / s_rollout at 5 besides: rollout_cap=5",
)  # fmt: skip
def iw_opd(gain: float = 0.5, rollout_cap: float | None = None) -> Recipe:
    """k1 times 1 + gamma (1 - share of the rollout's |log t - log s| that lies before the token)."""
    weights = (Weight("prefix_trust", {"gain": gain}), *importance(None, rollout_cap))
    return Recipe((Term(Estimator("k1"), weights=weights),))


@method(
    "Trust region on-policy distillation (TrOPD)", "2606.01249",
    teacher="a larger model",
    driver=("teacher model",),
    published="top 64, guidance 0.001 falling to 0 by a cosine over 200 steps, lr 5e-6, 128 prompts of 4 "
    "rollouts, 8,096 tokens",
    scope="`selected` tells the teacher's prefixes, which the student goes on from; guidance=0 has none",
    differs="how the three parts are averaged is not known to us: all by the number of tokens",
    library="completions of which the teacher wrote the first part",
    alone={"guidance": 0},
)  # fmt: skip
def tropd(k: int = 64, guidance: float = 0.001) -> Recipe:
    """k1 on tokens drawn with the probability min(t / s, 1), sum_v t_v (log t_v - log s_v) over the teacher's
    top k on the other ones; plus guidance (log t - log s) on what the teacher wrote."""
    own = (Weight("selected", {"accept": 0.0, "reject": 1.0}),) if guidance else ()
    trusted, outlying = (Weight("trust_region", {"inside": inside}) for inside in (True, False))
    covering = Objective("forward_kl", support=Support(k, "teacher", "drop"))
    terms = [Term(Estimator("k1"), weights=(trusted, *own)), Term(covering, weights=(outlying, *own))]
    if guidance:
        terms.append(Term(Estimator("decoded"), guidance, weights=(Weight("selected"),)))
    return Recipe(tuple(terms), (Prepare("draw"),))
