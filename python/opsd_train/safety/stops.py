"""Signals that end a run: it stops at the next safe point, keeps its last complete step, and says so.

SIGTERM, or SIGINT once, is noted while `watched` is on, and looked for between the tokens and batches of
rollouts (`requested`, `check`), when rollouts or an evaluation are done (`agreed`), after every micro-batch
and after every step. A step that is half done is dropped, and a resumed run does it again, bit for bit. The
exit code is 128 plus the number of the signal, as a shell has it: 143 for SIGTERM, 130 for SIGINT. A second
SIGINT is a KeyboardInterrupt at once. Where `watched` is not on, as while a model is loaded, signals end the
process as they always did.

Ranks stop together, wherever the signal arrived: they agree by an all-reduce at points that all of them
reach. While one of them writes a long rollout it hears of the others' signals from the process group's store,
which is asked once a second and needs nobody to wait. An evaluation whose `deadline` has passed is left at
the same points, by all ranks together, and the run goes on.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    StoppingCriteria,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from opsd_train.engines.base import EngineError
from opsd_train.safety.deadline import OutOfTime, is_over
from opsd_train.safety.keep import BadSteps, LastStep

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LATE = 1  # what a rank says whose evaluation took too long; below every signal that is watched
ASK_EVERY = 1.0  # seconds between two looks into the store
FAILED = 1 << 16  # what a rank says whose engine failed; above every signal


class Stopped(Exception):
    """A signal asked the run to end.

    Args:
        signum: of the signal.
    """

    def __init__(self, signum: int) -> None:
        self.signum = signum
        self.step = 0  # the last complete one; 0 if this run, since it was begun or resumed, completed none
        self.checkpoint: Path | None = None  # that holds it
        super().__init__(signum)

    @property
    def code(self) -> int:
        """What the process exits with."""
        return 128 + self.signum

    def __str__(self) -> str:
        name = signal.Signals(self.signum).name
        if not self.step:
            return f"stopped by {name} before a step was complete, so there is nothing new to keep"
        if self.checkpoint is None:
            return f"stopped by {name} after step {self.step}, which no checkpoint can hold"
        return (
            f"stopped by {name} after step {self.step}, which {self.checkpoint} holds; the same command with "
            "--resume-from-checkpoint last goes on from there"
        )


class _Watch:
    """The signals of one run on one rank; see `watched`."""

    count = 0  # of watches so far, the same on every rank; tells their keys in the store apart

    def __init__(self, trainer: Trainer) -> None:
        type(self).count += 1
        self.key = f"opsd/stop/{type(self).count}"
        self.pid = os.getpid()
        self.trainer = trainer
        self.signum: int | None = None  # received here, or heard of
        self.agreed: int | None = None  # that all ranks know of
        self.failure = False  # of an engine, that all ranks know of
        self.late = False  # an evaluation, of which all ranks know
        self.deferrals = 0
        self._told, self._asked = False, 0.0
        # Not public, but the only channel between ranks on which nobody waits for anybody.
        self._store = dist.distributed_c10d._get_default_store() if self._many() else None

    def receive(self, signum: int, frame: FrameType | None) -> None:
        """The handler: takes a note, and no more."""
        if os.getpid() != self.pid:  # a forked child ends as it would have
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        self.signum = self.signum or signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        again = "; once more leaves at once" if signum == signal.SIGINT else ""
        text = f"\n{signal.Signals(signum).name}: the run will stop and keep its last complete step{again}\n"
        os.write(2, text.encode())

    def heard(self) -> int | None:
        """The signal, if any rank is known to have received one."""
        if self._store is not None and not self._told:
            if self.signum is not None:
                self._store.set(self.key, str(self.signum))
                self._told = True
            elif time.monotonic() - self._asked > ASK_EVERY:
                self._asked = time.monotonic()
                if self._store.check([self.key]):
                    self.signum, self._told = int(self._store.get(self.key)), True
        return self.signum

    def agree(self, failed: bool = False, late: bool = False) -> int | None:
        """The signal that any rank received; every rank has to ask, and gets the same answer.

        Args:
            failed: this rank's engine did; then `failure` is set on all of them.
            late: this rank has left an evaluation; then, if nothing else happened, so is `late`.
        """
        found = FAILED if failed else self.heard() or LATE * late
        if self._many():
            found = self.most(found)
        self.failure, self.late = found == FAILED, found == LATE
        self.agreed = None if self.failure or self.late else found or None
        return self.agreed

    def is_common(self, error: Exception) -> bool:
        """Whether an error is one that all ranks have come to together."""
        return self.failure or isinstance(error, BadSteps) or not self._many()

    def most(self, value: int) -> int:
        """The largest value of all ranks."""
        mine = torch.tensor([value], device=self.trainer.args.device)
        found: Tensor = self.trainer.accelerator.gather(mine)
        return int(found.max())

    def _many(self) -> bool:
        return self.trainer.accelerator.num_processes > 1 and dist.is_initialized()


_watch: _Watch | None = None  # signals are the process's, and so is who looks for them


def requested() -> int | None:
    """The signal that asked the run to stop, None while nobody has; cheap enough for every token.

    Ranks need not agree yet: what stops early because of it has to be within `agreed`.
    """
    return None if _watch is None or _watch.deferrals else _watch.heard()


def check() -> None:
    """Raise Stopped if a signal asked for it, OutOfTime after a deadline; within `agreed` only."""
    signum = requested()
    if signum is not None:
        raise Stopped(signum)
    if is_over():
        raise OutOfTime


@contextmanager
def agreed() -> Iterator[None]:
    """All ranks run what is inside; one that is told to stop, or is late, may leave it early by `check`.

    Raises:
        Stopped: on all ranks alike, before or afterwards.
        OutOfTime: on all ranks alike, if one of them left it so.
        EngineError: on all ranks alike, if it came up in one of them.
    """
    watch = _watch
    if watch is None or watch.deferrals:
        yield
        return
    if watch.agreed is not None:
        raise Stopped(watch.agreed)
    failure: EngineError | None = None
    late = False
    try:
        with suppress(Stopped):  # the other ranks have to hear of it first
            yield
    except OutOfTime:
        late = True
    except EngineError as error:
        failure = error
    signum = watch.agree(failure is not None, late)
    if watch.failure:
        raise failure or EngineError("rollouts: the engine of another process failed, which says why")
    if signum is not None:
        raise Stopped(signum)
    if watch.late:
        raise OutOfTime


@contextmanager
def deferred() -> Iterator[None]:
    """Nothing stops inside: what is under way can neither be dropped nor be done again."""
    if _watch is None:
        yield
        return
    watch = _watch
    watch.deferrals += 1
    try:
        yield
    finally:
        watch.deferrals -= 1


class StopRequested(StoppingCriteria):
    """Ends `generate` for all rows once a signal has asked for it, or a deadline has passed."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """[rows] bool."""
        ends = requested() is not None or is_over()
        return torch.full((len(input_ids),), ends, device=input_ids.device)


class StopCallback(TrainerCallback):
    """Lets the ranks agree after micro-batches and steps.

    Args:
        watch: of the run.
    """

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop a step that is half done."""
        signum = self.watch.agree()
        if signum is not None:
            raise Stopped(signum)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log and save a step that is complete, and end without an evaluation, which would take its time."""
        if self.watch.agree() is not None:
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing that follows training may take this for its end."""
        if self.watch.agreed is not None and state.global_step < state.max_steps:
            raise Stopped(self.watch.agreed)


