"""The backend `"triton_paired"`: both sides' logits by one GEMM over the shared head, in 2 bytes an entry.

Everything after the logits is `"triton"`'s. It serves a student and a teacher with one head, over the whole
vocabulary, in a reduced loss or in statistics; anything else is refused.
"""

from dataclasses import dataclass

from opsd_kernels.backends.triton import (
    live_columns,
    normalisers,
    row_gradient_,
    row_loss,
    row_stats,
    slab_gradient_,
    softmax_gradient_,
    unsupported,
)
from opsd_kernels.backends.triton.paired import Head, Tiled, paired_logits_
from opsd_kernels.backends.triton.tiled import TiledSide
from opsd_kernels.engine.problem import Problem
from opsd_kernels.engine.projection import Projection
from opsd_kernels.engine.teachers import LogitsSource, same_head
from opsd_kernels.sources import Hidden

__all__ = [
    "LogitsStore",
    "live_columns",
    "normalisers",
    "row_gradient_",
    "row_loss",
    "row_stats",
    "slab_gradient_",
    "softmax_gradient_",
    "unsupported",
]


@dataclass(frozen=True)
class LogitsStore:
    """The logits of a chunk of rows as the paired-tile GEMM stores them.

    Args:
        student: hidden states and head.
        teacher: hidden states; the head is the same.
        tiled: buffers for C rows.
    """

    student: Projection
    teacher: Projection
    tiled: Tiled

    @staticmethod
    def entry_bytes(problem: Problem) -> int:
        """Of one side's logit, the tiles' statistics aside."""
        return 2

    @classmethod
    def of(cls, problem: Problem, student: Projection, teacher: LogitsSource, rows: int) -> "LogitsStore":
        """Buffers for `rows` rows."""
        s, t = problem.student, problem.teacher
        paired = isinstance(s, Hidden) and isinstance(t, Hidden) and same_head(s, t)
        if not paired or not isinstance(teacher, Projection) or problem.objective.support is not None:
            raise ValueError(
                "backend: expected 'triton' unless student and teacher are hidden states of one head (same "
                "weight, bias, scale, soft-cap) and the objective has no support; got 'triton_paired'"
            )
        return cls(student, teacher, Tiled.empty(rows, problem.vocab, problem.device))

    def fill_(self, span: slice) -> tuple[TiledSide, TiledSide]:
        """Student's and teacher's z / T of the live rows `span`; valid until the next call."""
        tiled = self.tiled.first(span.stop - span.start)
        source = self.student.source
        assert isinstance(source, Hidden)
        head = Head(source.bias, source.logit_scale, source.softcap, self.student.setting.temperature)
        operands = self.student.hidden(span), self.teacher.hidden(span), source.weight
        hidden_s, hidden_t, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in operands)
        paired_logits_(tiled, hidden_s, hidden_t, weight, head)
        return tiled.student, tiled.teacher
