"""What is kept of a step that ended a run: enough to compute its loss again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from opsd_train.json_files import dumps, write_atomically
from opsd_train.steps import Written


@dataclass(frozen=True)
class BadStep:
    """A step as one rank saw it.

    `save` writes `rank-R.safetensors` with the tensors of every micro-batch, `0.input_ids` and so on, and
    `rank-R.json` with the losses of the micro-batches, the norm of the gradient (null is a number that is not
    finite) and, for each row, where its prompt is from and the loss of the row on its own. Losses are as the
    trainer computes them: in a run of several processes times their number.

    Args:
        step: counted from 1, so that the checkpoint before it is that of `step - 1`.
        rank: of the process.
        grad_norm: over all ranks, before clipping.
        skipped_steps: of the whole run.
        written: the rollouts, if the trainer said.
        parts: the micro-batches, each with its part of the step's loss.
    """

    step: int
    rank: int
    grad_norm: float
    skipped_steps: int
    written: Written | None
    parts: Sequence[tuple[Mapping[str, Tensor], Tensor]]

    def rows(self) -> Iterator[dict[str, Tensor]]:
        """Every row as a batch of its own, without what says by how many tokens of others it is divided."""
        for batch, _ in self.parts:
            columns = {name: x for name, x in batch.items() if not name.startswith("count_")}
            for i in range(_rows_of(columns)):
                yield {name: x[i : i + 1] for name, x in columns.items()}

    def save(self, folder: Path, losses: Sequence[float] | None = None) -> None:
        """Write this rank's files; `losses` are those of the rows, None as long as they are not known."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{i}.{name}": x.detach().cpu().contiguous().clone()
            for i, (batch, _) in enumerate(self.parts)
            for name, x in batch.items()
        }
        save_file(tensors, folder / f"rank-{self.rank}.safetensors", metadata={"format": "pt"})
        about = {
            "step": self.step,
            "rank": self.rank,
            "losses": [loss.item() for _, loss in self.parts],
            "grad_norm": self.grad_norm,
            "skipped_steps": self.skipped_steps,
            "rows": self._described(losses),
        }
        write_atomically(folder / f"rank-{self.rank}.json", dumps(about, indent=1))

    def _described(self, losses: Sequence[float] | None) -> list[dict[str, object]]:
        """What is known of each row."""
        sizes = [_rows_of(batch) for batch, _ in self.parts]
        places = [(batch, row) for batch, size in enumerate(sizes) for row in range(size)]
        found: list[dict[str, object]] = [{"batch": batch, "row": row} for batch, row in places]
        if self.written is not None and len(self.written.rollouts) == len(found):
            for one, rollout in zip(found, self.written.rollouts, strict=True):
                one["where"] = rollout.prompt.where
        for one, loss in zip(found, losses or [], strict=False):
            one["loss"] = loss
        return found


def _rows_of(batch: Mapping[str, Tensor]) -> int:
    """Rows of a micro-batch; a step that drew none has an empty one."""
    return next((len(x) for name, x in batch.items() if not name.startswith("count_")), 0)
