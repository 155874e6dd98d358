"""What a model wrote, kept as Parquet: `completions/step-000020.parquet` of a run, one row per completion.

The files are plain tables: `pandas.read_parquet`, `datasets.load_dataset("parquet", ...)` and every other
reader of Parquet takes one or many of them. Each is written under another name and renamed, so that none is
ever half there.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from opsd_train.json_files import replacing
from opsd_train.reading.prompts import decode
from opsd_train.rollouts import Rollout

FOLDER = "completions"
SCHEMA = pa.schema(
    {
        "step": pa.int32(),  # optimizer steps, the one the completions were written for included
        "where": pa.string(),  # the row of the data
        "prompt": pa.string(),  # as it was fed to the model
        "completion": pa.string(),  # without special tokens, as a verifier reads it
        "token_ids": pa.list_(pa.int32()),  # of the completion, special tokens included
        "truncated": pa.bool_(),  # it reached the limit without an end
        "answer": pa.string(),
        "reward": pa.float32(),  # what the verifier said, null where it was not asked
        "decoding": pa.string(),  # training, greedy or sampled
        "version": pa.int32(),  # optimizer steps of the weights that wrote it
    }
)


def to_rows(
    rollouts: Sequence[Rollout],
    tokenizer: PreTrainedTokenizerBase,
    step: int,
    rewards: Sequence[float] = (),
    decoding: str = "training",
) -> list[dict[str, Any]]:
    """One row of `SCHEMA` per rollout; no rewards at all is a null in each."""
    given: Sequence[float | None] = list(rewards) or [None] * len(rollouts)
    return [
        {
            "step": step,
            "where": rollout.prompt.where,
            "prompt": decode(tokenizer, rollout.prompt.student_ids),
            "completion": decode(tokenizer, rollout.completion, skip_special_tokens=True),
            "token_ids": list(rollout.completion),
            "truncated": rollout.truncated,
            "answer": rollout.prompt.answer,
            "reward": None if reward is None else float(reward),
            "decoding": decoding,
            "version": rollout.version,
        }
        for rollout, reward in zip(rollouts, given, strict=True)
    ]


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of `SCHEMA` in place of an earlier file; a crash leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A lone surrogate, which half of a character decodes to at times, has no form in UTF-8.
    clean = [
        {name: _encodable(value) if isinstance(value, str) else value for name, value in row.items()}
        for row in rows
    ]
    with replacing(path) as file:
        parquet.write_table(pa.Table.from_pylist(clean, SCHEMA), file, compression="zstd")


class Completions:
    """Keeps the completions of a run's steps.

    Args:
        folder: of the run.
        every: keep those of every so many steps; 0 keeps none.
        tokenizer: of the completions.
        gather: a text of this process to those of all, in their order; see `Ranks.texts`.
        writes: whether this process writes the files; one of several does.
    """

    def __init__(
        self,
        folder: str | Path,
        every: int,
        tokenizer: PreTrainedTokenizerBase,
        gather: Callable[[str], Sequence[str]] = lambda own: [own],
        writes: bool = True,
    ) -> None:
        self.folder, self.every, self.tokenizer = Path(folder) / FOLDER, every, tokenizer
        self.gather, self.writes = gather, writes

    def keep(self, step: int, rollouts: Sequence[Rollout], rewards: Sequence[float] = ()) -> None:
        """Write the completions of a step, counted from 0, if it is one to keep; its file counts from 1.

        Every process calls it with its own; those of all are in the file, one process behind the other.
        """
        if self.every == 0 or (step + 1) % self.every:
            return
        own = json.dumps(to_rows(rollouts, self.tokenizer, step + 1, rewards))
        rows = [row for part in self.gather(own) for row in json.loads(part)]
        if rows and self.writes:
            write_parquet(self.folder / f"step-{step + 1:06}.parquet", rows)


def kept(folder: str | Path) -> list[Path]:
    """The files of a run's completions, by step."""
    return sorted((Path(folder) / FOLDER).glob("step-*.parquet"))


def step_of(path: Path) -> int:
    """The step of a file of completions, by its name."""
    return int(path.stem.removeprefix("step-"))


def _encodable(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode("utf-8")
