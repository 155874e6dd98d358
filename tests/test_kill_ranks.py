"""SIGKILL of runs of two processes, of both or of one: nothing is left running, and a whole step goes on."""

import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from checkpoint_runs import step_of
from driver_tiny import tiny_model, tiny_trainer
from opsd_train.safety import folders
from opsd_train.safety.checkpoints import checkpoint_of, complete
from opsd_train.watch.progress import RecordCallback
from opsd_train.watch.record import RunRecord, load_run
from test_kill import child, contents, die_at

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
STEPS = 4
ALONE = 60.0  # seconds that a process may go on for once the other one is dead
# Who is killed, at a random moment or at a (point, call) inside a save, see `die_at`.
KILLS = [((0, 1), None), ((0,), None), ((1,), None), ((0,), (1, 1)), ((1,), None)]


def run(out: Path, rank: int, port: int) -> None:
    """Train one of two processes to the end, from the newest whole checkpoint on if there is one."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of the tests before this one
    GradientState._reset_state()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    checkpoint = checkpoint_of(True, out) if complete(out) else None
    trainer = tiny_trainer(
        out, tiny_model(), max_steps=STEPS, save_strategy="steps", save_steps=1, save_total_limit=2,
        logging_steps=1, teacher="ema", max_completion_length=3, per_device_train_batch_size=2,
        ddp_backend="gloo",
        ddp_timeout=30,  # for one whose partner dies before they have met
    )  # fmt: skip
    assert trainer.ranks.count == 2
    if rank == 0:
        record = RunRecord(out, "resume")
        record.rewind(0 if checkpoint is None else step_of(Path(checkpoint)))
        trainer.add_callback(RecordCallback(record))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()


def start(out: Path, deadly: Callable[[int], None] = lambda rank: None) -> list[int]:
    """Both processes, as copies of this one; `deadly` is called in each first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> None:
        deadly(rank)
        run(out, rank, port)

    return [child(lambda rank=rank: work(rank)) for rank in (0, 1)]  # type: ignore[misc]


def status(pid: int) -> int:
    """How a process ended; it has to end by itself, and soon."""
    end = time.monotonic() + ALONE
    while time.monotonic() < end:
        found, how = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(how)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("a process went on without the other one")


def killed(
    out: Path, who: tuple[int, ...], inside: tuple[int, int] | None, draw: random.Random, seconds: float
) -> bool:
    """One try; whether it came to its end before."""

    def deadly(rank: int) -> None:
        if inside is not None and rank in who:
            die_at(*inside)

    pids = start(out, deadly)
    if inside is None:
        time.sleep(draw.uniform(0.2, 0.9) * seconds)
        for rank in who:
            os.kill(pids[rank], signal.SIGKILL)
    codes = [status(pid) for pid in pids]
    if codes == [0, 0]:
        return True
    for rank, code in enumerate(codes):
        assert code == (-signal.SIGKILL if rank in who else 1) or code == 0, codes
    return False


def test_two_processes_killed_together_or_one_of_them_go_on_to_the_same_weights(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run-0"
    begun = time.perf_counter()
    assert [status(pid) for pid in start(whole)] == [0, 0]
    seconds, newest, runs, done = time.perf_counter() - begun, 0, 0, 0
    draw, steps = random.Random(0), []
    while done < len(KILLS):
        ended = killed(out, *KILLS[done], draw, seconds)
        done += not ended
        found = [step_of(one) for one in complete(out)]
        assert not found or found[-1] >= newest, "a whole checkpoint was lost"
        assert all(folders.what_is_wrong(one, digests=True) is None for one in complete(out))
        newest = found[-1] if found else 0
        steps.append(newest)
        if ended:
            assert contents(out / "model") == contents(whole / "model")
            runs, newest = runs + 1, 0
            out = tmp_path / f"run-{runs}"
    assert [status(pid) for pid in start(out)] == [0, 0]
    assert contents(out / "model") == contents(whole / "model")
    assert [entry["step"] for entry in load_run(out).metrics] == list(range(1, STEPS + 1))
    assert any(0 < step < STEPS for step in steps), steps
