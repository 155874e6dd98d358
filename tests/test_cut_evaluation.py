"""A run that is cut off in its first evaluation: run.json says how, after which step of how many."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from driver_tiny import tiny_trainer
from opsd_train.safety.stops import Stopped
from opsd_train.train import run

TAKES = 0.3  # seconds of the evaluation until it is cut off


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail() -> None:
    raise RuntimeError("breaks")


@pytest.mark.parametrize(
    ("happens", "error", "expected"),
    [
        (stop, Stopped, {"how": "stopped", "step": 0, "of": 7, "why": "SIGTERM"}),
        (fail, RuntimeError, {"how": "failed", "step": 0, "of": 7, "why": "RuntimeError: breaks"}),
    ],
)
def test_the_record_of_a_run_cut_off_in_its_first_evaluation(
    tmp_path: Path, happens: Any, error: type[BaseException], expected: dict[str, Any]
) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=7)
    write = trainer.engine.write

    def cut(*asked: Any) -> Any:
        time.sleep(TAKES)
        happens()
        return write(*asked)

    trainer.engine.write = cut  # type: ignore[method-assign]
    start = time.perf_counter()
    with pytest.raises(error):
        run(trainer, {"name": "n", "model": "m"}, Console(quiet=True))
    took = time.perf_counter() - start
    info = json.loads((tmp_path / "run.json").read_text())
    assert info["ended"] == expected
    assert TAKES <= info["seconds"] <= took
