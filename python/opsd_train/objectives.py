"""The objective that an option names."""

from opsd_kernels import Objective, named_objectives
from opsd_kernels.methods import names


def objective(name: str) -> Objective:
    """The objective of that name; ValueError lists the names."""
    known = named_objectives()
    if name not in known:
        hint = f"; {name} is a method: --method {name}" if name in names() else ""
        raise ValueError(f"objective: expected one of {', '.join(known)}; got {name!r}{hint}")
    return known[name]
