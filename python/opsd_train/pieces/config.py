"""The part of a run's configuration that concerns pieces beside the loss, each of which may be had or not."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from opsd_train.fields import json_object, option
from opsd_train.pieces.exposure import ExposureSettings
from opsd_train.pieces.horizon import Counting, Turns
from opsd_train.pieces.private_run import PrivateSettings

Settings = TypeVar("Settings")


@dataclass
class PiecesConfig:
    """Options of the pieces; the defaults are those of none."""

    exposure: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "JSON for a controller that learns how much of the solution the context "
            'partial_solution shows, say {"hold": 5}; {} for its defaults.'
        },
    )
    extrapolate: int = option(
        0,
        "Go on along the weights' path after steps 1, 2, 4, ... while greedy accuracy improves on so many "
        "training rows, which are held back for it; 0 is never.",
    )
    private: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "JSON for differentially private steps: clipped gradients of single rows, noise and "
            'Poisson sampling, say {"clip": 1.0, "noise": 1.0, "delta": 1e-5}; {} for the defaults.'
        },
    )
    subnetwork: str | None = option(
        None, "Train only the weights that moved most from the model's to those in this run or model folder."
    )
    subnetwork_share: float = option(0.2, "Share of all weights that the sub-network has.")
    offline: str | None = option(
        None, "Train from this folder, which `opsd cache` wrote, without generation and without a teacher."
    )
    turns: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "JSON for how many turns of a rollout count, by the annotator's column `turn`, say "
            '{"start": 1, "every": 10, "order": "forward"} (or "backward").'
        },
    )
    length_gate: int | None = option(None, "Rollouts of more tokens do not count in the loss.")

    def check_pieces(self) -> None:
        """ValueError naming the option that is wrong, or that does not go with another."""
        for name in ("exposure", "private", "turns"):
            if getattr(self, name) is not None:
                setattr(self, name, json_object(name, getattr(self, name)))
        self.to_exposure()
        self.to_private()
        self.to_counting()
        if self.extrapolate < 0:
            raise ValueError(f"extrapolate: expected at least 0; got {self.extrapolate}")
        if not 0 < self.subnetwork_share <= 1:
            raise ValueError(
                f"subnetwork_share: expected a number above 0, at most 1; got {self.subnetwork_share}"
            )
        for name, broken, expected in self._conflicts():
            if broken:
                raise ValueError(f"{name}: expected {expected}")

    def to_exposure(self) -> ExposureSettings | None:
        """The controller's constants; horizon and seed are the run's unless the option says otherwise."""
        if self.exposure is None:
            return None
        run = {"horizon": max(self._other("max_steps"), 1), "seed": self._other("seed")}
        return settings_of("exposure", ExposureSettings, {**run, **dict(self.exposure)})  # type: ignore[arg-type]

    def to_private(self) -> PrivateSettings | None:
        """How private steps are."""
        return None if self.private is None else settings_of("private", PrivateSettings, dict(self.private))  # type: ignore[arg-type]

    def to_counting(self) -> Counting:
        """Which tokens of rollouts count."""
        if self.length_gate is not None and self.length_gate < 1:
            raise ValueError(f"length_gate: expected at least 1; got {self.length_gate}")
        turns = None if self.turns is None else settings_of("turns", Turns, dict(self.turns))  # type: ignore[arg-type]
        return Counting(turns, self.length_gate)

    def _conflicts(self) -> list[tuple[str, bool, str]]:
        """(option, whether it is broken, what it expects)."""
        no_method = self._other("method") is None
        offline, private = self.offline is not None, self.private is not None
        found = [
            ("exposure", self.exposure is not None and no_method, "a method; got none"),
            ("turns", self.turns is not None and no_method, "a method; got none"),
            ("offline", offline and no_method, "a method; got none"),
            (
                "turns",
                self.turns is not None and self._other("annotator") is None,
                "an annotator that makes the column 'turn'; got none",
            ),
            (
                "subnetwork",
                self.subnetwork is not None and self._other("weight_decay") != 0,
                f"weight_decay 0, which moves the other weights too; got {self._other('weight_decay')}",
            ),
        ]
        plain: dict[str, Any] = {"gradient_accumulation_steps": 1, "num_generations": 1, "fp16": False}
        alone: dict[str, Any] = {"exposure": None, "extrapolate": 0, "subnetwork": None}
        stored: dict[str, Any] = {
            "exposure": None,
            "contexts": {},
            "pool": None,
            "horizon": {},
            "teacher": "initial",
        }
        for name, chosen, wanted, why in (
            ("private", private, plain, "an example is one row, and a step one batch"),
            ("private", private, alone, "epsilon does not cover it"),
            ("offline", offline, stored, "the cache holds the rollouts and what its teacher said"),
        ):
            for other, value in wanted.items():
                got = self._other(other)
                found.append((name, chosen and got != value, f"{other} {value!r}, since {why}; got {got!r}"))
        return found

    def _other(self, name: str) -> Any:
        return getattr(self, name)


def settings_of(name: str, kind: type[Settings], given: Mapping[str, Any]) -> Settings:
    """A dataclass of settings from an option's JSON; ValueError naming the option."""
    known = [one.name for one in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise ValueError(f"{name}: expected options among {', '.join(known)}; got {key!r}")
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
