"""Models that ignore the attention mask read and write every row as if it were alone."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
)

from driver_tiny import TOKENIZER, tiny_trainer
from opsd_train.backbone import check_padding, completion_hidden
from opsd_train.padding import note_padding, reads_padding
from opsd_train.reading.prompts import pad_left, pad_right
from opsd_train.rollouts import Sampling, Vocabulary, generate
from opsd_train.teachers.rule import TeacherRule
from opsd_train.teachers.weights import make_teacher

PROMPTS = [(4, 5, 6, 7, 8), (9, 10), (11, 12, 13), (14, 15), (5, 6, 7, 8, 9, 10, 11)]
COMPLETIONS = [(4, 5), (6, 7, 8, 9), (5,), (10, 11, 12), (13, 14)]
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=6)
IGNORES = {"rwkv": True, "mamba": False, "llama": False}


def made(name: str) -> PreTrainedModel:
    """A model of two layers whose predictions depend on what it read."""
    torch.manual_seed(0)
    size = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "eos_token_id": 1, "bos_token_id": 2}
    model = {
        "rwkv": lambda: RwkvForCausalLM(RwkvConfig(**size)),
        "mamba": lambda: MambaForCausalLM(MambaConfig(**size)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**size, intermediate_size=48, num_attention_heads=2)),
    }[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.fixture(params=IGNORES)
def name(request) -> str:
    return str(request.param)


@pytest.fixture
def model(name) -> PreTrainedModel:
    model = made(name)
    check_padding(model)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor, int]:
    prompt, prompt_mask = pad_left(PROMPTS, 0)
    completion, completion_mask = pad_right(COMPLETIONS, 0)
    ids, mask = torch.cat([prompt, completion], 1), torch.cat([prompt_mask, completion_mask], 1)
    return ids, mask, completion.shape[1]


def distance_from_alone(model: PreTrainedModel) -> float:
    """Largest difference of hidden states from those of each row without padding, over the largest."""
    hidden = completion_hidden(model, *batch())
    worst = largest = 0.0
    for row, prompt, completion in zip(hidden, PROMPTS, COMPLETIONS, strict=True):
        ids = torch.tensor([prompt + completion])
        alone = completion_hidden(model, ids, torch.ones_like(ids), len(completion))[0]
        worst = max(worst, (row[: len(completion)] - alone).abs().max().item())
        largest = max(largest, alone.abs().max().item())
    return worst / largest


def test_only_models_that_ignore_the_mask_are_found_to(name, model) -> None:
    assert reads_padding(model) == IGNORES[name]
    assert reads_padding(copy.deepcopy(model)) == IGNORES[name]  # as teachers are made


@torch.no_grad()
def test_hidden_states_are_those_of_each_row_alone(name, model) -> None:
    assert distance_from_alone(model) < 1e-5
    if IGNORES[name]:
        note_padding(model, False)
        assert distance_from_alone(model) > 1e-2  # the test can tell


@pytest.mark.parametrize("batch_size", [None, 2])
def test_completions_are_those_of_each_row_alone(name, model, batch_size) -> None:
    vocabulary, sampling = Vocabulary(0, (1,)), replace(GREEDY, batch_size=batch_size)
    together = generate(model, PROMPTS, sampling, vocabulary, seed=(0,))
    assert together == [generate(model, [one], GREEDY, vocabulary, seed=(0,))[0] for one in PROMPTS]
    if IGNORES[name]:
        note_padding(model, False)
        assert together != generate(model, PROMPTS, GREEDY, vocabulary, seed=(0,))  # the test can tell


def test_gradients_are_those_of_the_rows_alone() -> None:
    model = made("rwkv").double()
    check_padding(model)
    ids, mask, length = batch()
    live = mask[:, -length:, None].bool()
    (completion_hidden(model, ids, mask, length) * live).sin().sum().backward()
    together = [one.grad.clone() for one in model.rwkv.parameters() if one.grad is not None]
    model.zero_grad()
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        row = torch.tensor([prompt + completion])
        completion_hidden(model, row, torch.ones_like(row), len(completion)).sin().sum().backward()
    alone = [one.grad for one in model.rwkv.parameters() if one.grad is not None]
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_reading_of_padding(name, dtype) -> None:
    model = made(name).to(dtype)
    check_padding(model)
    assert reads_padding(model) == IGNORES[name]


def test_a_sharded_one_is_refused_by_name() -> None:
    model = made("rwkv")
    check_padding(model)
    with pytest.raises(ValueError, match="model: expected one that is not sharded, since RwkvForCausalLM"):
        generate(model, PROMPTS, GREEDY, Vocabulary(0, (1,)), seed=(0,), synced=True)


def test_a_run_and_its_teacher_know_it(tmp_path) -> None:
    trainer = tiny_trainer(tmp_path / "run", made("rwkv"))
    assert reads_padding(trainer.student)
    assert reads_padding(trainer.teacher.model)
    trainer.train()
    made("rwkv").save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    rule = TeacherRule("model", model=str(tmp_path / "model"))
    assert reads_padding(make_teacher(rule, made("llama"), TOKENIZER).model)
