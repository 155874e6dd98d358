"""Distillation with weights of tokens, rollouts and teachers, and with teachers made of several."""

from opsd_kernels.methods.registry import method
from opsd_kernels.objectives import Objective, Support
from opsd_kernels.recipes import Blend, Built, Entropy, Estimator, Prepare, Recipe, Term, Weight

SELECTORS = {
    "soft_or": ("tip", {}),
    "overconfident": ("tip", {"overconfident": True}),
    "sample": ("tip_sample", {}),
    "ta_opd": ("ta_opd", {}),
}


@method(
    "TIP: token importance", "2604.14084",
    teacher="another model",
    driver=("teacher model",),
    published="share 0.5, or 0.2; 0.1 of the overconfident tokens; Qwen3-8B to 4B",
    differs="the released code has no such selector but a draw, selector='sample'; 'ta_opd' is the relative "
    "of arXiv 2605.26844, share 0.05, which needs `teacher_mass`",
)  # fmt: skip
def tip(share: float = 0.5, selector: str = "soft_or", divergence: str = "reverse_kl") -> Recipe:
    """KL(s || t), the mean over the share of tokens with the largest h + d - h d (entropy h, KL d)."""
    if selector not in SELECTORS:
        raise ValueError(f"selector: expected one of {', '.join(SELECTORS)}; got {selector!r}")
    name, options = SELECTORS[selector]
    kept = Weight(name, {"share": share, **options})
    return Recipe((Term(Objective(divergence), weights=(kept,), normaliser="selected"),))


@method(
    "SCOPE: signal-calibrated distillation", "2604.10688",
    teacher="another model",
    driver=("teacher model", "reward", "pool"),
    published="lr 5e-5, batch 256, 8 rollouts a prompt, T 0.6",
    differs="the released code's weights are softmax(+mean log p / tau) on both paths, which favours right "
    "rollouts that are likely already, times their number: student_sign=1, count=True",
)  # fmt: skip
def scope(
    tau: float = 1.0, student_sign: float = -1.0, teacher_sign: float = 1.0, count: bool = False,
    form: str = "k1", k: int = 16,
) -> Recipe:  # fmt: skip
    """-log s on right rollouts, weighted by PPL_s^(1/tau); distillation on wrong ones, by PPL_t^(-1/tau)."""
    losses: dict[str, Objective | Estimator] = {
        "k1": Estimator("k1", {"clamp": 10.0}),
        "k3": Estimator("k3", {"clamp": 10.0}),
        "top_k": Objective("reverse_kl", support=Support(k, "teacher", "renormalise")),
    }
    if form not in losses:
        raise ValueError(f"form: expected one of {', '.join(losses)}; got {form!r}")
    shared = {"tau": tau, "count": count}
    right = Weight("scope", {"path": "correct", "sign": student_sign, **shared})
    wrong = Weight("scope", {"path": "wrong", "sign": teacher_sign, **shared})
    imitated = Term(Estimator("nll"), teacher=None, weights=(right,), normaliser="selected")
    return Recipe((imitated, Term(losses[form], weights=(wrong,), normaliser="selected")))


@method(
    "MAD-OPD: multi-agent debate", "2605.01347",
    teacher="several models, each with the debate so far",
    driver=("context debate", "teacher model"),
    published="2 rounds, lr 1e-5; beta 0.5 for agents, 1 for code",
    library="several teacher models, and their debate",
)  # fmt: skip
def mad_opd(teachers: int = 2, beta: float = 0.5, tau: float = 1.0, top_k: int | None = None) -> Recipe:
    """sum_k w_k JSD(s, t_k), w = softmax(c / (100 tau)) of the teachers' confidences, 0 to 100."""
    support = None if top_k is None else Support(top_k, "teacher", "renormalise")
    loss = Objective("jsd", beta=beta, support=support)
    shares = [Weight("confidence", {"tau": tau, "index": index}) for index in range(teachers)]
    terms = [Term(loss, teacher=f"teacher{i + 1}", weights=(share,)) for i, share in enumerate(shares)]
    return Recipe(tuple(terms))


@method(
    "BRTS: best-of-N teacher rollouts", "2605.09725",
    teacher="another model",
    driver=("teacher model", "pool"),
    published="16 entries",
    scope="which teacher rollout is `selected` is of the data: right ones first, then the largest share of "
    "tokens among the student's top entries; the symmetric difference of both tops is no support here",
    differs="coefficient 0.05 in the README, 10 by an audit; the text's renormalised KL is zero for one "
    "entry, the code has a score function per entry (also arXiv 2604.13016)",
    library="completions of the teacher, one of which is selected",
)  # fmt: skip
def brts(
    k: int = 16, of: str = "student", weight: str = "student_renormalised", coefficient: float = 0.05
) -> Recipe:
    """-sum_v A(v) log s(v) on rollouts; KL(t || s) on the teacher's top k, on `selected` teacher rollouts."""
    own, selected = (Weight("selected", {"accept": a, "reject": 1.0 - a}) for a in (0.0, 1.0))
    score = Estimator("score_function", {"weight": weight}, Support(k, of))
    terms = [Term(score, weights=(own,), normaliser="selected")]
    if coefficient:
        imitated = Objective("forward_kl", support=Support(k, "teacher", "renormalise"))
        terms.append(Term(imitated, coefficient, weights=(selected,), normaliser="selected"))
    return Recipe(tuple(terms))


_DIVERGENCES = {0.0: "forward_kl", 0.5: "jsd", 1.0: "reverse_kl"}


