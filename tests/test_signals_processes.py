"""Signals to whole processes: one with a command line, and one of two that train together."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from ranks import run_ranks


def test_process_says_so_and_leaves(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("signal_child.py")), str(tmp_path), "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("step 3"):
                break
        start = time.monotonic()
        child.send_signal(signal.SIGTERM)
        error = child.communicate(timeout=60)[1]
        assert time.monotonic() - start < 60
    finally:
        child.kill()
    assert child.returncode == 143
    assert "SIGTERM: the run will stop and keep its last complete step\n" in error
    assert "Traceback" not in error
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert step >= 2
    said = f"ended: stopped by SIGTERM after step {step}, which {checkpoint} holds; the same command with"
    assert said in error
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step


def test_ranks_end_together(tmp_path: Path) -> None:
    """One of two ranks gets the signal: between the parts of a step, and in a rollout of a minute."""
    cases = [
        {"steps": 5, "parts": 3},
        {"steps": 5, "parts": 3, "signal_at": [3, 1]},
        {"steps": 5, "parts": 3, "resume": "run-1/checkpoint-2"},
        {"steps": 5, "parts": 3, "dawdle_at": 2},
    ]
    ranks = run_ranks(tmp_path, cases, code=143)
    for whole, part, rest, slow in ranks:
        assert "stopped by SIGTERM after step 2" in part["error"]
        assert rest["error"] is None
        assert rest["weights"] == {step: whole["weights"][step] for step in "345"}
        assert part["weights"] == {step: whole["weights"][step] for step in "12"}
        assert "stopped by SIGTERM after step 1" in slow["error"]
    assert ranks[0][1]["error"] == ranks[1][1]["error"]
    assert ranks[1][1]["seconds"] < 60
    assert ranks[1][3]["seconds"] < 60  # the other rank did not write its rollout to the end
