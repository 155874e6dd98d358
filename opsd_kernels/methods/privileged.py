"""Self-distillation from privileged information: the teacher has read the solution, or part of it."""

from dataclasses import replace

from opsd_kernels.methods.registry import method
from opsd_kernels.methods.terms import grpo, on_student_top
from opsd_kernels.objectives import Objective, Support
from opsd_kernels.recipes import Estimator, Prepare, Recipe, Term, Weight


@method(
    "Self-Distilled Reasoner: On-Policy Self-Distillation", "2601.18734",
    teacher="initial weights, full solution",
    driver=("context full_solution", "teacher initial"),
    published="T 1.1, top-p 0.95, top-k 20, lr 5e-6, LoRA 64/128, 1,024 tokens, batch 32, 100 steps",
    differs="tau 0.05 for 1.7B and 4B with thinking, 0.06 for 8B; 1e-6 and 1e-7 without thinking. Versions "
    "up to March have no clip and beta 0.5. The code also has the teacher's top k, renormalised, and the "
    "sampled token as a policy gradient, without the clip (sampled=True)",
)  # fmt: skip
def opsd(
    entry_clip: float | None = 0.05, clip_mode: str = "zero", beta: float = 0.0, top_k: int | None = None,
    sampled: bool = False,
) -> Recipe:  # fmt: skip
    """Forward KL (a JSD for beta > 0) with each vocabulary entry's signed term clipped at tau.

    On SmolLM2-135M the published clip lost accuracy (23.8 to 18.0 % greedy) and raised the KL under a falling
    loss, where the KL without it came to 60.2 %; see `Objective`.
    """
    if sampled:
        return Recipe((Term(Estimator("k1")),))
    support = None if top_k is None else Support(top_k, "teacher", "renormalise")
    whole = Objective("jsd", beta) if beta else Objective("forward_kl")
    loss = replace(whole, entry_clip=entry_clip, clip_mode=clip_mode, support=support)
    return Recipe((Term(loss),))


@method(
    "SDFT: self-distillation enables continual learning", "2601.19897",
    teacher="moving average, the demonstration in context",
    driver=("context full_solution", "teacher ema"),
    differs="the text minimises KL(s || t); alpha, top_k and skip (a rollout's first tokens) are options of "
    "TRL's version; how tokens are averaged is not known to us: by rollout, as in caopd, which has this loss",
)  # fmt: skip
def sdft(alpha: float = 1.0, top_k: int | None = None, skip: int = 0) -> Recipe:
    """KL(s || t) over the whole vocabulary on own samples; a JSD for alpha below 1, KL(t || s) at 0."""
    first = (Weight("skip_first", {"tokens": skip}),) if skip else ()
    return Recipe((Term(on_student_top(alpha, top_k), weights=first, normaliser="sequence_selected"),))


@method(
    "Position-weighted OPSD", "2605.21606",
    teacher="initial weights, full solution",
    driver=("context full_solution", "teacher initial"),
    published="as opsd, 150 steps",
    differs="the weights are not renormalised; normaliser='tokens' is the code's global mean. The "
    "parameters of its 'aggressive' weights are not published",
)  # fmt: skip
def pw_opsd(
    least: float = 0.25, middle: float = 0.30, width: float = 0.10, entry_clip: float | None = 0.05,
    normaliser: str = "sequences",
) -> Recipe:  # fmt: skip
    """OPSD with weights that rise along the rollout by a sigmoid of the relative position."""
    rising = Weight("position_sigmoid", {"floor": least, "center": middle, "width": width})
    return Recipe(
        (Term(Objective("forward_kl", entry_clip=entry_clip), weights=(rising,), normaliser=normaliser),)
    )