@method(
    "UniSD: unified self-distillation", "2605.06597",
    teacher="moving average (0.98 every 10 steps), demonstrations",
    driver=("context sibling", "teacher ema", "rollout_logprob"),
    published="3 contexts, lr 2e-5, T 0.7; alone gamma 0.01 to 1, contrastive 0.1 with margin 0.5",
    scope="`sequences.feature_matching` adds 0.01 of the hidden states' distance; quantile=0.99 is the "
    "released other form of the clip, without the constants that it adds to the value; the rollouts' "
    "`sequence_is` (cap 2) goes into the call's token_weight, "
    "since the sum of weights that divides would cancel it",
)  # fmt: skip
def unisd(
    beta: float = 0.0, token_clip: float = 10.0, gamma: float = 0.001, agreement: str = "token",
    spread: str = "var", contrastive: float = 0.01, margin: float = 0.1, quantile: float | None = None,
) -> Recipe:  # fmt: skip
    """Clipped KL(t || s) (beta 1: KL(s || t), between: JSD), weighted by contexts' agreement; and a hinge."""
    loss = Objective("jsd", beta=beta, token_clip=token_clip if quantile is None else None)
    clip: tuple[Weight, ...] = ()
    if quantile is not None:
        if beta not in _DIVERGENCES:
            raise ValueError(f"beta: expected 0, 1/2 or 1 with a quantile; got {beta}")
        clip = (Weight("below_quantile", {"level": quantile, "divergence": _DIVERGENCES[beta]}),)
    if agreement == "token":
        agreeing = Weight("unisd_token", {"gamma": gamma, "spread": spread})
        terms = [Term(loss, weights=(agreeing, *clip), normaliser="sequence_weights")]
    elif agreement == "sequence":
        agreeing = Weight("unisd_sequence", {"gamma": gamma})
        terms = [Term(loss, weights=(agreeing, *clip), normaliser="sequences")]
    else:
        raise ValueError(f"agreement: expected 'token' or 'sequence'; got {agreement!r}")
    if contrastive:
        terms.append(Term(Estimator("contrast", {"margin": margin}), contrastive, normaliser="sequences"))
    return Recipe(tuple(terms))


@method(
    "SELFCI: complementary self-distillation", "2605.20258",
    teacher="moving average (0.999), one context for integrity and one for utility",
    driver=("context feedback", "teacher ema", "teacher trust region"),
    published="lr 1e-6, T 0.7; weights 1 and 1, or 1 - score of each rollout",
    differs="the released sampled mode backpropagates log s - log t, whose gradient does not know the "
    "teacher; sampled=True is the policy gradient instead",
)  # fmt: skip
def selfci(
    integrity: float = 1.0, utility: float = 1.0, student: float = 0.0, by_rollout: bool = False,
    top_k: int | None = None, sampled: bool = False,
) -> Recipe:  # fmt: skip
    """(w_p KL(s || t_p) + w_u KL(s || t_u)) / max(1, W), W = w_p + w_u, as a KL to one product."""
    if by_rollout and student:
        raise ValueError(f"student: expected 0 with by_rollout=True; got {student!r}")
    total, teacher = integrity + utility, 1 - student
    powers: list[tuple[float | str, str]] = [
        (teacher * integrity / total, "integrity"), (teacher * utility / total, "utility"),
    ]  # fmt: skip
    if student:
        powers.append((student, "student"))
    scale = total / max(1.0, total)
    prepare: tuple[Prepare, ...] = ()
    weights: tuple[Weight, ...] = ()
    if by_rollout:
        powers = [("coefficient", "integrity"), ("1-coefficient", "utility")]
        scale, prepare, weights = 1.0, (Prepare("first_share"),), (Weight("teacher_total"),)
    support = None if top_k is None else Support(top_k, "student", "renormalise")
    loss = Estimator("k1") if sampled else Objective("reverse_kl", support=support)
    product = Blend("loglinear", tuple(powers))
    return Recipe((Term(loss, scale, product, weights, "sequences"),), prepare)


@method(
    "CurioSFT: entropy-preserving fine-tuning", "2602.02244",
    teacher="moving average of the student (0.99 every 5 steps)",
    driver=("teacher ema", "offline"),
    published="lr 1e-5",
    library="demonstrations as completions",
)  # fmt: skip
def curiosft(coefficient: float = 1.0, raise_by: float = 0.5, k: int = 512) -> Recipe:
    """-log s + (log s - log t_tau)^2 / 2 on demonstrations, tau the temperature that raises t's entropy."""
    target = Built("matched_entropy", ("teacher",), {"raise_by": raise_by, "k": k})
    return Recipe((Term(Estimator("nll"), teacher=None), Term(Estimator("k2"), coefficient, target)))


@method(
    "TSD-KD: token-selective dual distillation", "2603.13260",
    teacher="another model",
    driver=("teacher model",),
    published="beta 0.9, top 10",
    differs="form='prefix' is the released code's ranking, which reverses Plackett and Luce's sums; its "
    "threshold of entropy is the batch's 10 % quantile, so that nine tenths of the tokens are kept",
)  # fmt: skip
def tsd_kd(
    beta: float = 0.9, entropy: float = 1.0, share: float = 0.9, ranking: float = 0.1, k: int = 10,
    limit: float = 0.1, form: str = "suffix",
) -> Recipe:  # fmt: skip
    """JSD weighted by sigmoid(H_s - H_t), the entropy of the least sure tokens, and the teacher's ranking."""
    order = Estimator("ranking", {"form": form}, Support(k, "student"))
    opening = Weight("entropy_prefix", {"limit": limit})
    unsure = Weight("top_entropy", {"share": share})
    return Recipe(
        (
            Term(Objective("jsd", beta=beta), weights=(Weight("entropy_difference"),)),
            Term(Entropy(), -entropy, teacher=None, weights=(unsure,), normaliser="selected"),
            Term(order, ranking, weights=(opening,), normaliser="selected"),
        )
    )
