"""A contender: what it runs, what it can compute, what it needs."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.cases import Case, Inputs

EVERY = frozenset({"forward_kl", "reverse_kl", "jsd", "opsd"})
UNCLIPPED = EVERY - {"opsd"}


@dataclass(frozen=True)
class Contender:
    """One line of the tables.

    Args:
        name: of the line.
        function: forward and backward of a case; fills `.grad` of the leaves, returns the mean loss without
            gradient.
        objectives: names of the objectives that it computes.
        masks: whether rows can be left out of its loss.
        temperatures: whether T may differ from 1.
        package: the module it needs, imported when first used.
        cuda_only: it cannot run on a CPU.
        compiles: it waits for torch.compile.
        ours: it is this project's. Its errors fail the run.
        optional: it uses an option that this version of the engine may lack: its ValueError or TypeError at
            the first call is a reason to leave it out.
        approximate: it drops gradient on purpose: its error is printed and does not fail the run.
        redundant: says why it adds nothing to a case, or None.
        note: what else to report about it at a case.
    """

    name: str
    function: Callable[[Inputs, Case], torch.Tensor]
    objectives: frozenset[str] = EVERY
    masks: bool = True
    temperatures: bool = True
    package: str | None = None
    cuda_only: bool = False
    compiles: bool = False
    ours: bool = False
    optional: bool = False
    approximate: bool = False
    redundant: Callable[[Case], str | None] | None = None
    note: Callable[[Inputs, Case], str] | None = None

    def why_not(self, case: Case) -> str | None:
        """Why it is left out of a case, or None if it takes part."""
        if case.objective not in self.objectives:
            return f"does not compute {case.objective}"
        if case.masked and not self.masks:
            return "does not support masked rows"
        if case.temperature != 1 and not self.temperatures:
            return "does not support a temperature"
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        if self.cuda_only and case.device == "cpu":
            return "cannot run on a CPU"
        return None if self.redundant is None else self.redundant(case)