@method(
    "TRACE: token-routed self on-policy alignment", "2605.10194",
    teacher="weights of ten steps ago, the spans' types",
    driver=("context rubric", "teacher sync", "reward", "old_logprob", "spans"),
    published="lambda 0.5 for 10 steps, then linear to 0 over 30; spans at most 25 % of the rollout. The "
    "strong base (8B) has key spans only, the weak one (1.7B) error spans only",
    scope="the annotation of spans is the driver's: 1 key, in right rollouts only; 2 error, in wrong ones "
    "only",
    schedule={"strength": {"start": 0.5, "end": 0.0, "steps": 30, "hold": 10}},
)  # fmt: skip
def trace(
    strength: float = 0.5, initial: float = 0.5, key_spans: float = 1.0, error_spans: float = 0.0,
    entry_clip: float | None = 0.05,
) -> Recipe:  # fmt: skip
    """GRPO outside the spans, (1 - lambda / lambda_0) GRPO + lambda (forward KL on key, reverse KL on error
    spans) inside; sums over a rollout are divided by its length."""
    rest, by_row = (Weight("span", {"code": 0}),), "sequences"
    terms = [grpo(strength / initial, high=0.28, weights=rest, normaliser=by_row)]
    if strength != initial:
        terms.append(grpo(1 - strength / initial, high=0.28, normaliser=by_row))
    for code, divergence, share in ((1, "forward_kl", key_spans), (2, "reverse_kl", error_spans)):
        if share:
            loss = Objective(divergence, entry_clip=entry_clip)
            inside = (Weight("span", {"code": code}),)
            terms.append(Term(loss, strength * share, weights=inside, normaliser=by_row))
    return Recipe(tuple(terms))


@method(
    "Adaptive teacher exposure for self-distillation", "2605.11458",
    teacher="initial weights, the first share alpha of the solution and its answer",
    driver=("context partial_solution", "teacher initial", "exposure"),
    published="as opsd",
    scope="the controller that learns alpha by REINFORCE from the loss's progress is the driver's",
    differs="that OPSD's clip is kept is inferred from its code base",
)  # fmt: skip
def atesd(entry_clip: float | None = 0.05) -> Recipe:
    """OPSD's forward KL; what is new is how much of the solution the teacher sees."""
    return Recipe((Term(Objective("forward_kl", entry_clip=entry_clip)),))


@method(
    "Skill-conditioned self-distillation for agents", "2604.10674",
    teacher="weights of the last update, retrieved skill",
    driver=("context skill", "teacher sync", "reward", "old_logprob"),
    published="lambda 0.001 (0.01 over-regularises)",
    differs="that the ratio has a gradient is inferred from the text; ratio='detached' has none",
)  # fmt: skip
def skill_sd(coefficient: float = 0.001, ratio: str = "live") -> Recipe:
    """GRPO plus a k3 whose importance ratio has a gradient, so that its expectation is the reverse KL's."""
    return Recipe((grpo(), Term(Estimator("k3", {"ratio": ratio}), coefficient)))


@method(
    "Mixed contextual self-distillation", "2605.16865",
    teacher="none: tokens drawn from the base with or without the fact",
    driver=("context full_solution", "offline"),
    published="share of expert tokens 0.3, 0.5 or 0.7",
    scope="the mixing of the two conditionals into a target sequence is the driver's",
    library="completions drawn from the base with and without the fact",
)  # fmt: skip
def mixsd() -> Recipe:
    """-log s of the mixed sequence's tokens."""
    return Recipe((Term(Estimator("nll"), teacher=None),))


@method(
    "Privileged information distillation: pi-Distill", "2602.04942",
    teacher="live weights, privileged context",
    driver=("context full_solution", "teacher live", "reward", "old_logprob"),
    published="alpha 0, 0.5 or 1",
    scope="one of its sides a call: 'student' and 'teacher' on the teacher's rollouts, weighed 1 - alpha and "
    "alpha; each side's call has the other one's distribution as its constant teacher. 'on_policy' is the "
    "paper's OPSD, on the student's rollouts",
    differs="no beta is known to us: 0.1 is a stand-in",
    library="completions of the teacher",
    alone={"side": "on_policy"},
)  # fmt: skip
def pi_distill(side: str = "student", beta: float = 0.1) -> Recipe:
    """-E[clipped ratio R] + beta KL: KL(teacher || student), of which the trained side has the gradient; the
    student's ratio is s / t."""
    sides = {
        "student": ("forward_kl", "teacher"),
        "teacher": ("reverse_kl", "old"),
        "on_policy": ("reverse_kl", "old"),
    }
    if side not in sides:
        raise ValueError(f"side: expected one of {', '.join(sides)}; got {side!r}")
    divergence, behaviour = sides[side]
    surrogate = Estimator(
        "policy_gradient", {"advantage": "data", "surrogate": "ppo", "behaviour": behaviour}
    )
    reads_teacher = "teacher" if behaviour == "teacher" else None
    return Recipe((Term(surrogate, teacher=reads_teacher), Term(Objective(divergence), beta)))


