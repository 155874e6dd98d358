"""Runs that would minimise nothing: refused before the first step, or counted and warned of."""

import warnings
from pathlib import Path

import pytest
import torch

from driver_tiny import ROWS, TOKENIZER, tiny_config, tiny_model, tiny_trainer
from opsd_train.data.rows import load_rows
from opsd_train.demo.pretrain import build_tokenizer
from opsd_train.pieces.empty import EmptySteps
from opsd_train.reading.prompts import Templates
from opsd_train.train import make_trainer

TEMPLATES = Templates("{problem}", "{solution};{problem}")


def test_a_chat_template_that_ignores_its_messages_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "1+1="
    rows = load_rows(ROWS, TEMPLATES)
    for kind in ("initial", "live"):
        with pytest.raises(ValueError, match="expected a teacher that reads more than the student"):
            make_trainer(tiny_model(), tokenizer, rows, [], tiny_config(tmp_path, teacher=kind))


@pytest.mark.parametrize("rows", [ROWS, [row | {"critique": ["", " "]} for row in ROWS]])
def test_critiques_that_no_row_has_are_refused(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    config = tiny_config(tmp_path, method="step_critique", num_generations=2)
    with pytest.raises(ValueError, match="the context 'critique' can tell the role 'teacher'"):
        make_trainer(tiny_model(), TOKENIZER, load_rows(rows, TEMPLATES, privileged=False), [], config)
    told = load_rows([*rows[1:], ROWS[0] | {"critique": ["", "wrong"]}], TEMPLATES, privileged=False)
    make_trainer(tiny_model(), TOKENIZER, told, [], config)


def test_steps_without_a_token_have_loss_0_and_are_counted(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=3, length_gate=1, logging_steps=1)
    before = [weight.clone() for weight in trainer.student.parameters()]
    trainer.vocabulary = type(trainer.vocabulary)(trainer.vocabulary.pad_id, (99,))
    trainer.engine.vocabulary = trainer.vocabulary  # no completion ends, and all are longer than the gate
    with pytest.warns(UserWarning, match="no token has counted in 3 steps in a row; length_gate 1"):
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logged] == [0.0] * 3
    assert [entry["empty_steps"] for entry in logged] == [1, 2, 3]
    for weight, old in zip(trainer.student.parameters(), before, strict=True):
        assert torch.equal(weight, old)


def test_counts_of_a_method_are_divisors() -> None:
    steps = EmptySteps(None)
    some = {"count_0": torch.tensor(0.0), "count_1": torch.tensor(2.5)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches, tokens = steps.heard([some], 7)
    assert ([float(x) for x in batches[0].values()], tokens, steps.total) == ([1.0, 2.5], 7, 0)
    steps.heard([{"count_0": torch.tensor(0.0)}], 7)
    assert (steps.total, steps.in_a_row, steps.metrics()) == (1, 1, {"empty_steps": 1.0})
