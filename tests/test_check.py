"""`opsd check`: what is shown of data before anything is trained, and what is warned of."""

import copy
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from driver_tiny import ROWS, TOKENIZER, tiny_config, tiny_model
from opsd_train.commands import terminal
from opsd_train.commands.main import app
from opsd_train.data.check import Findings, check, quantile
from opsd_train.loading import Reader, load_reader
from opsd_train.run_options import RunOptions


def findings(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    tokenizer: Any = TOKENIZER,
    positions: int | None = None,
    **settings: Any,
) -> Findings:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(tmp_path / "run", **settings)
    reader = None if tokenizer is None else Reader(tokenizer, positions)
    return check(RunOptions(model="m", data=str(path)), config, reader)


def with_template(template: str | None) -> Any:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


def test_lengths_columns_and_conventions(tmp_path: Path) -> None:
    found = findings(tmp_path, [*ROWS, {"prompt": "1+1=", "teacher_prompt": "2;1+1="}])
    assert found.conventions == {"problem and solution": 8, "prompt and teacher_prompt": 1}
    assert found.columns["problem"] == 8
    assert found.lengths["student"] == [*(len(row["problem"]) + 2 for row in ROWS), 6]
    assert [len(prompt.student_ids) for prompt in found.prompts] == found.lengths["student"]
    assert found.lengths["solution"] == [len(row["solution"]) for row in ROWS]
    assert found.refused == found.warnings == []


def test_what_a_run_would_refuse_is_all_found(tmp_path: Path) -> None:
    rows = [*ROWS, {"problem": "1"}, {"problem": "1" * 40, "solution": "3"}]
    found = findings(tmp_path, rows, max_prompt_length=20)
    places = [reason.split(":")[0] for reason in found.refused]
    assert places == [f"{tmp_path / 'rows.jsonl'} line {number}" for number in (9, 10)]
    assert "max_prompt_length 20" in found.refused[1]
    assert max(found.lengths["student"]) == 42  # lengths are of all rows, refused ones too
    assert len(found.prompts) == 8


def test_positions_of_the_model_count_the_completion(tmp_path: Path) -> None:
    longest = max(findings(tmp_path, ROWS).lengths["teacher"])
    assert findings(tmp_path, ROWS, positions=longest + 6).refused == []
    found = findings(tmp_path, ROWS, positions=longest + 5)
    (over,) = found.refused
    assert over.startswith(f"{tmp_path / 'rows.jsonl'} line 3: its longer prompt has {longest} tokens, which")
    assert "with a completion of 6 (max_completion_length) is more than" in over
    assert len(found.prompts) == 7
    assert max(found.lengths["teacher"]) == longest


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "1+1=", "teacher_prompt": "2"}],
            "1 row has a teacher's prompt in which the",
        ),
        (
            [{"prompt": "1+1=", "teacher_prompt": "1+1="}],
            "1 row has a teacher that reads no more",
        ),
        ([ROWS[0], ROWS[0]], "1 row comes again"),
        ([{"problem": "1" * 25, "solution": "1" * 24}], "1 row has the solution in the student's prompt"),
    ],
)
def test_texts_that_are_seldom_meant(tmp_path: Path, rows: list[dict], message: str) -> None:
    warnings = findings(tmp_path, rows).warnings
    assert any(warning.startswith(message) for warning in warnings), warnings
    assert warnings == findings(tmp_path, rows, None).warnings  # no tokenizer is needed for that


def test_special_tokens_in_the_text_are_told(tmp_path: Path) -> None:
    (warning,) = findings(tmp_path, [*ROWS, {"problem": "1<|pad|>", "solution": "3"}]).warnings
    assert warning.startswith("1 row has a special token of the tokenizer in the text; the first is ")
    assert warning.endswith("rows.jsonl line 9")


def test_templates_that_are_seldom_meant(tmp_path: Path) -> None:
    header = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert "no chat template" in findings(tmp_path, ROWS, with_template(None)).warnings[0]
    assert "ignores add_generation_prompt" in findings(tmp_path, ROWS, with_template(header)).warnings[0]
    (ignored,) = findings(tmp_path, ROWS, student_thinking=False).warnings
    assert "student_thinking: the tokenizer's chat template has no switch enable_thinking" in ignored
    switch = (
        header + "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking %};{% endif %}{% endif %}"
    )
    thinking = {"student_thinking": False, "teacher_thinking": True}
    ends, tokens = findings(tmp_path, ROWS, with_template(switch), **thinking).warnings
    assert ends.startswith("the student's prompts end in '<|assistant|>', the teacher's in '<|assistant|>;'")
    assert tokens.startswith("8 rows have prompts whose last 1 tokens differ")
    thinking["student_thinking"] = True
    assert findings(tmp_path, ROWS, with_template(switch), **thinking).warnings == []


