"""`python -m bench`: time, peak memory and gradient error of the loss beside its peers.

Contenders run in one process, interleaved (ABBA) with the bare matrix products that bound the time from
below; ratios are to be read, not seconds. On a CPU memory is measured in a process per contender. Results go
to the screen and, with --out, after every case to JSON and Markdown, at the end to plots.

A contender of this project that computes another loss, or whose gradient errs by more than twice eager
PyTorch's, is named as WRONG, and the exit code is 1. Peers are only marked. A case during which a GPU's bare
matrix products changed by more than 2 % is measured again; if it drifts again its times are rejected, and the
exit code is 3. A CPU is often shared, so there drift is printed and stored, and is a warning.
"""

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.status import Status

from bench import arguments as options
from bench import machine, plots, tables
from bench.contenders import choose
from bench.measure import Group, run

WRONG, REJECTED, INTERRUPTED = 1, 3, 130


def main(command: list[str] | None = None) -> int:
    """Parses the command line, measures, prints, writes; returns the exit code."""
    parser = options.parser()
    try:
        arguments = options.complete(parser.parse_args(command))
        cases = options.cases(arguments)
    except ValueError as error:
        parser.error(str(error))
    settings = options.settings(arguments)
    contenders = choose(arguments.contenders, compiled=arguments.preset != "quick")
    facts = machine.describe(arguments.device)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(machine.line(facts), highlight=False)
    groups: list[Group] = []
    try:
        with Console(stderr=True).status("") as status:
            for number, case in enumerate(cases, 1):
                say = partial(_say, status, f"case {number} of {len(cases)}")
                group = run(case, settings, contenders, say)
                groups.append(group)
                tables.show(group, console)
                if arguments.out is not None:
                    tables.write(arguments.out, facts, groups, asdict(settings))
    except KeyboardInterrupt:
        print(f"Interrupted: {len(groups)} of {len(cases)} cases are finished.", file=sys.stderr)
        return INTERRUPTED
    finally:
        _finish(arguments.out, groups)
    return _verdict(groups)


def _say(status: Status, prefix: str, text: str) -> None:
    status.update(f"{prefix}: {text}")


def _finish(folder: Path | None, groups: list[Group]) -> None:
    if folder is not None and groups:
        for path in plots.draw([group.as_dict() for group in groups], folder):
            print(f"wrote {path}")


def _verdict(groups: list[Group]) -> int:
    """Prints what must not be trusted; returns the exit code."""
    code = 0
    for group in groups:
        if group.rejected:
            assert group.drift is not None
            code = REJECTED
            print(
                f"REJECTED {tables.title(group.case)}: the floor drifted by {group.drift.share:+.1%}. "
                "Measure again on a quiet machine, or keep the times with --keep-drifted."
            )
    for group in groups:
        for result in group.wrong:
            code = WRONG
            print(f"WRONG {result.contender}, {tables.title(group.case)}: {'; '.join(result.remarks)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
