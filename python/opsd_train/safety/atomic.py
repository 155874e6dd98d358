"""Checkpoints that are whole or not there, hold no pickle, and continue a run bit for bit."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from opsd_train.config import OPSDConfig
from opsd_train.data.sampler import Ordered
from opsd_train.json_files import dumps
from opsd_train.pieces.parts import Pieces
from opsd_train.safety import checkpoints, folders, optimizer_state, zero
from opsd_train.safety.random_state import random_state, set_random_state
from opsd_train.safety.student_files import load_student, write_student
from opsd_train.safety.trees import load_tree, save_tree
from opsd_train.sharding import is_sharded
from opsd_train.teachers.weights import Teacher

ARGUMENTS, OPTIMIZER, SCHEDULER, SCALER = "training_args.json", "optimizer", "scheduler", "scaler"


class CheckpointError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class AtomicCheckpoints(Ordered):
    """A `Trainer` whose checkpoints appear by a rename, when all of them is on the disk.

        checkpoint-20/
            model.safetensors (or adapters), config, tokenizer       as `from_pretrained` reads them
            optimizer.*, scheduler.*, scaler.*                        `trees.save_tree`
            rank-00000.*                                              random numbers and loss of each process
            trainer_state.json, training_args.json, position.json
            what teacher and pieces save
            complete.json                                             size and SHA-256 of every file, last

    Rank 0 writes; the other processes add their own rank-N.* to its folder, so all need to see one file
    system. An error while writing ends the run on all of them with `CheckpointError`.
    """

    config: OPSDConfig
    tokenizer: PreTrainedTokenizerBase
    teacher: Teacher
    pieces: Pieces

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        checkpoints.check_options(self.config)
        self._resumed: Path | None = None
        self._before: tuple[int, torch.Tensor] | None = None  # step that began last, and the loss until then
        super().__init__(*args, **kwargs)

    # Writing

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.store_flos()
        run = Path(self._get_output_dir(trial=trial))
        path = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        temporary = folders.temporary_of(path)
        self._name_best(run)
        student, optimizer = self._gathered_state()
        try:
            self._on_main(lambda: self._begin_checkpoint(path))
            self._on_main(lambda: self._write_checkpoint(temporary, student, optimizer))
            self._together(lambda: self._write_parts(temporary))
            self._together(lambda: self._write_rank(temporary))
            about = {"step": self.state.global_step, "processes": self.args.world_size}
            self._on_main(lambda: folders.publish(path, about))
            self._on_main(lambda: checkpoints.rotate(path, self.args.save_total_limit, self._best()))
        except CheckpointError:
            if self.args.should_save:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def save_model(
        self, output_dir: str | os.PathLike[str] | None = None, _internal_call: bool = False
    ) -> None:
        """Write the student for `from_pretrained`, whole or not at all; called by every process.

        Args:
            output_dir: the folder, `model` in the run's folder by default. One that a run wrote is replaced.
            _internal_call: see `transformers.Trainer`.
        """
        path = Path(self.args.output_dir or ".") / "model" if output_dir is None else Path(output_dir)
        student = self._gathered_weights()

        def write() -> None:
            with folders.whole_folder(path) as temporary:
                write_student(self._student(), self.tokenizer, temporary, student)

        self._on_main(write)

    def _begin_checkpoint(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.sweep(path.parent)
        folders.begin(path)

    def _write_checkpoint(
        self, folder: Path, student: dict[str, torch.Tensor] | None, optimizer: dict[str, Any]
    ) -> None:
        """All that the main process knows."""
        write_student(self._student(), self.tokenizer, folder, student, own_names=True)
        save_tree(optimizer, folder / OPTIMIZER)
        save_tree(self.lr_scheduler.state_dict(), folder / SCHEDULER)  # type: ignore[union-attr]
        if self.accelerator.scaler is not None:
            save_tree(self.accelerator.scaler.state_dict(), folder / SCALER)
        self._note_callbacks()
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        arguments = dumps(self.args.to_dict(), indent=1, default=str)
        (folder / ARGUMENTS).write_text(arguments, encoding="utf-8")
        checkpoints.write_position(folder, self.config, len(self.train_dataset))  # type: ignore[arg-type]

    def _write_parts(self, folder: Path) -> None:
        """Teacher and pieces; every process may be needed to gather a teacher's shards."""
        self.teacher.save(folder)
        if self.args.should_save:
            self.pieces.save(folder)

    def _write_rank(self, folder: Path) -> None:
        """What each process has of its own: random numbers, and the loss since the last line of the log."""
        cut_off = self._before is not None and self._before[0] == self.state.global_step
        own = {
            "random": random_state(),
            "loss": self._before[1] if self._before and cut_off else self._tr_loss,
            "last_logged": self._globalstep_last_logged,
        }
        save_tree(own, self._rank_files(folder))

    def note_loss(self) -> None:
        """A step begins: if it is cut off and the one before it saved, its own losses are not to be kept."""
        self._before = self.state.global_step, self._tr_loss.clone()

    def _rank_files(self, folder: Path) -> Path:
        return folder / f"rank-{self.args.process_index:05d}"

    def _student(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _gathered_weights(self) -> dict[str, torch.Tensor] | None:
        """The student's weights on the main process where it holds shards of them; None for its own."""
        shards, student = self._shards(), self._student()
        return None if shards is None or not is_sharded(student) else shards.full_weights(student)

    def _gathered_state(self) -> tuple[dict[str, torch.Tensor] | None, dict[str, Any]]:
        """The weights, see `_gathered_weights`, and the optimizer's whole state; called by every process."""
        own, shards = self._plain_optimizer(), self._shards()
        state = own.state_dict() if shards is None else shards.full_state(self._student(), own)
        return self._gathered_weights(), state

    def _shards(self) -> ModuleType | None:
        """What gathers and spreads the state of processes that have a part of it each."""
        if self.is_fsdp_enabled:
            return optimizer_state
        return zero if self.is_deepspeed_enabled else None

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        found = self.optimizer
        return found.optimizer if isinstance(found, AcceleratedOptimizer) else found  # type: ignore[return-value]

    def _note_callbacks(self) -> None:
        """Put what callbacks export into the state, as `transformers.Trainer` does."""
        held = [*self.callback_handler.callbacks, self.control]
        found: dict[str, Any] = {}
        for callback in held:
            if isinstance(callback, ExportableState):
                found.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {  # type: ignore[assignment]
            name: states[0] if len(states) == 1 else states for name, states in found.items()
        }

    def _name_best(self, run: Path) -> None:
        if self.state.best_global_step:
            best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best.is_dir() or self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(best)

    def _best(self) -> Path | None:
        best = self.state.best_model_checkpoint
        return None if best is None else Path(best)

    def _on_main(self, action: Callable[[], None]) -> None:
        self._together(action if self.args.should_save else lambda: None)

    def _together(self, action: Callable[[], None]) -> None:
        """Do it on every process and wait for all; CheckpointError on all if it failed on one."""
        failure: Exception | None = None
        try:
            action()
        except (OSError, SafetensorError) as error:
            failure = error
        failed = torch.tensor(float(failure is not None), device=self.args.device)
        if self.args.world_size > 1:
            failed = self.accelerator.reduce(failed, "sum")
        if bool(failed):
            whole = ", ".join(one.name for one in checkpoints.complete(Path(self.args.output_dir or ".")))
            raise CheckpointError(
                f"checkpoint: writing at step {self.state.global_step} failed: "
                f"{failure or 'on another process'}; whole in {self.args.output_dir}: {whole or 'none'}"
            ) from failure

    # Reading

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train; on resuming, the teacher and the pieces go on from the checkpoint too.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest in `output_dir`.
            trial: see `transformers.Trainer`.
            ignore_keys_for_eval: see `transformers.Trainer`.

        Raises:
            ValueError: there is no checkpoint to resume from, or it holds another teacher.
        """
        checkpoint = checkpoints.checkpoint_of(resume_from_checkpoint, self.config.output_dir)
        if checkpoint is not None:
            self.teacher.load(checkpoint)
            self.pieces.load(checkpoint)
        return super().train(checkpoint, trial, ignore_keys_for_eval)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[torch.nn.Module, Any]:
        """Wrap the model; one in DeepSpeed's engine goes on from a checkpoint here."""
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        found = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_from_checkpoint(resume_from_checkpoint)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return found

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        checkpoints.compare_position(folder, self.config, len(self.train_dataset))  # type: ignore[arg-type]
        shards = self._shards()
        put = load_student if shards is None else shards.set_full_weights
        put(self._student(), folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        self._resumed = Path(checkpoint)
        saved, shards = load_tree(self._resumed / OPTIMIZER), self._shards()
        if shards is None:
            optimizer_state.set_state(self._plain_optimizer(), saved)
        else:
            shards.set_full_state(self._student(), self._plain_optimizer(), saved)
        self.lr_scheduler.load_state_dict(load_tree(self._resumed / SCHEDULER))  # type: ignore[union-attr]

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(load_tree(Path(checkpoint) / SCALER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._has_rank_files(Path(checkpoint)):
            set_random_state(load_tree(self._rank_files(Path(checkpoint)))["random"])

    def _has_rank_files(self, folder: Path) -> bool:
        """Whether this process was one of those that wrote it; more processes than then begin anew."""
        return self._rank_files(folder).with_suffix(".json").is_file()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """An epoch, from the loss on that a checkpoint holds; nothing for a run that is over already."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._resumed is not None and self._has_rank_files(self._resumed):
            own = load_tree(self._rank_files(self._resumed))
            self._tr_loss += own["loss"].to(self._tr_loss)
            self._total_loss_scalar = -own["loss"].item()  # of the steps before, which this call did not run
            self._globalstep_last_logged = own["last_logged"]
        self._resumed = None
        super()._run_epoch(*args, **kwargs)
