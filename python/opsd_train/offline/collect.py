"""Rollouts with what the teacher said of them, written once and trained from without a teacher.

Lightning OPD (arXiv 2604.13010) trains on the rollouts of the initial student with the log-probs of the
teacher computed beforehand; its condition is that this student was fine-tuned on the same teacher.

`Writer` makes such a cache (the files are described in `cache.py`, which reads it back). One that was
cut off goes on with the first shard that is missing; its rollouts do not depend on where it was cut.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import Hidden
from opsd_train.backbone import causal_lm, completion_hidden, head_source, logits
from opsd_train.offline.cache import begin, digest, shard_path, write_shard
from opsd_train.reading.prompts import Prompt
from opsd_train.rollouts import Rollout, Sampling, Vocabulary, check_alignment, collate, evaluating, generate
from opsd_train.teachers.weights import Teacher

CACHE = 3  # the stream of random numbers; 0 to 2 are taken
CHUNK = 256  # tokens whose logits are held at a time


@dataclass(frozen=True)
class CacheOptions:
    """How a cache is made.

    Args:
        sampling: of the rollouts.
        samples: rollouts per prompt.
        top_k: the teacher's most likely tokens that are kept with their log-probs; 0 for none.
        temperature: of the log-probs, softmax(z / T) over the whole vocabulary.
        shard_size: rollouts in a file.
        seed: of the rollouts.
    """

    sampling: Sampling
    samples: int = 1
    top_k: int = 0
    temperature: float = 1.0
    shard_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("top_k", 0), ("shard_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}; got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a number above 0; got {self.temperature}")


@dataclass(frozen=True)
class Writer:
    """Makes a cache with one student and one teacher.

    Args:
        student: writes the rollouts.
        teacher: reads them with the prompts' teacher context.
        vocabulary: of both.
        options: see `CacheOptions`.
        about: what identifies student and teacher, for cache.json; JSON values.
    """

    student: torch.nn.Module
    teacher: Teacher
    vocabulary: Vocabulary
    options: CacheOptions
    about: Mapping[str, Any]

    def write(
        self,
        folder: str | os.PathLike[str],
        prompts: Sequence[Prompt],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Write the shards that are missing; `progress` hears of shards done and in all.

        Raises ValueError for a folder whose cache was made otherwise, of other prompts too, and for more top
        tokens than the vocabulary has.
        """
        path, size = Path(folder), self.options.shard_size
        columns = causal_lm(self.student).get_output_embeddings().weight.shape[0]
        if self.options.top_k > columns:
            raise ValueError(f"top_k: expected at most {columns}, the vocabulary; got {self.options.top_k}")
        drawn = [prompt for prompt in prompts for _ in range(self.options.samples)]
        info = {**self.about, **asdict(self.options), "rollouts": len(drawn), "prompts": digest(prompts)}
        total = begin(path, info)
        for shard in range(total):
            if not shard_path(path, shard).exists():
                write_shard(
                    shard_path(path, shard), self._rows(drawn[shard * size : (shard + 1) * size], shard)
                )
            progress(shard + 1, total)

    def _rows(self, prompts: Sequence[Prompt], shard: int) -> list[dict[str, Any]]:
        ids = [prompt.student_ids for prompt in prompts]
        completions = generate(
            causal_lm(self.student),
            ids,
            self.options.sampling,
            self.vocabulary,
            (self.options.seed, CACHE, shard),
        )
        ends = self.vocabulary.eos_ids
        rollouts = [
            Rollout(prompt, completion, truncated=completion[-1] not in ends)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        size = self.options.sampling.batch_size or len(rollouts)
        rows: list[dict[str, Any]] = []
        for start in range(0, len(rollouts), size):
            rows += self._read(rollouts[start : start + size])
        return rows

    @torch.no_grad()
    def _read(self, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
        """What student and teacher say of a batch of rollouts."""
        device = next(self.student.parameters()).device
        batch = {name: one.to(device) for name, one in collate(rollouts, self.vocabulary.pad_id).items()}
        check_alignment(batch)
        mask = batch["completion_mask"].bool()
        length = mask.shape[1]
        with evaluating(self.student):
            hidden = completion_hidden(self.student, batch["input_ids"], batch["attention_mask"], length)
            student = head_source(self.student, hidden)
        teacher = self.teacher.source(batch["teacher_input_ids"], batch["teacher_attention_mask"], length)
        if not isinstance(teacher, Hidden):
            raise ValueError(
                "teacher: expected one with hidden states of its own, not a mixture of several; got "
                f"{type(teacher).__name__}"
            )
        token_ids = batch["input_ids"][:, -length:]
        rows = []
        for i, rollout in enumerate(rollouts):
            tokens = token_ids[i, mask[i]]
            of_student, _, _ = self._log_probs(student, student.hidden[i, mask[i]], tokens, 0)
            of_teacher, top_ids, top = self._log_probs(
                teacher, teacher.hidden[i, mask[i]], tokens, self.options.top_k
            )
            rows.append(
                {
                    "student_ids": rollout.prompt.student_ids,
                    "teacher_ids": rollout.prompt.teacher_ids,
                    "answer": rollout.prompt.answer,
                    "where": rollout.prompt.where,
                    "completion": rollout.completion,
                    "truncated": rollout.truncated,
                    "student_logprob": of_student.tolist(),
                    "teacher_logprob": of_teacher.tolist(),
                    "top_ids": top_ids.flatten().tolist(),
                    "top_logprobs": top.flatten().tolist(),
                }
            )
        return rows

    def _log_probs(
        self, source: Hidden, states: Tensor, token_ids: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """At hidden states [C, H]: log-probs of the tokens [C], and the k most likely ids and log-probs."""
        chosen, ids, top = [], [], []
        for hidden, tokens in zip(states.split(CHUNK), token_ids.split(CHUNK), strict=True):
            log_p = (logits(replace(source, hidden=hidden)) / self.options.temperature).log_softmax(-1)
            chosen.append(log_p.gather(-1, tokens[:, None])[:, 0])
            most = log_p.topk(k, dim=-1)
            ids.append(most.indices)
            top.append(most.values)
        return torch.cat(chosen), torch.cat(ids), torch.cat(top)
