"""Comparisons: the runs, their numbers, resuming, failures, and what is written."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from driver_tiny import TOKENIZER, tiny_model, tiny_prompts
from opsd_train.commands.options import parse
from opsd_train.config import OPSDConfig
from opsd_train.demo.run import MODEL
from opsd_train.studies import compare, compare_report
from opsd_train.studies.compare import Plan, Task, execute, measure, parse_methods
from opsd_train.studies.compare_results import summarise
from opsd_train.trainer import OPSDTrainer
from opsd_train.watch.record import load_run
from test_driver_run import invoke

DEFAULTS = [
    "--student_template={problem}", "--teacher_template={solution};{problem}", "--max_completion_length=4",
    "--per_device_train_batch_size=8", "--save_strategy=no", "--eval_strategy=steps", "--use_cpu",
    "--learning_rate=1e-3", "--logging_steps=1",
]  # fmt: skip
QUIET = Console(quiet=True)


def prepare(arguments: Sequence[str], console: Console) -> OPSDTrainer:
    (config,) = parse([OPSDConfig], [], arguments, DEFAULTS)
    prompts = tiny_prompts(config)
    return OPSDTrainer(tiny_model(), config, prompts, TOKENIZER, prompts)


def plan_of(out: Path, named: str = "forward_kl,jsd:beta=0.1", **settings: object) -> Plan:
    plan = Plan(parse_methods(named), seeds=(0,), steps=2, samples=3, ks=(1, 2), out=out)
    return replace(plan, **settings)


TINY = Task("tiny", prepare)


def test_methods_by_name_with_options() -> None:
    plain, scaled = parse_methods("opsd, forward_kl:entry_clip=0.05:clip-mode=scale,")
    assert plain.arguments == ("--objective=opsd",)
    assert scaled.arguments == ("--objective=forward_kl", "--entry_clip=0.05", "--clip_mode=scale")
    assert scaled.folder == "forward_kl-entry_clip=0.05-clip-mode=scale"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forward_kl,kl", "methods: expected one of forward_kl, .*; got 'kl'"),
        ("opsd:entry_clip", "methods: expected name:option=value:...; got 'entry_clip' of 'opsd'"),
        ("opsd:entry_clop=1", "methods: opsd: unknown option entry_clop; did you mean entry_clip"),
    ],
)
def test_wrong_methods(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_methods(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ()}, "methods: expected one or more, each once"),
        ({"methods": parse_methods("opsd,opsd")}, "methods: expected one or more, each once; got opsd, opsd"),
        ({"seeds": (1, 1)}, "seeds: expected one or more, each once; got 1, 1"),
        ({"steps": 0}, "steps: expected at least 1; got 0"),
        ({"ks": (1, 4)}, r"k: expected 1 to 3, the number of samples; got \(1, 4\)"),
    ],
)
def test_wrong_plans(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(tmp_path, **settings)


def test_counts_and_entropies_are_those_of_samples_of_ones_own(tmp_path: Path) -> None:
    trainer = prepare([f"--output_dir={tmp_path}"], QUIET)
    sampling = replace(trainer.sampling, batch_size=64)
    said = [
        TOKENIZER.decode(list(one.completion), skip_special_tokens=True)
        for one in trainer.roll_out(trainer.held_out, sampling, (2, 1))
    ]  # the second draw is right
    trainer.held_out = [
        replace(one, answer=text or "7") for one, text in zip(trainer.held_out, said, strict=True)
    ]
    counts, entropies = measure(trainer, 3)
    expected = [0] * len(trainer.held_out)
    for draw in range(3):
        rollouts = trainer.roll_out(trainer.held_out, sampling, (2, draw))
        for i, rollout in enumerate(rollouts):
            text = TOKENIZER.decode(list(rollout.completion), skip_special_tokens=True)
            expected[i] += text.strip() == rollout.prompt.answer
            if draw == 0:
                ids = torch.tensor([rollout.prompt.student_ids + rollout.completion])
                with torch.no_grad():
                    logits = trainer.student.eval()(ids).logits[0, len(rollout.prompt.student_ids) - 1 : -1]
                log_s = logits.double().log_softmax(-1)
                assert entropies[i] == pytest.approx(-(log_s.exp() * log_s).sum(-1).mean().item(), rel=1e-4)
    assert counts == expected
    assert 0 < sum(counts) < 24


def test_results_are_those_of_the_runs_recorded(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, seeds=(0, 1))
    given = np.array([[0, 1, 2, 3, 3, 0, 1, 0], [3, 3, 0, 1, 2, 2, 0, 0], [1] * 8, [0, 0, 0, 0, 0, 1, 3, 2]])
    outcomes = [
        replace(outcome, measured={**outcome.measured, "correct": counts.tolist()})
        for outcome, counts in zip(execute(plan, TINY, QUIET), given, strict=True)
    ]
    found = summarise(plan, outcomes, "opsd compare", "tiny")
    assert [(outcome.method.spec, outcome.seed) for outcome in outcomes] == [
        ("forward_kl", 0), ("jsd:beta=0.1", 0), ("forward_kl", 1), ("jsd:beta=0.1", 1),
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "forward_kl-seed0", "forward_kl-seed1", "jsd-beta=0.1-seed0", "jsd-beta=0.1-seed1",
    ]  # fmt: skip
    assert load_run(tmp_path / "jsd-beta=0.1-seed1").info["objective"]["beta"] == 0.1
    runs = [load_run(tmp_path / f"jsd-beta=0.1-seed{seed}") for seed in (0, 1)]
    method = found["methods"][1]
    assert (method["method"], found["problems"], found["devices"]) == ("jsd:beta=0.1", 8, ["cpu"])
    last = [run.evaluations[-1]["greedy"] for run in runs]
    for key, name in (("value", "accuracy"), ("low", "low"), ("high", "high")):
        assert method["greedy"][key] == pytest.approx(np.mean([one[name] for one in last]))
    counts = given[1::2]
    assert method["sampled"]["value"] == pytest.approx(counts.mean() / 3)
    two_of_three = 1 - (3 - counts) * (2 - counts) / 6
    assert method["pass_at_k"]["2"]["value"] == pytest.approx(two_of_three.clip(max=1).mean())
    entropy = np.array([run.info["comparison"]["entropy"] for run in runs])
    assert method["entropy"]["value"] == pytest.approx(entropy.mean())
    assert found["methods"][0]["difference"] is None
    assert method["difference"]["value"] == pytest.approx((counts.mean() - given[::2].mean()) / 3)
    curve = method["curves"]["entropy"]
    near = [row["student_entropy"] for run in runs for row in run.metrics]
    assert [point["step"] for point in curve] == [1, 2]
    half = 1.959964 * np.std(near, ddof=1) / 2
    assert curve[0]["value"] == pytest.approx(np.mean(near))
    assert curve[0]["high"] - curve[0]["value"] == pytest.approx(half, rel=1e-5)
    assert [point["step"] for point in method["curves"]["greedy"]] == [0, 1, 2]


def test_finished_runs_are_not_repeated_and_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path)
    first = execute(plan, TINY, QUIET)
    info = tmp_path / "jsd-beta=0.1-seed0" / "run.json"
    cut_off = {key: value for key, value in json.loads(info.read_text()).items() if key != "comparison"}
    info.write_text(json.dumps(cut_off))
    made = []
    again = execute(plan, Task("tiny", lambda *given: made.append(given[0]) or prepare(*given)), QUIET)
    assert len(made) == 1
    assert "--objective=jsd" in made[0]
    assert [outcome.measured for outcome in again] == [outcome.measured for outcome in first]
    monkeypatch.setattr(compare, "_run", lambda *_: pytest.fail("nothing may run"))
    for settings, name in (({"steps": 3}, "arguments"), ({"samples": 4}, "samples")):
        with pytest.raises(ValueError, match=f"holds a finished run with {name}"):
            execute(replace(plan, **settings), TINY, QUIET)


def test_a_failing_run_does_not_lose_the_others(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "jsd:beta=2,forward_kl")
    outcomes = execute(plan, TINY, QUIET)
    assert outcomes[0].error.startswith("ValueError: beta: expected a number in [0, 1]")
    assert outcomes[1].measured
    found = summarise(plan, outcomes, "opsd compare", "tiny")
    assert (found["methods"][0]["greedy"], found["methods"][0]["pass_at_k"]) == (None, {})
    text = compare_report.markdown(found, picture=True)
    line = next(line for line in text.splitlines() if line.startswith("| jsd:beta=2"))
    assert "seed 0: ValueError: beta: expected a number in [0, 1]" in line
    paths = compare_report.write(found, tmp_path)
    assert [path.name for path in paths] == ["compare.json", "compare.md", "compare.png"]


def test_nothing_finished_is_a_table_without_a_picture(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "jsd:beta=2")
    found = summarise(plan, execute(plan, TINY, QUIET), "opsd compare", "tiny")
    assert [path.name for path in compare_report.write(found, tmp_path)] == ["compare.json", "compare.md"]
    assert "compare.png" not in (tmp_path / "compare.md").read_text()
    assert json.loads((tmp_path / "compare.json").read_text())["problems"] is None


@pytest.mark.skipif(not MODEL.is_dir(), reason="the demo's model is not in this checkout")
def test_command_on_the_demo(tmp_path: Path) -> None:
    given = ["compare", "--methods", "forward_kl,forward_kl:entry_clip=0.05:clip_mode=scale", "--steps", 2]
    given += ["--samples", 2, "--k", "1,2", "--out", tmp_path, "--per_device_train_batch_size", 8]
    given += ["--eval_strategy", "no"]
    code, output = invoke(*given)
    assert code == 0, output
    assert "2 steps, 1 seed, 512 held-out problems" in output
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["command"].startswith("opsd compare --methods forward_kl,forward_kl:entry_clip=0.05")
    assert found["versions"][0]["torch"] == torch.__version__
    for method in found["methods"]:
        assert 0 < method["sampled"]["low"] < method["sampled"]["value"] < method["sampled"]["high"] < 0.5
        assert method["pass_at_k"]["1"] == method["sampled"]
        assert method["pass_at_k"]["2"]["value"] > method["sampled"]["value"]
        value, low, high = (f"{100 * method['greedy'][key]:.1f}" for key in ("value", "low", "high"))
        assert value in output
        assert f"({low}" in output
        assert f"{high})" in output
        line = f"| {method['method']} | {value} ({low} to {high}) | "
        assert line in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    code, output = invoke(*given)
    assert code == 0, output
    assert output.count("finished before") == 2
    assert "/2 loss" not in output


def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    for given, message in [
        (["--methods", "kl"], "error: methods: expected one of forward_kl"),
        (["--methods", "opsd", "--seeds", "a"], "error: seeds: expected integers like 0,1; got 'a'"),
    ]:
        code, output = invoke("compare", "--out", tmp_path / "out", *given)
        assert code == 2, output
        assert message in output
