"""A few rollouts token by token, so that a person sees where the teacher disagrees."""

import functools
from collections.abc import Sequence

import torch

import opsd_kernels
from opsd_kernels import Hidden, LogLinear, TopK
from opsd_train.backbone import logits
from opsd_train.evaluation.examined import EVALUATION
from opsd_train.reading.prompts import Prompt, decode
from opsd_train.rollouts import Rollout, collate, evaluating
from opsd_train.trainer import OPSDTrainer
from opsd_train.watch.record import RolloutRecord, TokenRecord


@torch.no_grad()
def inspect_rollouts(trainer: OPSDTrainer, prompts: Sequence[Prompt]) -> list[RolloutRecord]:
    """Sample a completion of every prompt and write down what student and teacher thought of its tokens."""
    rollouts = trainer.roll_out(prompts, trainer.sampling, (EVALUATION, trainer.state.global_step))
    inside = functools.partial(trainer.ranks.inside, trainer.model_wrapped)
    return [inside(functools.partial(_record, trainer, rollout)) for rollout in rollouts]


def _record(trainer: OPSDTrainer, rollout: Rollout) -> RolloutRecord:
    tokenizer = trainer.tokenizer
    batch = {k: v.to(trainer.args.device) for k, v in collate([rollout], trainer.vocabulary.pad_id).items()}
    with evaluating(trainer.student):
        student, teacher = trainer.distributions(trainer.student, batch)
    ids = batch["input_ids"][:, -len(rollout.completion) :]
    stats = opsd_kernels.token_stats(
        student,
        teacher,
        token_ids=ids,
        temperature=trainer.config.loss_temperature,
        objective=trainer.objective,
    )
    assert not isinstance(teacher, TopK)  # see `look`
    top_ids, top_probs = _most_likely(teacher, trainer.config.loss_temperature)
    judged = trainer.judge.knows(rollout.prompt)
    return RolloutRecord(
        step=trainer.state.global_step,
        prompt=decode(tokenizer, rollout.prompt.student_ids),
        teacher_prompt=decode(tokenizer, rollout.prompt.teacher_ids),
        answer=rollout.prompt.answer,
        correct=trainer.judge.judge([rollout], tokenizer)[0] if judged else None,
        tokens=[
            TokenRecord(
                text=decode(tokenizer, [token]),
                forward_kl=stats.forward_kl[0, i].item(),
                student_logprob=stats.student_logprob[0, i].item(),
                teacher_logprob=stats.teacher_logprob[0, i].item(),
                student_entropy=stats.student_entropy[0, i].item(),
                teacher_top=decode(tokenizer, [top_ids[i]]),
                teacher_top_prob=top_probs[i],
            )
            for i, token in enumerate(rollout.completion)
        ],
    )


def _most_likely(source: Hidden | LogLinear, temperature: float) -> tuple[list[int], list[float]]:
    """The most likely token at each position of one row and its probability."""
    ids, probabilities = [], []
    for start in range(0, source.lead[1], 64):  # a few positions at a time: these are whole rows of logits
        z = logits(source, start, start + 64)[0]
        top = torch.softmax(z / temperature, dim=-1).max(dim=-1)
        ids += top.indices.tolist()
        probabilities += top.values.tolist()
    return ids, probabilities
