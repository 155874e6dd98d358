"""Signals that end a run: it stops at the next safe point, keeps its last complete step, and says so.

SIGTERM, or SIGINT once, is noted while `watched` is on, and looked for between the tokens and batches of
rollouts (`requested`, `check`), when rollouts or an evaluation are done (`agreed`), after every micro-batch
and after every step. A step that is half done is dropped, and a resumed run does it again, bit for bit. The
exit code is 128 plus the number of the signal, as a shell has it: 143 for SIGTERM, 130 for SIGINT. A second
SIGINT is a KeyboardInterrupt at once. Where `watched` is not on, as while a model is loaded, signals end the
process as they always did.

Ranks stop together, wherever the signal arrived: they agree by an all-reduce at points that all of them
reach. While one of them writes a long rollout it hears of the others' signals from the process group's store,
which is asked once a second and needs nobody to wait.
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
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from opsd_train.safety.random_state import random_state, set_random_state
from opsd_train.safety.zero_options import not_kept

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ASK_EVERY = 1.0  # seconds between two looks into the store


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

    def agree(self) -> int | None:
        """The signal that any rank received; every rank has to ask, and gets the same answer."""
        found = self.heard() or 0
        if self._many():
            found = self.most(found)
        self.agreed = found or None
        return self.agreed

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
    """Raise Stopped if a signal asked for it; within `agreed` only."""
    signum = requested()
    if signum is not None:
        raise Stopped(signum)


@contextmanager
def agreed() -> Iterator[None]:
    """All ranks run what is inside, and one that is told to stop may leave it early by Stopped.

    Raises:
        Stopped: on all ranks alike, before or afterwards.
    """
    watch = _watch
    if watch is None or watch.deferrals:
        yield
        return
    if watch.agreed is not None:
        raise Stopped(watch.agreed)
    with suppress(Stopped):  # the other ranks have to hear of it first
        yield
    signum = watch.agree()
    if signum is not None:
        raise Stopped(signum)


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
    """Ends `generate` for all rows once a signal has asked for it."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """[rows] bool."""
        return torch.full((len(input_ids),), requested() is not None, device=input_ids.device)


class StopCallback(TrainerCallback):
    """Lets the ranks agree after micro-batches and steps, and remembers the end of the last complete step.

    Args:
        watch: of the run.
    """

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch
        self.random: dict[str, Any] | None = None  # after that step; None if this run completed none
        self.loss: Tensor | None = None  # that it has not logged yet, while the next one adds to it

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The loss is that of whole steps for the last time."""
        self.loss = self.watch.trainer._tr_loss.clone()

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
        self.random, self.loss = random_state(), None
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

    Handlers can be installed in the main thread alone; elsewhere this does nothing. The earlier ones are back
    afterwards.

    Args:
        trainer: whose step it is; it may train and evaluate inside, more than once.

    Raises:
        Stopped: on every rank, with the checkpoint.
        KeyboardInterrupt: at a second SIGINT.
    """
    global _watch
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _watch is not None:
        raise RuntimeError("watched: expected one run at a time, got a second one inside the first")
    watch = _watch = _Watch(trainer)
    callback = StopCallback(watch)
    trainer.add_callback(callback)
    before = {signum: signal.signal(signum, watch.receive) for signum in SIGNALS}
    try:
        yield
    except Stopped as stopped:
        with deferred():
            stopped.step, stopped.checkpoint = _keep(trainer, watch, callback)
        raise
    finally:
        _watch = None
        trainer.remove_callback(callback)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _keep(trainer: Trainer, watch: _Watch, last: StopCallback) -> tuple[int, Path | None]:
    """Save the last complete step as if it had just ended, unless that was done; every rank is needed."""
    step = trainer.state.global_step
    if last.random is None:
        return 0, None
    plugin = trainer.args.deepspeed_plugin
    if plugin is not None and not_kept(plugin) is not None:
        return step, None
    folder = Path(trainer.args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    if watch.most(not folder.is_dir()):
        set_random_state(last.random)
        if last.loss is not None:
            trainer._tr_loss.copy_(last.loss)
        trainer._save_checkpoint(trainer.model, trial=None)  # type: ignore[arg-type]
        trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    return step, folder
