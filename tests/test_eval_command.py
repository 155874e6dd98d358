"""Evaluation: pass@k and its intervals, verifiers of the user's own, and `opsd eval`."""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import yaml
from peft import PeftModel
from typer.testing import CliRunner

from driver_tiny import ROWS, TOKENIZER, tiny_config, tiny_model, tiny_trainer
from opsd_train.commands.main import app
from opsd_train.evaluation.examine import Findings, Judged, from_metrics, to_metrics
from opsd_train.evaluation.judge import wilson
from opsd_train.evaluation.passk import bootstrap, mean_pass_at_k, pass_at_k
from opsd_train.evaluation.verify import Verifier
from opsd_train.loading import load, with_lora
from opsd_train.watch.record import RunRecord, load_run

GIVEN = ["--max-completion-length", "4", "--use_cpu", "--student-template", "{problem}"]


def speaks(completion: str, answer: str | None, columns: dict) -> float:
    assert columns["problem"].endswith("=")
    return float(len(completion) >= 1)


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def test_intervals_cover_the_true_pass_at_k() -> None:
    """Problems of unequal difficulty, drawn anew: pass@k is 1 - E[(1 - p)^k] with p ~ Beta(1, 2)."""
    generator, trials, samples = np.random.default_rng(0), 200, 8
    covered = dict.fromkeys((1, 4, samples), 0)
    for trial in range(trials):
        counts = generator.binomial(samples, generator.beta(1, 2, size=64)).tolist()
        for k in covered:
            truth = 1 - np.prod([(2 + i) / (3 + i) for i in range(k)])
            if k < samples:
                found = bootstrap([pass_at_k(samples, count, k) for count in counts], trial, resamples=300)
            else:
                found = findings_of(counts, samples).pass_at_k(k)
            covered[k] += found["low"] <= truth <= found["high"]
    assert all(0.91 <= count / trials <= 0.985 for count in covered.values()), covered


def findings_of(counts: list[int], samples: int) -> Findings:
    """Of each problem, as many right samples as its count."""
    right = [count > draw for draw in range(samples) for count in counts]
    return Findings(Judged(counts, [True] * len(counts)), Judged(right, right), samples, (1,))  # type: ignore[arg-type]


def test_the_kind_of_an_interval() -> None:
    counts = [4, 0, 1, 2, 0, 0, 4, 3]
    found = findings_of(counts, 4)
    assert found.counts() == counts
    assert found.pass_at_k(4) == {"k": 4, "value": 5 / 8} | bounds(wilson(5, 8))
    assert found.pass_at_k(2) == {"k": 2, **mean_pass_at_k(counts, 4, 2)}
    sampled = found.evaluation(0)["sampled"]
    assert (sampled["correct"], sampled["total"]) == (14, 32)
    assert bounds(sampled) == bounds(mean_pass_at_k(counts, 4, 1))
    assert bounds(sampled) != bounds(wilson(14, 32))
    once = findings_of([1, 0, 1], 1).evaluation(0)
    assert once["sampled"] == wilson(2, 3)
    assert once["pass_at_k"] == [{"k": 1, "value": 2 / 3} | bounds(wilson(2, 3))]


def bounds(found: Mapping[str, Any]) -> dict[str, float]:
    return {key: found[key] for key in ("low", "high")}


def test_an_evaluation_counts_samples_by_problem(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, eval_samples=4, eval_k="4,1")
    prompts = trainer.held_out
    found = trainer.examine(prompts)
    again = trainer.examine(prompts)
    assert [one.completion for one in found.sampled.rollouts] == [
        one.completion for one in again.sampled.rollouts
    ]
    assert len(found.sampled.rollouts) == 4 * len(prompts)
    assert [one.prompt for one in found.sampled.rollouts] == list(prompts) * 4
    assert len({one.completion for one in found.sampled.rollouts[:: len(prompts)]}) > 1  # samples differ
    texts = [TOKENIZER.decode(one.completion, skip_special_tokens=True) for one in found.sampled.rollouts]
    answered = [replace(prompt, answer=texts[i] or "0") for i, prompt in enumerate(prompts)]
    graded = trainer.examine(answered)
    expected = [
        sum(texts[i + j * len(prompts)].strip() == one.answer.strip() for j in range(4))
        for i, one in enumerate(answered)
    ]
    assert graded.counts() == expected
    evaluation = graded.evaluation(7)
    assert evaluation["pass_at_k"][1]["value"] == pytest.approx(
        np.mean([pass_at_k(4, count, 4) for count in expected])
    )
    one, sampled = evaluation["pass_at_k"][0], evaluation["sampled"]
    assert (one["k"], evaluation["step"], evaluation["samples"]) == (1, 7, 4)
    assert (one["value"], one["low"], one["high"]) == (sampled["accuracy"], sampled["low"], sampled["high"])
    assert (sampled["correct"], sampled["total"]) == (sum(expected), 32)


