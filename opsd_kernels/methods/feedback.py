"""Self-distillation from feedback on the student's own rollouts: verdicts, siblings, revisions, audits."""

from opsd_kernels.methods.registry import method
from opsd_kernels.methods.terms import grpo, importance, on_student_top
from opsd_kernels.objectives import Objective, Support
from opsd_kernels.recipes import Blend, Built, Estimator, Prepare, Recipe, Role, Term, Weight

PRIVILEGED = Weight("privileged")


@method(
    "Reinforcement Learning via Self-Distillation (SDPO)", "2601.20802",
    teacher="average of past weights, a successful sibling or the environment's feedback",
    driver=(
        "context sibling", "context feedback", "teacher ema", "teacher trust region", "reward", "old_logprob",
        "rollout_logprob",
    ),
    published="alpha 0.5, k 100, lr 1e-5, batch 32 of 8 rollouts (science); alpha 1, k 20, lr 1e-6 "
    "(LiveCodeBench); average 0.05, 0.01 for LiveCodeBench; success from reward 0.5",
    scope="rows without a reprompt are those whose data says not privileged",
    differs="trust_region=eta replaces the average: the frozen weights ('initial') and the live ones "
    "('privileged') both read the feedback, and their logits are mixed; sampled=True is the policy gradient "
    "of its sampled mode; the code bounds the log of the entries' mass by -1e-7, which is left out",
)  # fmt: skip
def sdpo(
    alpha: float = 0.5, k: int | None = 100, rest: str = "tail", *, is_cap: float | None = 2.0,
    rollout_cap: float | None = 2.0, trust_region: float | None = None, sampled: bool = False,
) -> Recipe:  # fmt: skip
    """alpha KL(t || m) + (1 - alpha) KL(s || m) on the student's top k and their tail, times capped
    importance weights."""
    teacher: Role = "teacher"
    if trust_region is not None:
        streams = ((trust_region, "privileged"), (1 - trust_region, "initial"))
        teacher = Blend("loglinear", streams)
    loss = Estimator("k1") if sampled else on_student_top(alpha, k, rest)
    weights = (PRIVILEGED, *importance(is_cap, rollout_cap))
    return Recipe((Term(loss, teacher=teacher, weights=weights, normaliser="selected"),))


@method(
    "Sample-routed policy optimization (SRPO)", "2604.02288",
    teacher="average of past weights, a successful sibling",
    driver=("context sibling", "teacher ema", "reward", "old_logprob"),
    published="beta 1, average 0.05, lr 5e-6, batch 32 of 8 rollouts",
    differs="the text names no importance weights of the SDPO branch; is_cap adds SDPO's",
)  # fmt: skip
def srpo(beta: float = 1.0, alpha: float = 0.5, k: int | None = 100, is_cap: float | None = None) -> Recipe:
    """GRPO on the rollouts that are right or have no teacher; SDPO on the others, weighed by exp(-beta H_t)
    over its mean; divided by the tokens of both."""
    trust = (Weight("srpo", {"beta": beta}), *importance(is_cap))
    return Recipe(
        (
            grpo(weights=(Weight("sdpo_route", {"value": False}),)),
            Term(on_student_top(alpha, k), weights=trust),
        )
    )


@method(
    "On-policy co-distillation of two students", "2606.14368",
    teacher="live weights, own right rollout and the peer's feedback",
    driver=("context sibling", "context feedback", "teacher live", "reward"),
    scope="the feedback, and the gate that decides whose rollouts are taught (data: privileged), are the "
    "driver's",
    differs="only a summary is known to us: that the divergence is SDPO's is inferred",
    library="a second student that is trained beside, its rollouts and feedback",
)  # fmt: skip
def opcod(alpha: float = 0.5, k: int | None = 100) -> Recipe:
    """SDPO's divergence on the rollouts that pass the gate."""
    return Recipe((Term(on_student_top(alpha, k), weights=(PRIVILEGED,), normaliser="selected"),))


@method(
    "Calibration-aware OPD (CaOPD)", "2604.16830",
    teacher="average of past weights, demonstration with the measured confidence",
    driver=("context revision", "teacher ema", "rollout_logprob", "old_logprob"),
    published="average 0.01, lr 1e-5 or 2e-5, 1,024 tokens, confidence from 8 or 16 rollouts",
    scope="the confidence that is written into the rollout is the driver's",
    differs="share keeps the tokens with the highest student entropy, an option of its code",
    library="rollouts into which the measured confidence is written",
)  # fmt: skip
def caopd(
    alpha: float = 0.0, skip: int = 3, is_cap: float | None = 2.0, share: float | None = None
) -> Recipe:
    """KL(t || s), or a JSD for alpha > 0: mean over each rollout's tokens but the first 3, times the
    rollout's mean importance ratio."""
    weights = [Weight("skip_first", {"tokens": skip})]
    if is_cap is not None:
        weights.append(Weight("sequence_is", {"cap": is_cap}))
    if share is not None:
        weights.append(Weight("top_entropy", {"share": share}))
    loss = Objective("jsd", alpha)
    return Recipe((Term(loss, weights=tuple(weights), normaliser="sequence_selected"),))


