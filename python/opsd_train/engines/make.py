"""The engine that a configuration asks for."""

import importlib

import torch
from transformers import PreTrainedTokenizerBase

from opsd_train.config import OPSDConfig
from opsd_train.engines.base import Engine
from opsd_train.engines.table import ENGINES
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
    made: Engine = importlib.import_module(ENGINES[config.rollouts].module).make(
        config, student, tokenizer, vocabulary
    )
    return made
