"""The tables of the methods as Markdown, made from their entries."""

from collections.abc import Mapping
from typing import Any

from opsd_kernels.methods.registry import Method, get_method, names
from opsd_kernels.methods.supplies import supplies
from opsd_kernels.objectives import Objective, Support
from opsd_kernels.recipes import Blend, Built, Entropy, Estimator, Role, Term

COLUMNS = (
    "method", "paper", "teacher", "target", "divergence", "support", "clip", "weight", "extra terms",
    "driver pieces", "with opsd train", "scope and differences", "test",
)  # fmt: skip
ARXIV = "https://arxiv.org/abs/"


def table(module: str) -> str:
    """One row per method of a module."""
    rows = [_row(method) for method in map(get_method, names()) if method.module == module]
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join(head + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _row(method: Method) -> list[str]:
    recipe = method.recipe()
    # The term that has a teacher is what the method is about; the others come beside it.
    main = next((term for term in recipe.terms if term.teacher is not None), recipe.terms[0])
    others = [describe(term) for term in recipe.terms if term is not main]
    prepared = [_call(spec.name, spec.options) for spec in recipe.prepare]
    loss = main.loss
    notes = [method.scope, method.differs]
    is_number = method.arxiv.replace(".", "").isdigit()
    paper = f"[{method.arxiv}]({ARXIV}{method.arxiv})" if is_number else method.arxiv
    return [
        f"`{method.key}`",
        f"{method.title}, {paper}" if method.arxiv else method.title,
        method.teacher,
        target_of(main.teacher),
        loss_of(main),
        support_of(getattr(loss, "support", None)),
        clip_of(loss),
        ", ".join([_call(spec.name, spec.options) for spec in main.weights] + [_per(main)]).strip(", "),
        "; ".join([*others, *prepared]),
        ", ".join(method.driver),
        state_of(method),
        "; ".join(note for note in notes if note),
        f"`tests/test_methods_{method.module}.py::test_{method.key}`",
    ]


def state_of(method: Method) -> str:
    """The state of a method with its own options, what has to be supplied, and what changes with the step."""
    found = supplies(method.key)
    parts = [*found.words, *schedule_of(method.schedule)]
    return f"{found.state}: {'; '.join(parts)}" if parts else found.state


def schedule_of(schedule: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Each option that changes with the step, in words."""
    return [
        f"{name} goes from {spec['start']:g} to {spec['end']:g} in {spec['steps']} steps"
        + (f" after {spec['hold']}" if spec.get("hold") else "")
        for name, spec in schedule.items()
    ]


def describe(term: Term) -> str:
    """A term in words, for the tables."""
    parts = [loss_of(term)]
    if isinstance(term.teacher, Blend | Built):
        parts.append(f"to {target_of(term.teacher)}")
    weights = [_call(spec.name, spec.options) for spec in term.weights]
    return " ".join([*parts, *(f"x {weight}" for weight in weights)])


def loss_of(term: Term) -> str:
    """The divergence or estimator, and its coefficient."""
    loss = term.loss
    factor = "" if term.coefficient == 1 else f"{term.coefficient:g} "
    if isinstance(loss, Entropy):
        return f"{factor}negative entropy"
    if isinstance(loss, Estimator):
        beside = f" beside {loss.baseline.divergence}" if loss.baseline is not None else ""
        return factor + _call(loss.name, loss.options) + beside
    beta = f"({loss.beta:g})" if loss.divergence not in ("forward_kl", "reverse_kl", "reverse_kl_sg") else ""
    return f"{factor}{loss.divergence}{beta}"


def target_of(teacher: Role | None) -> str:
    """Of which roles the teacher is made."""
    if teacher is None:
        return ""
    if isinstance(teacher, Blend):
        return f"{teacher.kind}: " + " + ".join(f"{factor} {role}" for factor, role in teacher.streams)
    if isinstance(teacher, Built):
        return _call(teacher.name, {**dict.fromkeys(teacher.roles, ""), **teacher.options})
    return "" if teacher == "teacher" else teacher


def support_of(support: Support | None) -> str:
    """The entries of the sum."""
    if support is None:
        return ""
    return f"{'given' if support.k is None else f'top {support.k} of {support.of}'}, {support.rest}"


def clip_of(loss: Objective | Estimator | Entropy) -> str:
    """Clips of a divergence; an estimator's are among its options."""
    if not isinstance(loss, Objective):
        return ""
    bounds = {"entry": loss.entry_clip, "token": loss.token_clip}
    return ", ".join(
        f"{name} {bound:g} ({loss.clip_mode})" for name, bound in bounds.items() if bound is not None
    )


def _per(term: Term) -> str:
    return "" if term.normaliser == "tokens" else f"mean by {term.normaliser}"


def _call(name: str, options: Any) -> str:
    inside = ", ".join(key if value == "" else f"{key}={value}" for key, value in options.items())
    return f"{name}({inside})" if inside else name