@contextmanager
def watched(trainer: Trainer) -> Iterator[None]:
    """SIGTERM and SIGINT stop what is inside at the next safe point, and the last complete step is saved.

    It is saved too when an engine fails or too many steps were not finite. An engine that failed outside of
    `agreed`, in one of several processes, ends the run as it is: the others cannot take part.

    Handlers can be installed in the main thread alone; elsewhere this does nothing. The earlier ones are back
    afterwards.

    Args:
        trainer: whose step it is; it may train and evaluate inside, more than once.

    Raises:
        Stopped: on every rank, with the checkpoint.
        EngineError, BadSteps: as they were raised, with a note that names the checkpoint.
        KeyboardInterrupt: at a second SIGINT.
    """
    global _watch
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _watch is not None:
        raise RuntimeError("watched: expected one run at a time, got a second one inside the first")
    watch = _watch = _Watch(trainer)
    last = LastStep(trainer)
    callbacks: list[TrainerCallback] = [last, StopCallback(watch)]
    for callback in callbacks:
        trainer.add_callback(callback)
    before = {signum: signal.signal(signum, watch.receive) for signum in SIGNALS}
    try:
        yield
    except Stopped as stopped:
        with deferred():
            stopped.step, stopped.checkpoint = last.keep()
        raise
    except (EngineError, BadSteps) as error:  # the weights are still those of the last complete step
        if watch.is_common(error):
            with deferred():
                last.keep_after(error)
        raise
    finally:
        _watch = None
        for callback in callbacks:
            trainer.remove_callback(callback)
        for signum, handler in before.items():
            signal.signal(signum, handler)
