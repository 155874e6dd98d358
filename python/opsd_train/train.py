"""One run, from a model and rows to a report: what `opsd demo` and `opsd train` have in common."""

import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainingArguments

from opsd_kernels import get_method
from opsd_train import record
from opsd_train.backbone import causal_lm
from opsd_train.checkpoints import newest_checkpoint
from opsd_train.config import OPSDConfig
from opsd_train.data import Row, load_rows
from opsd_train.inspection import inspect_rollouts
from opsd_train.loading import load, with_lora
from opsd_train.progress import ProgressCallback, RecordCallback, accuracy_table
from opsd_train.prompts import Encoder
from opsd_train.record import RunRecord, load_run
from opsd_train.report import write_report
from opsd_train.run_options import RunOptions
from opsd_train.trainer import OPSDTrainer

Existing = Literal["error", "replace", "resume"]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "opsd-kernels")


def train(options: RunOptions, config: OPSDConfig, console: Console) -> OPSDTrainer:
    """Load what `opsd train` was given. Raises ValueError for anything that is wrong with it."""
    check_output(config.output_dir, "resume" if config.resume_from_checkpoint else "error")
    last_checkpoint(config)
    templates = config.to_templates()
    privileged = config.method is None
    rows = load_rows(options.data, templates, privileged)
    held_out = load_rows(options.eval_data, templates, privileged) if options.eval_data else []
    with console.status(f"loading {options.model}"):
        model, tokenizer = load(options.model, options.dtype, options.gguf_file, options.revision)
        student: torch.nn.Module = model
        if options.lora_rank:
            student = with_lora(model, options.lora_rank, options.lora_alpha, options.lora_dropout)
        return make_trainer(student, tokenizer, rows, held_out, config)


def make_trainer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    config: OPSDConfig,
) -> OPSDTrainer:
    """A trainer over rows and, to evaluate on, held-out ones; all are checked here against their budgets."""
    encoder = Encoder(
        tokenizer,
        config.max_prompt_length,
        config.max_teacher_prompt_length,
        config.student_chat_kwargs,  # type: ignore[arg-type]
        config.teacher_chat_kwargs,  # type: ignore[arg-type]
    )
    method = config.to_method(encoder)
    if method is not None:
        method.check(rows)
    return OPSDTrainer(
        model, config, encoder.encode(rows), tokenizer, encoder.encode(held_out), method=method
    )


def run(
    trainer: OPSDTrainer, about: Mapping[str, Any], console: Console, existing: Existing = "error"
) -> Path:
    """Evaluate, train, evaluate, and write the run folder; returns the path of the report.

    Args:
        trainer: as `make_trainer` made it; its `output_dir` becomes the run folder.
        about: what goes into run.json besides what the trainer knows: `name` and `model` at least.
        console: where progress and the final table appear.
        existing: what to do if the folder holds a run already, see `RunRecord`.
    """
    config, folder = trainer.config, Path(trainer.config.output_dir or ".")
    written = RunRecord(folder, existing)
    started = time.perf_counter()
    info = {**about, "started": datetime.now(UTC).isoformat(), **describe(trainer)}
    written.write_info(info)
    if config.method is not None:
        console.print(
            f"method {config.method}: the teacher's weights are {config.to_teacher()} (--teacher); published "
            f"with: {get_method(config.method).teacher}",
            highlight=False,
            markup=False,
        )
    trainer.add_callback(RecordCallback(written))
    trainer.add_callback(progress := ProgressCallback(console))
    checkpoint = last_checkpoint(config)
    if checkpoint is None:
        look(trainer, written, console)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        progress.close()
    look(trainer, written, console)
    save_model(trainer, folder / "model")
    info |= {"seconds": time.perf_counter() - started, "peak_memory_gb": peak_memory_gb(trainer.args.device)}
    written.write_info(info)
    found = load_run(folder).evaluations
    if found:
        console.print(accuracy_table(found[0], found[-1]))
    return write_report(folder)


def look(trainer: OPSDTrainer, written: RunRecord, console: Console) -> None:
    """Measure the student as it is: accuracy on the held-out rows, and a few rollouts token by token."""
    with console.status(f"evaluating at step {trainer.state.global_step}"):
        evaluated = {evaluation["step"] for evaluation in load_run(written.directory).evaluations}
        if trainer.held_out and trainer.state.global_step not in evaluated:
            trainer.evaluate()
        if (
            trainer.stored is not None or not trainer.teacher.is_whole
        ):  # there is no teacher whose opinion could be recorded
            return
        watched = trainer.held_out or trainer.prompts
        written.add_rollouts(inspect_rollouts(trainer, watched[: trainer.config.rollouts_recorded]))


def save_model(trainer: OPSDTrainer, folder: Path) -> None:
    """Weights (of the adapters only, for LoRA) as safetensors, configuration and tokenizer."""
    trainer.student.save_pretrained(folder)  # type: ignore[operator]
    trainer.tokenizer.save_pretrained(folder)


def check_output(folder: str | Path | None, existing: Existing) -> None:
    """Raise ValueError for a folder that holds something else, or a run that is to be kept."""
    path = Path(folder or ".")
    if path.exists() and not path.is_dir():
        raise ValueError(f"out: expected a folder, got the file {path}")
    held = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    is_run = any(name in held for name in record.FILES)
    if held and not is_run:
        raise ValueError(f"out: expected an empty folder or a run, but {path} holds {', '.join(held[:3])}")
    if is_run and existing == "error":
        raise ValueError(
            f"out: {path} holds a run; choose another folder, or go on with --resume-from-checkpoint last"
        )


def last_checkpoint(config: OPSDConfig) -> str | None:
    """The checkpoint to go on from, None for a fresh start; `last` stands for the newest of the run."""
    if config.resume_from_checkpoint != "last":
        return config.resume_from_checkpoint
    return newest_checkpoint(config.output_dir)


def describe(trainer: OPSDTrainer) -> dict[str, Any]:
    """What run.json says about how a run was made."""
    config = trainer.config
    inherited = {field.name for field in fields(TrainingArguments)}
    settings = {
        field.name: value
        for field in fields(config)
        if isinstance(value := getattr(config, field.name), str | int | float | dict)
        and (field.name not in inherited or value != field.default)
        and not field.name.endswith("_token")  # a hub token is nobody else's business
    }
    inner = causal_lm(trainer.student)
    return {
        "parameters": sum(parameter.numel() for parameter in inner.parameters()),
        "objective": _minimised(config, trainer),
        "method": config.method,
        "teacher": str(config.to_teacher()),
        "config": settings,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
        "device": str(trainer.args.device),
    }


def _minimised(config: OPSDConfig, trainer: OPSDTrainer) -> dict[str, Any]:
    """The objective by its fields, or the method with the options that were given."""
    if config.method is None:
        return asdict(trainer.objective)
    return {"method": config.method, **dict(config.method_options or {})}  # type: ignore[arg-type]


def peak_memory_gb(device: torch.device) -> float:
    """Most memory the run has had: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
