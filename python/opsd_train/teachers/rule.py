"""Which weights teach, and how they follow the student."""

from dataclasses import dataclass

from opsd_train.redaction import redacted_url
from opsd_train.teachers.served import ServedRule

KINDS = ("initial", "live", "ema", "sync", "trust_region", "model", "served")


@dataclass(frozen=True)
class TeacherRule:
    """Which weights the teacher has, and how they follow the student.

    Args:
        kind: one of `KINDS`. `initial`: those that training started from; `live`: those of this step; `ema`:
            a moving average; `sync`: a copy that is renewed; `trust_region`: a geometric mixture of `initial`
            and `live`; `model`: another model's; `served`: those of a vLLM server.
        decay: of `ema`, in [0, 1).
        every: optimizer steps from one update of `ema` or `sync` to the next.
        copy_every: optimizer steps after which `ema` is set to the student itself; 0 for never.
        share: of `live` in `trust_region`, in [0, 1].
        model: folder or hub id, of `model`.
        served: how the server is asked, of `served`.
    """

    kind: str = "initial"
    decay: float = 0.98
    every: int = 1
    copy_every: int = 0
    share: float = 0.05
    model: str | None = None
    served: ServedRule | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"teacher: expected one of {', '.join(KINDS)}; got {self.kind!r}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema_decay: expected a number at least 0 and below 1, got {self.decay}")
        if self.every < 1 or self.copy_every < 0:
            raise ValueError(
                "teacher_every: expected at least 1, and teacher_copy_every at least 0; got "
                f"{self.every} and {self.copy_every}"
            )
        if not 0 <= self.share <= 1:
            raise ValueError(f"teacher_share: expected a number in [0, 1], got {self.share}")
        if (self.kind == "model") != (self.model is not None):
            raise ValueError(
                f"teacher_model: expected a folder or hub id with teacher 'model' and only then; got "
                f"{self.model!r} with {self.kind!r}"
            )

        if (self.kind == "served") != (self.served is not None):
            raise ValueError(f"teacher: expected 'served' with a server and only then; got {self.kind!r}")

    def __str__(self) -> str:
        if self.served is not None:
            url = redacted_url(self.served.url)
            return f"served by {url}, the student's {self.served.top_k} most likely tokens"
        every = f" every {self.every} steps" if self.every > 1 else ""
        copied = f", copied every {self.copy_every}" if self.copy_every else ""
        return {
            "ema": f"ema (decay {self.decay}{every}{copied})",
            "sync": f"sync{every}",
            "trust_region": f"trust_region (share {self.share})",
            "model": f"model {self.model}",
        }.get(self.kind, self.kind)
