"""Tokens that the model has no embedding of, and prompts longer than the tokenizer expects."""

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from driver_tiny import TOKENIZER, tiny_model
from opsd_train.commands.main import app


def saved(folder: Path, padding: bool = False) -> Path:
    """A model of 32 tokens whose tokenizer has had twenty more added, up to id 36."""
    tiny_model().save_pretrained(folder)
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_tokens([f"<{number}>" for number in range(20)])
    if padding:
        tokenizer.pad_token = "<19>"
    tokenizer.model_max_length = 8
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers logs, which goes past pytest otherwise."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def command(name: str, model: Path, problem: str, *further: str) -> tuple[int, str, list[str]]:
    rows = model.parent / "rows.jsonl"
    rows.write_text(json.dumps({"problem": problem, "solution": "3", "answer": "3"}) + "\n")
    words = [name, str(rows)] if name == "check" else [name, "--data", str(rows), "--use_cpu"]
    words += [] if name == "check" else ["--out", str(model.parent / "out")]
    words += ["--student-template", "{problem}", "--teacher-template", "{solution};{problem}", *further]
    result = CliRunner().invoke(app, [*words, "--model", str(model)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning:")]
    return result.exit_code, " ".join(result.output.split()), lines


@pytest.mark.parametrize("name", ["check", "train", "eval"])
@pytest.mark.parametrize(("problem", "padding"), [("1+<19>=", False), ("1+2=", True)])
def test_an_id_without_an_embedding_is_refused(
    name: str, problem: str, padding: bool, tmp_path: Path
) -> None:
    model = saved(tmp_path / "model", padding)
    code, output, _ = command(name, model, problem)
    assert code == (1 if name == "check" and not padding else 2), output
    expected = f"expected tokens that the model has embeddings of, 32 rows; the tokenizer {model} has id 36"
    assert expected in output.replace("refused ", "")
    assert ("rows.jsonl line 1: " in output) is not padding
    assert "'<19>'" in output


@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_long_row_is_one_line(name: str, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    given = ("--max-prompt-length", "12")
    code, output, lines = command(name, saved(tmp_path / "model"), "1+1+1+1+1+1+1+1=", *given)
    assert code == 2
    assert "a prompt is longer than its budget: the student's has 18 tokens" in output
    assert len(lines) == 1
    assert "sequence length is longer" not in said.text


def test_check_counts_long_rows_without_a_line_of_the_tokenizer(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    assert command("check", saved(tmp_path / "model"), "1+1+1+1+1+1+1+1=")[0] == 0
    assert "sequence length is longer" not in said.text
