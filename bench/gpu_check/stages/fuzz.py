"""Random cases for the time that is left; a failure prints the seed that repeats it."""

import random
import time
from functools import partial
from typing import Any

import torch

from bench.gpu_check.rule import Unlucky, case_accurate
from bench.gpu_check.setting import DTYPES, Check, Setting, Skip, on, per_backend, short
from bench.gpu_check.stages.conformance import OBJECTIVES
from opsd_kernels.testing import Case, hidden_case, logits_case

TRIES = 3  # of a case that was unlucky, with other numbers
SMALL_SECONDS = 4.0
SLACK = 8.0  # seconds before the end of the stage: a last case may compile kernels


def checks(setting: Setting) -> list[Check]:
    """One line per backend."""
    seconds = SMALL_SECONDS if setting.small else max(setting.left - SLACK, 1.0)

    def build(backend: str) -> list[Check]:
        run = partial(_fuzz, setting, backend, seconds)
        return [Check(backend, run, group=backend, limit=seconds + 120)]

    return per_backend(setting, build)


def _fuzz(setting: Setting, backend: str, seconds: float) -> str:
    end, number, unlucky, refused = time.monotonic() + seconds, 0, 0, 0
    while number == 0 or time.monotonic() < end:
        seed = random.Random(f"{backend} {number}").randrange(2**31)
        for attempt in range(TRIES):
            case, text = draw(setting, seed, seed + attempt)
            try:
                case_accurate(case, backend)
                break
            except Unlucky as error:
                unlucky += 1
                if attempt == TRIES - 1:
                    raise AssertionError(f"case {number}, seed {seed} ({text}): {error}") from error
            except Exception as error:
                if str(error).startswith("backend:"):  # what the backend does not serve it refuses
                    refused += 1
                    break
                raise AssertionError(f"case {number}, seed {seed} ({text}): {error}") from error
        number += 1
    if refused == number:
        raise Skip(f"backend: refused all {number} cases")
    return f"{number} cases, {unlucky} of them drawn anew, {refused} refused"


def draw(setting: Setting, seed: int, numbers: int) -> tuple[Case, str]:
    """A case and what it is; `seed` decides its kind and sizes, `numbers` its values."""
    r = random.Random(seed)
    most_rows, most_columns = (6, 120) if setting.small else (96, 20_000)
    rows, vocab = r.randint(4, most_rows), max(48, int(most_columns ** r.uniform(0.5, 1)))
    dtype, objective = r.choice(DTYPES), r.choice(sorted(OBJECTIVES))
    gap, width = r.choice([0.3, 1.0, 3.0]), r.choice([16, 24, 40, 64, 136])
    if r.random() < 0.25:
        case = logits_case(rows, vocab, gap=gap, seed=numbers)
        kind = "logits"
    else:
        head: dict[str, Any] = {"softcap": r.choice([None, None, 15.0]), "logit_scale": r.choice([1.0, 0.5])}
        bias, own = r.random() < 0.3, r.choice([None, None, 48])
        case = hidden_case(rows, vocab, width, gap=gap, bias=bias, teacher_width=own, seed=numbers, **head)
        kind = f"H {width}, {head}, bias {bias}, teacher's H {own}"
    # A mean's gradients in fp16 are subnormal, and rounding them costs more than the rule allows for.
    means = [] if dtype == torch.float16 else ["mean"]
    options: dict[str, Any] = {"reduction": r.choice([*means, "sum", "none"])}
    options["temperature"] = r.choice([0.7, 1.0, 1.7])
    # Per token, the backward multiplies in other shapes than the forward. With matrices of a few rows these
    # round differently enough to break the rule, so budgets that small are left to the other reductions.
    if options["reduction"] != "none" and r.random() < 0.3:
        options["workspace_bytes"] = 2 * 4 * vocab * max(rows // 2, 4)
    if r.random() < 0.3:
        options["vocab_size"] = vocab - r.randint(1, vocab // 4)
    text = f"N {rows}, V {vocab}, {kind}, {short(dtype)}, {objective}, {options}"
    if r.random() < 0.4:
        generator = torch.Generator().manual_seed(seed)
        options["mask"] = torch.rand(rows, generator=generator) < 0.8
        options["mask"][:2] = True
        text += ", mask"
    case = on(case.having(**options), setting.device).to(dtype)
    return case.having(objective=OBJECTIVES[objective]), text
