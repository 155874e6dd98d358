"""The engine that a configuration asks for."""

import torch
from transformers import PreTrainedTokenizerBase

from opsd_train.backbone import causal_lm
from opsd_train.config import OPSDConfig
from opsd_train.engines.base import Engine
from opsd_train.engines.hf import HFEngine
from opsd_train.engines.vllm import VLLMEngine
from opsd_train.rollouts import Vocabulary


def make_engine(
    config: OPSDConfig,
    student: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
) -> Engine:
    """An engine that has the student's weights as they are.

    Args:
        config: which one, and how it is started.
        student: the model in training; the engine asks it for its weights.
        tokenizer: of the student.
        vocabulary: the special tokens.

    Raises:
        ValueError: the engine's package is not installed, or it cannot run this model.
        EngineError: it did not start.
    """
    if config.rollouts == "hf":
        return HFEngine(student, vocabulary)
    if config.rollouts == "vllm":
        return VLLMEngine(config, student, vocabulary, longest(config, student), config.seed)
    raise NotImplementedError(config.rollouts)


def longest(config: OPSDConfig, student: torch.nn.Module) -> int:
    """Tokens of the longest prompt and completion together that the budgets and the model allow."""
    budget = config.max_prompt_length + config.max_completion_length
    positions = getattr(causal_lm(student).config.get_text_config(), "max_position_embeddings", None)
    return budget if positions is None else min(budget, positions)
