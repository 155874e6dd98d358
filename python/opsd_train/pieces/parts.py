"""The pieces of a run beside its loss, as the trainer meets them: what they are made of, log and save."""

import os
from collections.abc import Callable

import torch

from opsd_train.config import OPSDConfig
from opsd_train.method import MethodRun
from opsd_train.pieces.effopd import Extrapolation, layer_weights
from opsd_train.pieces.empty import EmptySteps
from opsd_train.pieces.exposure_run import ExposedTeacher
from opsd_train.pieces.private_run import PrivateSteps
from opsd_train.pieces.subnetwork import restrict_to_moved
from opsd_train.teachers.weights import Teacher


class Pieces:
    """Those that the configuration asks for; the others are None.

    Args:
        config: see `PiecesConfig`.
        student: the model in training, before it and on its device; the teacher has copied what it needs.
        teacher: of the run.
        method: of the run.
        rows: of the training set.
        score: greedy accuracy of the student as it is, on the rows held back.
    """

    def __init__(
        self,
        config: OPSDConfig,
        student: torch.nn.Module,
        teacher: Teacher,
        method: MethodRun | None,
        rows: int,
        score: Callable[[], float],
    ) -> None:
        self.exposure: ExposedTeacher | None = None
        self.private: PrivateSteps | None = None
        self.extrapolation: Extrapolation | None = None
        self.empty = EmptySteps(config.length_gate)
        exposure, private = config.to_exposure(), config.to_private()
        if exposure is not None and method is not None:
            self.exposure = ExposedTeacher(exposure, method, teacher)
        if config.subnetwork is not None:
            restrict_to_moved(student, config.subnetwork, config.subnetwork_share)
        if private is not None:
            self.private = PrivateSteps(private, student, rows, config.per_device_train_batch_size)
        if config.extrapolate:
            self.extrapolation = Extrapolation(layer_weights(student), score)

    def metrics(self, steps: int) -> dict[str, float]:
        """What they add to a line of metrics after so many optimizer steps."""
        found: dict[str, float] = self.empty.metrics()
        if self.exposure is not None:
            found |= self.exposure.metrics()
        if self.private is not None:
            found |= self.private.metrics(steps)
        if self.extrapolation is not None:
            found |= self.extrapolation.metrics()
        return found

    def save(self, checkpoint: str | os.PathLike[str]) -> None:
        """Write into a checkpoint's folder what a resumed run could not know."""
        for one in (self.exposure, self.extrapolation):
            if one is not None:
                one.save(checkpoint)

    def load(self, checkpoint: str | os.PathLike[str]) -> None:
        """Go on from what `save` wrote."""
        for one in (self.exposure, self.extrapolation):
            if one is not None:
                one.load(checkpoint)
