"""The model's two halves: the backbone at the completion's positions, and the head that makes logits."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper

from opsd_kernels import Hidden, LogLinear
from opsd_kernels.backends import reference
from opsd_kernels.integrations import hf
from opsd_kernels.integrations.hf import backbone_of, causal_lm, evaluating, head_of
from opsd_train.padding import moved_behind, note_padding, reads_padding
from opsd_train.reading.prompts import Prompt

CHECKED = 16  # tokens of a prompt that `check_head` reads
PADDED = 8  # columns of padding before two tokens: what a recurrent model read first fades with more


def completion_hidden(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int
) -> torch.Tensor:
    """Last hidden states `[B, length, H]` at the positions that predict the last `length` tokens of each row.

    Those run from the last token of the prompt to the completion's last but one, which is why the last column
    is never fed to the model. Only the backbone runs, no logits are formed. Padding on the left does not
    count towards a token's position; a model that would read it gets it behind the rows, see `padding`.

    Args:
        model: a causal language model, or PEFT's wrapper of one.
        input_ids: `[B, P + length]` prompts padded on the left, completions padded on the right.
        attention_mask: the same shape, 0 at padding.
        length: columns of the completions.
    """
    backbone = backbone_of(model)
    ids, mask, back = input_ids[:, :-1], attention_mask[:, :-1], None
    if reads_padding(model):
        there, back = moved_behind(mask)
        ids, mask = ids.gather(1, there), mask.gather(1, there)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    hidden: torch.Tensor = backbone(**inputs).last_hidden_state
    if back is None:
        return hidden[:, -length:]
    return hidden.take_along_dim(back[:, -length:, None], dim=1)


def head_source(model: torch.nn.Module, hidden: torch.Tensor) -> Hidden:
    """Hidden states with the model's head: weight, bias, logit scale and soft-cap.

    Raises ValueError if the head carries an adapter: what hands weights to engines, shards and copies takes
    the head's weight for the whole head.
    """
    if isinstance(causal_lm(model).get_output_embeddings(), BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise ValueError(
            "model: expected a head without an adapter, got one on lm_head; leave it out of target_modules "
            "and modules_to_save"
        )
    return head_of(model)(hidden)


def logits(source: Hidden | LogLinear, start: int = 0, end: int | None = None) -> torch.Tensor:
    """Logits `[B, c, V]` in fp32 of the few positions from `start` up to `end`; the factors are numbers."""
    if isinstance(source, LogLinear):
        return torch.stack([factor * logits(one, start, end) for factor, one in source.streams]).sum(dim=0)
    return reference.logits(replace(source, hidden=source.hidden[:, start:end]))


def check_head(model: torch.nn.Module, prompt: tuple[int, ...]) -> None:
    """Raise ValueError unless `head_source` over `completion_hidden` is what the model itself computes.

    Tried on the beginning of one prompt, see `opsd_kernels.integrations.hf.check_head`, and on padding, see
    `check_padding`.
    """
    check_padding(model)
    ids = torch.tensor([prompt[:CHECKED]], device=causal_lm(model).device)
    head_source(model, torch.empty(0))  # an adapter on the head is named before anything is computed

    def states(ids: torch.Tensor) -> torch.Tensor:
        follow = torch.cat([ids, ids[:, -1:]], dim=1)
        return completion_hidden(model, follow, torch.ones_like(follow), ids.shape[1])

    hf.check_head(model, ids, states)


@torch.no_grad()
def check_padding(model: torch.nn.Module) -> None:
    """Compare a row padded on the left with itself alone; from then on a model that differs reads no padding.

    The last hidden states have to agree in half of the digits of the model's dtype. Some recurrent models
    take an attention mask and ignore it; what then becomes of padding is `padding`'s concern.
    """
    inner = causal_lm(model)
    note_padding(model, False)
    first, second, pad = torch.linspace(0, embeddings_of(model) - 1, 5).long().tolist()[1:4]
    ids = torch.tensor([[pad] * PADDED + [first, second, second]], device=inner.device)
    mask = (torch.arange(ids.shape[1], device=inner.device) >= PADDED).long()[None]
    with evaluating(model):
        padded = completion_hidden(model, ids, mask, 1).float()
        alone = completion_hidden(model, ids[:, PADDED:], mask[:, PADDED:], 1).float()
    bound = torch.finfo(inner.dtype).eps ** 0.5 * alone.norm()
    note_padding(model, bool((padded - alone).norm() > bound))


def positions_of(model: torch.nn.Module) -> int | None:
    """How many positions the model has, if its configuration says so."""
    found: int | None = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
    return found


def embeddings_of(model: torch.nn.Module) -> int:
    """How many tokens the model can read."""
    weight: Any = causal_lm(model).get_input_embeddings().weight
    return int(weight.shape[0])


def check_positions(model: torch.nn.Module, prompts: Sequence[Prompt], max_completion_length: int) -> None:
    """Raise ValueError unless the longest prompt of student and teacher leaves room for a whole completion.

    The room are the model's positions, see `positions_of`; without a number of them there is no bound.
    """
    limit = positions_of(model)
    if limit is None or not prompts:
        return
    for reader, lengths in (
        ("student", [len(prompt.student_ids) for prompt in prompts]),
        ("teacher", [len(prompt.teacher_ids) for prompt in prompts]),
    ):
        longest = max(lengths)
        if longest + max_completion_length > limit:
            where = prompts[lengths.index(longest)].where
            raise ValueError(
                f"max_completion_length: expected at most {limit - longest}, got {max_completion_length}: "
                f"the {reader}'s prompt of {where} has {longest} tokens, and the "
                f"model {limit} positions (max_position_embeddings) for prompt and completion; lower "
                f"max_completion_length or shorten that prompt"
            )
