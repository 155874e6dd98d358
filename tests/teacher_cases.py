"""Teachers made of several sources, of every kind, beside one student: for tests."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from opsd_kernels import Hidden, Logits, LogLinear, Mixture, Routed
from opsd_kernels.testing import hidden_case

LEAD, V, H = (3, 11), 131, 24
CHUNKS_OF_4 = 2 * 4 * V * 4
NUMBERS = torch.arange(33).reshape(LEAD)
SIGNED = NUMBERS % 7 / 4.0 - 0.6  # -0.6 to 0.9
SHARES = NUMBERS % 5 / 4.0  # 0 to 1, both included
MASK = NUMBERS % 4 != 1
WEIGHTS = NUMBERS % 3 * 0.7 - 0.3


class World:
    """A student and as many streams as asked for: with its head, with heads of their own, or as logits."""

    def __init__(self, dtype: torch.dtype = torch.float32, **head: Any) -> None:
        self.student = hidden_case(LEAD, V, H, **head).to(dtype).student
        self.dtype = dtype
        self.head = head

    def shared(self, k: int) -> Hidden:
        noise = torch.randn(*LEAD, H, generator=torch.Generator().manual_seed(k))
        return replace(self.student, hidden=(self.student.hidden + 0.3 * noise).to(self.dtype))

    def own(self, k: int) -> Hidden:
        return hidden_case(LEAD, V, H + k, seed=100 + k, peak=2.0, **self.head).to(self.dtype).student

    def logits(self, k: int) -> Logits:
        """Each stream excludes another column, which the student has: only for a forward KL or a JSD."""
        z = 2 * torch.randn(*LEAD, V, generator=torch.Generator().manual_seed(200 + k))
        z[..., k] = -torch.inf
        return Logits(z.to(self.dtype))

    def me(self) -> Hidden:
        return self.student.with_tensors([x.detach() for x in self.student.tensors])

    def biased(self, stream: Hidden) -> Hidden:
        return replace(stream, bias=torch.linspace(-1, 2, V).to(self.dtype))

    def teacher(self, name: str) -> Any:
        return TEACHERS[name](self)


TEACHERS: dict[str, Callable[[World], Any]] = {
    "shared head": lambda w: LogLinear([(0.7, w.shared(1)), (0.9, w.shared(2))]),
    "shared head, by logits": lambda w: LogLinear([(0.7, w.shared(1)), (0.9, w.shared(2))], mix="logits"),
    "shared head, extrapolated": lambda w: LogLinear([(1.5, w.shared(1)), (-0.5, w.shared(2))]),
    "shared head, per token": lambda w: LogLinear(
        [(SIGNED, w.shared(1)), (1.2 - SIGNED, w.shared(2)), (0.1, w.shared(3))]
    ),
    "own heads": lambda w: LogLinear([(0.3, w.own(1)), (-0.4, w.own(2)), (0.8, w.own(3))]),
    "own heads, per token": lambda w: LogLinear([(SIGNED.bfloat16(), w.own(1)), (SHARES.double(), w.own(2))]),
    "logits": lambda w: LogLinear([(0.6, w.logits(1)), (-0.2, w.logits(2)), (0.5, w.own(1))]),
    "student in a shared head": lambda w: LogLinear([(0.4, w.me()), (0.8, w.shared(1))]),
    "student beside a head": lambda w: LogLinear([(SIGNED, w.me()), (0.8, w.own(1))]),
    # What looks like one head, or like the student, and is not.
    "one head, two scales": lambda w: LogLinear(
        [(0.6, w.shared(1)), (0.5, replace(w.shared(2), logit_scale=0.4))]
    ),
    "one head, two biases": lambda w: LogLinear([(0.6, w.shared(1)), (0.5, w.biased(w.shared(2)))]),
    "one head, a soft-cap": lambda w: LogLinear([(0.6, w.shared(1)), (0.5, replace(w.me(), softcap=3.0))]),
    "student, but for its scale": lambda w: LogLinear(
        [(0.6, replace(w.me(), logit_scale=0.4)), (0.5, w.own(1))]
    ),
    "student, but for its bias": lambda w: LogLinear([(0.6, w.biased(w.me())), (0.5, w.own(1))]),
    "student, but for its soft-cap": lambda w: LogLinear(
        [(0.6, replace(w.me(), softcap=3.0)), (0.5, w.own(1))]
    ),
    "mixture": lambda w: Mixture([(0.3, w.shared(1)), (0.2, w.own(1)), (0.5, w.logits(1))]),
    "mixture, per token": lambda w: Mixture([(SHARES, w.logits(1)), (1 - SHARES, w.own(1))]),
    "mixture of log-linear": lambda w: Mixture(
        [
            (0.25, LogLinear([(0.5, w.shared(1)), (0.7, w.shared(2))])),
            (0.75, LogLinear([(SIGNED, w.me()), (0.6, w.own(1))])),
        ]
    ),
    "routed": lambda w: Routed([w.shared(1), w.own(1), w.logits(2)], NUMBERS % 3),
    "routed to everything": lambda w: Routed(
        [
            w.own(2),
            LogLinear([(SIGNED, w.shared(1)), (0.5, w.me())]),
            LogLinear([(SHARES, w.me()), (0.5, w.own(1))]),
            Mixture([(SHARES, w.shared(2)), (1 - SHARES, LogLinear([(1.3, w.own(1))]))]),
            w.logits(1),
        ],
        (NUMBERS * 7 % 5).to(torch.uint8),
    ),
}
FEW = ("shared head, per token", "own heads", "student beside a head", "mixture", "routed to everything")
