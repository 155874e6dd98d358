"""What run.json says of a run as a whole: when it began, how long it took, how it ended."""

import signal
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from opsd_train.safety.stops import Stopped
from opsd_train.watch.record import RunRecord, load_run

CUT_OFF = "evaluations_cut_off"  # in run.json


class Journal:
    """Writes run.json, of a run that begins or goes on.

    A run that goes on keeps `started`, adds the moment to `resumed`, and counts its `seconds` on. `ended` is
    null as long as a run goes on, and in one that was killed.

    Args:
        written: the run's record.
        info: what the run is.
        resumes: it goes on with the run that is in the folder.
        steps: that it is to have.
    """

    def __init__(self, written: RunRecord, info: Mapping[str, Any], resumes: bool, steps: int) -> None:
        self.written, self.info, self.steps = written, dict(info), steps
        self.resumes = resumes
        self.begun = False
        self._start = time.perf_counter()
        self._spent = 0.0

    def begin(self, step: int) -> None:
        """The run is sound and begins after `step`: what the record holds of later ones is superseded."""
        now = datetime.now(UTC).isoformat()
        about: dict[str, Any] = {"started": now}
        if self.resumes and self.written.exists():
            earlier = load_run(self.written.directory)
            times = [earlier.info.get("seconds"), *(row.get("seconds") for row in earlier.metrics[-1:])]
            self._spent = max((one for one in times if one is not None and one == one), default=0.0)
            about = {
                "started": earlier.info.get("started", now),
                "resumed": [*earlier.info.get("resumed", []), now],
                CUT_OFF: [one for one in earlier.info.get(CUT_OFF, []) if one["step"] <= step],
            }
            self.written.rewind(step)
        self.info |= {**about, "seconds": self._spent, "ended": None}
        self.begun = True
        self.written.write_info(self.info)

    def cut_off(self, step: int, seconds: float) -> None:
        """An evaluation was given up after these; it counts as one that was not made."""
        others = [one for one in self.info.get(CUT_OFF, []) if one["step"] != step]
        self.info[CUT_OFF] = [*others, {"step": step, "seconds": seconds}]
        self.written.write_info(self.info)

    def end(self, state: TrainerState, error: BaseException | None = None, **found: Any) -> None:
        """How it ended, if it had begun: without an error it is finished. Adds what was found besides."""
        if not self.begun:
            return
        ended: dict[str, Any] = {"how": "finished", "step": state.global_step, "of": self.steps}
        if isinstance(error, Stopped):
            ended |= {"how": "stopped", "why": signal.Signals(error.signum).name}
        elif error is not None:
            ended |= {"how": "failed", "why": f"{type(error).__name__}: {error}".removesuffix(": ")}
        seconds = self._spent + time.perf_counter() - self._start
        self.info |= {"seconds": seconds, **found, "ended": ended}
        self.written.write_info(self.info)


class CutOffCallback(TrainerCallback):
    """Writes down which evaluations were given up."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At once: the run may be killed."""
        seconds = (kwargs.get("logs") or {}).get("eval_cut_off_seconds")
        if seconds is not None:
            self.journal.cut_off(state.global_step, seconds)


def cut_offs(info: Mapping[str, Any]) -> list[str]:
    """What run.json says of evaluations that were given up, in words."""
    return [cut_off(one["step"], one["seconds"]) for one in info.get(CUT_OFF) or []]


def cut_off(step: int, seconds: float) -> str:
    """The same of one of them."""
    return (
        f"the evaluation at step {step:,} was cut off after {seconds:,.0f} s (--eval-seconds), without result"
    )
