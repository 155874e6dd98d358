"""What on-policy distillation is made of: GKD, MiniLLM, DistiLLM, and losses of reports and neighbours."""

from opsd_kernels.methods.registry import method
from opsd_kernels.methods.terms import grpo, policy_gradient
from opsd_kernels.objectives import Objective, Support
from opsd_kernels.recipes import Blend, Built, Estimator, Prepare, Recipe, Term, Weight


@method(
    "GKD: generalized knowledge distillation", "2306.13649",
    teacher="another model",
    driver=("teacher model", "pool"),
    published="half of the batches on the student's samples; T 0.9 in TRL",
)  # fmt: skip
def gkd(beta: float = 0.5) -> Recipe:
    """JSD(s, t); KL(t || s) at beta 0, KL(s || t) at 1."""
    return Recipe((Term(Objective("jsd", beta=beta)),))


@method(
    "MiniLLM", "2306.08543",
    teacher="another model",
    driver=("teacher model", "old_logprob", "rollout_logprob", "pool"),
    published="4 epochs a batch; rollouts drawn from 0.8 s + 0.2 t",
    scope="its language-modelling loss on a corpus is nll on other tokens",
    differs="TRL's version has discount 0 and no single step, which is k1",
    library="completions drawn from a mixture of student and teacher",
    alone={"share": None},
)  # fmt: skip
def minillm(share: float | None = 0.2, discount: float = 1.0, single_step: float = 1.0) -> Recipe:
    """PPO of the whitened mean return of log t - log s_old, and KL(s || t); both corrected for t's share."""
    returns = Prepare("reward_to_go", {"discount": discount})
    drawn = () if share is None else (Weight("mixed_sampling", {"share": share}),)
    terms = [Term(policy_gradient("data"), weights=drawn)]
    if single_step:
        terms.append(Term(Objective("reverse_kl"), single_step, weights=drawn))
    return Recipe(tuple(terms), (returns,))


@method(
    "DistiLLM", "2402.03898",
    teacher="another model",
    driver=("teacher model", "pool"),
    published="alpha 0.1, adaptive replay of off-policy samples",
)  # fmt: skip
def distillm(form: str = "skew_reverse", alpha: float = 0.1) -> Recipe:
    """KL(s || (1 - alpha) t + alpha s), KL(t || alpha t + (1 - alpha) s) or the total variation."""
    # The alpha of both is the share of the first distribution; beta is the teacher's in either mixture.
    beta = {"skew_reverse": 1 - alpha, "skew_forward": alpha, "total_variation": 0.5}
    if form not in beta:
        raise ValueError(f"form: expected one of {', '.join(beta)}; got {form!r}")
    return Recipe((Term(Objective(form, beta=beta[form])),))


@method(
    "DistiLLM-2", "2503.07067",
    teacher="another model",
    driver=("teacher model", "pool"),
    published="alpha 0.1; the second term's coefficient rises from 1 to 1.5",
    scope="`selected` tells teacher's rollouts from student's; an alpha for each rollout is "
    "`sequences.adaptive_alpha`, with a call for each value",
    library="completions of the teacher beside the student's",
)  # fmt: skip
def distillm2(alpha: float = 0.1, ramp: float = 1.0, detached: bool = True) -> Recipe:
    """KL(t || alpha t + (1 - alpha) s) on the teacher's rollouts, KL(s || (1 - alpha) t + alpha s) on s's."""
    theirs, own = (Weight("selected", {"accept": a, "reject": 1.0 - a}) for a in (1.0, 0.0))
    reverse = Objective("skew_reverse_sg" if detached else "skew_reverse", beta=1 - alpha)
    return Recipe(
        (
            Term(Objective("skew_forward", beta=alpha), weights=(theirs,), normaliser="selected"),
            Term(reverse, ramp, weights=(own,), normaliser="selected"),
        )
    )


@method(
    "DeepSeek-V4: several teachers over the whole vocabulary", "DeepSeek-V4 technical report",
    teacher="domain experts",
    driver=("teacher model", "routing"),
    published="teachers' last hidden states are cached, rows sorted by teacher",
    differs="product=True has the same gradient from one divergence, and a value less by a constant",
    library="several teacher models",
)  # fmt: skip
def deepseek_v4(weights: tuple[float, ...] = (0.5, 0.5), product: bool = False) -> Recipe:
    """sum_i w_i KL(s || t_i), of the teachers "teacher1", "teacher2" and so on."""
    names = [f"teacher{index + 1}" for index in range(len(weights))]
    if not product:
        pairs = zip(weights, names, strict=True)
        return Recipe(tuple(Term(Objective("reverse_kl"), w, teacher=name) for w, name in pairs))
    total = sum(weights)
    powers = tuple((w / total, name) for w, name in zip(weights, names, strict=True))
    return Recipe((Term(Objective("reverse_kl"), total, teacher=Blend("loglinear", powers)),))


