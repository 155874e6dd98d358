"""The names of a run's metrics, in one place: the record, the report and the trackers use these."""

from collections.abc import Mapping
from typing import Any

import torch

from opsd_kernels import Hidden, LogLinear, Masses, Mixture, Support, support_mass
from opsd_train.watch.phases import PHASES

# Positions in a completion, from 0; the last bucket has no end.
BUCKETS = ((0, 8), (8, 32), (32, 128), (128, 512), (512, None))


def bucket_name(bucket: tuple[int, int | None]) -> str:
    """`kl_0_8` for positions 0 to 7, `kl_512_up` for those from 512 on."""
    start, end = bucket
    return f"kl_{start}_{'up' if end is None else end}"


# What a logged step may have; those of pieces, exposure say, come on top. Divergences and entropies in nats.
METRICS: dict[str, str] = {
    "loss": "Mean of the objective over the tokens since the last line, clips applied.",
    "grad_norm": "Norm of the gradient before clipping.",
    "learning_rate": "Learning rate of the step.",
    "epoch": "Passes over the training rows.",
    "forward_kl": "KL(teacher || student), without clips.",
    "reverse_kl": "KL(student || teacher), without clips.",
    "jsd": "Jensen-Shannon divergence at beta = 1/2.",
    **{bucket_name(bucket): "Forward KL at these positions of the completions." for bucket in BUCKETS},
    "student_entropy": "Entropy of the student.",
    "teacher_entropy": "Entropy of the teacher.",
    "student_logprob": "Log-prob of the sampled tokens under the student.",
    "teacher_logprob": "Log-prob of the sampled tokens under the teacher.",
    "top1_agreement": "Share of tokens at which both have the same most likely token.",
    "student_mass": "Probability that the student gives to its own mass_top_k most likely tokens.",
    "teacher_mass": "Probability that the teacher gives to the same tokens.",
    "engine_difference": "Mean absolute difference of the engine's and the trainer's log-probs of tokens.",
    "clipped_fraction": "Share of the divergence that the objective's clips remove, tokens weighted by "
    "their forward KL; above 1 where the clipped terms sum to less than 0.",
    "completion_length": "Mean length of the completions in tokens.",
    "completion_length_min": "Shortest completion in tokens.",
    "completion_length_max": "Longest completion in tokens.",
    "truncated_share": "Share of completions that reached max_completion_length.",
    "reward": "Mean of what the verifier said, where a method asks it.",
    "tokens_per_second": "Completion tokens of all processes per second of steps.",
    "step_seconds": "A step, from its rollouts to the moved weights.",
    **{f"{name}_seconds": f"Of that, in the phase {name!r}." for name in PHASES},
    "memory_gb": "Memory in use: what PyTorch holds of a GPU, or the process's resident memory.",
    "peak_memory_gb": "Most memory the process has had: allocated on a GPU, resident on a CPU.",
    "seconds": "Time since training began.",
    "skipped_steps": "Steps that were skipped so far, since loss or gradient was not finite.",
}


def teacher_mass(
    student: Hidden, teacher: Any, mask: torch.Tensor, k: int, temperature: float
) -> Masses | None:
    """What student and teacher give to the student's k most likely tokens, [B, C] each.

    Args:
        student: its next-token distributions.
        teacher: as the loss has it; of several by role the first counts.
        mask: the tokens that count.
        k: 0 asks for nothing.
        temperature: of both distributions.

    Returns:
        None where k is 0, or the teacher is not known at all tokens of the vocabulary.
    """
    if isinstance(teacher, Mapping):
        teacher = next(iter(teacher.values()), None)
    if k == 0 or not isinstance(teacher, Hidden | LogLinear | Mixture):
        return None
    few = Support(min(k, student.vocab), "student")
    return support_mass(student, teacher, None, few, mask=mask, temperature=temperature)
