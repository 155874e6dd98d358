"""Self-distillation from several contexts of one teacher: their consensus and their differences."""

from opsd_kernels.methods.registry import method
from opsd_kernels.methods.terms import grpo, importance, on_student_top
from opsd_kernels.objectives import Objective
from opsd_kernels.recipes import Built, Estimator, Prepare, Recipe, Term, Weight


@method(
    "Adaptive-view self-distillation (AVSD)", "2605.20643",
    teacher="initial weights; full solution, its first half, the answer only",
    driver=("context full_solution", "context partial_solution", "context answer_only", "teacher initial"),
    published="T 0.7, lr 5e-6, LoRA 64/128, 4,096 tokens, batch 32, 200 to 500 steps",
    scope="the code's mode on the union of the views' top k, which also bounds each token's loss, is left "
    "out",
    differs="the released scripts use the sampled token with an unnormalised consensus (sampled=True, data: "
    "teacher_logprobs); its dense target normalises q_G and floors q_A before J (renormalise=True, "
    "floor=1e-8); gate 'sigmoid' and 'consistency_exp' are options of the code",
)  # fmt: skip
def avsd(
    views: int = 3, gate: str = "avsd", beta: float = 1.0, sampled: bool = False, renormalise: bool = False,
    floor: float | None = None,
) -> Recipe:  # fmt: skip
    """KL(s || q*), log q* = the views' mean of log q_m plus lambda J: J is how far their arithmetic mean
    exceeds the geometric one, lambda how far the views agree against the student."""
    if sampled:
        for name, given in (("renormalise", renormalise), ("floor", floor)):
            if given:
                raise ValueError(f"{name}: expected nothing with sampled=True; got {given!r}")
        return Recipe((Term(Estimator("policy_gradient", {"advantage": "consensus"}), teacher=None),))
    names = tuple(f"view{number}" for number in range(1, views + 1))
    options = {"gate": gate, "renormalise": renormalise, "floor": floor}
    return Recipe((Term(Objective("jsd", beta), teacher=Built("consensus", names, options)),))


@method(
    "Skill-conditioned gated self-distillation (SGSD)", "2605.28791",
    teacher="live weights, eight skills",
    driver=("context skill", "teacher live", "reward", "pool"),
    published="8 skills, tau 1, lr 5e-6, 200 steps, 1,024 tokens; T 1.1 for sampling, 1 for the loss",
    scope="a skill's weight is the data's teacher_weight, 1 without it; the option of a forward KL on the "
    "top k is left out",
)  # fmt: skip
def sgsd(tau: float = 1.0, clip: float = 3.0, threshold: float = 0.05) -> Recipe:
    """sum_m w_m sign_m (ln 2 - softplus(-D_m^2 / (2 tau))), D_m = log t_m - log s: towards teachers that
    support a right rollout or oppose a wrong one, away from the others; within a gate."""
    signs = Prepare("polarity", {"clip": clip, "threshold": threshold})
    loss = Estimator("sgsd", {"tau": tau})
    return Recipe((Term(loss, teacher=None, normaliser="sequences"),), (signs,))


@method(
    "DemoPSD: disagreement-modulated policy self-distillation", "2607.02502",
    teacher="average of past weights, with and without the demonstration",
    driver=("context sibling", "context plain", "teacher ema", "reward", "old_logprob"),
    published="beta 70 (biology), 25 (chemistry), 50 (materials), 100 (physics); alpha below 0.15; average "
    "0.05",
    scope="rows without a demonstration are those whose data says not privileged",
)  # fmt: skip
def demopsd(
    beta: float = 50.0, alpha_max: float = 0.15, k: int | None = 100, floor: float | None = 1e-8,
    is_cap: float | None = 2.0,
) -> Recipe:  # fmt: skip
    """KL(s || q*), q* ~ privileged^(1 - alpha) plain^alpha, alpha = 2 alpha_max (sigmoid(beta
    JSD(privileged, plain)) - 1/2): where the demonstration changes much, it counts less."""
    options = {"beta": beta, "alpha_max": alpha_max, "k": k, "floor": floor}
    target = Built("barycenter", ("privileged", "plain"), options)
    weights = (Weight("privileged"), *importance(is_cap))
    loss = on_student_top(1.0, k)
    return Recipe((Term(loss, teacher=target, weights=weights, normaliser="selected"),))


@method(
    "Purified OPSD", "2607.02234",
    teacher="initial weights; question and reference, reference only, question only",
    driver=("context full_solution", "context answer_only", "context plain", "teacher initial"),
    published="c 10, beta 1, LoRA 64, lr 5e-6, batch 32, 1,024 tokens, at most 200 steps",
    differs="the share of its JSD is not known to us: jsd=0.5 is a stand-in; 0 and 1 are the two KL "
    "divergences",
)  # fmt: skip
def purified_opsd(c: float | None = 10.0, beta: float = 1.0, jsd: float = 0.5) -> Recipe:
    """JSD to softmax(log base + c tanh(delta / c) / beta), delta = log privileged - log context_only less
    its mean: what the reference says by itself is taken out."""
    roles = ("privileged", "context_only", "base")
    return Recipe((Term(Objective("jsd", jsd), teacher=Built("purified", roles, {"c": c, "beta": beta})),))


