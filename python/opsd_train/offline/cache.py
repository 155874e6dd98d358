"""The files of a cache of rollouts and teacher log-probs, and how to read them.

    cache.json            how it was made, and how many rollouts there are
    shard-00000.parquet   a row per rollout, see `FEATURES`; so many rows each, the last one fewer

A shard is written beside its place and then renamed: it is there whole or not at all.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from opsd_train.json_files import dumps, replacing, write_atomically
from opsd_train.reading.prompts import Prompt
from opsd_train.rollouts import Rollout, collate
from opsd_train.run_folder import of_output

INFO = "cache.json"
_IDS, _FLOATS = datasets.Sequence(datasets.Value("int32")), datasets.Sequence(datasets.Value("float32"))
FEATURES = datasets.Features(
    {
        "student_ids": _IDS,
        "teacher_ids": _IDS,
        "answer": datasets.Value("string"),
        "where": datasets.Value("string"),
        "completion": _IDS,
        "truncated": datasets.Value("bool"),
        "student_logprob": _FLOATS,  # of the completion's tokens, [C]
        "teacher_logprob": _FLOATS,
        "top_ids": _IDS,  # the teacher's k most likely tokens of each, [C * k]
        "top_logprobs": _FLOATS,
    }
)


@dataclass(frozen=True)
class CachedRollout:
    """A rollout with its columns, of C tokens.

    Args:
        rollout: prompt and completion.
        student_logprob: `[C]` fp32, of the completion's tokens under the student that wrote them.
        teacher_logprob: `[C]` fp32, the teacher's.
        top_ids: `[C, k]` int64, the teacher's most likely tokens, the most likely first; k may be 0.
        top_logprobs: `[C, k]` fp32, their log-probs in the softmax over the whole vocabulary.
    """

    rollout: Rollout
    student_logprob: Tensor
    teacher_logprob: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


class Cache(Sequence[CachedRollout]):
    """The rollouts of a whole cache in the order they were written; rows stay on the disk until asked for.

    Args:
        folder: as a `Writer` made it.

    Raises:
        ValueError: there is no cache, or shards are missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        path = Path(folder)
        self.info = read_info(path)
        """cache.json: the writer's `about` and options, `rollouts`, `prompts`."""
        paths = [shard_path(path, shard) for shard in range(_shards(self.info))]
        missing = [one.name for one in paths if not one.exists()]
        if missing:
            raise ValueError(
                f"cache: expected {len(paths)} shards in {folder}; {len(missing)} are missing, the first "
                f"{missing[0]}; go on writing it"
            )
        found = datasets.load_dataset(
            "parquet", data_files=[str(one) for one in paths], split="train", trust_remote_code=False
        )
        self._rows = found.with_format("numpy")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._rows[range(len(self))[index]]
        prompt = Prompt(
            student_ids=tuple(row["student_ids"].tolist()),
            teacher_ids=tuple(row["teacher_ids"].tolist()),
            answer=None if row["answer"] is None else str(row["answer"]),
            where=str(row["where"]),
        )
        completion = tuple(row["completion"].tolist())
        top = (len(completion), self.info["top_k"])
        return CachedRollout(
            rollout=Rollout(prompt, completion, truncated=bool(row["truncated"])),
            student_logprob=torch.tensor(row["student_logprob"], dtype=torch.float32),
            teacher_logprob=torch.tensor(row["teacher_logprob"], dtype=torch.float32),
            top_ids=torch.tensor(row["top_ids"], dtype=torch.int64).view(top),
            top_logprobs=torch.tensor(row["top_logprobs"], dtype=torch.float32).view(top),
        )


def collate_cached(items: Sequence[CachedRollout], pad_id: int) -> dict[str, Tensor]:
    """The batch of `rollouts.collate` with the columns of its tokens, padded on the right.

    `rollout_logprob` and `teacher_logprob` [B, C] fp32, 0 at padding; `top_ids` [B, C, k] int64, -1 at
    padding, as `loss(support_ids=...)` takes them; `top_logprobs` [B, C, k] fp32, -inf at padding.
    """
    batch = collate([item.rollout for item in items], pad_id)
    columns = {
        "rollout_logprob": ([item.student_logprob for item in items], 0.0),
        "teacher_logprob": ([item.teacher_logprob for item in items], 0.0),
        "top_ids": ([item.top_ids for item in items], -1),
        "top_logprobs": ([item.top_logprobs for item in items], -torch.inf),
    }
    return batch | {
        name: torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=padding)
        for name, (column, padding) in columns.items()
    }


def begin(folder: Path, info: Mapping[str, Any]) -> int:
    """Write cache.json, or check that the cache begun there is this one; returns the number of shards."""
    wanted = json.loads(dumps(info))
    if (folder / INFO).exists():
        found = read_info(folder)
        different = sorted(key for key in found | wanted if found.get(key) != wanted.get(key))
        if different:
            what = ", ".join(f"{key} {found.get(key)!r}, not {wanted.get(key)!r}" for key in different)
            raise ValueError(f"out: {folder} holds a cache with {what}; choose another folder")
    else:
        if stray := sorted(folder.glob(shard_path(folder, 0).name.replace("00000", "*"))):
            raise ValueError(f"out: expected a cache or no shards in {folder}, got {stray[0]} without {INFO}")
        with of_output(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / INFO, dumps(info, indent=1))
    return _shards(wanted)


def write_shard(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one file of rows, whole or not at all."""
    with replacing(path) as file:
        datasets.Dataset.from_list([dict(row) for row in rows], features=FEATURES).to_parquet(file)


def shard_path(folder: Path, shard: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{shard:05d}.parquet"


def read_info(folder: Path) -> dict[str, Any]:
    """cache.json; ValueError without one."""
    try:
        return dict(json.loads((folder / INFO).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"cache: expected a readable {INFO} in {folder}; {error}") from None


def digest(prompts: Sequence[Prompt]) -> str:
    """What tells other prompts apart."""
    ids = [[prompt.student_ids, prompt.teacher_ids] for prompt in prompts]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def _shards(info: Mapping[str, Any]) -> int:
    return -(-info["rollouts"] // info["shard_size"])
