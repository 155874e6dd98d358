"""What is told of a loss with clips, and of runs that go wrong though no single line of metrics says so."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from driver_tiny import tiny_config
from opsd_kernels import Logits, Objective, loss, token_stats
from opsd_train.data.check import _of_clips
from opsd_train.report.page import verdict, write_report
from opsd_train.watch.meter import Meter
from opsd_train.watch.progress import shown
from opsd_train.watch.record import Evaluation, RunRecord, load_run
from opsd_train.watch.trends import TrendsCallback, overfits, rising
from run_samples import accuracy, rollout, token

GOOD: Evaluation = {
    "step": 0, "greedy": accuracy(192, 0.342, 0.427), "sampled": accuracy(150, 0.261, 0.342),
}  # fmt: skip
BAD: Evaluation = {
    "step": 20, "greedy": accuracy(100, 0.17, 0.24), "sampled": accuracy(150, 0.261, 0.342),
}  # fmt: skip


def lines(kl: list[float], loss: list[float], clipped: float = 0.8) -> list[dict[str, float]]:
    return [
        {"step": at, "forward_kl": k, "loss": value, "clipped_fraction": clipped, "student_entropy": 1.5}
        for at, (k, value) in enumerate(zip(kl, loss, strict=True), start=1)
    ]


MOVED_AWAY = lines([0.24, 0.26, 0.3, 0.31], [0.04, 0.02, 0.0, -0.02])


def test_the_clipped_share_is_of_the_divergence_of_all_tokens() -> None:
    """Of 20 tokens one is far from its teacher: the mean of the tokens' shares would say next to nothing."""
    z_t = torch.zeros(1, 20, 5).index_fill(-1, torch.tensor([1]), 0.1)
    z_t[0, 3, 2] = 9.0
    student, teacher = Logits(torch.zeros(1, 20, 5)), Logits(z_t)
    objective, mask = Objective("forward_kl", entry_clip=0.05), torch.ones(1, 20, dtype=torch.bool)
    meter = Meter(torch.device("cpu"), 20)
    stats = token_stats(student, teacher, objective=objective)
    meter.add(stats, mask)
    found = meter.read()
    left = loss(student, teacher, objective=objective) / loss(student, teacher)
    assert found["clipped_fraction"] == pytest.approx(1 - float(left), rel=1e-5)
    assert found["clipped_fraction"] > 0.9 > 0.2 > float(stats.clipped_fraction.mean())


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (MOVED_AWAY, True),
        (MOVED_AWAY[:3], False),
        (lines([0.24, 0.26, 0.3, 0.31], [0.04, 0.05, 0.06, 0.07]), False),
        (lines([0.24, 0.24, 0.23, 0.25], [0.04, 0.02, 0.0, -0.02]), False),
        (lines([0.24, 0.26, 0.3, 0.31], [0.04, 0.02, 0.0, -0.02], clipped=0.0), False),
    ],
    ids=["moved away", "too short", "the loss says it", "noise", "no clip"],
)
def test_a_kl_that_rises_under_a_falling_loss(metrics: list[dict[str, float]], said: bool) -> None:
    found = rising(metrics)
    assert (found is not None) == said
    if found is not None:
        assert "the loss falls (0.040 to -0.020)" in found
        assert "rises (0.240 to 0.310 nats)" in found


def test_accuracy_under_its_first_interval_while_the_kl_falls() -> None:
    falls, rises = ([1.0, 0.8, 0.6, 0.5], [1.0, 1.0, 1.1, 1.2])
    found = overfits(lines(falls, falls), [GOOD, BAD])
    assert found is not None
    assert found.startswith(
        "greedy held-out accuracy is 20.0% at step 20, under its interval at step 0 (34.2%"
    )
    assert overfits(lines(rises, rises), [GOOD, BAD]) is None
    assert overfits(lines(falls, falls), [GOOD]) is None
    assert overfits(lines(falls, falls), [BAD, GOOD]) is None


