"""SIGKILL at fifty moments, many inside a save: a run goes on from a whole step, to the same weights."""

import gc
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint_runs import step_of
from driver_tiny import tiny_model, tiny_trainer
from opsd_train.loading import with_lora
from opsd_train.safety import folders
from opsd_train.safety.checkpoints import checkpoint_of, complete
from opsd_train.watch.progress import RecordCallback
from opsd_train.watch.record import RunRecord, load_run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
KILLS, STEPS = 50, 5
# What a save calls on its way, and how often in a few saves: files and folders are synced, folders renamed
# and deleted.
POINTS = ((folders.os, "fsync", 60), (folders.os, "rename", 6), (folders.shutil, "rmtree", 8))


def run(out: Path, lora: bool) -> None:
    """Train to the end, from the newest whole checkpoint on if there is one, and write the model."""
    checkpoint = checkpoint_of(True, out) if complete(out) else None
    record = RunRecord(out, "resume")
    record.rewind(0 if checkpoint is None else step_of(Path(checkpoint)))
    model = tiny_model()
    student = with_lora(model, rank=2, alpha=4, dropout=0.3) if lora else model
    trainer = tiny_trainer(
        out,
        student,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        logging_steps=1,
        teacher="ema",
        max_completion_length=3,
        per_device_train_batch_size=2,
    )
    trainer.add_callback(RecordCallback(record))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()


def child(work: Callable[[], None]) -> int:
    """Do it in a copy of this process, which has imported everything already."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def die_at(point: int, call: int) -> None:
    """Kill this process at the `call`-th call of a function that a save uses, counted from 0."""
    module, name, _ = POINTS[point]
    real, seen = getattr(module, name), iter(range(10**9))

    def deadly(*arguments: Any, **named: Any) -> Any:
        if next(seen) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    setattr(module, name, deadly)


def killed(out: Path, lora: bool, draw: random.Random, seconds: float) -> bool:
    """One try, killed at a random moment or a random point of a save; whether it came to its end before."""
    inside = draw.random() < 0.6
    point = draw.randrange(len(POINTS))
    call = draw.randrange(POINTS[point][2])

    def work() -> None:
        if inside:
            die_at(point, call)
        run(out, lora)

    pid = child(work)
    if not inside:
        time.sleep(draw.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a run failed by itself"
    return not os.WIFSIGNALED(status)


def contents(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.glob("*.safetensors")}


def test_runs_killed_at_any_moment_end_with_the_same_weights(tmp_path: Path) -> None:
    undisturbed = {}
    for lora in (True, False):  # in this process: what is imported on the way is there for the copies
        started = time.perf_counter()
        run(tmp_path / f"whole-{lora}", lora)
        undisturbed[lora] = contents(tmp_path / f"whole-{lora}" / "model")
    seconds = time.perf_counter() - started
    gc.collect()
    gc.freeze()  # nor searched for garbage again in each of them
    draw, kills, finished, number = random.Random(0), 0, 0, 0
    while kills < KILLS:
        lora, out, newest = number % 2 == 1, tmp_path / f"run-{number}", 0
        ended = False
        while not ended and kills < KILLS:
            ended = killed(out, lora, draw, seconds)
            kills += not ended
            steps = [step_of(one) for one in complete(out)]
            assert not steps or steps[-1] >= newest, "a whole checkpoint was lost"
            newest = steps[-1] if steps else 0
            assert all(folders.what_is_wrong(one, digests=True) is None for one in complete(out))
        if not ended:
            assert os.waitpid(child(lambda lora=lora, out=out: run(out, lora)), 0)[1] == 0
        assert contents(out / "model") == undisturbed[lora]
        assert [entry["step"] for entry in load_run(out).metrics] == list(range(1, STEPS + 1))
        assert len((out / "metrics.jsonl").read_text().splitlines()) == STEPS
        finished, number = finished + 1, number + 1
    assert kills == KILLS
    assert finished >= 2
    gc.unfreeze()
