"""`python -m bench`: time, peak memory and gradient error of the loss beside plain PyTorch.

Contenders run in one process, interleaved (ABBA) with the bare matrix products that bound the time from
below; ratios are to be read, not seconds. Memory is measured in a process per contender. Results go to the
screen and, with --out, to JSON and Markdown. A contender whose gradient is less accurate than twice eager
PyTorch's is named, and the exit code is 1.
"""

import argparse
import sys
from pathlib import Path

from bench.cases import Case
from bench.measure import Result, run, worse_than_eager
from bench.tables import show, write


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=2048, help="tokens N")
    parser.add_argument("--vocab", type=int, default=49152, help="vocabulary V")
    parser.add_argument("--hidden", type=int, default=576, help="hidden width H")
    parser.add_argument("--gap", type=float, default=1.0, help="std of student minus teacher logits")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--frozen-head", action="store_true", help="the head needs no gradient (LoRA)")
    parser.add_argument(
        "--objectives",
        nargs="+",
        default=["opsd", "forward_kl", "reverse_kl", "jsd"],
        help="names to measure",
    )
    parser.add_argument("--repeats", type=int, default=3, help="ABBA rounds, two timed calls each")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds at a small shape")
    parser.add_argument("--out", type=Path, help="folder for results.json and results.md")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.vocab, arguments.hidden, arguments.repeats = 256, 8192, 256, 1
    cases = [
        Case(
            rows=arguments.rows,
            vocab=arguments.vocab,
            hidden=arguments.hidden,
            gap=arguments.gap,
            objective=objective,
            dtype=arguments.dtype,
            trainable_head=not arguments.frozen_head,
        )
        for objective in arguments.objectives
    ]
    results: list[list[Result]] = []
    for case in cases:
        results.append(run(case, arguments.repeats))
        show(case, results[-1])
    if arguments.out is not None:
        write(arguments.out, cases, results)
    wrong = [result for group in results for result in worse_than_eager(group)]
    for result in wrong:
        print(f"WRONG {result.contender}, {result.objective}: more than twice eager's gradient error")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