def test_each_is_said_once_in_the_terminal_and_kept(tmp_path: Path) -> None:
    output = io.StringIO()
    seen = TrendsCallback(Console(file=output, width=400), RunRecord(tmp_path))
    state: Any = (TrainingArguments(tmp_path / "x", use_cpu=True), TrainerState(), TrainerControl())
    for line in [*MOVED_AWAY, *MOVED_AWAY[-2:]]:
        seen.on_log(*state, logs=line)
    seen.metrics, seen.evaluations = lines([1.0, 0.8, 0.6, 0.5], [1.0, 0.8, 0.6, 0.5]), [GOOD, BAD]
    seen.finish()
    seen.finish()
    told = output.getvalue().splitlines()
    assert [line.split(" (")[0] for line in told] == [
        "warning: the loss falls",
        "warning: greedy held-out accuracy is 20.0% at step 20, under its interval at step 0",
    ]
    assert told == [f"warning: {sentence}" for sentence in seen.told]


def test_a_clipped_run_is_told_by_its_kl_and_entropy(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    for line in MOVED_AWAY:
        record.log(int(line["step"]), {**line, "skipped_steps": 0.0, "teacher_mass": 0.9})
    record.write_info({"objective": {"entry_clip": 0.05}, "config": {"mass_top_k": 20}})
    text = " ".join(write_report(tmp_path).read_text().split())
    assert verdict(load_run(tmp_path)).startswith(
        "Accuracy was not measured; the forward KL was 0.24 at step 1"
    )
    assert "Forward KL went from 0.24 to 0.31 nats, the student&#39;s entropy went from 1.5 to 1.5" in text
    assert "Clips took 80% of the divergence" in text
    assert "<b>Warning:</b> the loss falls" in text
    assert text.index("<b>KL divergence</b>") < text.index("<b>Loss, clips applied</b>")
    assert "<b>Mass on the student&#39;s 20 most likely tokens</b>" in text
    assert "The same all along:" in text
    assert "skipped steps 0" in text
    assert shown({**MOVED_AWAY[-1], "tokens_per_second": 9.0}) == [
        "KL 0.310", "H 1.50", "9 tok/s", "clips take 80%", "clipped loss -0.020",
    ]  # fmt: skip
    assert shown(lines([0.1], [0.1], clipped=0.0)[0])[0] == "loss 0.100"


def test_what_the_teacher_alone_reads_is_in_sight(tmp_path: Path) -> None:
    """Nothing of it is left out, and what it has in common with the student's prompt is shortened."""
    prompt, solution = "p" * 5000, "the solution, " * 200
    record = RunRecord(tmp_path)
    one = rollout(0, [token("5", teacher_top="")], prompt=prompt)
    record.add_rollouts([{**one, "teacher_prompt": prompt + solution}])
    html = write_report(tmp_path).read_text()
    shown_to_teacher = html.split('<pre class="whole">')[1].split("</pre>")[0]
    assert f"<mark>{solution}</mark>" in shown_to_teacher
    assert "[… 4,200 characters that the student reads too …]" in shown_to_teacher
    assert "pre.whole { max-height: none; overflow: visible }" in html
    assert "∅ is a token without text" in html
    record.add_rollouts([rollout(0, [token("5")])])
    assert "∅" not in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "opsd"}, True),
        ({"entry_clip": 0.1, "clip_mode": "scale"}, True),
        ({"method": "opsd"}, True),
        ({}, False),
        ({"entry_clip": 1.0, "clip_mode": "ratio"}, False),
        ({"method": "opsd", "method_options": '{"clip_mode": "ratio", "entry_clip": 1.0}'}, False),
    ],
    ids=str,
)
def test_a_check_says_what_a_clip_makes_of_the_loss(
    settings: dict[str, Any], said: bool, tmp_path: Path
) -> None:
    found = _of_clips(tiny_config(tmp_path, **settings))
    assert len(found) == said
    assert all("forward KL and the student's entropy" in one for one in found)