def test_quantiles_are_lengths_that_occur() -> None:
    lengths = list(range(1, 101))
    assert [quantile(lengths, share) for share in (0.0, 0.5, 0.9, 0.99, 1.0)] == [1, 50, 90, 99, 100]
    assert quantile([7], 0.99) == 7


def invoke(*arguments: object, width: int = 160) -> tuple[int, str]:
    with mock.patch.object(terminal.console, "_width", width):
        result = CliRunner().invoke(app, ["check", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_command_shows_tokens_and_leaves_with_1_for_refused_rows(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    assert load_reader(str(tmp_path / "model")).positions == tiny_model().config.max_position_embeddings
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["--student_template={problem}", "--teacher_template={solution};{problem}", "--use_cpu"]
    code, output = invoke(rows, "--model", tmp_path / "model", *words)
    assert code == 0, output
    assert "all 8 rows would be trained on" in output
    assert "8 rows" in output
    assert "'<|assistant|>'" in output
    assert "max_teacher_prompt_length" in output
    shown = [line for line in output.splitlines() if line.count("'3'") == 2]
    assert any("completion" in line for line in shown)  # the solution, behind both prompts
    with rows.open("a") as file:
        file.write("{\n")
    code, output = invoke(rows, *words)
    assert code == 1
    assert "rows.jsonl line 9: expected a JSON object" in output
    assert "1 of 9 rows would be refused" in output
    code, output = invoke(tmp_path / "none.jsonl")
    assert code == 2
    assert not (Path.cwd() / "opsd-unused").exists()


def test_everything_is_told_in_80_columns(tmp_path: Path) -> None:
    tiny_model(max_position_embeddings=262_144).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    name = "a_column_with_a_name_" + "of_many_words_" * 5
    long = {"problem": "1" * 3_000, "solution": "2" * 12_000, name: "x"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, long]))
    words = ["--student_template={problem}", "--teacher_template={solution};{problem}", "--use_cpu"]
    budgets = [f"--max_{what}_length=131072" for what in ("prompt", "teacher_prompt")]
    budgets.append("--max_completion_length=32768")
    code, output = invoke(rows, "--model", tmp_path / "model", *words, *budgets, width=80)
    assert code == 0, output
    assert "…" not in output
    lines = [line.split() for line in output.splitlines()]
    assert ["teacher's", "prompt", "10", "15,003", "15,003", "15,003", "131,072", "0"] in lines
    assert ["max_teacher_prompt_length"] in lines
    longest = ["32,778", "47,771", "47,771", "47,771", "262,144", "0"]
    assert ["prompt", "and", "completion", *longest] in lines
    assert name in "".join(line.strip().removesuffix("1").strip() for line in output.splitlines())
    tables = output[: output.index("all 9 rows")]
    assert max(len(line) for line in tables.splitlines() if str(tmp_path) not in line) <= 80


def test_all_rows_are_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    # The demo's tokenizer has no token for the words of the default templates.
    code, output = invoke(rows, "--model", tmp_path / "model", "--use_cpu")
    assert code == 1
    assert output.count("refused: ") == 3
    assert "line 1: student_template: expected text that the tokenizer can encode" in " ".join(output.split())
    assert "3 of 3 rows would be refused" in output
    assert "where they meet" not in output
    rows.write_text('{"a": 1}\n')
    code, output = invoke(rows, "--use_cpu")
    assert code == 1
    assert output.count("refused: ") == 1
    assert "1 of 1 row would be refused" in output
    assert "columns" in output  # which were expected
    rows.write_text("")
    assert invoke(rows, "--use_cpu")[0] == 2


def test_without_a_model_the_texts_are_shown(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    chat = [{"role": "system", "content": "Be [bold]brief."}, {"role": "user", "content": "1+1="}]
    records = [{"prompt": chat, "privileged_context": "It is 2."}, {"prompt": "2+2=", "teacher_prompt": "4"}]
    rows.write_text("".join(json.dumps(row) + "\n" for row in records))
    code, output = invoke(rows, "--use_cpu", "--context_template={prompt} Known: {privileged_context}")
    assert code == 0
    lines = [" ".join(line.split()) for line in output.splitlines()]
    shown = [line for line in lines if line.startswith(("student ", "teacher "))]
    assert shown == [
        "student system Be [bold]brief.", "student user 1+1=",
        "teacher system Be [bold]brief.", "teacher user 1+1= Known: It is 2.",
    ]  # fmt: skip
    code, output = invoke(rows, "--use_cpu", "--rows", "2")
    assert "4" in " ".join(output.split()).split("line 2, texts")[1]
    rows.write_text(json.dumps(records[1]) + "\n")
    code, output = invoke(rows, "--use_cpu", "--rows", "0")
    assert "1 row would be trained on" in output
    assert ", texts" not in output
