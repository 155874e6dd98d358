"""How commands end that could not do what they were asked to: one message, and an exit code."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from driver_tiny import ROWS
from opsd_train.commands.main import app, main
from opsd_train.engines.base import EngineError
from server_engines import DEMO

ERRORS = [EngineError("died"), ValueError("directory: got none"), OSError("No space left on device")]


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def raising(error: Exception) -> Callable[..., Any]:
    def stub(*_: Any, **__: Any) -> Any:
        raise error

    return stub


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("command", ["demo", "train"])
def test_what_goes_wrong_in_a_run_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, error: Exception
) -> None:
    monkeypatch.setattr("opsd_train.demo.run.demo", lambda *_: None)
    monkeypatch.setattr("opsd_train.train.train", lambda *_: None)
    monkeypatch.setattr("opsd_train.train.run", raising(error))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(ROWS[0]))
    words = ["--model", DEMO, "--data", rows, "--use-cpu"] if command == "train" else []
    assert invoke(command, "--out", tmp_path / "run", *words) == (1, f"ended: {error}\n")


def test_an_evaluation_leaves_nothing_outside_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine starts where the results will be, and its failure is one message too."""
    asked = []

    def fail(config: Any, *_: Any) -> Any:
        asked.append(config.output_dir)
        raise EngineError("died")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("opsd_train.evaluation.run.make_engine", fail)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(ROWS[0]))
    given = ["--model", DEMO, "--data", rows, "--use-cpu", "--student-template", "{problem}"]
    code, said = invoke("eval", *given, "--max-completion-length", 4, "--out", "found")
    assert code == 1
    assert said.splitlines()[-1] == "ended: died"
    assert asked == ["found"]
    assert {entry.name for entry in tmp_path.iterdir()} <= {"rows.jsonl", "found"}


@pytest.mark.parametrize("end", [None, SystemExit(0), SystemExit(143), ZeroDivisionError()], ids=repr)
def test_every_end_leaves_the_process_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException | None
) -> None:
    """A group that is left to the end of the interpreter can abort a run that has saved everything."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    waiting = torch.distributed.all_reduce(torch.ones(3, requires_grad=True).detach(), async_op=True)
    seen: list[bool] = []

    def stub() -> None:
        seen.append(torch.distributed.is_initialized())
        if end is not None:
            raise end

    monkeypatch.setattr("opsd_train.commands.main.app", stub)
    try:
        with pytest.raises(type(end)) if end is not None else nullcontext():
            main()
        assert seen == [True]
        assert not torch.distributed.is_initialized()
        assert waiting is None or waiting.is_completed()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
