"""The reusable buffers that hold the logits of a chunk of rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_kernels.engine.problem import Problem
from opsd_kernels.engine.projection import Projection
from opsd_kernels.engine.teachers import LogitsSource

ALL = slice(None)


@dataclass(frozen=True)
class DenseStore:
    """Student's and teacher's logits `[C, V]` in fp32 (or fp64), by one matrix product each.

    Args:
        student: fills the first buffer.
        teacher: fills the second.
        buffers: `[2, C, V]`.
    """

    student: Projection
    teacher: LogitsSource
    buffers: Tensor

    @staticmethod
    def entry_bytes(problem: Problem) -> int:
        """Of one side's logit."""
        return problem.dtype.itemsize

    @classmethod
    def of(cls, problem: Problem, student: Projection, teacher: LogitsSource, rows: int) -> "DenseStore":
        """Buffers for `rows` rows, which start at multiples of 64 bytes, as matrix products like it."""
        width = -(-problem.vocab // 16) * 16
        return cls(student, teacher, torch.empty(2, rows, width, **problem.like)[..., : problem.vocab])

    def fill_(self, span: slice) -> tuple[Tensor, Tensor]:
        """Student's and teacher's z / T of the live rows `span`; valid until the next call."""
        z_s, z_t = self.buffers[:, : span.stop - span.start]
        self.student.logits_(z_s, span, ALL)
        self.teacher.logits_(z_t, span, ALL, z_s)
        return z_s, z_t