def test_an_evaluation_as_metrics_and_back_and_in_the_record(tmp_path: Path) -> None:
    evaluation = tiny_trainer(tmp_path / "a", eval_samples=3, eval_k="1,2,3").examine
    trainer = tiny_trainer(tmp_path / "b", eval_samples=3, eval_k="1,2,3")
    metrics = trainer.evaluate()
    assert all(type(value) in (int, float) for value in metrics.values())
    assert "eval_pass_at_3_low" in metrics
    expected = evaluation(trainer.held_out).evaluation(5)
    assert from_metrics(metrics, 5) == expected
    assert from_metrics(to_metrics(expected, "other"), 5, "other") == expected
    record = RunRecord(tmp_path / "run")
    record.add_evaluation(expected)
    assert load_run(tmp_path / "run").evaluations == [expected]


def test_a_verifier_of_ones_own_judges_evaluations(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, eval_match="test_eval_command:speaks")
    found = trainer.examine([replace(prompt, answer=None) for prompt in trainer.held_out])
    for rollout, right in zip(found.greedy.rollouts, found.greedy.right, strict=True):
        assert right is (len(TOKENIZER.decode(rollout.completion, skip_special_tokens=True)) >= 1)
    assert {True, False} == {*found.sampled.right}
    with pytest.raises(ValueError, match="eval_match: expected a function at 'test_eval_command:nothing'"):
        tiny_config(tmp_path, eval_match="test_eval_command:nothing")
    with pytest.raises(ValueError, match="row 1: expected an `answer`"):
        Verifier.named("exact").require([replace(trainer.held_out[0], answer=" ")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_k": "1,2"}, r"eval_k: expected 1 to 1 \(eval_samples\); got '1,2'"),
        ({"eval_k": "one"}, "eval_k: expected integers like 1,4,8; got 'one'"),
        ({"eval_k": "0", "eval_samples": 2}, r"eval_k: expected 1 to 2 \(eval_samples\); got '0'"),
        ({"eval_samples": 0}, "eval_samples: expected a number at least 1, got 0"),
        ({"mass_top_k": -1}, "mass_top_k: expected a number at least 0, got -1"),
    ],
)
def test_options_that_are_wrong_are_named(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"problem": r["problem"], "answer": r["solution"]}) + "\n" for r in ROWS)
    )
    return path


