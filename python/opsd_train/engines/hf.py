"""Rollouts by transformers' `generate`: the training model itself writes, so there is nothing to send."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from opsd_train.backbone import causal_lm
from opsd_train.config import OPSDConfig
from opsd_train.engines.base import Completion, Engine
from opsd_train.rollouts import Sampling, Vocabulary, generate
from opsd_train.sharding import is_sharded, through


def make(
    config: OPSDConfig,
    student: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
) -> "HFEngine":
    """The engine of a configuration."""
    return HFEngine(student, vocabulary)


class HFEngine(Engine):
    """The model in training.

    Args:
        student: a causal language model, or a PEFT model of one.
        vocabulary: its special tokens.
    """

    def __init__(self, student: torch.nn.Module, vocabulary: Vocabulary) -> None:
        self.student, self.vocabulary = student, vocabulary
        self.version = 0

    def write(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: Sequence[int]
    ) -> list[Completion]:
        """A function of the weights, the prompts, `sampling` and `seed`."""
        if not is_sharded(self.student):
            written = self._generated(prompts, sampling, seed)
        else:  # all processes make every pass, those that are done too, until the last one is
            written = through(
                [(self.student, self.student)], lambda: self._generated(prompts, sampling, seed, synced=True)
            )
        return [Completion(tokens, version=self.version) for tokens in written]

    def _generated(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: Sequence[int], synced: bool = False
    ) -> list[tuple[int, ...]]:
        model = causal_lm(self.student)
        return generate(model, prompts, sampling, self.vocabulary, seed, synced, self.tell)

    def follow(self, version: int) -> None:
        """The weights are here already."""
        self.version = version
