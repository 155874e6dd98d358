"""Tiny models and rows for the driver's tests: the demo's tokenizer, random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3ForCausalLM

from opsd_train.config import OPSDConfig
from opsd_train.data.rows import load_rows
from opsd_train.demo.pretrain import build_tokenizer
from opsd_train.reading.prompts import Encoder, Prompt
from opsd_train.trainer import OPSDTrainer

torch.set_num_threads(1)  # at this size a second thread costs more than it brings

TOKENIZER = build_tokenizer()
SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": TOKENIZER.pad_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
    "bos_token_id": None,
    "tie_word_embeddings": True,
}
# Prompts of different lengths, so that every batch is padded on the left.
ROWS = [
    {"problem": "1+2=", "solution": "3"},
    {"problem": "10+20=", "solution": "30"},
    {"problem": "123+456=", "solution": "579"},
    {"problem": "9+1=", "solution": "10"},
    {"problem": "7+77=", "solution": "84"},
    {"problem": "5+5=", "solution": "10"},
    {"problem": "100+1=", "solution": "101"},
    {"problem": "8+8=", "solution": "16"},
]


def tiny_model(seed: int = 0, kind: type = Qwen3ForCausalLM, **settings: Any) -> PreTrainedModel:
    """A model of two layers. Its weights are enlarged, since fresh ones give nearly uniform distributions."""
    torch.manual_seed(seed)
    model = kind(kind.config_class(**(SIZES | settings)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(10 if "embed" in name or "lm_head" in name else 16)
    # Several tokens end a completion, so that completions are of different lengths.
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *range(20, 32)]
    return model


def tiny_config(out: Path, **settings: Any) -> OPSDConfig:
    given = {
        "student_template": "{problem}",
        "teacher_template": "{solution};{problem}",
        "max_completion_length": 6,
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "use_cpu": True,
    }
    return OPSDConfig(output_dir=str(out), **(given | settings))


def tiny_prompts(config: OPSDConfig, rows: list[dict[str, str]] | None = None) -> list[Prompt]:
    encoder = Encoder(TOKENIZER, config.max_prompt_length, config.max_teacher_prompt_length)
    return encoder.encode(load_rows(ROWS if rows is None else rows, config.to_templates()))


def tiny_trainer(out: Path, model: torch.nn.Module | None = None, **settings: Any) -> OPSDTrainer:
    config = tiny_config(out, **settings)
    prompts = tiny_prompts(config)
    return OPSDTrainer(tiny_model() if model is None else model, config, prompts, TOKENIZER, prompts)
