"""The part of a run's configuration that concerns what happens when something fails."""

from dataclasses import dataclass


@dataclass
class SafetyConfig:
    """Options of steps that are skipped and of ends before the end."""

    def check_safety(self) -> None:
        """ValueError for an option that is out of range."""
