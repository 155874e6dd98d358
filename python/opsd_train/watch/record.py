"""The run folder: what training and evaluation write down, and what the report reads back.

    metrics.jsonl      one JSON object per logged step; appended to
    evaluations.json   list of `Evaluation`
    rollouts.json      list of `RolloutRecord`
    run.json           one object: model, objective, configuration, versions
    completions/       Parquet, see `completions.py`
    superseded.jsonl   what the record held of steps that a resumed run went through again; their completions
                       are in superseded-completions/

All of it is strict JSON: a number that is not finite is written as null and read back as NaN (as None inside
an evaluation or a rollout). The three JSON files are replaced whole, so a reader sees the old or the new one;
only `metrics.jsonl` can be cut off by a crash, and then only in its last line.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from opsd_train.json_files import dumps, write_atomically
from opsd_train.redaction import redacted
from opsd_train.run_folder import EVALUATIONS, FILES, INFO, METRICS, ROLLOUTS
from opsd_train.safety.folders import move
from opsd_train.watch.completions import kept, step_of

SUPERSEDED, SUPERSEDED_COMPLETIONS = "superseded.jsonl", "superseded-completions"


class Accuracy(TypedDict):
    """Share of problems answered right, with its 95 % Wilson interval; fractions in [0, 1]."""

    correct: int
    total: int
    accuracy: float
    low: float
    high: float


class PassAtK(TypedDict):
    """Chance that one of `k` samples is right, with its 95 % interval; fractions in [0, 1]."""

    k: int
    value: float
    low: float
    high: float


class Evaluation(TypedDict):
    """Held-out accuracy after `step` optimizer steps, by greedy decoding and by sampling.

    `samples` completions were sampled of every problem: `sampled` is the share of all that are right, its
    `total` so many times the problems. Older records have neither `samples` nor `pass_at_k`.
    """

    step: int
    greedy: Accuracy
    sampled: Accuracy
    samples: NotRequired[int]
    pass_at_k: NotRequired[list[PassAtK]]


class TokenRecord(TypedDict):
    """One completion token; divergence and entropy in nats, log-probabilities natural."""

    text: str
    forward_kl: float | None
    student_logprob: float | None
    teacher_logprob: float | None
    student_entropy: float | None
    teacher_top: str
    teacher_top_prob: float | None


class RolloutRecord(TypedDict):
    """One completion the student wrote, with both prompts as they were fed to the model."""

    step: int
    prompt: str
    teacher_prompt: str
    answer: str | None
    correct: bool | None
    tokens: list[TokenRecord]


@dataclass(frozen=True)
class Run:
    """A run folder in memory.

    `metrics` is sorted by step with one entry per step; a value that was not finite is NaN. `problems` says
    in words what could not be read.
    """

    directory: Path
    info: dict[str, Any]
    metrics: list[dict[str, float]]
    evaluations: list[Evaluation]
    rollouts: list[RolloutRecord]
    problems: list[str]


class RunRecord:
    """Writes a run folder.

    `existing` says what happens when the folder already holds a run: "error" raises ValueError, "replace"
    removes that record (the record's own files, nothing else), "resume" goes on with it.
    """

    def __init__(
        self, directory: str | Path, existing: Literal["error", "replace", "resume"] = "error"
    ) -> None:
        if existing not in ("error", "replace", "resume"):
            raise ValueError(f"existing: expected 'error', 'replace' or 'resume', got {existing!r}")
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        held = [name for name in (*FILES, "report.html") if (self.directory / name).exists()]
        if held and existing == "error":
            raise ValueError(f"directory: expected a folder without a run, but {directory} holds {held}")
        if existing == "replace":
            for path in (*(self.directory / name for name in held), *kept(self.directory)):
                path.unlink()
        self._drop_torn_line()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of one step. A step logged twice (training resumed) counts as logged last."""
        line = dumps({"step": step, **metrics} | {"step": step}) + "\n"
        with (self.directory / METRICS).open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that follows shall not outlive the lines before it

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Add one evaluation, in place of an earlier one of the same step."""
        self._extend(EVALUATIONS, [evaluation])

    def add_rollouts(self, rollouts: Iterable[RolloutRecord]) -> None:
        """Add rollouts, in place of the earlier ones of the same steps."""
        self._extend(ROLLOUTS, list(rollouts))

    def write_info(self, info: Mapping[str, Any]) -> None:
        """Write run.json. What JSON has no form for (a path, a dtype) is written as its `str`.

        Passwords and keys are not written.
        """
        write_atomically(self.directory / INFO, dumps(redacted(info), indent=1, default=str))

    def exists(self) -> bool:
        """Whether there is anything of a run yet."""
        return any((self.directory / name).exists() for name in FILES)

    def rewind(self, step: int) -> None:
        """Drop what came after `step`, from which a run goes on; it is kept in superseded.jsonl first.

        Completions move to the folder superseded-completions. Raises ValueError, and changes nothing, if a
        file cannot be read.
        """
        lines, unread = _read_metrics(self.directory / METRICS, []), _unread_metrics(self.directory / METRICS)
        dropped: list[dict[str, Any]] = [{"metrics": one} for one in lines if one["step"] > step]
        new: dict[str, str] = {}
        if dropped or unread:
            dropped += [{"unread": one} for one in unread]
            new[METRICS] = "".join(dumps(one) + "\n" for one in lines if one["step"] <= step)
        for name in (EVALUATIONS, ROLLOUTS):
            found = self._entries(name)
            later = [one for one in found if one["step"] > step]
            if later:
                dropped += [{Path(name).stem: one} for one in later]
                new[name] = dumps([one for one in found if one["step"] <= step])
        self._supersede(dropped)
        for name, text in new.items():
            write_atomically(self.directory / name, text)
        for path in kept(self.directory):
            if step_of(path) > step:
                move(path, self.directory / SUPERSEDED_COMPLETIONS / path.name)

    def _supersede(self, dropped: list[dict[str, Any]]) -> None:
        """Append to what was superseded, and wait for the disk."""
        if not dropped:
            return
        with (self.directory / SUPERSEDED).open("a+b") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            torn = file.read() not in (b"", b"\n")
            file.write(b"\n" * torn)
            file.writelines((dumps(one) + "\n").encode("utf-8", errors="replace") for one in dropped)
            file.flush()
            os.fsync(file.fileno())

    def _extend(self, name: str, items: list[Any]) -> None:
        steps = {item["step"] for item in items}
        kept = [item for item in self._entries(name) if item["step"] not in steps]
        write_atomically(self.directory / name, dumps(sorted(kept + items, key=lambda item: item["step"])))

    def _entries(self, name: str) -> list[Any]:
        """What a list holds; ValueError if it cannot be read whole."""
        problems: list[str] = []
        found = _read_list(self.directory / name, lambda item: "step" in item, problems)
        if problems:  # writing the file anew would lose what a person may still want to rescue
            raise ValueError(f"directory: expected a readable run in {self.directory}; {problems[0]}")
        return found

    def _drop_torn_line(self) -> None:
        path = self.directory / METRICS
        if path.exists():
            text = path.read_bytes()
            if len(text) > (whole := text.rfind(b"\n") + 1):
                os.truncate(path, whole)


def load_run(directory: str | Path) -> Run:
    """Read a run folder, finished or not.

    A missing file reads as empty and an unreadable part is left out and named in `Run.problems`. Raises
    ValueError when the folder holds none of a run's files.
    """
    folder = Path(directory)
    if not any((folder / name).is_file() for name in FILES):
        what = "is not a folder" if not folder.is_dir() else "holds none of them"
        raise ValueError(
            f"directory: expected a run folder, with at least one of {', '.join(FILES)}; {directory} {what}"
        )
    problems: list[str] = []
    info = _read_json(folder / INFO, problems)
    if info is not None and not isinstance(info, dict):
        problems.append(f"{INFO}: expected an object, got {type(info).__name__}; left out")
    return Run(
        directory=folder,
        info=info if isinstance(info, dict) else {},
        metrics=_read_metrics(folder / METRICS, problems),
        evaluations=_read_list(folder / EVALUATIONS, _is_evaluation, problems),
        rollouts=_read_list(folder / ROLLOUTS, _is_rollout, problems),
        problems=problems,
    )


def _read_json(path: Path, problems: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:  # JSON that is cut off, or bytes that are not UTF-8
        problems.append(f"{path.name}: not readable ({error}); left out")
        return None


def _read_list(path: Path, is_whole: Callable[[dict[str, Any]], bool], problems: list[str]) -> list[Any]:
    found = _read_json(path, problems)
    if found is None:
        return []
    if not isinstance(found, list):
        problems.append(f"{path.name}: expected a list, got {type(found).__name__}; left out")
        return []
    whole = [item for item in found if isinstance(item, dict) and is_whole(item)]
    if len(whole) < len(found):
        problems.append(
            f"{path.name}: {len(found) - len(whole)} of {len(found)} entries incomplete; left out"
        )
    return sorted(whole, key=lambda item: item["step"])


def _is_evaluation(item: dict[str, Any]) -> bool:
    numbers_of = [item.get(decoding) or {} for decoding in ("greedy", "sampled")]
    return "step" in item and all(
        one.get(key) is not None for one in numbers_of for key in Accuracy.__annotations__
    )


def _is_rollout(item: dict[str, Any]) -> bool:
    return item.keys() >= RolloutRecord.__required_keys__ and all(
        token.keys() >= TokenRecord.__required_keys__ for token in item["tokens"]
    )


def _read_metrics(path: Path, problems: list[str]) -> list[dict[str, float]]:
    if not path.exists():
        return []
    by_step: dict[int, dict[str, float]] = {}
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        entry = _step_metrics(line)
        if entry is None:
            problems.append(f"{path.name}: line {number} is not a step's metrics (cut off?); left out")
        else:
            by_step[int(entry["step"])] = entry
    return [by_step[step] for step in sorted(by_step)]


def _unread_metrics(path: Path) -> list[str]:
    """The lines that are not a step's metrics."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [line for line in lines if _step_metrics(line) is None]


def _step_metrics(line: str) -> dict[str, float] | None:
    try:
        entry = json.loads(line)
        int(entry["step"])
    except (ValueError, TypeError, KeyError):
        return None
    return {key: math.nan if value is None else value for key, value in entry.items()}
