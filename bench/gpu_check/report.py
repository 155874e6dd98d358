"""Verdicts as they become known: on the screen, in `report.jsonl` and in `report.md`."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"


@dataclass(frozen=True)
class Verdict:
    """One line of the report.

    Args:
        stage: name of the stage.
        what: what was checked.
        verdict: PASS, FAIL or SKIP.
        numbers: what was measured, or why it failed or was skipped.
        seconds: how long it took.
    """

    stage: str
    what: str
    verdict: str
    numbers: str
    seconds: float


class Report:
    """Appends to both files and flushes each line, so that a run that is killed leaves what it knew."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._json = (folder / "report.jsonl").open("w")
        self._markdown = (folder / "report.md").open("w")
        self._count: Counter[str] = Counter()
        self._write(None, "# GPU check\n\n| verdict | stage | what | numbers | s |\n|---|---|---|---|---|\n")

    def add(self, verdict: Verdict) -> None:
        """Prints and stores a verdict."""
        self._count[verdict.verdict] += 1
        numbers, seconds = " ".join(verdict.numbers.split()), f"{verdict.seconds:.1f}"
        print(f"{verdict.verdict}  {verdict.stage}: {verdict.what}  [{numbers}]  {seconds} s", flush=True)
        cells = (verdict.verdict, verdict.stage, verdict.what, numbers, seconds)
        line = " | ".join(cell.replace("|", "\\|") for cell in cells)
        self._write(asdict(verdict), f"| {line} |\n")

    def end(self, how: str, seconds: float) -> None:
        """The last line: `how` the run ended, and the counts."""
        counts = ", ".join(f"{self._count[x]} {x}" for x in (PASS, FAIL, SKIP))
        print(f"{how}: {counts}, {seconds:.0f} s", flush=True)
        record = {"end": how, "seconds": round(seconds, 1), **{x: self._count[x] for x in (PASS, FAIL, SKIP)}}
        self._write(record, f"\n{how}: {counts}, {seconds:.0f} s\n")

    @property
    def failed(self) -> bool:
        """Whether any verdict is FAIL."""
        return self._count[FAIL] > 0

    def _write(self, record: dict[str, object] | None, line: str) -> None:
        if record is not None:
            self._json.write(json.dumps(record) + "\n")
            self._json.flush()
        self._markdown.write(line)
        self._markdown.flush()