@method(
    "MiMo-V2-Flash: multi-teacher on-policy distillation", "2601.02780",
    teacher="domain experts, one routed to each prompt",
    driver=("teacher model", "routing", "old_logprob", "rollout_logprob"),
    published="a token counts where 0.5 <= s_old / s_rollout <= 5",
    library="several teacher models, one routed to each prompt",
)  # fmt: skip
def mimo_mopd(low: float = 0.5, high: float = 5.0, weighted: bool = False, reward: bool = False) -> Recipe:
    """REINFORCE of log t - log s_old with IcePop's gate; weighted: times the ratio inside it."""
    gate = Weight("icepop", {"low": low, "high": high, "weighted": weighted})
    name = "data+teacher" if reward else "teacher"
    return Recipe((Term(policy_gradient(name, "reinforce", student="old"), weights=(gate,)),))


@method(
    "KDRL: distillation and reinforcement learning unified", "2506.02208",
    teacher="another model",
    driver=("teacher model", "reward", "advantage", "old_logprob"),
    published="coefficient 2e-3",
)  # fmt: skip
def kdrl(coefficient: float = 2e-3) -> Recipe:
    """GRPO + coefficient (log s - log t)^2 / 2."""
    return Recipe((grpo(), Term(Estimator("k2"), coefficient)))


@method(
    "Revisiting on-policy distillation: local support matching", "2603.25562",
    teacher="another model",
    driver=("teacher model",),
    differs="the text minimises the KL on the teacher's top entries; the released code takes the student's "
    "top 32 and has the KL as an advantage, which no token has a part in: its expected gradient is zero",
)  # fmt: skip
def lsm(k: int = 32, of: str = "teacher", form: str = "loss") -> Recipe:
    """KL(s || t), both renormalised on the top k; "advantage": REINFORCE of its negative."""
    kl = Objective("reverse_kl", support=Support(k, of, "renormalise"))
    if form not in ("loss", "advantage"):
        raise ValueError(f"form: expected 'loss' or 'advantage'; got {form!r}")
    return Recipe((Term(kl if form == "loss" else policy_gradient("divergence", "reinforce", baseline=kl)),))


@method(
    "SelecTKD: selective token-weighted distillation", "2510.24021",
    teacher="another model",
    driver=("teacher model",),
    published="a token is `selected` if it is among the teacher's top 5; the divergence is left open",
)  # fmt: skip
def selectkd(reject: float = 0.01, divergence: str = "forward_kl", beta: float = 0.5) -> Recipe:
    """A divergence, with a small weight on the tokens that the teacher rejects."""
    accepted = Weight("selected", {"reject": reject})
    return Recipe((Term(Objective(divergence, beta=beta), weights=(accepted,)),))


@method(
    "FiRe-OPD: filter, then reweight", "2606.02684",
    teacher="another model",
    driver=("teacher model",),
    published="drops the 20 % of rollouts that the teacher finds least likely",
    differs="maxima and mean of the weights within the batch or within a rollout: per_row",
)  # fmt: skip
def fire(share: float = 0.8, per_row: bool = False, divergence: str = "reverse_kl") -> Recipe:
    """KL(s || t) of the likelier rollouts, weighted by (1 - H_t / max) (H_s / max), weights of mean 1."""
    weights = (Weight("fire", {"share": share, "per_row": per_row}),)
    return Recipe((Term(Objective(divergence), weights=weights, normaliser="weights"),))


@method(
    "PowerOPD", "2606.17199",
    teacher="another model",
    driver=("teacher model",),
    differs="no exponent is known to us: 0.5 stands here",
)  # fmt: skip
def power_opd(exponent: float = 0.5, surrogate: str = "reinforce") -> Recipe:
    """REINFORCE of t^a - s^a, bounded by 1."""
    return Recipe((Term(policy_gradient("power", surrogate, exponent=exponent)),))


@method(
    "Veto: adaptive target reformulation", "2601.07155",
    teacher="another model",
    driver=("teacher model",),
    differs="beta is tuned for each task: 0.5 stands here",
)  # fmt: skip
def veto(beta: float = 0.5, divergence: str = "forward_kl") -> Recipe:
    """KL(q || s), q ~ t s^beta with a constant s: what the student finds unlikely pulls it less."""
    return Recipe((Term(Objective(divergence), teacher=Built("veto", ("teacher",), {"beta": beta})),))


@method(
    "PACED: distillation at the frontier of competence", "2603.11178",
    teacher="another model, or the same weights with the solution",
    driver=("teacher model", "reward"),
    published="forward KL, then reverse KL",
    differs="when one follows the other is not known to us: the forward KL stays here",
)  # fmt: skip
def paced(divergence: str = "forward_kl") -> Recipe:
    """KL(t || s) weighted by p (1 - p), p the share of right rollouts of the prompt."""
    return Recipe((Term(Objective(divergence), weights=(Weight("paced"),)),))
