"""The evaluation that the command line asks for: a model, rows, and nothing trained."""

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd_train.backbone import check_head, check_positions, embeddings_of
from opsd_train.commands.options import parse
from opsd_train.commands.presets import Preset
from opsd_train.config import OPSDConfig
from opsd_train.data.rows import Row, is_generated, load_rows
from opsd_train.demo import task
from opsd_train.demo.run import MODEL, presets
from opsd_train.engines.make import make_engine
from opsd_train.evaluation.examine import Exam, Findings
from opsd_train.evaluation.matched import how_judged
from opsd_train.json_files import dumps, write_atomically
from opsd_train.loading import load_source
from opsd_train.reading.prompts import Encoder, Prompt
from opsd_train.rollouts import Rollout, Sampling, Vocabulary
from opsd_train.run_folder import INFO, check_folder, of_output
from opsd_train.run_folder import MODEL as TRAINED
from opsd_train.run_options import RunOptions
from opsd_train.safety.deadline import OutOfTime, within
from opsd_train.watch.completions import FOLDER, to_rows, write_parquet
from opsd_train.watch.progress import doing, interval, intervals
from opsd_train.watch.record import Evaluation

EVALUATION = "eval.json"
WRITTEN = (EVALUATION, f"{FOLDER}/eval.parquet")
PACKAGES = ("torch", "transformers", "peft", "opsd-kernels")  # beside what the engine names
# How a model of a run was made to write; `opsd eval` of it asks in the same way unless it is told otherwise.
KEPT = (
    "student_template", "student_chat_kwargs", "max_prompt_length", "max_completion_length", "temperature",
    "top_p", "top_k", "eval_match",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What to evaluate.

    Args:
        demo: the demo's held-out problems, and its model unless one is named.
        arguments: options (`--name=value`) of RunOptions and OPSDConfig: `model` is a local folder or hub id,
            of a model or of LoRA adapters, or a run folder; the rows are `eval_data`.
        layers: presets and YAML files that count before them.
    """

    demo: bool
    arguments: tuple[str, ...]
    layers: tuple[Path | Preset, ...] = ()


def evaluate(request: Request, out: Path, console: Console) -> Evaluation:
    """Evaluate, and write eval.json and the completions into the folder `out`.

    Raises:
        ValueError: what is wrong with the request; nothing was written.
        EngineError: the engine that writes the completions failed.
    """
    check_folder(out)
    for name in WRITTEN:
        if (out / name).exists():
            raise ValueError(f"out: expected a folder without an evaluation, but {out} holds {name}")
    options, config = _configured(request, out)
    model = options.model
    if request.demo:
        torch.set_num_threads(1)  # as the demo itself
    rows = _rows_of(None if request.demo else options, config)
    with console.status(f"loading {model}"):
        student, tokenizer = load_source(options.source())
    prompts = _encoded(rows, tokenizer, config, embeddings_of(student))
    said = f"model {model}; {how_judged(config.eval_match, len(prompts))}"
    console.print(said, highlight=False, markup=False)
    config.to_judge().require(prompts)
    check_positions(student, prompts, config.max_completion_length)
    check_head(student, prompts[0].student_ids)
    student.to(config.device)
    started = time.perf_counter()
    with doing(console, f"{len(prompts):,} problems, {config.eval_samples} samples each") as told:
        findings, versions = _hold(config, (student, tokenizer), prompts, told)
    seconds = time.perf_counter() - started
    found = findings.evaluation(0)
    about = {"model": model, "data": "opsd demo" if request.demo else options.eval_data, "seconds": seconds}
    about |= {"versions": {package: version(package) for package in PACKAGES} | versions}
    _write(out, {**about, **found, **_length(findings)}, config, _rows(findings, tokenizer))
    return found


def table(found: Evaluation) -> Table:
    """A line per way of decoding and k."""
    several = found["samples"] > 1
    shown = Table(
        title=f"Accuracy ({found['greedy']['total']:,} problems, {found['samples']} samples each)",
        caption="95 % confidence intervals: "
        + ("Wilson's for greedy, else by resampling problems." if several else "Wilson's."),
    )
    for heading in ("decoding", "accuracy"):
        shown.add_column(heading)
    for name, one in intervals(found).items():
        shown.add_row(name, interval(one))
    return shown


def _configured(request: Request, out: Path) -> tuple[Any, ...]:
    """RunOptions and OPSDConfig; a run folder's model is asked as its run asked it unless told otherwise."""
    first = presets(request.arguments) if request.demo else []
    given = [*request.arguments, f"--output_dir={out}", "--data="]
    kinds, defaults = [RunOptions, OPSDConfig], [f"--model={MODEL if request.demo else ''}"]
    options, _ = parse(kinds, [*first, *request.layers], given, defaults)
    if not options.model:
        raise ValueError("model: expected a model to evaluate; got none")
    if not request.demo and not options.eval_data:
        raise ValueError("data: expected rows to evaluate on, or --demo; got none")
    model, recorded = resolve(options.model)
    run = Preset(f"{options.model}/{INFO}", "", "", "", recorded)
    return parse(kinds, [*first, run, *request.layers], [*given, f"--model={model}"])


def resolve(model: str) -> tuple[str, dict[str, Any]]:
    """The model that is meant, and the options it was trained with if a run folder is named.

    Raises ValueError for a run folder without a model.
    """
    folder = Path(model)
    if not (folder / INFO).is_file():
        return model, {}
    if not (folder / TRAINED).is_dir():
        raise ValueError(f"model: expected a run that has ended, with a folder `model`; {model} has none")
    settings = json.loads((folder / INFO).read_text(encoding="utf-8")).get("config") or {}
    kept = {name: settings[name] for name in KEPT if settings.get(name) not in (None, {})}
    return str(folder / TRAINED), kept


def _rows_of(options: RunOptions | None, config: OPSDConfig) -> list[Row]:
    """The demo's problems, or those named, read as a run reads its held-out ones: none twice if generated."""
    templates = config.to_templates()
    if options is None:
        return load_rows(task.report_problems(), templates, privileged=False)
    reading = options.reading(held_out=True)
    source = str(options.eval_data)
    if is_generated(source):
        reading = replace(reading, repeats=False, refuse=lambda *repeated: None)
    return load_rows(source, templates, False, reading)


def _encoded(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: OPSDConfig, embeddings: int
) -> list[Prompt]:
    """What the student reads; nobody teaches, so that a teacher's budget and template do not matter."""
    encoder = replace(
        Encoder.of(tokenizer, config, embeddings=embeddings), max_teacher_prompt_length=sys.maxsize
    )
    return encoder.encode([replace(row, teacher=row.student) for row in rows])


def _hold(
    config: OPSDConfig,
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    prompts: list[Prompt],
    told: Callable[[str], None],
) -> tuple[Findings, dict[str, str]]:
    """What was found, and the versions of what wrote; `told` hears how far it has come."""
    student, tokenizer = loaded
    sampling = Sampling(
        config.temperature,
        config.top_p,
        config.top_k,
        config.max_completion_length,
        config.per_device_eval_batch_size,
    )
    vocabulary = Vocabulary.of(student, tokenizer)
    engine = make_engine(config, student, tokenizer, vocabulary)

    def write(asked: Sequence[Prompt], drawn: Sampling) -> list[Rollout]:
        with engine.telling(told, drawn):
            written = engine.write([prompt.student_ids for prompt in asked], drawn, (config.seed, 1, 0))
        return [
            Rollout(prompt, one.tokens, one.tokens[-1] not in vocabulary.eos_ids, one.logprobs, one.version)
            for prompt, one in zip(asked, written, strict=True)
        ]

    try:
        engine.follow(0)
        exam = Exam(config.to_judge(), tokenizer, sampling, config.eval_samples, config.to_ks())
        with within(config.eval_seconds):
            return exam.hold(write, prompts), engine.versions
    except OutOfTime:
        raise ValueError(
            f"eval_seconds: expected an evaluation of at most {config.eval_seconds:g} s; it takes longer, "
            "and nothing is written"
        ) from None
    finally:
        engine.close()


def _length(findings: Findings) -> dict[str, float]:
    """How long the sampled completions are, in tokens, and the share that was cut off."""
    rollouts = findings.sampled.rollouts
    return {
        "completion_length": sum(len(one.completion) for one in rollouts) / len(rollouts),
        "truncated_share": sum(one.truncated for one in rollouts) / len(rollouts),
    }


def _rows(findings: Findings, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    return [
        row
        for decoding, judged in (("greedy", findings.greedy), ("sampled", findings.sampled))
        for row in to_rows(judged.rollouts, tokenizer, 0, [float(right) for right in judged.right], decoding)
    ]


def _write(out: Path, found: dict[str, Any], config: OPSDConfig, rows: list[dict[str, Any]]) -> None:
    with of_output(out):
        out.mkdir(parents=True, exist_ok=True)
        write_parquet(out / WRITTEN[1], rows)
    asked = {name: getattr(config, name) for name in (*KEPT, "rollouts", "seed")}
    versions = {"python": platform.python_version()} | found.pop("versions")
    found.pop("step")
    text = dumps({**found, "config": asked, "versions": versions}, indent=1, default=str)
    write_atomically(out / EVALUATION, text)
