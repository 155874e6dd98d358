"""On-policy distillation from the sampled token's log-probabilities: advantages in a policy gradient."""

from opsd_kernels.methods.registry import method
from opsd_kernels.methods.terms import policy_gradient, to_reference
from opsd_kernels.objectives import Objective, Support
from opsd_kernels.recipes import Blend, Estimator, Prepare, Recipe, Term, Weight


@method(
    "On-policy distillation with a control-variate baseline", "2605.07865",
    teacher="another model",
    driver=("teacher model", "old_logprob"),
    published="lr 1e-5, LoRA 64/128, batch 64, one rollout a prompt, T 1.0, 2,048 tokens",
    differs="reward=True adds the group advantage, which one rollout a prompt does not have; "
    "floor is the released code's log(lambda) / (1 - lambda), off by default",
)  # fmt: skip
def vopd(
    baseline: str | None = "top_k", k: int = 100, reward: bool = False, floor: float | None = None
) -> Recipe:
    """PPO of A = log t - log s + KL(s || t), the KL over the student's top k renormalised ("full": all V)."""
    if baseline not in ("top_k", "full", None):
        raise ValueError(f"baseline: expected 'top_k', 'full' or None; got {baseline!r}")
    support = Support(k, "student", "renormalise") if baseline == "top_k" else None
    kl = None if baseline is None else Objective("reverse_kl", support=support)
    name = "data+teacher" if reward else "teacher"
    return Recipe((Term(policy_gradient(name, floor=floor, baseline=kl)),))


@method(
    "G-OPD and ExOPD: reward extrapolation", "2602.12125",
    teacher="another model, one routed to each prompt, or the initial weights with a context",
    driver=("teacher model", "routing", "reference", "old_logprob", "rollout_logprob"),
    published="lr 1e-5, batch 1,024, one update a batch, T 1.0, 16,384 tokens",
    differs="dense=True is the full-vocabulary objective with the same expected gradient, to the teacher "
    "`reference` in place of the column `reference_logprob`",
)  # fmt: skip
def exopd(coefficient: float = 1.25, rollout_cap: float | None = 5.0, dense: bool = False) -> Recipe:
    """PPO of A = lambda (log t - log b) - (log s_old - log b); dense: KL(s || t^lambda b^(1 - lambda)/Z)."""
    if dense:
        target = Blend("loglinear", ((coefficient, "teacher"), (1 - coefficient, "reference")))
        return Recipe((Term(Objective("reverse_kl"), teacher=target),))
    weights = () if rollout_cap is None else (Weight("tis", {"cap": rollout_cap}),)
    if coefficient == 1:  # b cancels, and the released code does not evaluate it
        return Recipe((Term(policy_gradient("teacher", student="old"), weights=weights),))
    return Recipe((Term(policy_gradient("extrapolated", coefficient=coefficient), weights=weights),))


@method(
    "EffOPD: extrapolation of the weights", "2605.11739",
    teacher="another model",
    driver=("teacher model", "extrapolate", "old_logprob"),
    published="factor 2, then f / (1 + f), at most 5 tries on 50 problems at steps that are powers of two",
    scope="the loss is exopd's; the extrapolation of the weights is the driver's",
)  # fmt: skip
def effopd(coefficient: float = 1.0, rollout_cap: float | None = None) -> Recipe:
    """PPO of log t - log s_old, unchanged."""
    return exopd(coefficient, rollout_cap)


@method(
    "Uni-OPD", "2605.03677",
    teacher="another model, one routed to each prompt",
    driver=("teacher model", "routing", "reward", "old_logprob"),
    published="lr 1e-6, batch 64, 16 rollouts a prompt, right and wrong prompts balanced",
    scope="the choice of prompts and the greedy margin mask are of the data",
)  # fmt: skip
def uni_opd(delta: float | None = 0.4, mode: str = "both", gap: str = "mean", limit: float = 10.0) -> Recipe:
    """PPO of log t - log s, 0 beyond the limit, shifted so that right rollouts lead wrong ones by delta."""
    if delta is None:
        return Recipe((Term(policy_gradient(limit=limit, low=0.2, high=0.28)),))
    margin = Prepare("margin_calibration", {"delta": delta, "mode": mode, "gap": gap, "limit": limit})
    return Recipe((Term(policy_gradient("data", low=0.2, high=0.28)),), (margin,))


