"""Distillation beside rewards, and methods whose novelty is in the driver, over a loss that is known."""

from opsd_kernels.methods.registry import method
from opsd_kernels.methods.terms import grpo, importance, on_student_top, to_reference
from opsd_kernels.objectives import Objective
from opsd_kernels.recipes import Blend, Estimator, Recipe, Term, Weight


@method(
    "KEPO: knowledge-enhanced preference optimization", "2602.00400",
    teacher="another model",
    driver=("teacher model", "reward", "advantage", "reference", "pool"),
    published="8 rollouts a prompt, lr 2e-6, 1,024 tokens, Qwen3-VL-32B to 2B",
    scope="when all rewards are 0, hinted and rejection-sampled rollouts replace two: of the data",
    differs="beta and the reference's coefficient are the configuration's: 0.5 and 0 stand here",
    library="rollouts that the teacher's hints help to write, where all of a prompt's fail",
)  # fmt: skip
def kepo(threshold: float = 1.0, coefficient: float = 1.0, beta: float = 0.5, kl: float = 0.0) -> Recipe:
    """GRPO + JSD(s, t) on the rollouts with a reward of at least the threshold + kl times k3 to b."""
    good = Weight("reward_at_least", {"threshold": threshold})
    distilled = Term(Objective("jsd", beta=beta), coefficient, weights=(good,), normaliser="selected")
    return Recipe((grpo(), distilled, *to_reference(kl)))


@method(
    "dGRPO: distilled GRPO for long contexts", "2605.12227",
    teacher="another model",
    driver=("teacher model", "reward", "advantage", "old_logprob"),
    published="Qwen3-32B to 1.7B, 8B to 4B",
    differs="no value of the coefficient is known to us: 1 stands here",
)  # fmt: skip
def dgrpo(coefficient: float = 1.0) -> Recipe:
    """GRPO + coefficient KL(s || t)."""
    return Recipe((grpo(), Term(Objective("reverse_kl"), coefficient)))


@method(
    "pi-Play: multi-agent self-play", "2604.14054",
    teacher="moving average (0.05 a step), the question's construction path",
    driver=("context full_solution", "teacher ema", "reward", "advantage", "old_logprob", "reference"),
    published="3 rounds of 50 steps, over which the coefficient decays",
    differs="neither coefficient is known to us: 1 for the teacher, which stays, and 0 for the reference "
    "stand here",
)  # fmt: skip
def pi_play(coefficient: float = 1.0, kl: float = 0.0) -> Recipe:
    """GRPO + coefficient KL(s || t) + kl times k3 to b, the means of sequences' means."""
    distilled = Term(Objective("reverse_kl"), coefficient, normaliser="sequences")
    return Recipe((grpo(normaliser="sequences"), distilled, *to_reference(kl, "sequences")))


@method(
    "DP-OPD: differentially private distillation", "2604.04461",
    teacher="a frozen public model",
    driver=("teacher model", "private"),
    published="epsilon 2; GPT-2 large to DistilGPT-2",
    scope="clipped gradients of single sequences and their noise are the driver's: the fused dW is that of "
    "the whole call, so it makes one call a sequence",
)  # fmt: skip
def dp_opd(beta: float = 0.0) -> Recipe:
    """GKD's divergence, KL(t || s) as published, as one loss for each sequence."""
    return Recipe((Term(Objective("jsd", beta=beta), normaliser="sequences"),))


@method(
    "GDSD: guided denoiser self-distillation", "2605.29398",
    teacher="none: the reward's advantage guides",
    driver=("advantage", "old_logprob", "reference"),
    published="psi 1 (10 on GSM8K), eps 4e-4, 1e-3 times k2 to the reference",
    scope="a square of each sequence's sum: reduction='none' gives the -log s of the masked positions, of "
    "which `sequences.gdsd` makes the loss",
    library="masked positions of a diffusion model, and the square of each sequence's sum",
)  # fmt: skip
def gdsd() -> Recipe:
    """-log s of the masked positions."""
    return Recipe((Term(Estimator("nll"), teacher=None),))


@method(
    "Training the sparse sub-network of on-policy distillation", "2606.13657",
    teacher="another model",
    driver=("teacher model", "subnetwork"),
    scope="an analysis of which weights move, with no loss of its own; a frozen head costs no dW",
)  # fmt: skip
def sparse_opd() -> Recipe:
    """KL(s || t)."""
    return Recipe((Term(Objective("reverse_kl")),))


