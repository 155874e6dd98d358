"""The part of a run's configuration that concerns what is seen and kept of it."""

from dataclasses import dataclass


@dataclass
class WatchConfig:
    """Options of metrics, completions and evaluation."""

    def check_watch(self) -> None:
        """ValueError for an option that is out of range."""
