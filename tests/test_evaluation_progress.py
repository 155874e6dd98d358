"""How far an evaluation has come is told while it goes on, whoever writes and wherever it is shown."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from driver_tiny import tiny_model, tiny_trainer
from opsd_train.engines.base import Advance
from opsd_train.rollouts import Sampling, Vocabulary, generate
from opsd_train.train import run
from opsd_train.watch import progress
from opsd_train.watch.progress import NowAndThen, doing, make_progress

VOCABULARY = Vocabulary(0, (31,))


def test_every_token_is_told_and_draws_nothing() -> None:
    model, prompts = tiny_model(), [(3, 4), (5, 6, 7), (8,)]
    sampling = Sampling(1.0, 1.0, 0, 4, batch_size=2)
    told: list[Advance] = []
    written = generate(model, prompts, sampling, VOCABULARY, (0,), tell=told.append)
    assert written == generate(model, prompts, sampling, VOCABULARY, (0,))
    assert {one.done for one in told} == {0, 2}
    assert [one.at for one in told if one.done == 0] == list(range(1, max(map(len, written[:2])) + 1))
    assert str(Advance(0, 1200, 3)) == "0 of 1,200 completions, the next at token 3"


def test_words_are_passed_on_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now, shown = [100.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    tell = NowAndThen(shown.append, 30.0, at_once=False)
    for second in range(100):
        now[0] = 100.0 + second
        tell(str(second))
    assert shown == ["30", "60", "90"]


@pytest.mark.parametrize("terminal", [True, False])
def test_it_is_shown(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PRINTED", 0.0)
    monkeypatch.setattr(progress, "REDRAWN", 0.0)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with doing(console, "8 problems") as told:
        told("greedy, 3 of 8 completions")
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "8 problems: greedy, 3 of 8 completions" in said
    callback = make_progress(console)
    callback.told("sampled, 4 of 8")
    if terminal:
        assert callback.bar.below == "evaluating: sampled, 4 of 8"  # type: ignore[union-attr]
    else:
        assert "step 0: evaluating: sampled, 4 of 8" in console.file.getvalue()  # type: ignore[attr-defined]


def test_all_evaluations_of_a_run_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PRINTED", 0.0)
    trainer = tiny_trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    console = Console(file=io.StringIO(), width=200)
    run(trainer, {"name": "n", "model": "m"}, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    problems = len(trainer.held_out)
    for step in (0, 1, 2):
        for how in ("greedy", "sampled"):
            start = f"step {step}: evaluating"
            expected = f": {how}, 0 of {problems} completions, the next at token 1"
            assert [one for one in lines if one.startswith(start) and one.endswith(expected)], (step, how)
    assert trainer.engine.tell is None
