"""Methods through `opsd train` on the demo's model, as a user would start them."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from opsd_kernels import get_method
from opsd_train.commands.main import app
from opsd_train.demo.run import MODEL
from opsd_train.demo.task import train_problems
from opsd_train.watch.record import load_run

METHODS = {
    "opsd": {},
    "pw_opsd": {"method_options": {"entry_clip": None}},
    "sdpo": {"num_generations": 4},
    "srpo": {"num_generations": 4},
    "demopsd": {"num_generations": 4},
    "purified_opsd": {},
    "cepo": {"num_generations": 4},
    "rlcsd": {"num_generations": 4, "teacher": "sync"},
    "tip": {},
    "vopd": {},
    "exopd": {"teacher": "ema", "method_schedule": {"coefficient": {"start": 1.0, "end": 1.5, "steps": 2}}},
    "gkd": {"teacher": "sync", "teacher_every": 2},
    "scope": {"num_generations": 4},
}


@pytest.mark.parametrize("method", METHODS)
def test_opsd_train(tmp_path: Path, method: str) -> None:
    torch.set_num_threads(1)
    rows = train_problems(48, torch.Generator().manual_seed(0))
    data, config = tmp_path / "rows.jsonl", tmp_path / "run.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "method": method, "student_template": "{problem}", "teacher_template": "{solution};{problem}",
        "context_templates": {
            "answer_only": "{answer};{problem}", "wrong_answer": "{answer};{problem}",
            "sibling": "{demonstration};{problem}", "wrong_sibling": "{demonstration};{problem}",
        },
        "max_completion_length": 5, "per_device_train_batch_size": 16, "max_steps": 3, "learning_rate": 1e-4,
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "rollouts_recorded": 2,
    }  # fmt: skip
    config.write_text(yaml.safe_dump(settings | METHODS[method]))
    arguments = ["--model", str(MODEL), "--data", str(data), "--config", str(config), "--out"]
    result = CliRunner().invoke(app, ["train", *arguments, str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert f"published with: {get_method(method).teacher}" in said
    assert ("mix goes from 0.5 to 0 in 25 steps" in said) == (method == "cepo")
    run = load_run(tmp_path / "run")
    assert run.info["method"] == method
    losses = [line["loss"] for line in run.metrics if "loss" in line]
    assert len(losses) == 3
    assert any(line.get("grad_norm", 0) > 0 for line in run.metrics)
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
