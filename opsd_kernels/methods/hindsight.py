"""Learning in hindsight: from what users said next, from critiques, from what a smaller self remembered."""

from opsd_kernels.methods.registry import method
from opsd_kernels.methods.terms import grpo
from opsd_kernels.objectives import Objective
from opsd_kernels.recipes import Estimator, Prepare, Recipe, Term, Weight


@method(
    "Aligning Language Models from User Interactions", "2603.12273",
    teacher="live weights, the user's next message",
    driver=("context follow_up", "teacher live", "offline"),
    published="lr 1e-5, LoRA 64/128, 2,048 tokens",
    differs="the code's offline trainer skips no token, its live one the first 2 (skip=2)",
    library="logged completions, to which a user answered",
)  # fmt: skip
def user_hindsight(clip: float | None = 2.0, skip: int = 0) -> Recipe:
    """-sg[clip(log t - log s, +-2)] log s on a conversation's answer, mean over each answer."""
    weights = (Weight("skip_first", {"tokens": skip}),) if skip else ()
    loss = Estimator("k1", {"clamp": clip})
    return Recipe((Term(loss, weights=weights, normaliser="sequence_selected"),))


@method(
    "The Role of Feedback Alignment in Self-Distillation", "2606.11173",
    teacher="live weights, a critique of the rollout's steps by a frozen critic",
    driver=("context critique", "teacher live"),
    scope="what is new is the context: a critique step by step, rather than a solution",
    differs="only summaries are known to us, which name no divergence: beta 0 is OPSD's forward KL",
)  # fmt: skip
def step_critique(beta: float = 0.0, entry_clip: float | None = None) -> Recipe:
    """KL(teacher that has read the critique || student), a JSD for beta > 0."""
    return Recipe((Term(Objective("jsd", beta, entry_clip)),))


@method(
    "ACPO: Adaptive Clip Policy Optimization", "https://github.com/Control-derek/ACPO",
    teacher="none",
    driver=("reward", "old_logprob"),
    published="bounds 0.2 + 3 std, at most 3; 5 groups",
    scope="no distillation: a surrogate for the reward that any method here can use",
)  # fmt: skip
def acpo(base: float = 0.2, alpha: float = 3.0, largest: float = 3.0, bins: int = 5) -> Recipe:
    """PPO whose bounds widen with the deviation of s / s_old among tokens of like probability."""
    bounds = {"base": base, "alpha": alpha, "largest": largest, "bins": bins}
    loss = Estimator("policy_gradient", {"advantage": "data", "surrogate": "ppo", "low": None, "high": None})
    return Recipe((Term(loss, teacher=None),), (Prepare("acpo_bounds", bounds),))


@method(
    "Language Models Need Sleep: knowledge seeding", "2606.03979",
    teacher="a smaller self with its memories in context",
    driver=("teacher model", "reward", "old_logprob"),
    scope="the growth of the network and the dreaming, a curriculum made by reinforcement learning, are out "
    "of scope",
    differs="only the abstract is known to us, on-policy distillation combined with imitation by "
    "reinforcement learning: the divergence and both coefficients are stand-ins after GKD's combination "
    "(arXiv 2306.13649)",
)  # fmt: skip
def sleep(beta: float = 1.0, reward: float = 0.5) -> Recipe:
    """(1 - alpha) JSD(student, smaller self) + alpha GRPO, whose reward is the likeness to the smaller
    self."""
    return Recipe((Term(Objective("jsd", beta), 1 - reward), grpo(reward)))
