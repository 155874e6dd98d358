"""The part of a run's configuration that concerns what is seen and kept of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from opsd_train.evaluation.verify import Verifier
from opsd_train.fields import option


@dataclass
class WatchConfig:
    """Options of metrics, completions and evaluation."""

    mass_top_k: int = option(
        20,
        "Measure what the teacher gives to so many most likely tokens of the student, at logged steps; two "
        "more products with the head there. 0 is off.",
    )
    save_completions_every: int = option(
        20, "Write the completions of every so many steps to completions/ as Parquet; 0 is off."
    )
    eval_samples: int = option(1, "Completions sampled per held-out row in an evaluation.")
    eval_k: str | None = option(None, "Estimate pass@k for these k, say 1,4,8; None is 1 and `eval_samples`.")

    eval_seconds: float = option(
        0.0, "Give an evaluation up after so many seconds, without a result, and train on; 0 is never."
    )

    def check_watch(self) -> None:
        """ValueError for an option that is out of range, and for a tracker that is not installed."""
        numbers = {"mass_top_k": 0, "save_completions_every": 0, "eval_samples": 1, "eval_seconds": 0}
        for name, least in numbers.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected a number at least {least}, got {getattr(self, name)}")
        for name in ("metric_for_best_model", "fsdp", "deepspeed"):
            if self.eval_seconds and getattr(self, name, None):
                raise ValueError(
                    f"eval_seconds: expected 0 with {name}, which takes every evaluation to its end; got "
                    f"{self.eval_seconds:g}"
                )
        self.to_ks()
        self.to_judge()
        trackers: Any = getattr(self, "report_to", None) or []
        _check_trackers([trackers] if isinstance(trackers, str) else trackers)

    def to_ks(self) -> tuple[int, ...]:
        """The k of pass@k, rising."""
        if self.eval_k is None:
            return tuple(sorted({1, self.eval_samples}))
        try:
            found = sorted({int(word) for word in str(self.eval_k).split(",")})
        except ValueError:
            raise ValueError(f"eval_k: expected integers like 1,4,8; got {self.eval_k!r}") from None
        if not 1 <= found[0] <= found[-1] <= self.eval_samples:
            raise ValueError(f"eval_k: expected 1 to {self.eval_samples} (eval_samples); got {self.eval_k!r}")
        return tuple(found)

    def to_judge(self) -> Verifier:
        """Who says which completions of an evaluation are right."""
        return Verifier.named(getattr(self, "eval_match"), "eval_match")  # noqa: B009


def _check_trackers(names: Iterable[str]) -> None:
    from transformers.integrations import integration_utils  # looks around for every tracker there is

    installed = integration_utils.get_available_reporting_integrations()
    for name in names:
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(integration_utils.INTEGRATION_TO_CALLBACK))
            raise ValueError(f"report_to: expected none or some of {known}; got {name!r}")
        if name not in installed:
            raise ValueError(f"report_to: expected a tracker that is installed; {name!r} is not")
