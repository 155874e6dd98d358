"""Bounds of what a run inherits from `transformers.TrainingArguments`, and what it has no use for."""

from typing import Any

LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "logging_steps": 0,
    "eval_steps": 0,
    "eval_delay": 0,
    "save_steps": 0,
    "dataloader_num_workers": 0,
    "seed": 0,
}
# Names with the values that say nothing, and why others are refused.
UNUSED = {
    "label_smoothing_factor": (0.0, "a token's target is the teacher's distribution, not a label"),
    "neftune_noise_alpha": (None, "student and teacher read the same completions, without noise"),
}


def check_inherited(args: Any) -> None:
    """ValueError for a number that is out of range, and for an option that would do nothing here."""
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name}: expected a number of at least {least}, got {value}")
    for name, (nothing, why) in UNUSED.items():
        if (value := getattr(args, name)) != nothing:
            raise ValueError(f"{name}: expected nothing, since {why}; got {value}")
