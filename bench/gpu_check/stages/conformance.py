"""Value and every gradient against the fp64 reference on the same device, by the project's tolerance rule."""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from bench.gpu_check.rule import case_accurate, over_seeds
from bench.gpu_check.setting import DTYPES, Check, Setting, fused, on, per_backend, short
from bench.gpu_check.stages import features
from opsd_kernels import Objective, loss, named_objectives
from opsd_kernels.testing import (
    Case,
    Outcome,
    evaluate,
    hidden_case,
    relative_error,
    upstream_of,
)

OBJECTIVES = {
    **{name: named_objectives()[name] for name in ("forward_kl", "reverse_kl", "jsd", "opsd")},
    "opsd, scaled clip": Objective("forward_kl", entry_clip=0.05, clip_mode="scale"),
    "reverse_kl, token clip": Objective("reverse_kl", token_clip=0.1),
    "jsd 0.2": Objective("jsd", beta=0.2),
}
# Rows, V, H: one column; less than a block; ragged; models' vocabularies. H with and without a remainder.
SHAPES = (
    (5, 1, 8),
    (33, 7, 72),
    (130, 1000, 128),
    (17, 32_000, 200),
    (6, 50_257, 96),
    (5, 151_936, 64),
    (3, 262_144, 40),
)
SMALL_SHAPES = ((2, 1, 8), (3, 7, 24), (4, 97, 16))


def checks(setting: Setting) -> list[Check]:
    """Objective x dtype over all shapes, then what else a call may have, for each backend."""
    return per_backend(setting, partial(_of_backend, setting))


def _of_backend(setting: Setting, backend: str) -> list[Check]:
    # Triton's interpreter is slow: there, one dtype and one objective.
    slow = setting.small and backend != "torch"
    dtypes = (torch.bfloat16,) if slow else DTYPES
    found = [
        Check(
            f"{backend}, {name}, {short(dtype)}: V {_sizes(setting)}",
            partial(over_seeds, partial(_sweep, setting, backend, objective, dtype)),
            group=f"{backend} {name}",
            limit=180,
        )
        for name, objective in OBJECTIVES.items()
        for dtype in dtypes
    ]
    asked = tuple(product(dtypes, ("jsd",) if slow else ("opsd", "jsd")))
    for name, feature in features.FEATURES.items():
        run = partial(_feature, feature, setting, backend, asked)
        found.append(Check(f"{backend}, {name}", run, group=f"{backend} {name}", limit=180))
    return found


def _sizes(setting: Setting) -> str:
    shapes = SMALL_SHAPES if setting.small else SHAPES
    return ", ".join(str(vocab) for _, vocab, _ in shapes)


def _sweep(setting: Setting, backend: str, objective: Objective, dtype: torch.dtype, seed: int) -> str:
    worst: dict[str, float] = {}
    for rows, vocab, width in SMALL_SHAPES if setting.small else SHAPES:
        case = on(hidden_case(rows, vocab, width, seed=seed), setting.device).to(dtype)
        case = case.having(objective=objective)
        _note(worst, case, case_accurate(case, backend))
    return "largest relative error: " + ", ".join(f"{name} {error:.1e}" for name, error in worst.items())


def _note(worst: dict[str, float], case: Case, actual: Outcome) -> None:
    """Keeps the largest relative L2 error of the value and of each gradient; V = 1 has none."""
    truth = evaluate(partial(loss, backend="reference"), case.to(torch.float64), upstream_of(actual.loss))
    pairs = {"loss": (actual.loss, truth.loss)}
    pairs |= {f"d{name}": (actual.gradients[name], truth.gradients[name]) for name in truth.gradients}
    for name, (found, exact) in pairs.items():
        if case.student.vocab > 1 and exact.norm() > 0:
            worst[name] = max(worst.get(name, 0.0), relative_error(found, exact))


def _feature(
    feature: Callable[[features.Feature], None],
    setting: Setting,
    backend: str,
    asked: tuple[tuple[torch.dtype, str], ...],
) -> str:
    def at(dtype: torch.dtype, objective: str, seed: int) -> str:
        feature(features.Feature(fused(backend), backend, setting, dtype, objective, seed))
        return f"{short(dtype)} {objective}"

    done: list[str] = []
    narrow: list[str] = []
    for dtype, objective in asked:
        try:
            numbers = over_seeds(partial(at, dtype, objective))
        except AssertionError as error:
            raise AssertionError(f"{short(dtype)} {objective}: {error}") from error
        (narrow if ";" in numbers else done).append(numbers)
    return ", ".join([*done, *narrow])
