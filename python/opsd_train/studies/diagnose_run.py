"""The diagnosis that the command line asks for: candidates from options, the table and the JSON file."""

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from opsd_train.backbone import check_head, check_positions
from opsd_train.config import OPSDConfig
from opsd_train.demo import task
from opsd_train.description import PACKAGES
from opsd_train.evaluation.passk import Interval
from opsd_train.json_files import dumps, write_atomically
from opsd_train.reading.prompts import Prompt
from opsd_train.redaction import redacted
from opsd_train.rollouts import Sampling, Vocabulary
from opsd_train.studies.alignment import Diagnosis
from opsd_train.studies.compare import Method, parse_methods
from opsd_train.studies.diagnose import Candidate, Probe, choose, diagnose, objective_loss
from opsd_train.studies.given import Given, config_of, load_given
from opsd_train.teachers.weights import Teacher
from opsd_train.watch.progress import doing


@dataclass(frozen=True)
class Request:
    """What to diagnose.

    Args:
        demo: the demo's model and held-out problems, instead of the `--model` and `--data` of `arguments`.
        methods: candidates in the form of `parse_methods`; None for the one that `arguments` describe.
        prompts: how many are drawn from the rows.
        rollouts: per prompt, even.
        parameters: see `choose`.
        arguments: options (`--name=value`) of RunOptions and OPSDConfig for every candidate.
    """

    demo: bool
    methods: str | None
    prompts: int
    rollouts: int
    parameters: str
    arguments: tuple[str, ...]


def judge(request: Request, console: Console) -> Diagnosis:
    """Load the model and the rows, and judge the candidates; ValueError says what is wrong with them."""
    if request.prompts < 1:
        raise ValueError(f"prompts: expected at least 1; got {request.prompts}")
    methods = (Method("", ()),) if request.methods is None else parse_methods(request.methods)
    configs = [config_of(request.demo, (*request.arguments, *method.arguments)) for method in methods]
    with console.status("loading"):
        given = load_given(request.arguments, task.report_problems() if request.demo else None)
    model = given.model
    for config in configs:
        if config.method is not None:
            raise ValueError(
                f"methods: expected objectives, of one teacher's gradient; got method {config.method!r}"
            )
    contexts = [_drawn(given.prompts(config), request.prompts, config.seed) for config in configs]
    for prompts in contexts:
        configs[0].to_judge().require(prompts)
        check_positions(model, prompts, configs[0].max_completion_length)
    check_head(model, contexts[0][0].student_ids)
    candidates = [
        Candidate(
            name=method.spec or config.objective,
            loss=objective_loss(config.to_objective(), config.loss_temperature),
            prompts=prompts,
            teacher=Teacher(model),
        )
        for method, config, prompts in zip(methods, configs, contexts, strict=True)
    ]
    with doing(console, f"{len(contexts[0])} prompts, {request.rollouts} rollouts each"):
        return diagnose(_probe(request, configs[0], given), candidates)


def table(found: Diagnosis) -> Table:
    """A line per candidate."""
    ceiling = "unknown: too few rollouts" if found["ceiling"] is None else f"{found['ceiling']:.2f}"
    shown = Table(
        title=f"Alignment with success: mean reward {found['reward']:.1%}, {found['informative']} of "
        f"{len(found['candidates'][0]['prompts'])} prompts informative",
        caption="Cosines, 95 % confidence intervals in brackets. A perfect candidate's, with this much noise "
        f"in the estimate of success: {ceiling}.",
    )
    for heading in ("candidate", "all prompts", "mean of prompts", "on right", "on wrong"):
        shown.add_column(heading, overflow="fold")
    for one in found["candidates"]:
        shown.add_row(
            escape(one["candidate"]),
            _interval(one["overall"]),
            _interval(one["mean"]),
            *("-" if value is None else f"{value:.3f}" for value in (one["right"], one["wrong"])),
        )
    return shown


def write(found: Diagnosis, request: Request, path: Path) -> None:
    """The numbers, with what was asked for and the versions, as JSON."""
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        path, dumps({"request": redacted(asdict(request)), "versions": versions, **found}, indent=1)
    )


def _drawn(prompts: list[Prompt], count: int, seed: int) -> list[Prompt]:
    """Some prompts drawn by the seed, the same for every candidate."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))[:count]
    return [prompts[i] for i in order.tolist()]


def _probe(request: Request, config: OPSDConfig, given: Given) -> Probe:
    judge = config.to_judge()
    return Probe(
        student=given.model,
        parameters=choose(given.model, request.parameters),
        sampling=Sampling(
            config.temperature,
            config.top_p,
            config.top_k,
            config.max_completion_length,
            config.per_device_eval_batch_size,
        ),
        vocabulary=Vocabulary.of(given.model, given.tokenizer),
        rollouts=request.rollouts,
        reward=lambda rollout: float(judge.judge([rollout], given.tokenizer)[0]),
        seed=config.seed,
    )


def _interval(found: Interval | None) -> str:
    return "-" if found is None else f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
