"""Weight extrapolation on a score whose optimum along the path is known."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from driver_tiny import TOKENIZER, tiny_model, tiny_trainer
from opsd_train.loading import with_lora
from opsd_train.pieces.effopd import Extrapolation, Trial
from opsd_train.reading.prompts import Prompt, decode
from opsd_train.trainer import OPSDTrainer

START, MOVED = torch.tensor([1.0, -2.0]), torch.tensor([1.5, -2.5])
STEP = MOVED - START


def moved(score_peak: float, **settings: float) -> tuple[Extrapolation, dict[str, Tensor]]:
    """Parameters that went from START to MOVED; the score is best at START + score_peak * STEP."""
    parameters = {"a": START[:1].clone().requires_grad_(), "b": START[1:].clone().requires_grad_()}

    def score() -> float:
        along = (parameters["a"].item() - 1.0) / 0.5
        return -abs(along - score_peak)

    search = Extrapolation(parameters, score, **settings)
    with torch.no_grad():
        parameters["a"].copy_(MOVED[:1])
        parameters["b"].copy_(MOVED[1:])
    return search, parameters


def values(parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([parameters["a"], parameters["b"]]).detach()


def test_factors_are_those_published_and_every_try_adds_the_same_vector() -> None:
    search, parameters = moved(score_peak=100.0)
    trials = search.search(step=4)
    assert [trial.factor for trial in trials] == pytest.approx([0, 2, 2 / 3, 2 / 5, 2 / 7, 2 / 9])
    assert all(trial.accepted for trial in trials)
    torch.testing.assert_close(values(parameters), START + 11 * STEP)
    assert trials[0] == Trial(4, 0.0, -99.0, True)


@pytest.mark.parametrize(("peak", "best", "tries"), [(0.5, 1, 1), (3.0, 3, 2), (5.1, 5, 3), (6.9, 7, 4)])
def test_first_try_that_is_no_better_is_undone_and_is_the_last(peak: float, best: int, tries: int) -> None:
    search, parameters = moved(peak)
    trials = search.search()
    assert len(trials) == tries + 1
    assert [trial.accepted for trial in trials] == [True] * tries + [False]
    torch.testing.assert_close(values(parameters), START + best * STEP)


def test_rejected_try_leaves_the_very_same_bits() -> None:
    search, parameters = moved(1.0)
    search.search()
    assert torch.equal(values(parameters), MOVED)


def test_an_equal_score_is_no_improvement() -> None:
    search, parameters = moved(2.0)  # 1 and 3 steps along are as far from it
    assert [trial.accepted for trial in search.search()] == [True, False]
    assert torch.equal(values(parameters), MOVED)


def test_next_search_starts_from_the_best_of_the_last() -> None:
    found: list[float] = []
    search, parameters = moved(3.0)
    search.search()
    with torch.no_grad():
        parameters["a"].add_(1.0)
    search.score = lambda: found.append(parameters["a"].item()) or -len(found)
    search.search()
    assert found == pytest.approx([3.5, 5.5])  # 2.5 + 1, and twice that 1 further


def test_tries_and_factor_can_be_set() -> None:
    search, parameters = moved(100.0, tries=2, factor=1.0)
    assert [trial.factor for trial in search.search()] == pytest.approx([0, 1, 1 / 2])
    torch.testing.assert_close(values(parameters), START + 3 * STEP)


def test_powers_of_two() -> None:
    assert [step for step in range(-1, 70) if Extrapolation.due(step)] == [1, 2, 4, 8, 16, 32, 64]


def test_base_is_saved_with_a_checkpoint(tmp_path: Path) -> None:
    search, _ = moved(3.0)
    search.search()
    search.save(tmp_path)
    other, parameters = moved(3.0)
    other.load(tmp_path)
    assert torch.equal(other.base["a"], search.base["a"])
    assert not torch.equal(other.base["a"], START[:1])
    with pytest.raises(ValueError, match=r"expected extrapolation_base.safetensors in"):
        other.load(tmp_path / "none")
    with pytest.raises(ValueError, match="to hold this model's parameters"):
        Extrapolation({"a": parameters["a"]}, lambda: 0.0).load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parameters": {}}, "parameters: expected at least one"),
        ({"factor": 0.0}, "factor: expected a number above 0; got 0.0"),
        ({"tries": 0}, "tries: expected at least 1; got 0"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    given = {"parameters": {"a": START}, "score": lambda: 0.0, **settings}
    with pytest.raises(ValueError, match=message):
        Extrapolation(**given)


def test_in_training(tmp_path: Path) -> None:
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 4}
    trainer = tiny_trainer(tmp_path, extrapolate=2, logging_steps=1, **settings)
    search = trainer.pieces.extrapolation
    assert search is not None
    scores = iter([0.0, 1.0, 0.5, 0.0, -1.0, 0.0, -1.0])
    search.score = lambda: next(scores)
    trainer.train()
    assert [(t.step, t.accepted) for t in search.history] == [
        (1, True), (1, True), (1, False), (2, True), (2, False), (4, True), (4, False),
    ]  # fmt: skip
    logged = [
        (x["validation_accuracy"], x["extrapolations"]) for x in trainer.state.log_history if "loss" in x
    ]
    assert logged == [(1.0, 1), (0.0, 0), (0.0, 0), (0.0, 0), (0.0, 0)]
    again = tiny_trainer(tmp_path, extrapolate=2, **(settings | {"max_steps": 4}))
    again.train(tmp_path / "checkpoint-4")
    other = again.pieces.extrapolation
    assert other is not None
    assert all(torch.equal(other.base[name], search.base[name]) for name in search.base)


def test_rows_held_back_are_not_trained_on_and_judge_the_weights(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, extrapolate=3, max_steps=1)
    assert [prompt.where for prompt in trainer.validation] == ["row 1", "row 3", "row 6"]
    assert [prompt.where for prompt in trainer.prompts] == [f"row {i}" for i in (2, 4, 5, 7, 8)]
    assert len(trainer.held_out) == 8
    search = trainer.pieces.extrapolation
    assert search is not None
    assert all(".layers." in name and one.dim() == 2 for name, one in search.parameters.items())
    assert len(search.parameters) == 14
    drawn = [prompt for batch in trainer.get_train_dataloader() for prompt in batch]
    assert sorted(prompt.where for prompt in drawn) == [prompt.where for prompt in trainer.prompts]
    trainer.train()
    assert [trial.step for trial in search.history[:2]] == [1, 1]
    greedy = [greedy_answer(trainer, prompt) for prompt in trainer.validation]
    trainer.validation = [
        replace(prompt, answer=text if i < 2 else "no") for i, (prompt, text) in enumerate(greedy)
    ]
    assert search.score() == pytest.approx(2 / 3)


def greedy_answer(trainer: OPSDTrainer, prompt: Prompt) -> tuple[Prompt, str]:
    (rollout,) = trainer.roll_out([prompt], replace(trainer.sampling, temperature=0.0), (1, 0))
    return prompt, decode(TOKENIZER, rollout.completion, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extrapolate": 8}, "extrapolate: expected less than the 8 training rows; got 8"),
        ({"extrapolate": -1}, "extrapolate: expected at least 0; got -1"),
    ],
)
def test_wrong_numbers_of_rows(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **settings)


def test_adapters_are_no_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="extrapolate: expected a model without adapters; got a PEFT model"):
        tiny_trainer(tmp_path, with_lora(tiny_model(), 2, 4.0, 0.0), extrapolate=2)
