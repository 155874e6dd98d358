"""The student's rollouts: sampling with `generate`, and the batch in which student and teacher read them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from opsd_kernels.integrations.hf import evaluating
from opsd_train.engines.base import Advance
from opsd_train.padding import reads_padding
from opsd_train.reading.prompts import Prompt, pad_left, pad_right
from opsd_train.safety import stops


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_p: draw from the smallest set of tokens with this probability; 1 for all.
        top_k: draw from this many most likely tokens; 0 for all.
        max_tokens: a completion stops here if it has not ended before.
        batch_size: sequences that are generated at once, None for all.
    """

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    batch_size: int | None = None


@dataclass(frozen=True)
class Vocabulary:
    """The special tokens that generation needs to know."""

    pad_id: int
    eos_ids: tuple[int, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "Vocabulary":
        """Every end-of-sequence token that the model's generation defaults or the tokenizer name."""
        named = model.generation_config.eos_token_id
        ends = [named] if isinstance(named, int) else list(named or [])
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
            ends.append(tokenizer.eos_token_id)
        if not ends:
            raise ValueError("processing_class: expected a tokenizer with an end-of-sequence token, got none")
        return cls(ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id, tuple(ends))


@dataclass(frozen=True)
class Rollout:
    """A prompt and what the student wrote: its tokens up to and including the first end-of-sequence.

    `logprobs` are those of the engine that wrote them, at temperature 1, and `version` the optimizer steps of
    its weights; see `engines.base.Completion`.
    """

    prompt: Prompt
    completion: tuple[int, ...]
    truncated: bool
    logprobs: tuple[float, ...] | None = None
    version: int = 0


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    vocabulary: Vocabulary,
    seed: Sequence[int],
    synced: bool = False,
    tell: Callable[[Advance], None] | None = None,
) -> list[tuple[int, ...]]:
    """Complete every prompt; the result is a function of the weights, the prompts, `sampling` and `seed`.

    The model's own generation defaults (a repetition penalty, say) do not apply: rollouts come from the very
    distribution that is trained. The global random state is left as it was. With `synced`, every process goes
    on until the last one is done, as a sharded model needs it. `tell` hears of every token. A model that
    reads padding completes one prompt at a time.

    Raises:
        ValueError: a model that reads padding is sharded: its processes would make different passes.
        Stopped: a signal asked for it, see `stops`.
    """
    if not prompts:
        return []
    alone = reads_padding(model)
    if alone and synced:
        raise ValueError(
            f"model: expected one that is not sharded, since {type(model).__name__} ignores the attention "
            "mask and reads padding on the left; train it whole, or let another engine write"
        )
    config = _generation_config(sampling, vocabulary)
    # Not in groups of one length: transformers' RWKV mixes the states of rows that it continues together.
    size = 1 if alone else sampling.batch_size or len(prompts)
    completions: list[tuple[int, ...]] = []
    with evaluating(model), _only(model, config), seeded(model.device, seed):
        for start in range(0, len(prompts), size):
            ids, mask = pad_left(prompts[start : start + size], vocabulary.pad_id)
            ids, mask = ids.to(model.device), mask.to(model.device)
            criteria: list[StoppingCriteria] = [stops.StopRequested()]
            if tell is not None:
                criteria.append(_Telling(tell, Advance(start, len(prompts)), ids.shape[1]))
            sequences = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList(criteria),
                synced_gpus=synced,
            )
            stops.check()
            for tokens in sequences[:, ids.shape[1] :].tolist():
                completions.append(until_end(tokens, vocabulary.eos_ids))
    return completions


class _Telling(StoppingCriteria):
    """Ends nothing, and tells of every token.

    Args:
        tell: hears of it.
        before: what was written when the batch began.
        prompt: tokens of the padded prompts.
    """

    def __init__(self, tell: Callable[[Advance], None], before: Advance, prompt: int) -> None:
        self.tell, self.before, self.prompt = tell, before, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """[rows] bool."""
        self.tell(replace(self.before, at=input_ids.shape[1] - self.prompt))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def until_end(tokens: Sequence[int], eos_ids: Sequence[int]) -> tuple[int, ...]:
    """The tokens up to and including the first end-of-sequence; what follows it is padding."""
    for position, token in enumerate(tokens):
        if token in eos_ids:
            return tuple(tokens[: position + 1])
    return tuple(tokens)


def collate(rollouts: Sequence[Rollout], pad_id: int) -> dict[str, torch.Tensor]:
    """The batch of one forward and backward pass, all int64.

    `input_ids` [B, P + C] and `teacher_input_ids` [B, P_t + C]: the prompts padded on the left, then the very
    same completion ids padded on the right. `attention_mask` and `teacher_attention_mask` go with them;
    `completion_mask` [B, C] is 1 at the completion's tokens, the end-of-sequence included. If an engine said
    how likely they were, `engine_logprobs` [B, C] fp32 does too, 0 behind the completions.
    """
    completion, completion_mask = pad_right([r.completion for r in rollouts], pad_id)
    student, student_mask = pad_left([r.prompt.student_ids for r in rollouts], pad_id)
    teacher, teacher_mask = pad_left([r.prompt.teacher_ids for r in rollouts], pad_id)
    batch = {
        "input_ids": torch.cat([student, completion], dim=1),
        "attention_mask": torch.cat([student_mask, completion_mask], dim=1),
        "teacher_input_ids": torch.cat([teacher, completion], dim=1),
        "teacher_attention_mask": torch.cat([teacher_mask, completion_mask], dim=1),
        "completion_mask": completion_mask,
    }
    said = [torch.tensor(r.logprobs) for r in rollouts if r.logprobs is not None]
    if len(said) == len(rollouts):
        batch["engine_logprobs"] = torch.nn.utils.rnn.pad_sequence(said, batch_first=True)
    return batch


def counted(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tokens that count in the loss, [B, C] bool: all of the completions unless the batch says which."""
    return batch.get("counted", batch["completion_mask"]).bool()


def check_alignment(batch: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless student and teacher see the same completion tokens at the same positions."""
    length = batch["completion_mask"].shape[1]
    live = batch["completion_mask"].bool()
    student, teacher = batch["input_ids"][:, -length:], batch["teacher_input_ids"][:, -length:]
    agreements = {
        "teacher_input_ids": (student == teacher) | ~live,
        "attention_mask": batch["attention_mask"][:, -length:].bool() == live,
        "teacher_attention_mask": batch["teacher_attention_mask"][:, -length:].bool() == live,
    }
    if bool(torch.stack(list(agreements.values())).all()):  # waits for the device once
        return
    for name, same in agreements.items():
        if not bool(same.all()):
            row, position = (~same).nonzero()[0].tolist()
            raise ValueError(
                f"{name}: expected student and teacher to see the same completion; they differ in row {row} "
                f"of the batch at token {position} of the completion"
            )


def _generation_config(sampling: Sampling, vocabulary: Vocabulary) -> GenerationConfig:
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        do_sample=sampling.temperature > 0,
        use_cache=True,
        pad_token_id=vocabulary.pad_id,
        eos_token_id=list(vocabulary.eos_ids),
        **(drawn if sampling.temperature > 0 else {}),
    )


@contextmanager
def _only(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """`generate` fills what its argument leaves open from `model.generation_config`: leave nothing there."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def seeded(device: torch.device, seed: Sequence[int]) -> Iterator[None]:
    """`generate` draws from the global random state, so seed that, and put it back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
        yield
