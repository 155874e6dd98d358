"""The inputs that every contender of a run shares."""

import importlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from opsd_kernels import Objective

# Standard deviation of the logits: at vocabularies of 32k to 256k it gives a mean entropy of 1.4 to 2 nats,
# like a language model. torch.rand or an independent teacher would hide the accuracy problem.
LOGIT_STD = 7.5
FLOOR_MEMORY_SHARE = 0.6  # of the free memory, for the buffer of the bare matrix products
IGNORED = -100  # the label that PyTorch and the peers give to a row that does not count


@dataclass(frozen=True)
class Case:
    """One benchmark problem: N tokens, vocabulary V, width H, student = teacher + noise.

    Args:
        rows: N.
        vocab: V.
        hidden: H.
        gap: standard deviation of the student's logits minus the teacher's, in nats.
        objective: name of the objective.
        dtype: name of the torch dtype of hidden states and head.
        trainable_head: whether dW is needed.
        masked: share of the rows that do not count.
        temperature: T of both distributions.
        beta: the teacher's share of the mixture, for `"jsd"`.
        device: `"cpu"` or `"cuda"`.
        recorded: file of hidden states of a real model; `gap` then says nothing.
    """

    rows: int = 2048
    vocab: int = 49152
    hidden: int = 576
    gap: float = 1.0
    objective: str = "opsd"
    dtype: str = "float32"
    trainable_head: bool = True
    masked: float = 0.0
    temperature: float = 1.0
    beta: float = 0.5
    device: str = "cpu"
    recorded: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def loss_objective(self) -> str | Objective:
        """What `opsd_kernels.loss` takes."""
        return Objective("jsd", beta=self.beta) if self.objective == "jsd" else self.objective

    @property
    def peer_beta(self) -> float:
        """The objective as GKD's beta, which Liger and TRL take: 0 is forward KL, 1 reverse KL."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": self.beta}[self.objective]

    @property
    def reduced_precision(self) -> bool:
        """Whether the tensors have 16 bits."""
        return self.dtype != "float32"


def load_recording(path: str) -> Any:
    """Hidden states of a real model: `student`, `teacher` `[N, H]` and `head` `[V, H]`, all bf16."""
    return importlib.import_module("bench.recorded").load(Path(path))


@dataclass
class Inputs:
    """Tensors of a case: leaves `student` `[N, H]` and `head` `[V, H]`, constant `teacher` `[N, H]`.

    `mask` is bool `[N]`, True where a row counts, or None if all do.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    head: torch.Tensor
    mask: torch.Tensor | None = None

    @classmethod
    def of(cls, case: Case, seed: int = 0) -> "Inputs":
        """Draws the tensors on the case's device, or reads its recording."""
        if case.recorded is not None:
            return cls._recorded(case, seed)
        generator = torch.Generator(case.device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=case.device)

        head = normal(case.vocab, case.hidden).mul_(LOGIT_STD / case.hidden**0.5)
        teacher = normal(case.rows, case.hidden)
        student = normal(case.rows, case.hidden).mul_(case.gap / LOGIT_STD).add_(teacher)
        return cls._leaves(case, student, teacher, head, seed)

    @classmethod
    def _recorded(cls, case: Case, seed: int) -> "Inputs":
        assert case.recorded is not None
        recording = load_recording(case.recorded)
        student, teacher = recording.student[: case.rows], recording.teacher[: case.rows]
        return cls._leaves(case, student, teacher, recording.head, seed)

    @classmethod
    def _leaves(
        cls, case: Case, student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, seed: int
    ) -> "Inputs":
        dtype = getattr(torch, case.dtype)
        mask = None
        if case.masked:
            order = torch.randperm(len(student), generator=torch.Generator().manual_seed(seed))
            mask = order >= round(case.masked * len(student))
            mask[order.argmax()] = mask[0]
            mask[0] = True  # so that the first rows alone are a problem, too
            mask = mask.to(case.device)
        return cls(
            student=student.to(case.device, dtype).requires_grad_(),
            teacher=teacher.to(case.device, dtype),
            head=head.to(case.device, dtype).requires_grad_(case.trainable_head),
            mask=mask,
        )

    @cached_property
    def count(self) -> int:
        """Number of rows that count."""
        return len(self.student) if self.mask is None else int(self.mask.sum())

    @cached_property
    def live_rows(self) -> torch.Tensor:
        """Indices of the rows that count, int64."""
        if self.mask is None:
            return torch.arange(len(self.student), device=self.student.device)
        return self.mask.nonzero()[:, 0]

    @cached_property
    def live_states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Student's and teacher's rows that count, without gradient, for the floor."""
        student = self.student.detach()
        if self.mask is None:
            return student, self.teacher
        return student[self.live_rows], self.teacher[self.live_rows]

    @cached_property
    def floor_pieces(self) -> int:
        """In how many pieces of rows the floor's `[N, V]` buffer fits the device: 1 but for very many rows.

        Asked once, because asking a GPU takes time that is not the floor's.
        """
        if self.student.device.type != "cuda":
            return 1
        free, _ = torch.cuda.mem_get_info()
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        needed = self.count * len(self.head) * self.head.element_size()
        return max(1, -(-needed // int(FLOOR_MEMORY_SHARE * free)))

    @cached_property
    def labels(self) -> torch.Tensor:
        """The mask as labels, int64 `[N]`: 0 where a row counts, else -100."""
        labels = torch.zeros(len(self.student), dtype=torch.int64, device=self.student.device)
        return labels if self.mask is None else labels.masked_fill(~self.mask, IGNORED)

    def first_rows(self, rows: int) -> "Inputs":
        """The same problem over the first rows, for the comparison with fp64."""
        student = self.student.detach()[:rows].clone().requires_grad_()
        head = self.head.detach().requires_grad_(self.head.requires_grad)
        return Inputs(student, self.teacher[:rows], head, None if self.mask is None else self.mask[:rows])

    def clear_gradients(self) -> None:
        """Sets the gradients to None, as an optimizer's zero_grad does."""
        self.student.grad = self.head.grad = None
