"""The model's two halves: the backbone at the completion's positions, and the head that makes logits."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from transformers import PreTrainedModel

from opsd_kernels import Hidden, LogLinear
from opsd_train.reading.prompts import Prompt
from opsd_train.rollouts import evaluating


def causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The causal language model itself: a PEFT model's adapters live inside it and stay active."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        raise ValueError(
            f"model: expected a causal language model of transformers, got {type(inner).__name__}"
        )
    return inner


def completion_hidden(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int
) -> torch.Tensor:
    """Last hidden states `[B, length, H]` at the positions that predict the last `length` tokens of each row.

    Those run from the last token of the prompt to the completion's last but one, which is why the last column
    is never fed to the model. Only the backbone runs, no logits are formed. Padding on the left does not
    count towards a token's position.

    Args:
        model: a causal language model, or PEFT's wrapper of one.
        input_ids: `[B, P + length]` prompts padded on the left, completions padded on the right.
        attention_mask: the same shape, 0 at padding.
        length: columns of the completions.
    """
    decoder = causal_lm(model).get_decoder()
    mask = attention_mask[:, :-1]
    inputs: dict[str, Any] = {"input_ids": input_ids[:, :-1], "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return decoder(**inputs).last_hidden_state[:, -length:]


def head_source(model: torch.nn.Module, hidden: torch.Tensor) -> Hidden:
    """Hidden states with the model's head: weight, bias, logit scale and soft-cap.

    Raises ValueError if the head carries an adapter: its weight would not be the head's.
    """
    inner = causal_lm(model)
    head = inner.get_output_embeddings()
    if isinstance(head, BaseTunerLayer | ModulesToSaveWrapper):
        raise ValueError(
            "model: expected a head without an adapter, got one on lm_head; leave it out of target_modules "
            "and modules_to_save"
        )
    config = inner.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    return Hidden(hidden, head.weight, getattr(head, "bias", None), scale, cap)


def logits(source: Hidden | LogLinear, start: int = 0, end: int | None = None) -> torch.Tensor:
    """Logits `[B, c, V]` in fp32 of the few positions from `start` up to `end`; the factors are numbers."""
    if isinstance(source, LogLinear):
        return torch.stack([factor * logits(one, start, end) for factor, one in source.streams]).sum(dim=0)
    z = source.hidden[:, start:end].float() @ source.weight.float().T
    if source.bias is not None:
        z = z + source.bias.float()
    z = z * source.logit_scale
    return z if source.softcap is None else source.softcap * torch.tanh(z / source.softcap)


@torch.no_grad()
def check_head(model: torch.nn.Module, prompt: tuple[int, ...]) -> None:
    """Raise ValueError unless `head_source` says what the model itself computes, tried on one prompt.

    Some architectures scale, cap or shift their logits in ways of their own; training them on logits that are
    not theirs would look right and be wrong.
    """
    inner = causal_lm(model)
    ids = torch.tensor([prompt], device=inner.device)
    mask = torch.ones_like(ids)
    with evaluating(model):
        expected = (
            inner(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        )
        follow = torch.cat([ids, ids[:, -1:]], dim=1)
        hidden = completion_hidden(model, follow, torch.ones_like(follow), length=1)
        found = logits(head_source(model, hidden))[0, -1]
    # Rounding leaves parts in 10^2 (bf16) or 10^5; a forgotten scale or cap leaves far more.
    difference = (found - expected).norm().item() / max(expected.norm().item(), 1e-30)
    if not (math.isfinite(difference) and difference <= 0.05):
        raise ValueError(
            "model: expected a head that is a linear layer with bias, logit scale and soft-cap; the logits "
            f"of {type(inner).__name__} differ from that by {difference:.1%}"
        )


def positions_of(model: torch.nn.Module) -> int | None:
    """How many positions the model has, if its configuration says so."""
    found: int | None = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
    return found


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
