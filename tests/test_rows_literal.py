"""Rows that contain placeholders themselves are read as they stand, by `opsd check` and by training."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from driver_tiny import tiny_config, tiny_model
from opsd_train.commands.main import app
from opsd_train.data.check import check
from opsd_train.data.rows import load_rows
from opsd_train.loading import Reader
from opsd_train.run_options import RunOptions
from opsd_train.train import make_trainer
from test_rows_kept import bytes_tokenizer

PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}>"
GIVEN = {
    "student_template": "Q {problem}",
    "teacher_template": "S {solution} Q {problem}",
    "context_template": "C {privileged_context} P {prompt}",
    "max_steps": 1,
    "per_device_train_batch_size": 1,
}
ONE, TWO = "a {solution} b {problem} {0} {} {{x}} %s", "c {problem} d {solution} {prompt} {answer}"
ROWS = [
    ({"problem": ONE, "solution": TWO}, f"Q {ONE}>", f"S {TWO} Q {ONE}>"),
    ({"problem": ONE, "solution": TWO, "answer": "{solution}"}, f"Q {ONE}>", f"S {TWO} Q {ONE}>"),
    ({"prompt": ONE, "privileged_context": TWO}, f"{ONE}>", f"C {TWO} P {ONE}>"),
    ({"prompt": ONE, "teacher_prompt": TWO + ONE}, f"{ONE}>", f"{TWO}{ONE}>"),
]


@pytest.mark.parametrize(("row", "student", "teacher"), ROWS)
def test_check_and_training_read_a_row_literally(tmp_path: Path, row, student: str, teacher: str) -> None:
    tokenizer, path = bytes_tokenizer(PLAIN), tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    config = tiny_config(tmp_path / "run", **GIVEN)
    found = check(RunOptions(model="m", data=str(path)), config, Reader(tokenizer, 512))
    assert found.refused == []
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512)
    trainer = make_trainer(model, tokenizer, load_rows(path, config.to_templates()), [], config)
    for (prompt,) in (found.prompts, trainer.prompts):
        assert tokenizer.decode(prompt.student_ids) == student
        assert tokenizer.decode(prompt.teacher_ids) == teacher
    trainer.train()


@pytest.mark.parametrize("method", [[], ["--method", "opsd"]])
def test_the_command_shows_such_rows(tmp_path: Path, method: list[str]) -> None:
    tokenizer, path = bytes_tokenizer(PLAIN), tmp_path / "rows.jsonl"
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path.write_text(json.dumps(ROWS[0][0]) + "\n")
    for model in ([], ["--model", str(tmp_path / "model")]):
        result = CliRunner().invoke(app, ["check", str(path), *model, *method, "--use_cpu"])
        assert result.exit_code == 0, result.output
        assert "1 row would be trained on" in " ".join(result.output.split())