@method(
    "Diversity of self-distilled policies", "2606.26091",
    teacher="initial weights, full solution",
    driver=("context full_solution", "context plain", "teacher initial"),
    scope="the paper analyses pass@k; the loss here is one to its fixed point, from explicit teachers",
)  # fmt: skip
def diversity(strength: float = 1.0) -> Recipe:
    """KL(s || base (privileged / plain)^strength): the base tilted by pointwise mutual information."""
    tilted = Blend("loglinear", ((1.0, "base"), (strength, "privileged"), (-strength, "plain")))
    return Recipe((Term(Objective("reverse_kl"), teacher=tilted),))


@method(
    "SPD: self-policy distillation by subspace projection", "2605.22675",
    teacher="none: the student's own projected activations",
    driver=("offline",),
    published="50 calibration items, half the rank, LoRA 8, lr 1e-5, 5 epochs",
    scope="the projected generation is of the data; what is trained is plain imitation",
    library="completions that the student's projected activations wrote",
)  # fmt: skip
def spd() -> Recipe:
    """-log s of the generated tokens."""
    return Recipe((Term(Estimator("nll"), teacher=None),))


@method(
    "Vision-OPD: fine details", "2605.18740",
    teacher="moving average (0.05), the crop of the image",
    driver=("context partial_solution", "teacher ema", "old_logprob", "rollout_logprob"),
    published="lr 2e-6, 8 rollouts a prompt",
    library="images, and a crop of each for the teacher",
)  # fmt: skip
def vision_opd(
    beta: float = 0.5, k: int = 100, cap: float | None = 2.0, rollout_cap: float | None = 2.0
) -> Recipe:
    """JSD over the student's top k and a tail, times min(s / s_old, 2) min(s_old / s_rollout, 2)."""
    return Recipe((Term(on_student_top(beta, k), weights=importance(cap, rollout_cap)),))


@method(
    "PF-OPSD: privileged-future self-distillation", "2606.03603",
    teacher="the same weights, the future in context, tilted by the candidates' advantages",
    driver=("context full_solution", "teacher live", "advantage", "pool"),
    published="4 candidates, temperature 0.5, 0.02 times the simulation's term",
    scope="divergences between candidates, not entries: `sequences.candidate_kl` and `candidate_nll` take "
    "the sums of the log s that reduction='none' gives",
    library="candidate futures, and divergences between whole candidates",
)  # fmt: skip
def pf_opsd() -> Recipe:
    """-log s of the candidates' tokens."""
    return Recipe((Term(Estimator("nll"), teacher=None),))


@method(
    "GenEvolve: visual experience distillation", "2605.21605",
    teacher="the same weights, with the visual experience of best against worst in context",
    driver=("context sibling", "teacher live", "reward", "advantage", "old_logprob", "reference"),
    published="reward gap of at least 0.2 in the group",
    differs="the released code only infers: the numbers are those of the paper",
)  # fmt: skip
def genevolve(
    coefficient: float = 2.0, share: float = 0.1, cap: float = 2.0, clamp: float = 10.0, kl: float = 1e-3
) -> Recipe:
    """GRPO + 2 k3 on the most divergent tenth of the tokens of `privileged` rollouts + 1e-3 k3 to b."""
    weights = (
        Weight("top_divergence", {"share": share}),
        Weight("is_weight", {"cap": cap}),
        Weight("privileged"),
    )
    k3 = Estimator("k3", {"clamp": clamp})
    distilled = Term(k3, coefficient, weights=weights, normaliser="selected")
    return Recipe((grpo(high=0.28), distilled, *to_reference(kl)))


@method(
    "ORACLE: anticipation from partial trajectories", "2605.16363",
    teacher="the same weights, reflections and clues in context",
    driver=("context feedback", "teacher live"),
    differs="the form of its loss is not known to us: the divergence is the caller's, KL(t || s) by default",
)  # fmt: skip
def oracle(divergence: str = "forward_kl", beta: float = 0.5) -> Recipe:
    """A divergence to the teacher with the clues."""
    return Recipe((Term(Objective(divergence, beta=beta)),))