@method(
    "SOD: step-wise on-policy distillation", "2605.07725",
    teacher="another model",
    driver=("teacher model", "advantage", "old_logprob"),
    published="lr 1e-6, 16 rollouts a prompt",
    differs="delta 0.2 in the released script, 0.5 in its configuration",
)  # fmt: skip
def sod(coefficient: float = 1.0, delta: float = 0.2) -> Recipe:
    """PPO of A_GRPO + w_k (log t - log s_old), w_k = min(d_1 / d_k, 1 + delta), d_k turn k's mean gap."""
    steps = Prepare("step_coefficient", {"coefficient": coefficient, "delta": delta})
    both = policy_gradient("data+teacher", coefficient=None, student="old", low=0.2, high=0.28)
    return Recipe((Term(both),), (steps,))


@method(
    "TCOD: temporal curriculum", "2604.24005",
    teacher="another model",
    driver=("teacher model", "turns", "horizon", "old_logprob"),
    published="lr 1e-6; the last turn grows by one every eta steps",
    differs="the text writes KL(t || s), the released code has the reverse KL's advantage; text=True: the KL",
)  # fmt: skip
def tcod(first: int = 0, last: int | None = None, text: bool = False) -> Recipe:
    """PPO of log t - log s_old on the turns first..last, the mean of sequences' means."""
    loss = Objective("forward_kl") if text else policy_gradient(student="old")
    turns = Weight("turn", {"first": first, "last": last})
    return Recipe((Term(loss, weights=(turns,), normaliser="sequence_weights"),))


@method(
    "Lightning OPD: offline on-policy distillation", "2604.13010",
    teacher="another model, the one whose samples the student was first trained on",
    driver=("teacher model", "offline", "old_logprob"),
    published="lr 2e-6, batch 256, one rollout a prompt, 4,096 tokens",
)  # fmt: skip
def lightning_opd() -> Recipe:
    """PPO of log t - log s_old; both were stored before training (`Sampled`, `old_logprob`)."""
    return Recipe((Term(policy_gradient(student="old")),))


@method(
    "ERPD: extreme region policy distillation", "2605.25582",
    teacher="weights after many weakly constrained updates on a fixed batch",
    driver=("teacher model", "reference", "old_logprob"),
    published="1,000 prompts for the extreme teacher",
    scope="the second stage; no code or bounds of its trust region are published, so PPO's stand here",
)  # fmt: skip
def erpd(low: float = 0.2, high: float = 0.2) -> Recipe:
    """PPO of log t - log b, the extreme teacher's log-ratio to the reference."""
    return Recipe((Term(policy_gradient("teacher_over_reference", low=low, high=high)),))


@method(
    "RLAD: trust-region ratio distillation (TRRD)", "2602.22495",
    teacher="another model",
    driver=("teacher model", "reward", "old_logprob", "reference"),
    differs="alpha and the coefficient of the KL to the reference are not published: 0.5 and 0 stand here; "
    "one description swaps the ends, here alpha = 1 is GRPO",
)  # fmt: skip
def trrd(alpha: float = 0.5, kl: float = 0.0) -> Recipe:
    """PPO of the data's advantage with the ratio s / (s_old^alpha t^(1 - alpha)), and kl times k3 to b."""
    return Recipe((Term(policy_gradient("data", "trrd", alpha=alpha)), *to_reference(kl)))


