"""The inputs that every contender of a run shares."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

# Standard deviation of the logits: at vocabularies of 32k to 256k it gives an entropy of 0.5 to 2 nats, like
# a language model. torch.rand or an independent teacher would hide the accuracy problem, and flatter speed.
LOGIT_STD = 4.5


@dataclass(frozen=True)
class Case:
    """One benchmark problem: N tokens, vocabulary V, width H, student = teacher + noise.

    Args:
        rows: N.
        vocab: V.
        hidden: H.
        gap: standard deviation of the student's logits minus the teacher's.
        objective: name of the objective.
        dtype: name of the torch dtype of hidden states and head.
        trainable_head: whether dW is needed.
    """

    rows: int = 2048
    vocab: int = 49152
    hidden: int = 576
    gap: float = 1.0
    objective: str = "opsd"
    dtype: str = "float32"
    trainable_head: bool = True

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass
class Inputs:
    """Tensors of a case: leaves `student` `[N, H]` and `head` `[V, H]`, constant `teacher` `[N, H]`."""

    student: torch.Tensor
    teacher: torch.Tensor
    head: torch.Tensor

    @classmethod
    def of(cls, case: Case, device: str = "cpu", seed: int = 0) -> "Inputs":
        """Draws the tensors; the same case and seed give the same numbers on every device."""
        generator = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, case.dtype)
        head = torch.randn(case.vocab, case.hidden, generator=generator) * (LOGIT_STD / case.hidden**0.5)
        teacher = torch.randn(case.rows, case.hidden, generator=generator)
        noise = torch.randn(case.rows, case.hidden, generator=generator)
        student = teacher + noise * (case.gap / LOGIT_STD)
        return cls(
            student=student.to(device, dtype).requires_grad_(),
            teacher=teacher.to(device, dtype),
            head=head.to(device, dtype).requires_grad_(case.trainable_head),
        )

    def first_rows(self, rows: int) -> "Inputs":
        """The same problem over the first rows, for the comparison with fp64."""
        student = self.student.detach()[:rows].clone().requires_grad_()
        head = self.head.detach().requires_grad_(self.head.requires_grad)
        return Inputs(student, self.teacher[:rows], head)

    def clear_gradients(self) -> None:
        """Sets the gradients to None, as an optimizer's zero_grad does."""
        self.student.grad = self.head.grad = None
