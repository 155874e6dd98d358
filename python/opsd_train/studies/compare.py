"""Several methods side by side on one task: the runs, and what is measured at the end of each.

Each pair of method and seed is a run folder of its own, `<method>-seed<seed>`. What this module measures
beyond a run's own evaluations is written last, under `comparison` in its run.json: a run that has it is
finished, and is not repeated.
"""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
import yaml
from rich.console import Console

import opsd_kernels
from opsd_kernels import methods, named_objectives
from opsd_train.backbone import completion_hidden, head_source
from opsd_train.commands.words import check_known
from opsd_train.config import OPSDConfig
from opsd_train.redaction import redact, redacted
from opsd_train.rollouts import Rollout, collate, evaluating
from opsd_train.run_folder import FILES, check_output
from opsd_train.train import run
from opsd_train.trainer import OPSDTrainer
from opsd_train.watch.record import RunRecord, load_run

COMMAND = "opsd compare"
SAMPLES = 2  # the stream of random numbers; the trainer's own are 0 and 1
Prepare = Callable[[Sequence[str], Console], OPSDTrainer]


@dataclass(frozen=True)
class Task:
    """What the methods are compared on.

    Args:
        model: in words, for the record.
        prepare: makes a run's trainer from its arguments; it needs held-out prompts.
    """

    model: str
    prepare: Prepare