@method(
    "Rubric-conditioned self-distillation", "2606.19327",
    teacher="initial weights, rubric",
    driver=("context rubric", "teacher initial"),
    published="T 1.2, 4,096 tokens, 3 epochs; rubrics by a larger model",
    differs="the divergences of its ablation are beta 0 (default), 0.5 and 1",
)  # fmt: skip
def rcsd(beta: float = 0.0, entry_clip: float | None = 0.05) -> Recipe:
    """OPSD's loss; the teacher has read a rubric."""
    return Recipe((Term(Objective("jsd", beta, entry_clip)),))


@method(
    "Canonical-context OPD", "2605.30251",
    teacher="initial weights, the full prompt that the student gets in pieces over several turns",
    driver=("context full_solution", "teacher initial", "turns"),
    scope="the cutting of prompts into turns is the driver's",
    library="prompts in pieces, each of which the student answers",
)  # fmt: skip
def ccopd() -> Recipe:
    """KL(student given the history || teacher given the canonical prompt)."""
    return Recipe((Term(Objective("reverse_kl")),))


@method(
    "OPSD for diffusion language models", "2606.18195",
    teacher="initial weights that keep a suffix of the student's own answer",
    driver=("context partial_solution", "teacher initial", "reward"),
    published="LoRA 128/64, lr 5e-6, 256 tokens in blocks of 32, 128 steps, T 0.9, suffix 25 %",
    scope="the denoising steps, and the two masked positions of each that the teacher is surest of, are the "
    "driver's: a row of the batch holds a rollout's positions of all steps",
    differs="clip 0.04 or 0.05 by script; beta 1 for mathematics, else 0; the code divides by the steps, of "
    "two positions each, where this divides by the positions",
    library="the denoising steps of a diffusion model",
)  # fmt: skip
def d_opsd(beta: float = 1.0, k: int = 20, entry_clip: float | None = 0.05) -> Recipe:
    """Clipped reverse KL on the teacher's 20 most likely entries, both renormalised; rollouts with reward 0
    do not count."""
    loss = Objective("jsd", beta, entry_clip, support=Support(k, "teacher", "renormalise"))
    rewarded = (Weight("reward_at_least", {"threshold": 1e-6}),)
    return Recipe((Term(loss, weights=rewarded, normaliser="selected"),))


@method(
    "Distributional DAgger for RL from rich feedback", "2606.05152",
    teacher="live weights, rich feedback",
    driver=("context feedback", "teacher live"),
    scope="of a black-box expert only tokens are known: then its tokens' -log s is the cross-entropy",
    differs="the sequence's part is derived from the product rule; its weight, baseline and discount are "
    "not known to us; future=0 leaves it out",
)  # fmt: skip
def distil(future: float = 1.0, discount: float = 1.0) -> Recipe:
    """E_{y ~ s}[sum_t CE(t || s)]: each token's forward KL, which is its cross-entropy up to a constant, and
    REINFORCE with the later tokens' cross-entropies as the cost of having chosen this one."""
    local = Term(Objective("forward_kl"))
    if not future:
        return Recipe((local,))
    choice = Term(Estimator("policy_gradient", {"advantage": "data"}), future, None)
    return Recipe((local, choice), (Prepare("future_cross_entropy", {"discount": discount}),))