def test_opsd_eval_writes_what_it_found(model: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    match = ["--eval-match", "test_eval_command:speaks"]
    given = ["eval", "--model", model, "--data", rows, "--samples", 4, "--k", "1,4", *GIVEN, *match]
    code, output = invoke(*given, "--out", out)
    assert code == 0, output
    found = json.loads((out / "eval.json").read_text())
    frame = pandas.read_parquet(out / "completions" / "eval.parquet")
    assert frame["decoding"].value_counts().to_dict() == {"greedy": 8, "sampled": 32}
    spoke = frame["completion"].str.len() >= 1
    assert (frame["reward"] == spoke).all()
    sampled = frame[frame["decoding"] == "sampled"]
    by_row = sampled["reward"].groupby(sampled["where"]).sum().astype(int)
    assert [one["k"] for one in found["pass_at_k"]] == [1, 4]
    assert found["pass_at_k"][1]["value"] == pytest.approx(np.mean([pass_at_k(4, c, 4) for c in by_row]))
    assert found["sampled"]["correct"] == sampled["reward"].sum()
    assert found["greedy"]["correct"] == frame[frame["decoding"] == "greedy"]["reward"].sum()
    assert found["config"]["eval_match"] == "test_eval_command:speaks"
    assert f"pass@4 │ {found['pass_at_k'][1]['value']:.1%}" in output
    code, output = invoke(*given, "--out", out)
    assert (code, "out: expected a folder without an evaluation" in output) == (2, True)


def test_opsd_eval_of_a_run_asks_as_the_run_did(model: Path, rows: Path, tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = tmp_path / "config.yaml"
    settings = {
        "student_template": "{problem}", "teacher_template": "{solution};{problem}", "use_cpu": True,
        "max_steps": 1, "save_strategy": "no", "max_completion_length": 4, "lora_rank": 2,
        "learning_rate": 0.5, "eval_match": "test_eval_command:speaks", "eval_strategy": "steps",
        "eval_steps": 1, "eval_samples": 2, "rollouts_recorded": 1, "report_to": "tensorboard",
    }  # fmt: skip
    config.write_text(yaml.safe_dump(settings))
    run = tmp_path / "run"
    code, output = invoke(
        "train", "--model", model, "--data", train, "--eval-data", train, "--config", config, "--out", run
    )
    assert code == 0, output
    assert "pass@2" in output
    assert list((run / "tensorboard").glob("events.*"))
    out = tmp_path / "out"
    code, output = invoke("eval", "--model", run, "--data", train, "--samples", 2, "--use_cpu", "--out", out)
    assert code == 0, output
    found, after = json.loads((out / "eval.json").read_text()), load_run(run).evaluations[-1]
    assert after["step"] == 1
    assert found["greedy"] == after["greedy"]  # the adapters, merged
    assert found["greedy"] != load_run(run).evaluations[0]["greedy"]
    assert found["config"]["max_completion_length"] == 4
    (run / "model").rename(run / "elsewhere")
    code, output = invoke("eval", "--model", run, "--data", rows, "--out", tmp_path / "none")
    assert (code, "model: expected a run that has ended" in output) == (2, True)


def test_adapters_are_merged_into_the_model_below(model: Path, tmp_path: Path) -> None:
    base, _ = load(str(model))
    adapted = with_lora(base, 2, 4.0, 0.0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    adapted.save_pretrained(tmp_path)
    ids = TOKENIZER("1+2=", return_tensors="pt").input_ids
    expected = adapted(ids).logits
    merged, _ = load(str(tmp_path))
    assert not isinstance(merged, PeftModel)
    assert (merged(ids).logits - expected).abs().max() < 1e-3
    assert (tiny_model()(ids).logits - expected).abs().max() > 0.1
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model: expected adapter_model\.safetensors in"):
        load(str(tmp_path))


def test_mistakes_of_opsd_eval_are_one_message(model: Path, rows: Path, tmp_path: Path) -> None:
    for arguments, message in [
        (["--model", model], "data: expected rows or --demo"),
        (["--model", model, "--data", rows, "--demo"], "data: expected rows or --demo"),
        (["--data", rows], "model: expected a model to evaluate; got none"),
        (["--model", model, "--data", rows, "--k", "8"], "eval_k: expected 1 to 1 (eval_samples); got '8'"),
        (["--model", model, "--data", tmp_path / "no.jsonl"], "data: expected a file"),
        (
            ["--model", model, "--data", rows, "--eval-seconds", "1e-9"],
            "eval_seconds: expected an evaluation of",
        ),
    ]:
        code, output = invoke("eval", *arguments, *GIVEN, "--out", tmp_path / "out")
        assert code == 2, output
        assert message in output
    assert not (tmp_path / "out").exists()


def test_opsd_eval_takes_a_run_s_configuration(model: Path, rows: Path, tmp_path: Path) -> None:
    """The command line beats the file, whose data are the training rows; model and rule are named."""
    config, out = tmp_path / "run.yaml", tmp_path / "found"
    given = {"model": "none", "data": "none", "eval_data": str(rows), "student_template": "{problem}"}
    config.write_text(yaml.safe_dump(given | {"max_completion_length": 4, "eval_match": "number", "seed": 5}))
    words = ["--config", config, "--model", model, "--use-cpu", "--out", out, "--seed", 3]
    code, said = invoke("eval", *words)
    assert code == 0, said
    assert f"model {model}; accuracy on" in said
    assert "its last number is that of the answer (--eval-match number)" in said
    found = json.loads((out / "eval.json").read_text())
    assert (found["data"], found["config"]["eval_match"], found["config"]["seed"]) == (str(rows), "number", 3)


def test_columns_of_other_names_are_told_how_to_be_named(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "questions.jsonl"
    rows.write_text(json.dumps({"question": "1+2=", "answer": "3"}))
    code, said = invoke("eval", "--model", model, "--data", rows, "--use-cpu", "--out", tmp_path / "found")
    assert code == 2
    assert """--columns '{"problem": "question", "solution": "answer"}' says what they are called""" in said


def test_the_version_and_completion_are_there() -> None:
    assert invoke("--version") == (0, f"opsd-kernels {version('opsd-kernels')}")
    assert "--install-completion" in invoke("--help")[1]
