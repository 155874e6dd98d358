"""The teachers of a recipe's call, by the names that its terms have for them."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from opsd_kernels import known_checks, source_checks
from opsd_kernels.known import Sampled
from opsd_kernels.options import LossOptions, TeacherLike
from opsd_kernels.recipes import Recipe
from opsd_kernels.sources import Source, Teacher

Roles: TypeAlias = Mapping[str, TeacherLike | Sampled]
TeacherArgument: TypeAlias = TeacherLike | Sampled | Roles | None


def named_roles(
    teacher: TeacherArgument, recipe: Recipe, weight: Tensor | None, student: Source, options: LossOptions
) -> dict[str, Teacher | Sampled]:
    """The teachers by role, checked beside the student; a single one needs no name."""
    checked: dict[str, Teacher | Sampled] = {}
    for name, source in _by_name(teacher, recipe.roles).items():
        label = "teacher" if len(recipe.roles) == 1 else f"teacher[{name!r}]"
        known_checks.check_temperature(label, source, options.temperature)
        if isinstance(source, Sampled):
            known_checks.check_sampled(label, source, student.lead, student.tensors[0].device)
            known_checks.check_are_log_probs(f"{label}.logprob", source.logprob, options.mask, options.rows)
            checked[name] = source
        else:
            checked[name] = source_checks.as_teacher(label, source, weight)
            _check_lead(label, checked[name].lead, student.lead)
    return checked


def _check_lead(name: str, lead: torch.Size, expected: torch.Size) -> None:
    if lead != expected:
        raise ValueError(
            f"{name}: expected the student's token dimensions {tuple(expected)}; got {tuple(lead)}"
        )


def _by_name(teacher: TeacherArgument, expected: tuple[str, ...]) -> dict[str, Any]:
    if teacher is None:
        given: dict[str, Any] = {}
    elif isinstance(teacher, Mapping):
        given = dict(teacher)
    elif len(expected) == 1:
        given = {expected[0]: teacher}
    else:
        names = ", ".join(map(repr, expected))
        wanted = f"a mapping of the teachers {names}" if names else "None for an objective without one"
        raise ValueError(f"teacher: expected {wanted}; got {type(teacher).__name__}")
    if set(given) != set(expected):
        got = ", ".join(map(repr, given)) or "none"
        raise ValueError(f"teacher: expected {', '.join(map(repr, expected)) or 'none'}; got {got}")
    return given
