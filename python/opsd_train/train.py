"""One run, from a model and rows to a report: what `opsd demo` and `opsd train` have in common."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from opsd_kernels import get_method
from opsd_kernels.methods.table import schedule_of
from opsd_train.backbone import embeddings_of, positions_of
from opsd_train.config import OPSDConfig
from opsd_train.data.quarantine import Refuse, stop
from opsd_train.data.rows import Row
from opsd_train.data.rows import load as load_rows
from opsd_train.data.sampler import short_steps
from opsd_train.description import describe
from opsd_train.evaluation.matched import how_judged
from opsd_train.evaluation.missed import MissedEvaluation, is_known
from opsd_train.loading import load_student
from opsd_train.quantized import check_quantized
from opsd_train.reading.prompts import Encoder, Prompt
from opsd_train.report.page import write_report
from opsd_train.run_folder import MODEL, Existing, check_begun, check_output
from opsd_train.run_options import RunOptions
from opsd_train.safety import stops
from opsd_train.safety.checkpoints import is_none_named, newest_checkpoint, supersede
from opsd_train.safety.lock import FolderLock
from opsd_train.trainer import OPSDTrainer
from opsd_train.watch import trackers
from opsd_train.watch.inspection import inspect_rollouts
from opsd_train.watch.journal import CutOffCallback, Journal
from opsd_train.watch.meter import peak_memory_gb
from opsd_train.watch.progress import RecordCallback, accuracy_table, doing, make_progress, say
from opsd_train.watch.record import RunRecord, load_run
from opsd_train.watch.trends import TrendsCallback


def train(options: RunOptions, config: OPSDConfig, console: Console) -> OPSDTrainer:
    """Load what `opsd train` was given. Raises ValueError for anything that is wrong with it."""
    with ExitStack() as mistaken:
        lock, existing = None, _existing(config)
        check_output(config.output_dir, existing)
        if config.process_index == 0:
            lock = mistaken.enter_context(FolderLock(config.output_dir or "."))
            check_output(config.output_dir, existing)  # another run may have been quicker
        if config.resume_from_checkpoint and last_checkpoint(config) is None:
            check_begun(config.output_dir)
            console.print(
                f"no checkpoint in {config.output_dir}: beginning at step 0", highlight=False, markup=False
            )
        trainer = _prepare(options, config, console)
        trainer.lock = lock  # until the run ends
        mistaken.pop_all()
    return trainer


def _existing(config: OPSDConfig) -> Existing:
    """What may be in the output folder: the run that goes on, if its own checkpoint is where it does."""
    named, folder = config.resume_from_checkpoint, Path(config.output_dir or ".")
    if named is None:
        return "error"
    return "resume" if named == "last" or Path(named).resolve().parent == folder.resolve() else "error"


def _prepare(options: RunOptions, config: OPSDConfig, console: Console) -> OPSDTrainer:
    source = options.source()
    check_quantized(source.bits, config)
    loaded = load_rows(options, config)
    for note in loaded.notes:
        console.print(note, highlight=False, markup=False)
    with console.status(f"loading {options.model}"):
        set_seed(config.seed)  # adapters begin with the same numbers in every process
        student, tokenizer = load_student(source, options.lora())
        return make_trainer(student, tokenizer, loaded.rows, loaded.held_out, config, loaded.quarantine)


def make_trainer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    config: OPSDConfig,
    refuse: Refuse = stop,
) -> OPSDTrainer:
    """A trainer over rows and, to evaluate on, held-out ones; all are checked here against their budgets.

    What happens to one over its budget or the model's positions is up to `refuse`; it stops the run, if
    nothing else is said. Raises ValueError if none to train on is left.
    """
    encoder = Encoder.of(tokenizer, config, positions_of(model), embeddings_of(model))
    for sentence in encoder.ignored_switches():
        warnings.warn(sentence, stacklevel=2)
    method = config.to_method(encoder)
    if method is not None:
        method.check(rows)
    prompts, watched = encoder.encode(rows, refuse), encoder.encode(held_out, refuse)
    if not prompts:
        raise ValueError(f"data: expected at least one row that fits, got none of {len(rows)}")
    if config.method is None and config.to_teacher().kind not in ("model", "served"):
        _check_told(prompts)
    rollouts = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    fewer = short_steps(len(prompts), rollouts // config.num_generations, config.world_size)
    if fewer is not None and config.private is None:
        warnings.warn(fewer, stacklevel=2)
    return OPSDTrainer(model, config, prompts, tokenizer, watched, method=method)


def _check_told(prompts: Sequence[Prompt]) -> None:
    """ValueError where a teacher of the student's weights reads no more than the student."""
    if all(prompt.student_ids == prompt.teacher_ids for prompt in prompts):
        raise ValueError(
            "data: expected a teacher that reads more than the student; got the same tokens in all "
            "rows, so that the loss is 0 (does the chat template ignore its messages?)"
        )


