"""Whether the engine that writes rollouts has the weights that are trained: its log-probs, and the trainer's.

Two implementations of the same model differ by rounding, about 0.01 nats per token in bf16; weights of
another step, another tokenizer or a wrong merge differ by far more.
"""

import itertools
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

import opsd_kernels
from opsd_kernels import Hidden
from opsd_train.backbone import causal_lm, completion_hidden, head_source
from opsd_train.engines.base import EngineError
from opsd_train.rollouts import evaluating

EXPECTED, ALARM = 0.02, 0.1  # mean absolute difference, nats per token
RATE = re.compile("drop|jitter")  # attention_dropout, resid_pdrop, layerdrop, router_jitter_noise
DROPOUTS = torch.nn.modules.dropout._DropoutNd
logger = logging.getLogger(__name__)


class Agreement:
    """Compares the log-probs of one micro-batch of every step."""

    def __init__(self) -> None:
        self._heard = False
        self._differences: list[float] = []

    def begin_step(self) -> None:
        """The next micro-batch is compared."""
        self._heard = False

    @torch.no_grad()
    def hear(self, student: Callable[[], Hidden], batch: Mapping[str, Tensor]) -> None:
        """Compare the first micro-batch of the step, if the engine said how likely its tokens were.

        Args:
            student: gives it at the completion's positions, as it is before the step and without dropout;
                called if there is something to compare.
            batch: with `engine_logprobs` [B, C] at temperature 1, and the completions.

        Raises:
            EngineError: they differ by more than `ALARM`, or are not finite.
        """
        if self._heard or "engine_logprobs" not in batch:
            return
        self._heard = True
        mask = batch["completion_mask"].bool()
        own = opsd_kernels.token_logprobs(student(), batch["input_ids"][:, -mask.shape[1] :], mask=mask)
        found = float((own - batch["engine_logprobs"])[mask].abs().double().mean())
        self._differences.append(found)
        if not found <= ALARM:
            raise EngineError(
                f"rollouts: expected an engine with the student's weights, whose log-probs differ by at most "
                f"{ALARM} nats per token; they differ by {found:.3g} on average"
            )
        if found > EXPECTED:
            logger.warning("the rollouts' log-probs differ by %.3g nats per token from the trainer's", found)

    def metrics(self) -> dict[str, float]:
        """The mean over the steps since the last call, if any was compared."""
        if not self._differences:
            return {}
        mean = sum(self._differences) / len(self._differences)
        self._differences.clear()
        return {"engine_difference": mean}


@torch.no_grad()
def as_engines_read(
    model: torch.nn.Module,
    student: Hidden,
    batch: Mapping[str, Tensor],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Hidden:
    """The student at the completion's positions without dropout, which no engine has.

    Args:
        model: the student; one in training with dropout reads the batch once more, and draws nothing.
        student: what it said of the batch, which is the answer where there is no dropout.
        batch: as `collate` makes it.
        autocast: of the forward pass.
    """
    if not (model.training and has_dropout(model)):
        return student
    with evaluating(model), autocast():
        length = batch["completion_mask"].shape[1]
        hidden = completion_hidden(model, batch["input_ids"], batch["attention_mask"], length)
    return head_source(model, hidden)


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether a module, or a rate that a module or the configuration keeps for a function, drops something.

    A rate that is not used is one too: that costs a forward pass, and hides nothing.
    """
    configuration = causal_lm(model).config.get_text_config()
    held = itertools.chain(*(vars(one).items() for one in (configuration, *model.modules())))
    rates = [value for name, value in held if RATE.search(name) and isinstance(value, float)]
    return any(rates) or any(isinstance(one, DROPOUTS) and one.p for one in model.modules())


def check_engine_columns(needs: tuple[str, ...], config: Any) -> None:
    """ValueError for a method that weighs by the engine's log-probs where they are not at its temperature.

    Args:
        needs: columns of the method.
        config: an `OPSDConfig`.
    """
    if "rollout_logprob" in needs and config.rollouts != "hf" and config.loss_temperature != 1:
        raise ValueError(
            "loss_temperature: expected 1 with a method that reads rollout_logprob, which vLLM gives at "
            f"temperature 1; got {config.loss_temperature}"
        )
