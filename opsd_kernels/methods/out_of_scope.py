"""Systems of the field that have no loss over a vocabulary's tokens, and why each has none."""

OUT_OF_SCOPE: tuple[tuple[str, str], ...] = (
    ("LiveTalk", "Distils a video diffusion model: its teacher scores noised frames, not tokens."),
    (
        "Adversarial Flow Distillation",
        "Trains a video generator by a discriminator's reward of its denoising steps.",
    ),
    ("Self-E", "Trains an image generator from scratch on its own score estimates of its samples."),
    ("Adversarial Self-Distillation", "Aligns n-step with (n + 1)-step video denoising by a discriminator."),
    (
        "DiffusionOPD",
        "Matches Gaussian transitions of an image diffusion model, whose KL is a squared error of means.",
    ),
    ("Refined Policy Distillation", "Adds a squared error to a teacher's continuous robot actions to PPO."),
    (
        "Real-time iteration for diffusion policies",
        "Starts a robot policy's denoising from its last plan; nothing is trained.",
    ),
    ("SD-DARTS", "Flattens the loss of an architecture search for image classifiers."),
    (
        "Self-supervised label augmentation",
        "Distils image classifiers over joint labels of class and transformation.",
    ),
    ("Random Teachers are Good Teachers", "Studies image representations learned from untrained teachers."),
    ("Ground-truth targets in self-distillation", "Theory of repeated kernel regression on own outputs."),
    (
        "Recursive meta-distillation",
        "Theory of distillation as operators on distributions; it has no training loss.",
    ),
    (
        "RLTF-FM",
        "Models the feedback's own text: `nll` of its tokens, on other rows than rltf_sd's.",
    ),
    (
        "OPAD (of MAD-OPD)",
        "Agents' steps instead of whole answers: mad_opd's loss, on an environment's turns.",
    ),
    (
        "Question-asking as hidden-state probing",
        "Intervenes at inference, by questions and a probe of hidden states; nothing is distilled.",
    ),
    ("The survey of on-policy distillation", "Orders the methods of others; it has no loss of its own."),
    ("CoRP", "Averages rewarded perturbations of the weights; it has no gradient and no loss."),
    ("ExpRL", "Makes rewards of rubrics from hidden solutions; its policy gradient is GRPO's."),
    ("ZPPO", "Puts candidate answers of a teacher into prompts and keeps GRPO's loss."),
    ("Positive-unlabelled RL distillation", "Ranks rollouts around a teacher's answer for DPO or GRPO."),
    ("Reward uncertainty", "Replaces the reward by a distribution over rewards of sets of actions."),
    ("SODA", "Optimises preferences between a teacher's answers and a snapshot's, pairs of whole sequences."),
    (
        "Gradient alignment (Unmasking On-Policy Distillation)",
        "A diagnostic, not a loss: `opsd diagnose` compares gradients.",
    ),
)
"""(name, reason) of each."""