def run(
    trainer: OPSDTrainer, about: Mapping[str, Any], console: Console, existing: Existing = "error"
) -> Path | None:
    """Evaluate, train, evaluate, and write the run folder; returns the path of the report.

    SIGTERM and SIGINT end it at the next safe point, see `stops`; however it ends, its engine is closed. In a
    run of several processes all of them call this, and the first one writes; the others get None.

    Args:
        trainer: as `make_trainer` made it; its `output_dir` becomes the run folder.
        about: what goes into run.json besides what the trainer knows: `name` and `model` at least.
        console: where progress and the final table appear.
        existing: what to do if the folder holds a run already, see `RunRecord`.

    Raises:
        Stopped: a signal ended the run, which can be resumed.
        BadSteps: too many steps in a row were not finite.
        EngineError: the engine that writes rollouts died, stalled or has other weights.
    """
    config, folder = trainer.config, Path(trainer.config.output_dir or ".")
    if not trainer.is_world_process_zero():
        console = Console(quiet=True)
    with ExitStack() as ending:
        ending.callback(_release, trainer)
        ending.callback(trainer.engine.close)
        journal = trainer.ranks.first(lambda: _journal(trainer, about, existing))
        if config.method is not None:
            moving = "".join(f"; {words}" for words in schedule_of(config.schedules))
            console.print(
                f"method {config.method}: the teacher's weights are {config.to_teacher()} (--teacher); "
                f"published with: {get_method(config.method).teacher}{moving}",
                highlight=False,
                markup=False,
            )
        if trainer.held_out:
            sentence = how_judged(config.eval_match, len(trainer.held_out))
            console.print(sentence, highlight=False, markup=False)
        trackers.aim(trainer)
        try:
            with stops.watched(trainer):
                _train(trainer, journal, console)
                trainer.save_model(folder / MODEL)
        except BaseException as error:
            if journal is not None:
                with suppress(OSError):  # a disk that is full hides no error
                    journal.end(trainer.state, error)
            raise
        if journal is None:
            return None
        journal.end(trainer.state, peak_memory_gb=peak_memory_gb(trainer.args.device))
        found = load_run(folder).evaluations
        if len(found) > 1:  # one of the two may have been cut off
            console.print(accuracy_table(found[0], found[-1]))
        return write_report(folder)


def _journal(trainer: OPSDTrainer, about: Mapping[str, Any], existing: Existing) -> Journal:
    """The record of a run that is about to begin; takes the folder, if `train` has not."""
    folder = Path(trainer.config.output_dir or ".")
    trainer.lock = trainer.lock or FolderLock(folder)
    info = {**about, **describe(trainer)}
    return Journal(RunRecord(folder, existing), info, existing == "resume", trainer.args.max_steps)


def _release(trainer: OPSDTrainer) -> None:
    if trainer.lock is not None:
        trainer.lock.release()
        trainer.lock = None


class _Begin(TrainerCallback):
    """Begins the record of a run that goes on, once everything of the checkpoint has been loaded."""

    def __init__(self, trainer: OPSDTrainer, journal: Journal | None) -> None:
        self.trainer, self.journal = trainer, journal

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All processes wait for the first one."""
        begin(self.trainer, self.journal, state.global_step)


def begin(trainer: OPSDTrainer, journal: Journal | None, step: int) -> None:
    """A run begins after `step`: what its folder holds of later ones is superseded."""

    def rewind() -> None:
        assert journal is not None
        supersede(journal.written.directory, step)
        journal.begin(step)

    trainer.ranks.first(rewind)


def _train(trainer: OPSDTrainer, journal: Journal | None, console: Console) -> None:
    """Look at the student, train it, and look again; what is seen is written down."""
    progress, written = None, None
    if journal is not None:
        written = journal.written
        trainer.add_callback(RecordCallback(written))
        trainer.add_callback(CutOffCallback(journal))
        trainer.add_callback(progress := make_progress(console))
        if not console.is_terminal:
            say(console, f"{trainer.args.max_steps:,} steps, {trainer.args.device}")
    checkpoint = last_checkpoint(trainer.config)
    if checkpoint is None:
        begin(trainer, journal, 0)
        look(trainer, written, console)
    else:
        trainer.add_callback(_Begin(trainer, journal))
        trainer.add_callback(MissedEvaluation(trainer, written))
    seen = None
    if progress is not None:
        trainer.told = progress.told
    if journal is not None:
        trainer.add_callback(seen := TrendsCallback(console, journal.written))
        journal.info["warnings"] = seen.told
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        if progress is not None:
            progress.close()
    look(trainer, written, console)
    if seen is not None:
        seen.finish()


def look(trainer: OPSDTrainer, written: RunRecord | None, console: Console) -> None:
    """Measure the student as it is: accuracy on the held-out rows, and a few rollouts token by token."""
    step = trainer.state.global_step
    what = f"{len(trainer.held_out):,} held-out problems" if trainer.held_out else "a few rollouts"
    with doing(console, f"step {step}: evaluating {what}") as told:
        trainer.told = told
        tried = trainer.cut_off_at == step or trainer.ranks.any(is_known(written, step))
        if trainer.held_out and not tried:
            trainer.evaluate()
        if (
            trainer.stored is not None or not trainer.teacher.is_whole
        ):  # there is no teacher whose opinion could be recorded
            return
        watched = trainer.held_out or trainer.prompts
        seen = inspect_rollouts(trainer, watched[: trainer.config.rollouts_recorded])
        if written is not None:
            written.add_rollouts(seen)


def last_checkpoint(config: OPSDConfig) -> str | None:
    """The checkpoint to go on from, None for step 0; `last` stands for the newest of the run.

    A run that was killed before its first checkpoint has none. ValueError if all that it has are damaged.
    """
    if config.resume_from_checkpoint != "last":
        return config.resume_from_checkpoint
    if is_none_named(config.output_dir):
        return None
    return newest_checkpoint(config.output_dir)
