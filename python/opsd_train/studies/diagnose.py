"""How well a distillation gradient points to where success lies, measured without training.

The gradient alignment score of arXiv 2605.10889: the cosine between the direction in which a distillation
loss moves the student and the direction in which its probability of success rises fastest. There it is taken
per token with rollouts from every token; here per prompt, from whole rollouts y_1 .. y_n with rewards r_i::

    ideal     =   sum_i (r_i - mean r) grad log s(y_i)      REINFORCE: unbiased up to the factor n - 1
    direction = - sum_i grad loss(y_i)

Noise in the estimate of the ideal shrinks every cosine by the same factor. What a perfect candidate would get
is estimated too (`ceiling`), by the agreement of two halves of the rollouts.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import opsd_kernels
from opsd_kernels import Hidden, Objective, token_logprobs
from opsd_train.backbone import causal_lm, completion_hidden, head_source
from opsd_train.reading.prompts import Prompt
from opsd_train.rollouts import Rollout, Sampling, Vocabulary, collate, evaluating, generate
from opsd_train.studies.alignment import Diagnosis, Sums, cosine
from opsd_train.teachers.weights import Teacher

LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")

TokenLoss = Callable[[Hidden, Any, Tensor, Tensor], Tensor]
"""Sum of a loss over the tokens that count, from student, teacher, mask [B, C] bool and ids [B, C]."""


@dataclass(frozen=True)
class Candidate:
    """A loss and a teacher to judge.

    Args:
        name: for the table.
        loss: what would be minimised, see `TokenLoss`; `objective_loss` makes one.
        prompts: the student's prompts with this teacher's context.
        teacher: reads the context.
    """

    name: str
    loss: TokenLoss
    prompts: Sequence[Prompt]
    teacher: Teacher


@dataclass(frozen=True)
class Probe:
    """What the gradients are taken of, and from which rollouts.

    Args:
        student: its gradients are left as they are, no weight is changed.
        parameters: the gradients are taken of these; see `choose`.
        sampling: without top-p and top-k, whose log-probabilities would not be those of the rollouts.
        rollouts: n per prompt, an even number of at least 4.
        reward: 1 for a success and 0 for a failure, or any number.
        seed: of the rollouts.
    """

    student: torch.nn.Module
    parameters: Sequence[Tensor]
    sampling: Sampling
    vocabulary: Vocabulary
    rollouts: int
    reward: Callable[[Rollout], float]
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rollouts < 4 or self.rollouts % 2:
            raise ValueError(f"rollouts: expected an even number of at least 4; got {self.rollouts}")
        if self.sampling.temperature <= 0 or self.sampling.top_p < 1 or self.sampling.top_k:
            raise ValueError(
                f"sampling: expected a temperature above 0, top_p 1 and top_k 0; got {self.sampling}"
            )
        if not self.parameters or not all(one.requires_grad for one in self.parameters):
            raise ValueError("parameters: expected some, all of which require a gradient")


def objective_loss(objective: str | Objective, temperature: float = 1.0) -> TokenLoss:
    """The loss that training with this objective minimises, summed over tokens."""

    def loss(student: Hidden, teacher: Hidden, mask: Tensor, token_ids: Tensor) -> Tensor:
        return opsd_kernels.loss(
            student,
            teacher,
            objective=objective,
            mask=mask,
            token_ids=token_ids,
            temperature=temperature,
            reduction="sum",
        )

    return loss


def choose(model: torch.nn.Module, which: str) -> list[Tensor]:
    """Trained parameters: `all`, `last` (of the last decoder layer), or those whose name has a match.

    Raises ValueError if there are none.
    """
    named = {name: one for name, one in model.named_parameters() if one.requires_grad}
    layers = {name: int(found[1]) for name in named if (found := LAYER.search(name))}
    chosen: list[Tensor]
    if which == "all":
        chosen = list(named.values())
    elif which == "last":
        chosen = [named[name] for name, layer in layers.items() if layer == max(layers.values())]
    else:
        chosen = [one for name, one in named.items() if re.search(which, name)]
    if not chosen:
        raise ValueError(f"parameters: expected 'all', 'last' or part of a name; nothing matches {which!r}")
    return chosen


def diagnose(probe: Probe, candidates: Sequence[Candidate]) -> Diagnosis:
    """Judge every candidate on the same rollouts of the same prompts.

    Raises ValueError unless all candidates have the same student's prompts.
    """
    prompts = [[prompt.student_ids for prompt in candidate.prompts] for candidate in candidates]
    if not prompts or not prompts[0] or any(one != prompts[0] for one in prompts):
        raise ValueError("candidates: expected at least one, all with the same student's prompts")
    sums = Sums(
        [one.name for one in candidates], len(prompts[0]), sum(one.numel() for one in probe.parameters)
    )
    with evaluating(probe.student):
        for number, prompt in enumerate(candidates[0].prompts):
            rollouts, reward = _roll_out(probe, prompt, number)
            halves = torch.stack([_ideal(probe, rollouts, reward, half) for half in (0, 1)])
            sums.add_ideal(number, halves, reward)
            for at, candidate in enumerate(candidates):
                read = [replace(one, prompt=candidate.prompts[number]) for one in rollouts]
                parts = [[read[i] for i in part] for part in _right_and_wrong(reward)]
                directions = torch.stack([_direction(probe, candidate, part) for part in parts])
                sums.add_direction(at, number, directions, cosine(halves.sum(0), directions.sum(0)))
    return sums.diagnosis()


def _roll_out(probe: Probe, prompt: Prompt, number: int) -> tuple[list[Rollout], Tensor]:
    """n rollouts of one prompt and their rewards [n], fp64."""
    ids = [prompt.student_ids] * probe.rollouts
    completions = generate(
        causal_lm(probe.student), ids, probe.sampling, probe.vocabulary, (probe.seed, number)
    )
    ends = probe.vocabulary.eos_ids
    rollouts = [Rollout(prompt, one, truncated=one[-1] not in ends) for one in completions]
    return rollouts, torch.tensor([float(probe.reward(one)) for one in rollouts], dtype=torch.float64)


def _right_and_wrong(reward: Tensor) -> tuple[list[int], list[int]]:
    above = reward > reward.mean() if bool((reward != reward[0]).any()) else reward > 0
    return above.nonzero().flatten().tolist(), (~above).nonzero().flatten().tolist()


def _ideal(probe: Probe, rollouts: Sequence[Rollout], reward: Tensor, half: int) -> Tensor:
    """The part of the ideal gradient that every second rollout contributes, flat in fp32 on the CPU."""
    total = torch.zeros(sum(one.numel() for one in probe.parameters))
    advantage = (reward - reward.mean())[half::2]
    kept = advantage.nonzero().flatten()
    if not len(kept):  # all rewards are the same
        return total
    for some in kept.split(probe.sampling.batch_size or len(rollouts)):
        batch = _batch(probe, [rollouts[half::2][i] for i in some.tolist()])
        mask = batch["completion_mask"]
        token_ids = batch["input_ids"][:, -mask.shape[1] :]
        log_s = token_logprobs(_student(probe, batch), token_ids, temperature=probe.sampling.temperature)
        total += _gradient(probe, (log_s * mask * advantage[some, None].to(log_s)).sum())
    return total


def _direction(probe: Probe, candidate: Candidate, rollouts: Sequence[Rollout]) -> Tensor:
    """The negative gradient of the candidate's loss on these rollouts, flat in fp32 on the CPU."""
    total = torch.zeros(sum(one.numel() for one in probe.parameters))
    size = probe.sampling.batch_size or len(rollouts) or 1
    for start in range(0, len(rollouts), size):
        batch = _batch(probe, rollouts[start : start + size])
        mask = batch["completion_mask"].bool()
        length = mask.shape[1]
        teacher = candidate.teacher.source(
            batch["teacher_input_ids"], batch["teacher_attention_mask"], length
        )
        loss = candidate.loss(_student(probe, batch), teacher, mask, batch["input_ids"][:, -length:])
        total -= _gradient(probe, loss)
    return total


def _batch(probe: Probe, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    device = next(iter(probe.parameters)).device
    return {name: one.to(device) for name, one in collate(rollouts, probe.vocabulary.pad_id).items()}


def _student(probe: Probe, batch: dict[str, Tensor]) -> Hidden:
    length = batch["completion_mask"].shape[1]
    hidden = completion_hidden(probe.student, batch["input_ids"], batch["attention_mask"], length)
    return head_source(probe.student, hidden)


def _gradient(probe: Probe, value: Tensor) -> Tensor:
    found = torch.autograd.grad(value, probe.parameters, allow_unused=True)
    pairs = zip(found, probe.parameters, strict=True)
    flat = [(torch.zeros_like(one) if gradient is None else gradient).flatten() for gradient, one in pairs]
    return torch.cat([one.float().cpu() for one in flat])