@dataclass(frozen=True)
class Method:
    """A method as the command line names it, and the arguments it stands for."""

    spec: str
    arguments: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The spec as part of a file name."""
        return re.sub(r"[^\w.=+-]+", "-", self.spec)


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Args:
        methods: distinct ones.
        seeds: each method is run with each of them.
        steps: optimizer steps of a run.
        samples: completions per held-out problem, drawn at the end of each run.
        ks: pass@k is estimated for these k, at most `samples`.
        out: the folder that holds the run folders.
        further: arguments (`--name=value`) of every run; a method's own beat them.
    """

    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    steps: int
    samples: int
    ks: tuple[int, ...]
    out: Path
    further: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, values in (
            ("methods", [method.folder for method in self.methods]),
            ("seeds", self.seeds),
            ("k", self.ks),
        ):
            if not values or len(set(values)) < len(values):
                raise ValueError(
                    f"{name}: expected one or more, each once; got {', '.join(map(str, values))}"
                )
        for name in ("steps", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1; got {getattr(self, name)}")
        if min(self.ks) < 1 or max(self.ks) > self.samples:
            raise ValueError(f"k: expected 1 to {self.samples}, the number of samples; got {self.ks}")

    def arguments(self, method: Method, seed: int) -> list[str]:
        """Those of one run, but for its folder; its learning curves have at least eight points."""
        often = f"--eval_steps={max(1, self.steps // 8)}"
        return [f"--max_steps={self.steps}", often, *self.further, *method.arguments, f"--seed={seed}"]


class Measured(TypedDict):
    """What is measured at the end of a run, and what the run was told; the lists go over problems."""

    arguments: list[str]
    samples: int
    correct: list[int]
    entropy: list[float]


@dataclass(frozen=True)
class Outcome:
    """How one run of a comparison ended: measured, or with an error in words."""

    method: Method
    seed: int
    folder: Path
    measured: Measured | None
    error: str = ""


def to_arguments(name: str, options: Sequence[str]) -> tuple[str, ...]:
    """The training arguments of an objective or a method, with `option=value` in place of its own settings.

    An option is one of the method's own, `context.<role>`, or any of a run.

    Raises ValueError for a name that is none, or an option that neither the method nor a run has.
    """
    named = named_objectives()
    if name not in named and name not in methods.names():
        close = difflib.get_close_matches(name.lower(), [*named, *methods.names()], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"methods: expected one of {', '.join(named)}, or of those that `opsd methods` lists; got "
            f"{name!r}{hint}"
        )
    if name in named:
        arguments, own = [f"--objective={name}"], set[str]()
    else:
        arguments, own = [f"--method={name}"], set(opsd_kernels.get_method(name).options)
    chosen: dict[str, Any] = {}
    contexts: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        key = key.replace("-", "_")
        if not (equals and value):
            raise ValueError(f"methods: expected name:option=value:...; got {option!r} of {name!r}")
        if key in own:
            chosen[key] = yaml.safe_load(value)
        elif key.startswith("context."):
            contexts[key.removeprefix("context.")] = value
        else:
            known = [field.name for field in fields(OPSDConfig)]
            check_known(key, [*known, *own], f"methods: {name}")
            arguments.append(f"--{key}={value}")
    if chosen:
        arguments.append(f"--method_options={json.dumps(chosen)}")
    if contexts:
        arguments.append(f"--contexts={json.dumps(contexts)}")
    return tuple(arguments)


def parse_methods(text: str) -> tuple[Method, ...]:
    """Methods from `name,name:option=value:option=value,...`; ValueError says what is wrong with one.

    `label=...` among the options is how the method is called in what is shown, in place of the whole text.
    """
    found = tuple(_parsed(spec.strip()) for spec in text.split(",") if spec.strip())
    if not found:
        raise ValueError(f"methods: expected at least one name; got {text!r}")
    return found


def execute(plan: Plan, task: Task, console: Console) -> list[Outcome]:
    """Make every run that is not finished yet; one that fails does not keep the others from running.

    Args:
        plan: what to run.
        task: on what.
        console: where progress appears.

    Raises:
        ValueError: a run's folder holds a finished run of other arguments or samples, or what no comparison
            made; nothing was run.
    """
    runs = [
        (method, seed, plan.out / f"{method.folder}-seed{seed}")
        for seed in plan.seeds
        for method in plan.methods
    ]
    done = {
        folder: _finished(folder, plan.arguments(method, seed), plan.samples) for method, seed, folder in runs
    }
    for folder, measured in done.items():
        if measured is None:
            check_output(folder, "replace", COMMAND)
    outcomes = []
    for number, (method, seed, folder) in enumerate(runs, start=1):
        measured, error = done[folder], ""
        head = f"[bold]{number}/{len(runs)}[/bold] {method.spec}, seed {seed}"
        console.print(f"{head}: finished before" if measured else head, highlight=False)
        if measured is None:
            try:
                measured = _run(plan, method, seed, folder, task, console)
            except Exception as failure:  # whatever it is, it is this run's: the table says it
                error = redact(f"{type(failure).__name__}: {failure}")
                console.print(f"failed: {error}", style="red", markup=False, highlight=False)
        outcomes.append(Outcome(method, seed, folder, measured, error))
    return outcomes


def measure(trainer: OPSDTrainer, samples: int) -> tuple[list[int], list[float]]:
    """Of every held-out problem, how many of `samples` completions are right, and the entropy of the student.

    The entropy, in nats, is the mean over the tokens of the first of them.
    """
    sampling = replace(trainer.sampling, batch_size=trainer.config.per_device_eval_batch_size)
    correct, entropy = [0] * len(trainer.held_out), []
    for draw in range(samples):
        rollouts = trainer.roll_out(trainer.held_out, sampling, (SAMPLES, draw))
        for problem, right in enumerate(trainer.judge.judge(rollouts, trainer.tokenizer)):
            correct[problem] += right
        if draw == 0:
            entropy = _entropies(trainer, rollouts)
    return correct, entropy


@torch.no_grad()
def _entropies(trainer: OPSDTrainer, rollouts: Sequence[Rollout]) -> list[float]:
    """Mean entropy of the student over the tokens of each rollout."""
    found: list[float] = []
    size = trainer.config.per_device_eval_batch_size
    with evaluating(trainer.student):
        for start in range(0, len(rollouts), size):
            batch = collate(rollouts[start : start + size], trainer.vocabulary.pad_id)
            batch = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
            mask = batch["completion_mask"].bool()
            hidden = completion_hidden(
                trainer.student, batch["input_ids"], batch["attention_mask"], mask.shape[1]
            )
            student = head_source(trainer.student, hidden)
            stats = opsd_kernels.token_stats(
                student, student, mask=mask, temperature=trainer.config.loss_temperature
            )
            found += (stats.student_entropy.sum(1) / mask.sum(1)).tolist()
    return found


def _run(plan: Plan, method: Method, seed: int, folder: Path, task: Task, console: Console) -> Measured:
    arguments = plan.arguments(method, seed)
    trainer = task.prepare([*arguments, f"--output_dir={folder}"], console)
    if not trainer.held_out:
        raise ValueError("eval_data: expected held-out rows to compare on; got none")
    about = {"command": COMMAND, "name": f"{method.spec}, seed {seed}", "model": task.model}
    run(trainer, about, console, existing="replace")
    with console.status(f"drawing {plan.samples} samples per problem"):
        correct, entropy = measure(trainer, plan.samples)
    measured = Measured(arguments=arguments, samples=plan.samples, correct=correct, entropy=entropy)
    RunRecord(folder, "resume").write_info({**load_run(folder).info, "comparison": measured})
    return measured


def _finished(folder: Path, arguments: list[str], samples: int) -> Measured | None:
    """What was measured at the end of a run in that folder; None if there is no such run."""
    if not any((folder / name).is_file() for name in FILES):
        return None
    found: dict[str, Any] | None = load_run(folder).info.get("comparison")
    if found is None:
        return None
    for name, wanted in (("arguments", redacted(arguments)), ("samples", samples)):
        if found[name] != wanted:
            raise ValueError(
                f"out: {folder} holds a finished run with {name} {found[name]}, expected {wanted}; choose "
                "another folder"
            )
    return Measured(**found)  # type: ignore[typeddict-item]


def _parsed(spec: str) -> Method:
    name, *options = spec.split(":")
    labels = [option.removeprefix("label=") for option in options if option.startswith("label=")]
    others = [option for option in options if not option.startswith("label=")]
    return Method(labels[0] if labels else spec, to_arguments(name, others))
