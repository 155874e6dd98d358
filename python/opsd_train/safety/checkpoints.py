"""The checkpoints in a run's folder: which are whole, which a run goes on from, which are deleted."""

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from opsd_train.config import OPSDConfig
from opsd_train.safety import folders, stops

if TYPE_CHECKING:
    from opsd_train.trainer import OPSDTrainer

NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
LEFT = re.compile(rf"{folders.TEMPORARY}{PREFIX_CHECKPOINT_DIR}-\d+(\.old)?")
SUPERSEDED = "superseded-"
POSITION = "position.json"
FOREIGN = ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "pytorch_model.bin")


def check_options(config: OPSDConfig) -> None:
    """ValueError for options of `TrainingArguments` that checkpoints do not follow."""
    reasons = {
        "load_best_model_at_end": "the last student is the run's; checkpoints of the others are kept",
        "save_only_model": "a checkpoint is what a run goes on from",
        "save_on_each_node": "all processes write into one folder, on a file system that they share",
        "push_to_hub": "nothing is uploaded while it is written; upload the run's folder `model` at its end",
    }
    for name, reason in reasons.items():
        if getattr(config, name):
            raise ValueError(f"{name}: expected False, since {reason}; got True")


def complete(run: Path) -> list[Path]:
    """The whole checkpoints of a run, by their step."""
    return [one for one in _named(run) if folders.what_is_wrong(one) is None]


def newest_checkpoint(folder: str | os.PathLike[str] | None) -> str:
    """The newest whole checkpoint in a run's folder; a warning names others. ValueError if there is none."""
    path = Path(folder or ".")
    looked = [(one, folders.what_is_wrong(one)) for one in _named(path)]
    found = [one for one, problem in looked if problem is None]
    wrong = [f"{one.name} ({problem})" for one, problem in looked if problem is not None]
    wrong += [f"{one.name} (was being written)" for one in _left(path)]
    if not found:
        beside = f"; not whole: {', '.join(wrong)}" if wrong else ""
        raise ValueError(f"resume_from_checkpoint: expected a checkpoint in {path}, found none{beside}")
    if wrong:
        warnings.warn(f"checkpoints in {path} that are not whole: {', '.join(wrong)}; left out", stacklevel=2)
    return str(found[-1])


def is_none_named(folder: str | os.PathLike[str] | None) -> bool:
    """Whether a run's folder has no checkpoint at all, whole or damaged."""
    return not _named(Path(folder or "."))


def checkpoint_of(
    resume: str | os.PathLike[str] | bool | None, folder: str | os.PathLike[str] | None
) -> str | None:
    """The folder to resume from: one that is named, the newest in a run's folder for True, else None.

    Raises:
        ValueError: it is not a whole checkpoint, every file as it was written.
    """
    if resume is None or resume is False:
        return None
    path = Path(newest_checkpoint(folder) if resume is True else resume)
    if not path.is_dir():
        raise ValueError(f"resume_from_checkpoint: expected a checkpoint's folder; {path} is none")
    foreign = [name for name in FOREIGN if (path / name).exists()]
    if foreign and not (path / folders.MARKER).exists():
        raise ValueError(
            f"resume_from_checkpoint: expected a checkpoint of this driver, which has {folders.MARKER}; "
            f"{path} has {', '.join(foreign)}: pickles, which are not read. Its weights can be given as "
            "--model if they are safetensors"
        )
    problem = folders.what_is_wrong(path, digests=True)
    if problem is not None:
        raise ValueError(f"resume_from_checkpoint: expected a whole checkpoint at {path}; {problem}")
    return str(path)


def sweep(run: Path) -> None:
    """Delete what an interrupted write left."""
    for one in _left(run):
        if not one.name.endswith(".old") or complete(run):
            shutil.rmtree(one)


def supersede(run: Path, step: int) -> list[Path]:
    """Take the checkpoints after a step, from which a run goes on, out of the way; returns where they are.

    They are kept under another name, so that the newest checkpoint is never one of an abandoned branch.
    """
    later = [one for one in _named(run) if int(NAME.fullmatch(one.name)[1]) > step]  # type: ignore[index]
    return [folders.move(one, one.with_name(SUPERSEDED + one.name)) for one in later]


def rotate(newest: Path, limit: int | None, best: Path | None) -> None:
    """Delete the oldest whole checkpoints beyond `limit`, never `newest` or `best`; 0 or None is no limit."""
    found = complete(newest.parent)
    kept = {newest, best}
    old = [one for one in found if one not in kept]
    excess = len(found) - limit if limit else 0
    for one in old[: max(excess, 0)]:
        folders.remove(one)


def write_position(folder: Path, config: OPSDConfig, rows: int) -> None:
    """What the order of the rows is a function of, besides the step."""
    (folder / POSITION).write_text(json.dumps(_position(config, rows)), encoding="utf-8")


def compare_position(folder: Path, config: OPSDConfig, rows: int) -> None:
    """Warn if the run that goes on would read other rows than the one that stopped."""
    then, now = json.loads((folder / POSITION).read_text(encoding="utf-8")), _position(config, rows)
    different = [f"{name} {now.get(name)}, not {then[name]}" for name in then if then[name] != now.get(name)]
    if different:
        warnings.warn(f"goes on from {folder} with other rows: {'; '.join(different)}", stacklevel=2)


def _position(config: OPSDConfig, rows: int) -> dict[str, int]:
    per_process = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return {
        "rows": rows,
        "seed": config.seed,
        "num_generations": config.num_generations,
        "rollouts_per_step": per_process * config.world_size,
    }


def _named(run: Path) -> list[Path]:
    found = [(int(match[1]), one) for one in _folders(run) if (match := NAME.fullmatch(one.name))]
    return [one for _, one in sorted(found)]


def _left(run: Path) -> list[Path]:
    return [one for one in _folders(run) if LEFT.fullmatch(one.name)]


def _folders(run: Path) -> list[Path]:
    return sorted(one for one in run.iterdir() if one.is_dir()) if run.is_dir() else []


class StepCallback(TrainerCallback):
    """Lets teacher and pieces follow the student, and ends the meter's step.

    Args:
        trainer: whose they are.
    """

    def __init__(self, trainer: "OPSDTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count from here, on top of what a run took that goes on; what it abandons makes room."""
        spent = [entry["seconds"] for entry in state.log_history if "seconds" in entry]
        self.trainer.meter.restart(spent[-1] if spent else 0.0)
        if state.global_step:
            state.compute_steps(args, state.max_steps)  # how often to log and save is this run's to say
            self.trainer.engine_behind = True  # it may have been sent other weights, for an evaluation
            run = Path(args.output_dir or ".")
            self.trainer.ranks.first(lambda: supersede(run, state.global_step))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where the step began."""
        self.trainer.note_loss()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the teacher, unless the step was skipped."""
        if not self.trainer.step_skipped:
            self.trainer.engine_behind = True
            self.trainer.teacher.after_optimizer_step()
            if self.trainer.pieces.exposure is not None:
                self.trainer.pieces.exposure.after_optimizer_step()
        self.trainer.meter.end_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on along the weights' path where that is due."""
        if self.trainer.pieces.extrapolation is not None and not self.trainer.step_skipped:
            with stops.deferred():  # in the middle of a search the weights are not those of any step
                self.trainer.pieces.extrapolation.search_if_due(state.global_step)