@method(
    "Contrastive evidence policy optimization (CEPO)", "2605.19436",
    teacher="live weights, the right answer and a wrong one",
    driver=(
        "context answer_only", "context wrong_answer", "teacher live", "reward", "advantage", "old_logprob",
    ),
    published="lambda 0.5, linear to 0 over 25 steps; lr 5e-6, 8 rollouts, LoRA 16",
    scope="data: negative_logprob",
    schedule={"mix": {"start": 0.5, "end": 0.0, "steps": 25}},
)  # fmt: skip
def cepo(mix: float = 0.5, width: float = 0.2, low: float = 0.2, high: float = 0.28) -> Recipe:
    """PPO with A [(1 - lambda) + lambda w], w = clip((t_right / t_wrong)^sign(A), 1 - eps, 1 + eps)."""
    return _credit("cepo", mix, width, low, high)


@method(
    "Self-Distilled RLVR (RLSD)", "2604.03128",
    teacher="live weights, full solution",
    driver=("context full_solution", "teacher live", "reward", "advantage", "old_logprob"),
    published="lambda 0.5, linear to 0 over 50 steps",
    schedule={"mix": {"start": 0.5, "end": 0.0, "steps": 50}},
)  # fmt: skip
def rlsd(mix: float = 0.5, width: float = 0.2, low: float = 0.2, high: float = 0.2) -> Recipe:
    """PPO with A [(1 - lambda) + lambda w], w = clip((t / s)^sign(A), 1 - eps, 1 + eps): the reward says
    where to go, the teacher how far."""
    return _credit("rlsd", mix, width, low, high)


@method(
    "Rebellious Student: RLVR with a reversed teacher (RLRT)", "2605.10781",
    teacher="live weights, a right rollout of the same prompt",
    driver=("context sibling", "teacher live", "reward", "advantage", "old_logprob"),
    published="lambda 0.5; eps 1 for base models, 0.5 for instructed and 0.2 for thinking ones",
    differs="PPO's bounds are not known to us: 0.2 and 0.2 stand here",
)  # fmt: skip
def rlrt(mix: float = 0.5, width: float = 1.0, low: float = 0.2, high: float = 0.2) -> Recipe:
    """PPO with A [(1 - lambda) + lambda w], w = clip((s / t)^sign(A), 1 - eps, 1 + eps), on right rollouts,
    with A on others: what the student found without the teacher counts more."""
    return _credit("rlrt", mix, width, low, high)


@method(
    "Contrastive on-policy self-distillation (RLCSD)", "2606.11709",
    teacher="weights of ten steps ago; a right and a wrong rollout of the same prompt, in one template",
    driver=(
        "context sibling", "context wrong_sibling", "teacher sync", "reward", "advantage", "old_logprob",
    ),
    published="tau 0.02, lr 5e-6, 8 rollouts a prompt, 16,384 tokens",
    scope="data: negative_logprob, log of the mean of t under the wrong rollouts",
    differs="up to 4 wrong rollouts are averaged as published, the driver reads one; the code's clip of what "
    "is added, at 2, is never reached by a strength of 0.5",
)  # fmt: skip
def rlcsd(
    tau: float = 0.02, strength: float = 0.5, threshold: float = 0.02, coefficient: float = 1.0,
    clip: float = 0.2,
) -> Recipe:  # fmt: skip
    """PPO with A + r, r = strength tanh((log t_right - log t_wrong) / tau), never of another sign than A, the
    mean over the tokens with |r| > threshold; plus PPO with A, the mean over the others."""
    shared = {"tau": tau, "strength": strength}
    moved, plain = (
        (Weight("contrast_gate", {**shared, "threshold": threshold, "inside": i}),) for i in (True, False)
    )
    options = {"advantage": "rlcsd", "surrogate": "ppo", "low": clip, "high": clip, **shared}
    contrasted = Term(
        Estimator("policy_gradient", options), coefficient, weights=moved, normaliser="selected"
    )
    return Recipe((contrasted, grpo(low=clip, high=clip, weights=plain, normaliser="selected")))


def _credit(advantage: str, mix: float, width: float, low: float, high: float) -> Recipe:
    options = {
        "advantage": advantage, "mix": mix, "width": width, "surrogate": "ppo", "low": low, "high": high,
    }  # fmt: skip
    return Recipe((Term(Estimator("policy_gradient", options)),))
