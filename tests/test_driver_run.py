"""Evaluation, metrics, the command line and whole runs."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from driver_tiny import ROWS, TOKENIZER, tiny_config, tiny_model, tiny_prompts, tiny_trainer
from opsd_train.commands.main import app
from opsd_train.commands.options import parse
from opsd_train.config import OPSDConfig
from opsd_train.evaluation.judge import same_number, same_text, wilson
from opsd_train.reading.prompts import Prompt
from opsd_train.run_options import RunOptions
from opsd_train.trainer import OPSDTrainer
from opsd_train.watch.inspection import inspect_rollouts
from opsd_train.watch.record import load_run

METRICS = {
    "loss", "grad_norm", "learning_rate", "forward_kl", "reverse_kl", "jsd", "student_entropy",
    "teacher_entropy", "student_logprob", "teacher_logprob", "top1_agreement", "clipped_fraction",
    "completion_length", "truncated_share", "tokens_per_second", "memory_gb", "seconds",
}  # fmt: skip


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (5, 10, 0.236593, 0.763407),
        (1, 2, 0.094531, 0.905469),
    ],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    found = wilson(correct, total)
    assert found["accuracy"] == correct / total
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-6)


def test_wilson_bounds_are_the_shares_that_a_score_test_just_rejects() -> None:
    found = wilson(202, 512)
    for bound in (found["low"], found["high"]):
        assert abs(202 / 512 - bound) / math.sqrt(bound * (1 - bound) / 512) == pytest.approx(
            1.959964, abs=1e-6
        )


@pytest.mark.parametrize(("correct", "total"), [(3, 2), (-1, 2), (0, 0)])
def test_wilson_interval_of_nothing_is_an_error(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="correct: expected"):
        wilson(correct, total)


def test_matches() -> None:
    assert same_text(" 579\n", "579")
    assert not same_text("579.", "579")
    assert same_number("First 3 + 4 = 7, so it costs $1,007.50 in all.", "#### 1007.5")
    assert same_number("-12", "the answer is -12")
    assert not same_number("12 or 13", "12")
    assert not same_number("none", "12")


@pytest.mark.parametrize(
    ("text", "answer", "same"),
    [
        ("10-5", "5", True),
        ("10-5", "-5", False),
        ("10 and -5", "-5", True),
        ("x=-1,234,567.50.", "-1234567.5", True),
        ("on 12.11.2024", "2024", False),
        ("version 1.2.3", "3", False),
        ("1.2.3", "1.2.3", False),
        ("3,14", "314", False),
        ("9007199254740993", "9007199254740992", False),
        ("1" * 400, "2" * 400, False),
        ("The answer is \u22125", "5", False),
        ("The answer is \u22125", "-5", True),
        ("\u22121,234.5", "-1234.5", True),
        ("10\u22125", "5", True),
        ("1.5e3", "3", False),
        ("1.5e3", "1500", True),
        ("about 2E-2.", "0.02", True),
        ("1e5x", "5", True),
        ("1e99999999999999999999", "99999999999999999999", False),
    ],
)
def test_numbers(text: str, answer: str, same: bool) -> None:
    assert same_number(text, answer) is same


def greedy_text(trainer: OPSDTrainer, prompt: Prompt) -> str:
    """The most likely token after every token, from the whole sequence each time."""
    ids, ends = list(prompt.student_ids), trainer.vocabulary.eos_ids
    for _ in range(trainer.sampling.max_tokens):
        with torch.no_grad():
            ids.append(int(trainer.student(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return str(TOKENIZER.decode(ids[len(prompt.student_ids) :], skip_special_tokens=True))


def test_accuracy_counts_what_a_roll_out_of_ones_own_counts(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    said = [(prompt, greedy_text(trainer, prompt)) for prompt in trainer.prompts]
    said = [(prompt, text) for prompt, text in said if text.strip()]
    assert len(said) >= 4
    for known in range(len(said) + 1):
        answered = [
            replace(prompt, answer=text if i < known else text + "0") for i, (prompt, text) in enumerate(said)
        ]
        found = trainer.evaluate(answered)
        assert (found["eval_greedy_correct"], found["eval_greedy_total"]) == (known, len(said))
    with pytest.raises(ValueError, match="row 1: expected an `answer`"):
        trainer.evaluate([replace(trainer.prompts[0], answer=None, where="row 1")])


def test_metrics_of_a_step_are_means_over_its_tokens(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=3, logging_steps=2, per_device_train_batch_size=4)
    trainer.train()
    first, logged, last = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [first["step"], logged["step"], last["step"]] == [1, 2, 3]
    assert not METRICS - logged.keys()
    assert all(math.isfinite(logged[key]) for key in METRICS)
    assert 1 <= logged["completion_length"] <= 6
    assert logged["student_entropy"] <= math.log(32)
    assert logged["teacher_logprob"] < logged["student_logprob"] < 0


def test_forward_kl_that_is_logged_is_the_loss(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path, max_steps=2, gradient_accumulation_steps=4, per_device_train_batch_size=2, logging_steps=1
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert entry["loss"] == pytest.approx(entry["forward_kl"], rel=1e-5)


def test_loss_that_is_not_finite_is_logged_as_it_is(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=1, logging_steps=1)
    with torch.no_grad():
        trainer.teacher.model.lm_head.weight.fill_(torch.nan)
    trainer.train()
    assert math.isnan(trainer.state.log_history[0]["loss"])


def test_inspection_names_every_token(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    records = inspect_rollouts(trainer, trainer.prompts[:3])
    assert [record["answer"] for record in records] == ["3", "30", "579"]
    assert records[0]["teacher_prompt"] == "<|user|>3;1+2=<|assistant|>"
    for record in records:
        for token in record["tokens"]:
            assert token["forward_kl"] >= 0
            assert token["student_logprob"] < 0
            assert token["teacher_logprob"] <= math.log(token["teacher_top_prob"]) + 1e-6


def test_training_set_without_answers_is_enough_to_train(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_steps=1)
    prompts = tiny_prompts(config, [{"prompt": "1+1=", "teacher_prompt": "2;1+1="}] * 8)
    trainer = OPSDTrainer(tiny_model(), config, prompts, TOKENIZER)
    trainer.train()
    assert trainer.state.global_step == 1
    assert inspect_rollouts(trainer, prompts[:1])[0]["correct"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "kl"}, "objective: expected one of forward_kl"),
        ({"clip_mode": "soft"}, "clip_mode: expected one of zero, scale, ratio; got 'soft'"),
        ({"entry_clip": -1.0}, "entry_clip: expected a number above 0"),
        ({"objective": "jsd", "beta": 2.0}, "beta: expected a number in"),
        ({"temperature": -0.1}, "temperature: expected a number at least 0, got -0.1"),
        ({"loss_temperature": 0.0}, "loss_temperature: expected a number above 0, got 0.0"),
        ({"top_p": 0.0}, "top_p: expected a number above 0"),
        ({"ema_decay": 1.0}, "ema_decay: expected a number at least 0 and below 1"),
        ({"eval_match": "fuzzy"}, "eval_match: expected one of exact, number"),
        ({"student_chat_kwargs": "[1]"}, "student_chat_kwargs: expected a JSON object"),
        ({"teacher_template": "{problem}"}, "teacher_template: expected a template with {solution}"),
    ],
)
def test_config_names_the_field_that_is_wrong(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **settings)


def test_every_field_says_what_it_is() -> None:
    for kind in (RunOptions, OPSDConfig):
        for name in kind.__annotations__:
            help_text = kind.__dataclass_fields__[name].metadata["help"]
            assert re.fullmatch(r"[^%]{15,}\.", help_text), name


def test_command_line_beats_yaml_beats_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: here\ndata: rows.jsonl\nlearning_rate: 1e-4\nmax-steps: 7\ntop_p: 0.5\nuse_cpu: true\n"
        "student_chat_kwargs: {enable_thinking: false}\nteacher_template: '--{problem} {solution}'\n"
    )
    given = ["--top-p", "0.9", "--lora_rank=4", "--logging_nan_inf_filter"]
    options, config = parse(
        [RunOptions, OPSDConfig], [path], given, [f"--output_dir={tmp_path}", "--max_steps=9"]
    )
    assert (options.model, options.lora_rank, options.lora_dropout) == ("here", 4, None)
    assert (config.learning_rate, config.max_steps, config.top_p, config.top_k) == (1e-4, 7, 0.9, 0)
    assert config.student_chat_kwargs == {"enable_thinking": False}
    assert config.teacher_template == "--{problem} {solution}"
    assert config.logging_nan_inf_filter is True


def write_rows(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def test_mistakes_are_one_message_and_exit_code_2(tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    config = tmp_path / "config.yaml"
    config.write_text("temprature: 1\n")
    full, run = tmp_path / "full", tmp_path / "run"
    full.mkdir()
    (full / "thesis.tex").write_text("")
    run.mkdir()
    (run / "run.json").write_text("{}")
    for arguments, message in [
        (["--data", rows], "arguments are required: --model"),
        (["--data", rows, "--model", "/no/such/model"], "model: expected a local folder or a hub id"),
        (["--data", rows, "--model", full], f"model: {full} has no config.json"),
        (
            ["--data", tmp_path / "none.jsonl", "--model", full, "--loss-temprature", "2"],
            "did you mean --loss-temperature?",
        ),
        (
            ["--data", rows, "--model", full, "--config", config],
            "unknown option temprature; did you mean temper",
        ),
        (["--data", rows, "--model", full, "--config", tmp_path / "no.yaml"], "expected a YAML file at"),
        (["--data", rows, "--model", full, "--max-steps", "many"], "max-steps: invalid int value: 'many'"),
        (
            ["--data", rows, "--model", full, "--temperature", "-1"],
            "temperature: expected a number at least 0",
        ),
        (["--data", rows, "--model", full, "--out", full], "expected an empty folder or a run, but"),
        (["--data", rows, "--model", full, "--out", run], "holds a run; choose another folder"),
    ]:
        given = arguments if "--out" in arguments else [*arguments, "--out", out]
        code, output = invoke("train", "--use_cpu", *given)
        assert code == 2, output
        assert message in output
        assert output.startswith("error:")
    assert invoke("report", full)[0] == 2


def test_train_on_a_folder_and_resume(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    config = tmp_path / "config.yaml"
    settings = {
        "student_template": "{problem}", "teacher_template": "{solution};{problem}", "use_cpu": True,
        "max_steps": 2, "save_steps": 1, "logging_steps": 1, "max_completion_length": 4,
        "rollouts_recorded": 2,
    }  # fmt: skip
    config.write_text(yaml.safe_dump(settings))
    rows, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    given = ["train", "--model", tmp_path / "model", "--data", rows, "--config", config, "--out", out]
    code, output = invoke(*given, "--eval-data", rows, "--lora-rank", 2)
    assert code == 0, output
    run = load_run(out)
    assert [entry["step"] for entry in run.metrics] == [1, 2]
    assert [entry["step"] for entry in run.evaluations] == [0, 2]
    assert [entry["step"] for entry in run.rollouts] == [0, 0, 2, 2]
    assert run.info["options"]["lora_rank"] == 2
    assert (out / "model" / "adapter_model.safetensors").exists()
    again = [*given, "--lora-rank", 2, "--resume-from-checkpoint", "last", "--max-steps", 3]
    code, output = invoke(*again)
    assert code == 0, output
    assert [entry["step"] for entry in load_run(out).metrics] == [1, 2, 3]