@method(
    "RL from text feedback, self-distillation", "2602.02482",
    teacher="none: the second turn, which had feedback, scored on the first prompt",
    driver=("context feedback", "reward", "advantage", "old_logprob"),
    differs="the released code offers importance, ppo and cispo surrogates",
    scope="the loss of the feedback's own text (RLTF-FM) is nll on other tokens",
    library="a second turn, which the student writes after feedback",
)  # fmt: skip
def rltf_sd(
    coefficient: float = 0.1, min_logprob: float = -5.0, surrogate: str = "importance", behaviour: str = "old"
) -> Recipe:
    """A = r(second turn) - mean r(first turns) on the second turn's tokens where log s >= -5."""
    pg = policy_gradient("data", surrogate, behaviour=behaviour, min_logprob=min_logprob)
    return Recipe((Term(pg, coefficient, teacher=None),))


@method(
    "Extrapolation cliff: ListOPD", "2605.08737",
    teacher="another model",
    driver=("teacher model", "reference", "old_logprob"),
    differs="the closed form of the largest safe lambda is not public: the caller gives lambda",
)  # fmt: skip
def listopd(coefficient: float | None = None) -> Recipe:
    """As exopd with a lambda for each token, the data's `coefficient`: at most 1 where a format needs it."""
    return Recipe((Term(policy_gradient("extrapolated", coefficient=coefficient)),))


@method(
    "POPD: progressive rollouts", "2605.31490",
    teacher="another model",
    driver=("teacher model", "horizon"),
    published="H0 + dH floor(step / dk) tokens, at most T; ESR (arXiv 2605.27028) stops at 100",
    differs="H0, dH and dk are not known to us: 100 tokens stand here, and --horizon makes them grow",
)  # fmt: skip
def popd(tokens: int | None = 100) -> Recipe:
    """REINFORCE of log t - log s on a rollout's first tokens; None: the driver ends rollouts."""
    return _horizon(tokens=tokens)


@method(
    "TOPD: truncated rollouts", "2605.31490",
    teacher="another model",
    driver=("teacher model", "horizon"),
    published="rho 0.1",
)  # fmt: skip
def topd(share: float | None = 0.1) -> Recipe:
    """REINFORCE of log t - log s on the first share of each rollout; None for all, as in `popd`."""
    return _horizon(share=share)


@method(
    "VLA-OPD: vision, language and action", "2603.26666",
    teacher="an expert policy",
    driver=("teacher model", "old_logprob"),
    published="lr 5e-6, LoRA 32; the reverse KL did better than the forward one, that than hard imitation",
    scope="actions are tokens; student and teacher have to normalise them alike",
    library="an environment's observations and actions",
)  # fmt: skip
def vla_opd(form: str = "reverse", surrogate: str = "reinforce") -> Recipe:
    """REINFORCE or PPO of log t - log s; "forward": KL(t || s); "hard": -log s of the best action."""
    if form == "forward":
        return Recipe((Term(Objective("forward_kl")),))
    if form == "hard":
        return Recipe((Term(Estimator("imitation", {"target": "best"}, Support(1, "teacher"))),))
    if form != "reverse":
        raise ValueError(f"form: expected 'reverse', 'forward' or 'hard'; got {form!r}")
    return Recipe((Term(policy_gradient(surrogate=surrogate)),))


@method(
    "On-policy distillation of Thinking Machines, tinker", "https://thinkingmachines.ai/blog/on-policy-distillation",
    teacher="another model",
    driver=("teacher model", "rollout_logprob"),
    published="lr 1e-4 with LoRA, 5e-5 without, 200 steps of 512 rollouts",
    differs="reward=True adds the task's advantage, as the released code can",
)  # fmt: skip
def tml_opd(coefficient: float = 1.0, reward: bool = False) -> Recipe:
    """-s / s_rollout A without a clip, A = log t - log s_rollout."""
    name = "data+teacher" if reward else "teacher"
    return Recipe((Term(policy_gradient(name, "importance", coefficient=coefficient, student="rollout")),))


def _horizon(**options: float | None) -> Recipe:
    """The mean over the tokens within the horizon; over all where none is given."""
    early = tuple(Weight("horizon", {name: bound}) for name, bound in options.items() if bound is not None)
    return Recipe((Term(Estimator("k1"), weights=early, normaliser="selected"),))
