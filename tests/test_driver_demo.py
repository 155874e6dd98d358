"""The demo: what it writes, and what it teaches."""

import time
from pathlib import Path

import pytest

from opsd_train.demo.run import MODEL
from opsd_train.watch.record import load_run
from test_driver_run import invoke

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="the demo's model is not in this checkout")


def test_demo_of_three_steps_writes_the_run_folder(tmp_path: Path) -> None:
    given = ["--objective", "jsd", "--per_device_train_batch_size", 16]
    code, output = invoke("demo", "--steps", 3, "--out", tmp_path, *given)
    assert code == 0, output
    assert "Held-out accuracy (512 problems, 95 % confidence interval)" in output
    assert str(tmp_path / "report.html").replace(" ", "") in output.replace(" ", "")
    run = load_run(tmp_path)
    assert run.problems == []
    assert [entry["step"] for entry in run.evaluations] == [0, 3]
    assert 0.3 < run.evaluations[0]["greedy"]["accuracy"] < 0.5
    assert run.info["objective"]["divergence"] == "jsd"
    assert run.info["parameters"] < 1e6
    assert {"model", "metrics.jsonl", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    code, output = invoke("report", tmp_path)
    assert code == 0, output


@pytest.mark.slow
def test_demo_teaches_three_digit_addition_within_three_minutes(tmp_path: Path) -> None:
    begun = time.process_time()  # of the one core that it uses, which other tests may want too
    code, output = invoke("demo", "--out", tmp_path)
    assert code == 0, output
    run = load_run(tmp_path)
    before, after = run.evaluations[0], run.evaluations[-1]
    assert (before["step"], after["step"]) == (0, 200)
    assert 0.33 <= before["greedy"]["accuracy"] <= 0.47
    assert after["greedy"]["accuracy"] >= 0.90
    assert time.process_time() - begun < 180
