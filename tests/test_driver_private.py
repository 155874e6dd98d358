"""Private steps through the trainer: the rows that are drawn, their gradient and its noise, epsilon."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from driver_tiny import ROWS, TOKENIZER, tiny_config, tiny_model, tiny_prompts, tiny_trainer
from opsd_train.data.rows import load_rows
from opsd_train.pieces.private import epsilon
from opsd_train.pieces.private_run import PrivateSettings, PrivateSteps
from opsd_train.train import make_trainer
from opsd_train.trainer import OPSDTrainer

QUIET = {"clip": 0.5, "noise": 1e-9, "seed": 7}  # noise that the fp32 sums do not show


def private_trainer(out: Path, method: str | None = None, **settings: Any) -> OPSDTrainer:
    given: dict[str, Any] = {
        "private": QUIET, "per_device_train_batch_size": 4, "logging_steps": 1, "max_grad_norm": 0.0,
        "method": method,
    }  # fmt: skip
    if method is not None:
        given["context_templates"] = {"full_solution": "{solution};{problem}"}
    config = tiny_config(out, **(given | settings))
    return make_trainer(tiny_model(), TOKENIZER, load_rows(ROWS, config.to_templates()), [], config)


def row_gradients(trainer: OPSDTrainer, rows: list[int]) -> torch.Tensor:
    """Gradients of each row's mean loss, from full logits one sequence at a time."""
    found = []
    prompts = [trainer.prompts[row] for row in rows]
    for row, one in zip(rows, trainer.roll_out(prompts, trainer.sampling, (0, 0)), strict=True):
        model, logs = tiny_model(), []
        for text in (ROWS[row]["problem"], f"{ROWS[row]['solution']};{ROWS[row]['problem']}"):
            chat = [{"role": "user", "content": text}]
            prompt = TOKENIZER.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            z = model(torch.tensor([[*prompt, *one.completion]])).logits[0, len(prompt) - 1 : -1]
            logs.append(z.log_softmax(-1))
        s, t = logs[0], logs[1].detach()
        (t.exp() * (t - s)).sum(-1).mean().backward()
        found.append(torch.cat([one.grad.flatten() for one in model.parameters()]))
    return torch.stack(found)


@pytest.mark.parametrize("method", [None, "dp_opd"])
def test_gradient_of_a_step(tmp_path: Path, method: str | None) -> None:
    """Each row's own mean loss, clipped alone, over the expected number of rows."""
    contexts = {} if method is None else {"contexts": {"teacher": "full_solution"}}
    trainer = private_trainer(tmp_path, method, **contexts)
    batches, _ = trainer.get_batch_samples(iter([]), 1, torch.device("cpu"))
    drawn = np.random.default_rng((7, 0, 0)).random(8) < 0.5
    rows = [int(row) for row in drawn.nonzero()[0]]
    assert 2 <= len(rows) < 8
    assert len(batches) == 1
    loss = trainer.training_step(trainer.student, batches[0])
    gradients = row_gradients(trainer, rows)
    norms = gradients.norm(dim=1)
    assert bool((norms > 0.5).any())
    expected = (gradients * (0.5 / norms).clamp(max=1)[:, None]).sum(0) / 4
    found = torch.cat([one.grad.flatten() for one in trainer.student.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert loss.item() > 0


def test_noise_is_that_of_the_step_and_the_seed(tmp_path: Path) -> None:
    found = []
    for seed, step in ((1, 0), (1, 0), (1, 1), (2, 0), (None, 0), (None, 0)):
        trainer = private_trainer(tmp_path, private={"clip": 1e-6, "noise": 3.0, "seed": seed})
        trainer.state.global_step = step
        trainer.training_step(trainer.student, {})  # no row was drawn: noise alone
        found.append(torch.cat([one.grad.flatten() for one in trainer.student.parameters()]))
    assert torch.equal(found[0], found[1])
    for other in found[2:]:
        assert not torch.equal(found[0], other)
    assert not torch.equal(found[4], found[5])
    assert found[0].std().item() == pytest.approx(3.0 * 1e-6 / 4, rel=0.02)


def test_rows_are_drawn_each_on_its_own(tmp_path: Path) -> None:
    prompts = tiny_prompts(tiny_config(tmp_path))
    steps = PrivateSteps(PrivateSettings(seed=3), tiny_model(), len(prompts), 2)
    taken = np.array(
        [[one in drawn for one in prompts] for drawn in (steps.draw(prompts, step) for step in range(4000))]
    )
    assert taken.mean(0) == pytest.approx([0.25] * 8, abs=0.03)
    assert taken.sum(1).var() == pytest.approx(8 * 0.25 * 0.75, rel=0.1)
    assert taken.sum(1).min() == 0
    assert np.corrcoef(taken.T)[0, 1] == pytest.approx(0, abs=0.06)


def test_run_logs_epsilon_and_goes_on(tmp_path: Path) -> None:
    private = {"clip": 1.0, "noise": 2.0, "delta": 1e-3, "seed": 1}
    settings = {"private": private, "per_device_train_batch_size": 1}
    settings |= {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    whole = private_trainer(tmp_path, **settings)
    whole.train()
    lines = [line for line in whole.state.log_history if "loss" in line]
    assert [line["epsilon"] for line in lines] == [epsilon(2.0, 1 / 8, n, 1e-3) for n in range(1, 9)]
    assert any(line["completion_length"] == 0 for line in lines)  # a step without rows is one too
    resumed = private_trainer(tmp_path, **settings)
    resumed.train(tmp_path / "checkpoint-4")
    for one, other in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "private: expected gradient_accumulation_steps 1, .*; got 2"),
        ({"num_generations": 2}, "private: expected num_generations 1, since an example is one row"),
        ({"extrapolate": 2}, "private: expected extrapolate 0, since epsilon does not cover it; got 2"),
        ({"subnetwork": "x"}, "private: expected subnetwork None, .*; got 'x'"),
        ({"exposure": "{}", "method": "atesd"}, "private: expected exposure None"),
        ({"private": {"noise": 0}}, "private: noise: expected a finite number above 0; got 0"),
        ({"private": {"clip": -1}}, "private: clip: expected a finite number above 0; got -1"),
        ({"private": {"delta": 1}}, "private: delta: expected a number between 0 and 1; got 1"),
        ({"private": {"sigma": 1}}, "private: expected options among clip, noise, delta, seed; got 'sigma'"),
        ({"per_device_train_batch_size": 9}, "private: expected per_device_train_batch_size at most the 8"),
    ],
)
def test_what_would_break_privacy_is_refused(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **({"private": QUIET} | settings))
