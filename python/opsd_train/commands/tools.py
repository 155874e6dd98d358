"""The commands of `opsd` that do not train one run: comparing, diagnosing, caching a teacher."""

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from opsd_train.commands import early
from opsd_train.commands.option_names import KINDS, OF_THE_DEMO
from opsd_train.commands.terminal import ANY_OPTION, console, early_ends, quiet, show, user_errors
from opsd_train.redaction import redact
from opsd_train.run_folder import check_new, of_its_own

tools = typer.Typer()


@tools.command(context_settings=ANY_OPTION)
def compare(
    context: typer.Context,
    methods: Annotated[
        str, typer.Option(help="name,name:option=value:..., say opsd,forward_kl:entry_clip=0.05.")
    ],
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 200,
    seeds: Annotated[str, typer.Option(help="Each method is run with each of these seeds.")] = "0",
    samples: Annotated[int, typer.Option(help="Completions per held-out problem, for pass@k.")] = 16,
    k: Annotated[str, typer.Option(help="Estimate pass@k for these k.")] = "1,4,8",
    out: Annotated[Path, typer.Option(help="The folder of the run folders and of the results.")] = Path(
        "opsd-compare"
    ),
) -> None:
    """Run several methods on the demo's task side by side: accuracy, pass@k, entropy, learning curves.

    Run again, it goes on where it was cut off. Any option that `opsd options` lists applies to every run.
    """
    with user_errors():
        early.check(context.args, [OF_THE_DEMO])
    from opsd_train.demo import run as demo_run
    from opsd_train.studies import compare_report
    from opsd_train.studies.compare import COMMAND, Plan, Task, execute, parse_methods
    from opsd_train.studies.compare_results import summarise

    quiet()
    words = ["opsd", "compare", "--methods", methods, "--steps", steps, "--seeds", seeds]
    words += ["--samples", samples, "--k", k, "--out", out, *context.args]
    with early_ends(), user_errors():
        plan = Plan(
            methods=parse_methods(methods),
            seeds=_integers("seeds", seeds),
            steps=steps,
            samples=samples,
            ks=_integers("k", k),
            out=out,
            further=tuple(context.args),
        )
        compare_report.check_results(out)
        prepare = partial(demo_run.demo, command=COMMAND)
        task = Task("the demo's model, on three-digit addition", prepare)
        outcomes = execute(plan, task, console)
    found = summarise(plan, outcomes, redact(shlex.join(map(str, words))), task.model)
    written = compare_report.write(found, out)
    show(compare_report.table(found))
    console.print(f"written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    if any(outcome.error for outcome in outcomes):
        raise typer.Exit(code=1)


@tools.command(context_settings=ANY_OPTION)
def diagnose(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Local folder or hub id of the student.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows with answers, a .jsonl or .parquet file.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="The demo's model and task instead.")] = False,
    methods: Annotated[
        str | None, typer.Option(help="Candidates, as for compare; the options' own one if none is named.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Prompts, drawn from the rows.")] = 32,
    rollouts: Annotated[int, typer.Option(help="Rollouts per prompt.")] = 16,
    parameters: Annotated[str, typer.Option(help="all, last (decoder layer), or part of a name.")] = "all",
    out: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file.")] = None,
) -> None:
    """Measure how well candidate losses and teacher contexts point to where success lies, without training.

    The cosine between a distillation gradient and the direction in which the probability of success rises. A
    method may carry a teacher's context too: forward_kl:teacher_template=... Any option that
    `opsd options` lists applies to every candidate.
    """
    words = [f"--{name}={value}" for name, value in (("model", model), ("data", data)) if value is not None]
    with user_errors():
        early.check([*words, *context.args], [OF_THE_DEMO] if demo else KINDS)
    from opsd_train.studies import diagnose_run

    quiet()
    with early_ends(), user_errors():
        if out is not None:
            check_new(out)
        request = diagnose_run.Request(
            demo=demo,
            methods=methods,
            prompts=prompts,
            rollouts=rollouts,
            parameters=parameters,
            arguments=(*words, *context.args),
        )
        found = diagnose_run.judge(request, console)
    show(diagnose_run.table(found))
    if out is not None:
        diagnose_run.write(found, request, out)
        console.print(f"written: {out}", highlight=False, soft_wrap=True)


