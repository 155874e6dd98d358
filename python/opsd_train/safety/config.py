"""The part of a run's configuration that concerns what happens when something fails."""

from dataclasses import dataclass

from opsd_train.fields import option


@dataclass
class SafetyConfig:
    """Options of steps that are skipped and of ends before the end."""

    max_bad_steps: int = option(
        3,
        "A step whose loss or gradient is not finite is skipped; after so many in a row the run ends, and "
        "their last batch is in bad-step-N.",
    )

    def check_safety(self) -> None:
        """ValueError for an option that is out of range."""
        if self.max_bad_steps < 1:
            raise ValueError(f"max_bad_steps: expected a number at least 1, got {self.max_bad_steps}")
