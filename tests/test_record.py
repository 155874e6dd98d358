"""The run record survives crashes and odd numbers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from opsd_train.watch.record import RunRecord, load_run
from run_samples import AFTER, BEFORE, accuracy, rollout, token


def test_what_is_recorded_is_read_back(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "run")
    record.log(1, {"loss": 0.5, "tokens_per_second": 1500.0})
    record.log(2, {"loss": 0.25})
    record.add_evaluation(AFTER)
    record.add_evaluation(BEFORE)
    record.add_rollouts([rollout(0, [token("5")])])
    record.add_rollouts([rollout(200, [token("7")]), rollout(200, [token("9")])])
    record.write_info({"name": "trial", "config": {"output_dir": Path("out")}})
    run = load_run(tmp_path / "run")
    assert run.metrics == [
        {"step": 1, "loss": 0.5, "tokens_per_second": 1500.0},
        {"step": 2, "loss": 0.25},
    ]
    assert run.evaluations == [BEFORE, AFTER]
    assert [one["tokens"][0]["text"] for one in run.rollouts] == ["5", "7", "9"]
    assert run.info == {"name": "trial", "config": {"output_dir": "out"}}
    assert run.problems == []
    assert sorted(path.name for path in run.directory.iterdir()) == [
        "evaluations.json",
        "metrics.jsonl",
        "rollouts.json",
        "run.json",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")])
def test_a_number_that_is_not_finite_is_null_in_the_file_and_nan_when_read(
    tmp_path: Path, value: float
) -> None:
    record = RunRecord(tmp_path)
    record.log(1, {"loss": value, "forward_kl": 0.5})
    record.add_rollouts([rollout(0, [token("5", forward_kl=value)])])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "forward_kl": 0.5}\n'
    run = load_run(tmp_path)
    assert math.isnan(run.metrics[0]["loss"])
    assert run.metrics[0]["forward_kl"] == 0.5
    assert run.rollouts[0]["tokens"][0]["forward_kl"] is None


def test_a_line_cut_off_by_a_crash_is_left_out_named_and_mended_on_resume(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    for step in (1, 2):
        record.log(step, {"loss": 1.0 / step})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    for cut in range(1, len(whole.splitlines()[1]) - 1):
        (tmp_path / "metrics.jsonl").write_bytes(whole[: -1 - cut])
        run = load_run(tmp_path)
        assert [row["step"] for row in run.metrics] == [1]
        assert run.problems == ["metrics.jsonl: line 2 is not a step's metrics (cut off?); left out"]
    RunRecord(tmp_path, existing="resume").log(2, {"loss": 0.75})
    run = load_run(tmp_path)
    assert [row["loss"] for row in run.metrics] == [1.0, 0.75]
    assert run.problems == []


def test_what_is_recorded_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    for step, loss in ((1, 1.0), (2, 0.5), (3, 0.4)):
        record.log(step, {"loss": loss})
    record.add_evaluation(AFTER)
    again = RunRecord(tmp_path, existing="resume")
    again.log(2, {"loss": 0.6})
    again.add_evaluation({**AFTER, "greedy": accuracy(400, 0.76, 0.83)})
    run = load_run(tmp_path)
    assert [row["loss"] for row in run.metrics] == [1.0, 0.6, 0.4]
    assert [one["greedy"]["correct"] for one in run.evaluations] == [400]


def test_a_folder_that_holds_a_run_is_not_mixed_with_another(tmp_path: Path) -> None:
    RunRecord(tmp_path).log(1, {"loss": 1.0})
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"directory: expected a folder without a run.*metrics\.jsonl"):
        RunRecord(tmp_path)
    RunRecord(tmp_path, existing="replace").log(7, {"loss": 2.0})
    assert [row["step"] for row in load_run(tmp_path).metrics] == [7]
    assert (tmp_path / "model.safetensors").exists()
    with pytest.raises(ValueError, match="existing: expected 'error'"):
        RunRecord(tmp_path, existing="keep")  # type: ignore[arg-type]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.add_evaluation(BEFORE)
    with pytest.raises(TypeError):
        record.add_evaluation({**AFTER, "greedy": object()})  # type: ignore[typeddict-item]
    assert load_run(tmp_path).evaluations == [BEFORE]
    assert [path.name for path in tmp_path.iterdir()] == ["evaluations.json"]


def test_unreadable_parts_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    RunRecord(tmp_path).log(1, {"loss": 1.0})
    (tmp_path / "evaluations.json").write_text('[{"step": 0, "gre')
    (tmp_path / "rollouts.json").write_text(json.dumps([{"step": 0}, rollout(0, [token("5")])]))
    (tmp_path / "run.json").write_text("[]")
    run = load_run(tmp_path)
    assert (len(run.metrics), run.evaluations, len(run.rollouts), run.info) == (1, [], 1, {})
    assert [problem.split(":")[0] for problem in run.problems] == [
        "run.json",
        "evaluations.json",
        "rollouts.json",
    ]
    assert run.problems[2] == "rollouts.json: 1 of 2 entries incomplete; left out"
    with pytest.raises(ValueError, match=r"expected a readable run"):
        RunRecord(tmp_path, existing="resume").add_evaluation(AFTER)


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_a_folder_that_is_no_run_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"directory: expected a run folder, .*metrics\.jsonl.*{name}"):
        load_run(tmp_path / name)


def test_going_back_keeps_what_it_drops_before_it_drops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = RunRecord(tmp_path)
    for step in (1, 2, 3):
        written.log(step, {"loss": 1.0})
    written.add_evaluation(AFTER)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("garbled\n")
    (tmp_path / "superseded.jsonl").write_text('{"metrics": {"st')  # torn by a crash
    before = (tmp_path / "metrics.jsonl").read_text()
    with monkeypatch.context() as crash:
        crash.setattr("opsd_train.watch.record.write_atomically", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            written.rewind(2)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    kept = (tmp_path / "superseded.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line).keys() for line in kept] == [{"metrics"}, {"unread"}, {"evaluations"}]
    assert json.loads(kept[1]) == {"unread": "garbled"}
    written.rewind(2)
    run = load_run(tmp_path)
    assert ([row["step"] for row in run.metrics], run.evaluations, run.problems) == ([1, 2], [], [])


def test_going_back_in_a_record_that_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    written = RunRecord(tmp_path)
    written.log(5, {"loss": 1.0})
    (tmp_path / "evaluations.json").write_text("[{")
    with pytest.raises(ValueError, match="expected a readable run"):
        written.rewind(2)
    assert [row["step"] for row in load_run(tmp_path).metrics] == [5]
    assert not (tmp_path / "superseded.jsonl").exists()