@tools.command(context_settings=ANY_OPTION)
def cache(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The folder of the cache; one cut off is gone on with.")],
    model: Annotated[str | None, typer.Option(help="Local folder or hub id of the student.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows, a .jsonl or .parquet file.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="The demo's model and task instead.")] = False,
    teacher_model: Annotated[
        str | None, typer.Option(help="Another model as the teacher; of the same vocabulary.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Rollouts per row.")] = 1,
    teacher_top_k: Annotated[int, typer.Option(help="Keep the teacher's k most likely tokens.")] = 0,
    shard_size: Annotated[int, typer.Option(help="Rollouts in a file.")] = 256,
) -> None:
    """Write rollouts of the student with the teacher's log-probs, to train from without a teacher.

    Any option that `opsd options` lists can be given; loss_temperature is that of the log-probs.
    """
    words = [f"--{name}={value}" for name, value in (("model", model), ("data", data)) if value is not None]
    with user_errors():
        early.check([*words, *context.args], [OF_THE_DEMO] if demo else KINDS)
    from opsd_train.offline import run as offline_run

    quiet()
    with early_ends(), user_errors():
        request = offline_run.Request(
            demo=demo,
            teacher_model=teacher_model,
            samples=samples,
            top_k=teacher_top_k,
            shard_size=shard_size,
            arguments=(*words, *context.args),
        )
        found = offline_run.make(request, out, console)
    console.print(f"{len(found):,} rollouts: {out}", highlight=False, soft_wrap=True)


@tools.command("eval", context_settings=ANY_OPTION)
def evaluate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Local folder or hub id, LoRA adapters, or a run folder.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Rows with answers, a .jsonl or .parquet file.")] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="The demo's held-out problems, and its model.")
    ] = False,
    samples: Annotated[int, typer.Option(help="Completions sampled per row, besides a greedy one.")] = 1,
    k: Annotated[str | None, typer.Option(help="Estimate pass@k for these k, say 1,4,8.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Options of a published run, see `opsd presets`.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with options of a run; its eval_data, if no rows are named."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder of eval.json and of the completions; a new opsd-eval if none is."),
    ] = None,
) -> None:
    """Measure a model's accuracy on rows with answers: greedy, sampled and pass@k, with 95 % intervals.

    A run folder's model is asked as its run asked it. Any option that `opsd options` lists can be
    given: --eval-match, --rollouts, --temperature, --max-completion-length and so on.
    """
    named = {"model": model, "eval_data": data, "eval_samples": samples, "eval_k": k}
    words = [f"--{name}={value}" for name, value in named.items() if value is not None]
    with user_errors():
        if (demo and data is not None) or (not demo and data is config is preset is None):
            raise ValueError(f"data: expected rows or --demo, one of them; got {data!r} with demo {demo}")
        if model is None and not demo and config is None:
            raise ValueError("model: expected a model to evaluate; got none")
        early.check([*words, "--data=", *context.args], preset=preset, config=config)
    from opsd_train.commands.words import layers
    from opsd_train.evaluation import run as eval_run

    quiet()
    with early_ends(), user_errors():
        folder = of_its_own(Path("opsd-eval"), eval_run.WRITTEN) if out is None else out
        request = eval_run.Request(demo, (*words, *context.args), tuple(layers(preset, config)))
        found = eval_run.evaluate(request, folder, console)
    show(eval_run.table(found))
    written = ", ".join(str(folder / name) for name in eval_run.WRITTEN)
    console.print(f"written: {written}", highlight=False, soft_wrap=True)


def _integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"{name}: expected integers like 0,1; got {text!r}") from None


@tools.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One of them, to see what it needs.")] = None,
) -> None:
    """List the methods of the literature, or what one of them minimises, reads and can be told."""
    from opsd_train.commands.catalogue import all_methods, one_method

    with user_errors():
        if name is None:
            console.print(all_methods(), highlight=False)
        else:
            show(one_method(name))
