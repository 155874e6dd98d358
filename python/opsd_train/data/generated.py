"""Problems that the package reasoning-gym generates (2505.24760), with solutions and verifiers.

A problem is the package's `question`; the solution is the worked one, where the task has it (GSM-symbolic),
else the sentence that states the answer. The package draws problem i of seed s from `Random(s + i)`, so that
neighbouring seeds share nearly all of their problems: two sets of a task are disjoint by their ranges
`[seed, seed + size)`, and by their texts.
"""

import difflib
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from opsd_train.evaluation.figures import FIGURES, last_figures
from opsd_train.reading.texts import final_answer, without_thoughts

PREFIX = "reasoning_gym:"
HELD_OUT_SEED = 1_000_000_000  # of problems to evaluate on, unless one is given
WORKED = "answer_cot"
# Where a task leaves its answer open, since there are several, it gives one as an example.
EXAMPLES = ("example_answer", "example_correct_answer")
# Tasks whose scorers run a completion, or a text of the row, as code: by `eval`, or by sympy's `parse_expr`,
# which ends in it. The last one hands completions to the scorers of other tasks.
EVALUATED = frozenset({
    "binary_matrix", "bitwise_arithmetic", "countdown", "intermediate_integration", "n_queens",
    "number_sorting", "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix",
    "string_insertion", "composite",
})  # fmt: skip
STUMBLES = (
    ValueError, TypeError, ArithmeticError, LookupError, AttributeError, SyntaxError, AssertionError,
    RecursionError,
)  # fmt: skip


@dataclass(frozen=True)
class Problems:
    """A set of generated problems.

    Args:
        task: the package's name of it.
        size: how many.
        seed: problem i is drawn with `seed + i`.
        settings: further settings of the task, such as `min_terms`.
    """

    task: str
    size: int = 500
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, task: str, given: Mapping[str, Any]) -> "Problems":
        """From options, numbers and texts alike. ValueError for a task or an option that there is not."""
        _, config = _known(task)
        names = config.__dataclass_fields__
        for name in given:
            if name not in names:
                raise ValueError(f"data: expected options among {', '.join(names)} of {task!r}, got {name!r}")
        values = {name: _value(value) for name, value in given.items()}
        size, seed = values.pop("size"), values.pop("seed")
        for name, value, least in (("size", size, 1), ("seed", seed, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"data: expected a {name} of at least {least} for {task!r}, got {value!r}")
        return cls(task, size, seed, values)

    def overlaps(self, other: "Problems") -> bool:
        """Whether both draw a problem of the same task with the same seed."""
        apart = self.seed + self.size <= other.seed or other.seed + other.size <= self.seed
        return self.task == other.task and not apart


def records(problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each problem's place and its record: `problem`, `solution`, `answer`, and `reasoning_gym` to score by.

    A task whose answers are open has the example's text as `solution` and no `answer`; where there is none
    either, there is no `solution`. ValueError for settings that the task refuses.
    """
    settings = json.dumps(dict(problems.settings), sort_keys=True)
    made = _dataset(problems.task, problems.size, problems.seed, settings)
    for number in range(problems.size):
        entry = made[number]
        record: dict[str, Any] = {"problem": entry["question"].strip()}
        if (solution := _solution(entry)) is not None:
            record["solution"] = solution
        if entry["answer"] is not None:
            record["answer"] = str(entry["answer"])
        record["reasoning_gym"] = {"task": problems.task, "settings": settings, "entry": entry}
        yield f"{PREFIX}{problems.task}?seed={problems.seed} row {number + 1}", record


def score(completion: str, answer: str | None, columns: Mapping[str, Any]) -> float:
    """The package's own score of a completion, in [0, 1]; 1 is right, some tasks give a part for a near miss.

    The package expects an answer alone, so what is scored is what the completion states as its answer: inside
    the last `<answer>` tag, else boxed or stated (see `texts.final_answer`), else its last line, or as many
    lines as the answer has; of that, where the answer is a number, the last number. Raises ValueError for a
    row that is not the package's, and for one of a task whose scorer runs what it is given as code.
    """
    check_scored(columns)
    held = columns["reasoning_gym"]
    scorer = _dataset(held["task"], 1, 0, held["settings"])
    try:
        found = float(scorer.score_answer(stated(completion, answer), held["entry"]))
    except STUMBLES:
        return 0.0  # a completion that the task's parser stumbles over is not an answer
    return min(max(found, 0.0), 1.0)


def check_scored(columns: Mapping[str, Any]) -> None:
    """ValueError for a row that `score` does not judge."""
    held = columns.get("reasoning_gym")
    if held is None:
        raise ValueError("expected a row of reasoning_gym:TASK, got one without the column reasoning_gym")
    if held["task"] in EVALUATED:
        raise ValueError(
            f"expected a task whose scorer only reads completions, got {held['task']!r}, whose scorer in "
            "reasoning-gym runs text as Python code, so that a completion could do anything here; take "
            "another judge: --eval-match (--verifier) number, math or exact"
        )


def stated(completion: str, answer: str | None) -> str:
    """What a completion states as its answer, as the package's scorers expect it."""
    from reasoning_gym.utils import extract_answer

    text = without_thoughts(completion)
    lines = len(answer.splitlines()) if answer else 1
    found = extract_answer(text) or final_answer(text) or "\n".join(text.splitlines()[-lines:])
    figures = last_figures(found)
    if figures is not None and answer is not None and FIGURES.fullmatch(answer):
        return figures
    return found


def _solution(entry: Mapping[str, Any]) -> str | None:
    metadata = entry["metadata"]
    if isinstance(worked := metadata.get(WORKED), str) and worked.strip():
        return worked
    answer = entry["answer"]
    for name in EXAMPLES:
        answer = metadata.get(name) if answer is None else answer
    return None if answer is None else f"The answer is {answer}."


def _known(task: str) -> Any:
    """The classes of a task; ValueError with close names if there is none of that name."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(f"data: expected the package reasoning-gym for {PREFIX}{task}; {error}") from None
    if task not in DATASETS:
        close = difflib.get_close_matches(task, DATASETS, n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(sorted(DATASETS))}"
        raise ValueError(f"data: expected a task of reasoning-gym, got {task!r}; {hint}")
    return DATASETS[task]


@functools.lru_cache(maxsize=8)
def _dataset(task: str, size: int, seed: int, settings: str) -> Any:
    make, config = _known(task)
    try:
        chosen = config(size=size, seed=seed, **json.loads(settings))
        chosen.validate()
        return make(config=chosen)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"data: expected settings that the task {task!r} takes, got {settings}; {error}"
        ) from None


def _value(text: Any) -> Any:
    """A number, a list or true where the text is one."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError:
        return text
