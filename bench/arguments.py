"""The command line, and the cases that it asks for."""

import argparse
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case, load_recording
from bench.measure import Settings
from opsd_kernels import named_objectives

OBJECTIVES = ["opsd", "forward_kl", "reverse_kl", "jsd"]
DTYPES = ["float32", "bfloat16", "float16"]
GIB = 2**30


@dataclass(frozen=True)
class Preset:
    """Values of what is left open. `variants` adds a frozen head, and a half of the rows masked."""

    rows: tuple[int, ...]
    vocab: tuple[int, ...]
    hidden: tuple[int, ...]
    dtype: str
    repeats: int
    gap: tuple[float, ...] = (1.0, 0.1)
    variants: bool = False


PRESETS = {
    "quick": Preset((256,), (8192,), (256,), "float32", repeats=1, gap=(1.0,)),
    "cpu": Preset((2048,), (49152,), (576,), "float32", repeats=3),
    "goals": Preset((16384,), (151936,), (4096, 1024, 2048, 8192), "bfloat16", repeats=15, variants=True),
    # For minutes on a borrowed GPU: the reference shape first, then what else there is time for.
    "check": Preset(
        (16384,), (151936,), (4096, 1024, 2048, 8192), "bfloat16", repeats=3, gap=(0.1,), variants=True
    ),
}


def parser() -> argparse.ArgumentParser:
    """The options. Those without a default are filled from the preset."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time, peak memory and gradient error of the loss beside its peers.",
        epilog="Exit code: 0; 1 if a contender of this project is wrong; 3 if a GPU's clock drifted by more "
        "than 2 % in a case, whose times are then left out; 130 if interrupted, with finished cases written.",
    )
    parser.add_argument("--preset", choices=PRESETS, help="default: cpu on a CPU, goals on a GPU")
    parser.add_argument(
        "--quick", action="store_true", help="the preset quick: seconds, without torch.compile"
    )
    parser.add_argument("--rows", type=int, nargs="+", help="tokens N")
    parser.add_argument("--vocab", type=int, nargs="+", help="vocabulary V")
    parser.add_argument("--hidden", type=int, nargs="+", help="hidden width H")
    parser.add_argument("--gap", type=float, nargs="+", help="std of student minus teacher logits, in nats")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument(
        "--recorded", type=Path, help="safetensors file with real hidden states, see bench/recorded.py"
    )
    parser.add_argument("--frozen-head", action="store_true", help="the head needs no gradient (LoRA)")
    parser.add_argument("--masked", type=float, default=0.0, help="share of the rows that do not count")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--beta", type=float, default=0.5, help="of jsd")
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, choices=sorted(named_objectives()))
    parser.add_argument(
        "--contenders", nargs="+", default=[], help="only names with one of these words in them"
    )
    parser.add_argument("--repeats", type=int, help="ABBA rounds, two timed calls each")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument(
        "--largest-n", action="store_true", help="search the largest N before memory runs out"
    )
    parser.add_argument("--memory-limit", type=float, help="GiB of a process for --largest-n on a CPU")
    parser.add_argument("--keep-drifted", action="store_true", help="keep the times of a GPU that drifted")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for results.json, results.md and plots, say bench/results/DEVICE; kept up to date",
    )
    return parser


def complete(arguments: argparse.Namespace) -> argparse.Namespace:
    """Fills in the device and the preset's values.

    Raises:
        ValueError: options that contradict each other.
    """
    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.quick:
        arguments.preset = "quick"
    arguments.preset = arguments.preset or ("goals" if arguments.device == "cuda" else "cpu")
    if arguments.recorded is not None and any(
        (arguments.vocab, arguments.hidden, arguments.gap, arguments.dtype)
    ):
        raise ValueError("--recorded: expected no --vocab, --hidden, --gap or --dtype, the file has its own")
    if not 0 <= arguments.masked < 1:
        raise ValueError(f"--masked: expected a share in [0, 1); got {arguments.masked}")
    if arguments.largest_n and arguments.device == "cpu" and arguments.memory_limit is None:
        raise ValueError("--largest-n: expected --memory-limit on a CPU; got none")
    preset = PRESETS[arguments.preset]
    arguments.rows_given = arguments.rows is not None
    arguments.variants = preset.variants and not arguments.frozen_head and not arguments.masked
    for name in ("rows", "vocab", "hidden", "gap", "dtype", "repeats"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(preset, name))
    return arguments


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Every combination; a preset's variants only for the first objective and gap."""
    options: dict[str, Any] = {
        "trainable_head": not arguments.frozen_head,
        "masked": arguments.masked,
        "temperature": arguments.temperature,
        "beta": arguments.beta,
        "device": arguments.device,
    }
    if arguments.recorded is not None:
        bases = _recorded(arguments, options)
    else:
        shapes = product(arguments.rows, arguments.vocab, arguments.hidden, arguments.gap)
        bases = [
            Case(rows, vocab, hidden, gap, dtype=arguments.dtype, **options)
            for rows, vocab, hidden, gap in shapes
        ]
    found = []
    for base in bases:
        group = [replace(base, objective=name) for name in arguments.objectives]
        if arguments.variants and base.gap == bases[0].gap:
            group += [replace(group[0], trainable_head=False), replace(group[0], masked=0.5)]
        found += group
    return found


def _recorded(arguments: argparse.Namespace, options: dict[str, Any]) -> list[Case]:
    recording = load_recording(str(arguments.recorded))
    (rows, hidden), vocab = recording.student.shape, len(recording.head)
    wanted = arguments.rows if arguments.rows_given else [rows]
    for count in wanted:
        if count > rows:
            raise ValueError(f"--rows: expected at most the {rows} of {arguments.recorded}; got {count}")
    dtype = str(recording.student.dtype).removeprefix("torch.")
    path = str(arguments.recorded)
    return [Case(n, vocab, hidden, float("nan"), dtype=dtype, recorded=path, **options) for n in wanted]


def settings(arguments: argparse.Namespace) -> Settings:
    """How to measure."""
    limit = arguments.memory_limit
    return Settings(
        rounds=arguments.repeats,
        memory=not arguments.no_memory,
        largest_rows=arguments.largest_n,
        memory_limit=None if limit is None else int(limit * GIB),
        keep_drifted=arguments.keep_drifted,
    )