@method(
    "CORD: weighted on-policy cross-modal distillation", "2601.16547",
    teacher="live weights, the text of what the student hears",
    driver=("context full_solution", "teacher live", "reward", "old_logprob"),
    published="top 20, lr 3e-5, at most 200 tokens",
    differs="the boost (above 1), the decay's form and the reward's coefficient are not known to us: 2, an "
    "exponential of the relative place, and 1 are stand-ins",
    library="sound, which the student hears",
)  # fmt: skip
def cord(top: int = 20, boost: float = 2.0, decay: float = 1.0, reward: float = 1.0) -> Recipe:
    """Reverse KL, more on each rollout's 20 most divergent tokens and on early ones, plus GRPO on a judge's
    reward."""
    weighed = Weight("cord", {"top": top, "boost": boost, "decay": decay})
    terms = (Term(Objective("reverse_kl"), weights=(weighed,)),)
    return Recipe((*terms, grpo(reward)) if reward else terms)


@method(
    "Turn-level truncated OPD (Healthcare gym)", "2605.02943",
    teacher="average of past weights, hint",
    driver=("context feedback", "teacher ema", "teacher sync", "reward", "old_logprob"),
    published="lambda 4, average 0.995 every 5 steps, copied every 30; lr 5e-7, 8 prompts of 3 rollouts, at "
    "most 5 turns",
    scope="which turns count is the data's selected; the average and the hints are the driver's",
    differs="form='k3' is its port of OPSD: k3 cut at 0.05. The code replaces a teacher's NaN by -20, a "
    "caller's part here",
)  # fmt: skip
def tt_opd(coefficient: float = 4.0, form: str = "policy_gradient", clip: float = 0.05) -> Recipe:
    """GRPO + lambda KL(s || t), sampled as a clipped policy gradient, on the turns that are not truncated."""
    if form not in ("policy_gradient", "k3"):
        raise ValueError(f"form: expected 'policy_gradient' or 'k3'; got {form!r}")
    sampled = Estimator("policy_gradient", {"student": "old", "surrogate": "ppo"})
    loss = sampled if form == "policy_gradient" else Estimator("k3", {"clamp": clip})
    return Recipe((grpo(), Term(loss, coefficient, weights=(Weight("selected"),))))


@method(
    "Variational policy distillation (VPD)", "2605.15113",
    teacher="live weights, feedback; trained itself every 5 steps",
    driver=("context feedback", "teacher live", "reward"),
    published="beta 0.1 and every 5 steps for the teacher's part",
    scope="the student's step; the teacher's, a binary classification of whole rollouts, is `sequences.bco`",
    differs="the student's entries are not said: k takes SDPO's support",
    library="steps that train the teacher, one in five",
)  # fmt: skip
def vpd(k: int | None = None) -> Recipe:
    """KL(student || teacher that has read the feedback)."""
    return Recipe((Term(on_student_top(1.0, k)),))


@method(
    "Self-Distillation Zero", "2604.12002",
    teacher="weights after the revision phase, the student's own attempt and a cue for its revision",
    driver=("context revision", "teacher initial", "reward"),
    published="top 64, lr 5e-6, batch 128, 8,192 tokens",
    scope="the first phase, imitation of revisions, is -log s (method mixsd)",
    differs="the text has the reverse KL (divergence='reverse_kl'), the code half of each; outside=-100 "
    "keeps the student's whole softmax and gives the teacher that log-probability outside its top k",
)  # fmt: skip
def sd_zero(divergence: str = "mixed", k: int = 64, outside: float | None = None) -> Recipe:
    """0.5 KL(t || s) + 0.5 KL(s || t) on the teacher's top 64, both renormalised."""
    if outside is None:
        return Recipe((Term(Objective(divergence, support=Support(k, "teacher", "renormalise"))),))
    teacher = Built("truncated", ("teacher",), {"k": k, "outside": outside})
    return Recipe((Term(Objective(divergence), teacher=teacher),))


@method(
    "OmniOPD: logit-free on-policy distillation", "2606.01476",
    teacher="a black box that continues chosen chunks; initial weights elsewhere",
    driver=("teacher initial", "routing"),
    published="10 chunks of 50 tokens at the peaks of the student's entropy, 10 continuations each",
    scope="the chunks, the continuations and their similarities are the driver's (data: chunk, similarity, "
    "and selected for the tokens that are in a chunk)",
    differs="beta about 0.1 is from a port; no alpha is published",
)  # fmt: skip
def omniopd(beta: float = 0.1, alpha: float = 1.0, samples: int = 10) -> Recipe:
    """-pi log s on audited tokens, pi the share of continuations that agree with the chunk, and
    beta KL(reference || s) on the others."""
    audited = Term(Estimator("nll"), teacher=None, weights=(Weight("coefficient"),))
    others = (Weight("selected", {"accept": 0.0, "reject": 1.0}),)
    anchor = Term(Objective("forward_kl"), beta, "reference", others)
    return Recipe((audited, anchor), (Prepare("omniopd", {"alpha": alpha, "samples": samples}),))
