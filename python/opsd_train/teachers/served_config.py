"""The part of a run's configuration that concerns a teacher behind a vLLM server."""

import dataclasses
from dataclasses import dataclass

from opsd_kernels import Objective, Support
from opsd_train.engines.patience import Patience
from opsd_train.fields import option
from opsd_train.redaction import redacted_url
from opsd_train.teachers.served import SCORES, ServedRule


@dataclass
class ServedConfig:
    """Options of `--teacher served`."""

    teacher_url: str | None = option(
        None,
        "The vLLM server of a `served` teacher, started with --enable-scale-out; it shares the tokenizer.",
    )
    teacher_served_top_k: int = option(
        64, "A `served` teacher says how likely the student's so many most likely tokens are."
    )
    teacher_rest: str = option(
        "tail",
        "What the loss makes of the other tokens with a `served` teacher: `tail` (one more entry with their "
        "exact mass), `renormalise`, `renormalise_teacher` or `drop`.",
    )
    teacher_scores: str = option(
        "ids",
        "How a `served` teacher is asked: `ids` (for these tokens alone; needs vLLM's V2 model runner) or "
        "`vocabulary` (for all log-probs, slow; needs --max-logprobs -1).",
    )
    teacher_concurrency: int = option(64, "Requests that a `served` teacher has at once.")

    def check_served(self) -> None:
        """ValueError for options that do not go together."""
        is_served = getattr(self, "teacher", "initial") == "served"
        if is_served != (self.teacher_url is not None):
            raise ValueError(
                "teacher_url: expected a URL with teacher 'served' and only then; got "
                f"{redacted_url(self.teacher_url or 'none')!r}"
            )
        if not is_served:
            return
        if self.teacher_scores not in SCORES:
            raise ValueError(
                f"teacher_scores: expected one of {', '.join(SCORES)}; got {self.teacher_scores!r}"
            )
        for name in ("teacher_served_top_k", "teacher_concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        temperature = getattr(self, "loss_temperature", 1.0)
        if temperature != 1:
            raise ValueError(
                "loss_temperature: expected 1 with teacher 'served', since vLLM says log-probs of prompts at "
                f"temperature 1 alone; got {temperature}"
            )
        for name in ("method", "offline"):
            if getattr(self, name, None) is not None:
                raise ValueError(
                    f"{name}: expected none with teacher 'served', which knows the student's most likely "
                    f"tokens alone; got {getattr(self, name)!r}"
                )

    def over_known(self, objective: Objective) -> Objective:
        """The objective over the entries that the teacher is asked for; as it is for other teachers.

        Raises ValueError for one over entries that a served teacher is not asked for.
        """
        if self.teacher_url is None:
            return objective
        own = objective.support
        if own is not None and own.of != "student":
            raise ValueError(
                f"objective: expected one over the student's tokens with teacher 'served'; got {own}"
            )
        rest = self.teacher_rest if own is None else own.rest
        return dataclasses.replace(objective, support=Support(None, "given", rest))

    def to_served(self, objective: Objective) -> ServedRule | None:
        """How the served teacher is asked; None for other teachers."""
        if self.teacher_url is None:
            return None
        own = objective.support
        count = self.teacher_served_top_k if own is None or own.k is None else own.k
        patience = getattr(self, "patience", Patience())
        return ServedRule(self.teacher_url, count, self.teacher_scores, self.teacher_concurrency, patience)
