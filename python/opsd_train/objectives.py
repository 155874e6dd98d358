"""The objectives that an option can name: those with a name of their own, and every divergence."""

import opsd_kernels
from opsd_kernels import Objective, divergences
from opsd_kernels.methods import names


def objectives() -> dict[str, Objective]:
    """Every objective by name."""
    return {name: Objective(name) for name in divergences.table()} | opsd_kernels.named_objectives()


def objective(name: str) -> Objective:
    """The objective of that name; ValueError lists the names."""
    known = objectives()
    if name not in known:
        hint = f"; {name} is a method: --method {name}" if name in names() else ""
        raise ValueError(f"objective: expected one of {', '.join(known)}; got {name!r}{hint}")
    return known[name]
