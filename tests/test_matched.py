"""What a run says of how accuracy is judged, and of completions that are right in another way."""

import io
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from driver_tiny import TOKENIZER, tiny_trainer
from opsd_train.evaluation.examine import Judged
from opsd_train.evaluation.matched import how_judged, missed
from opsd_train.reading.prompts import Prompt
from opsd_train.rollouts import Rollout
from opsd_train.train import run
from opsd_train.trainer import OPSDTrainer


def judged(*texts: str, answer: str = "3", right: bool = False) -> Judged:
    prompt = Prompt((1,), (1,), answer, "row 1")
    ids = [tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return Judged([Rollout(prompt, one, False) for one in ids], [right, *[False] * (len(ids) - 1)])


def test_other_ways_are_tried_where_nothing_equals_its_answer() -> None:
    found = missed(judged("1+2=3", "4", "=3"), TOKENIZER)
    assert found == (
        "eval_match: none of 3 greedy completions equals its answer (exact), but 2 of the first 3 would be "
        "right with --eval-match number"
    )
    assert (missed(judged("=3", answer="2+1"), TOKENIZER) or "").endswith("with --eval-match math")
    assert missed(judged("1+2=3", "=3", right=True), TOKENIZER) is None
    assert missed(judged("4", "5"), TOKENIZER) is None
    assert missed(judged("4", answer=" "), TOKENIZER) is None


def test_how_is_told() -> None:
    assert how_judged("exact", 1280) == (
        "accuracy on 1,280 held-out rows: a completion is right if it equals the answer, and says nothing "
        "besides (--eval-match exact)"
    )
    assert "if a:b gives it at least 1/2 (--eval-match a:b)" in how_judged("a:b", 2)


def evaluated(trainer: OPSDTrainer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of two evaluations of completions that end in their answers."""

    def written(prompts: list[Prompt], *others: object) -> list[Rollout]:
        return [
            Rollout(one, tuple(TOKENIZER(f"={one.answer}", add_special_tokens=False)["input_ids"]), False)
            for one in prompts
        ]

    monkeypatch.setattr(trainer, "roll_out", written)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.evaluate()
        trainer.evaluate()
    return [str(one.message) for one in caught if "eval_match" in str(one.message)]


def test_the_first_evaluation_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sentence,) = evaluated(tiny_trainer(tmp_path), monkeypatch)
    assert sentence.startswith("eval_match: none of 8 greedy completions equals its answer (exact), but 8 of")
    assert evaluated(tiny_trainer(tmp_path, eval_match="number"), monkeypatch) == []


def test_a_run_says_how_accuracy_is_judged(tmp_path: Path) -> None:
    out = io.StringIO()
    trainer = tiny_trainer(tmp_path / "run", max_steps=1, rollouts_recorded=0)
    run(trainer, {"name": "a", "model": "m"}, Console(file=out, width=200))
    said = (
        "accuracy on 8 held-out rows: a completion is right if it equals the answer, and says nothing besides"
    )
    assert out.getvalue().count(said) == 1
