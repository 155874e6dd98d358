"""Parts of a run, for the tests of its record and its report."""

import math

from opsd_train.watch.record import Accuracy, Evaluation, RolloutRecord, TokenRecord


def accuracy(correct: int, low: float, high: float) -> Accuracy:
    return {"correct": correct, "total": 500, "accuracy": correct / 500, "low": low, "high": high}


BEFORE: Evaluation = {
    "step": 0,
    "greedy": accuracy(192, 0.342, 0.427),
    "sampled": accuracy(150, 0.261, 0.342),
}
AFTER: Evaluation = {
    "step": 200,
    "greedy": accuracy(485, 0.951, 0.982),
    "sampled": accuracy(421, 0.807, 0.871),
}


def token(
    text: str, forward_kl: float | None = 0.0, teacher_top: str = "7", share: float = 0.98
) -> TokenRecord:
    return {
        "text": text,
        "forward_kl": forward_kl,
        "student_logprob": math.log(0.5),
        "teacher_logprob": math.log(0.01),
        "student_entropy": 0.7,
        "teacher_top": teacher_top,
        "teacher_top_prob": share,
    }


def rollout(step: int, tokens: list[TokenRecord], prompt: str = "123+456=") -> RolloutRecord:
    return {
        "step": step,
        "prompt": prompt,
        "teacher_prompt": f"hint 579 {prompt}",
        "answer": "579",
        "correct": False,
        "tokens": tokens,
    }
