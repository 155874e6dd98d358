"""A call of several terms: the operators of `composite_ops.py` around a `Combination`."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opsd_kernels import backends, known_checks, ops
from opsd_kernels.backends.reference.values import values as reference_values
from opsd_kernels.call import Call
from opsd_kernels.combination import Combination
from opsd_kernels.composite_ops import CompositeSum
from opsd_kernels.engine.chunk_store import weighted
from opsd_kernels.engine.composite_chunk import Gathered, Values
from opsd_kernels.engine.parts import Parts, widths
from opsd_kernels.objectives import Objective
from opsd_kernels.options import LossOptions
from opsd_kernels.sources import Source, Teacher, TopK
from opsd_kernels.tokens import Batch


@dataclass(frozen=True)
class CompositeCall:
    """A checked call, flattened to N tokens.

    Args:
        call: the sources, options and rows.
        combination: how the parts' values make the loss.
        parts: what the engine evaluates.
    """

    call: Call
    combination: Combination
    parts: Parts

    @classmethod
    def of(
        cls, student: Source, teacher: Teacher, objective: Objective, parts: Parts, combination: Combination,
        options: LossOptions,
    ) -> "CompositeCall":  # fmt: skip
        """Checks what `Call` checks; the tokens that count are those that any term counts."""
        if options.grad_filter is not None:
            raise ValueError("grad_filter: expected None with an objective of several terms; got a value")
        if options.token_ids is None and any(gather.support is None for gather in parts.gathers):
            raise ValueError("token_ids: expected the sampled tokens, for an estimator; got None")
        if options.backend in backends.WITHOUT_SLABS:
            raise ValueError(
                "backend: expected 'triton', 'torch' or 'reference' for an "
                f"objective of several terms; got {options.backend!r}"
            )
        given = known_checks.given_of_parts(teacher, parts, options.support_ids)
        live = combination.live.reshape(student.lead)
        checked = replace(
            options, objective=_with_given(objective, parts), mask=live, rows=None, token_weight=None,
            reduction="sum", denominator=None, data=None,
            # Of a teacher that is a TopK by itself the entries are taken from it.
            support_ids=options.support_ids if isinstance(teacher, TopK) else given,
        )  # fmt: skip
        call = Call.of(student, teacher, None, checked)
        return cls(replace(call, packed=replace(call.packed, parts=parts)), combination, parts)

    def weighted_sum(self) -> Tensor:
        """The sum of the token losses, its gradient formed on the way."""
        call = self.call
        student, teacher, *rowwise, text = call.inputs(call.packed)
        problem, _ = ops.problem_of(student, teacher, rowwise, text)
        if not torch.is_grad_enabled():
            student = [x.detach() for x in student]  # without this the function would form their gradients
        with torch.autocast(problem.device.type, enabled=False):
            found: Tensor = CompositeSum.apply(problem, self.combination, call.main_grad(), *student)
        return found

    def tokens(self, batch: Batch) -> Tensor:
        """`[N]` weighted token losses, differentiable."""
        call, combination = self.call, self.combination
        rows = torch.arange(call.lead.numel(), device=call.student.tensors[0].device)
        weights = combination.weights(None, rows)
        by_definition = call.packed.backend == backends.REFERENCE
        values = self._reference(weights != 0) if by_definition else self._values()
        total = weighted(values.dense, weights.to(values.dense.dtype)).sum(1)
        return total + combination.losses(values, batch, rows).to(total.dtype)

    def _values(self) -> Values:
        """By the engine, which recomputes logits in the backward."""
        call = self.call
        inputs = *call.inputs(call.packed), call.main_grad()
        dense, log_s, log_t, ids = torch.ops.opsd_kernels.composite_values(*inputs)
        given = call.rowwise.support_ids
        sizes = widths(self.parts, call.student.vocab, 0 if given is None else given.shape[1])
        sides = zip(self.parts.gathers, *(x.split(sizes, 1) for x in (log_s, log_t, ids)), strict=True)
        gathered = [
            Gathered(i.clamp(min=0), i >= 0, s, None if gather.teacher is None else t)
            for gather, s, t, i in sides
        ]
        return Values(dense, gathered)

    def _reference(self, counts: Tensor) -> Values:
        """By the definition: full logits, autograd's gradient."""
        call = self.call
        student, teacher, *rowwise, text = call.inputs(call.packed)
        problem, _ = ops.problem_of(student, teacher, rowwise, text)
        return reference_values(problem, counts)


def _with_given(objective: Objective, parts: Parts) -> Objective:
    """The objective by which the call is checked: one that has the given support, if any part has."""
    objectives = [dense.objective for dense in parts.dense if dense.objective is not None]
    supports = [x.support for x in objectives] + [x.support for x in parts.gathers]
    given = [support for support in supports if support is not None and support.of == "given"]
    return replace(objective.of_rows, support=given[0]) if given else objective
