"""What somebody meets who trains for the first time: refusals before loading, lines in a file, warnings."""

import io
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from transformers import TrainingArguments
from typer.testing import CliRunner

from driver_tiny import ROWS, TOKENIZER, tiny_config, tiny_model, tiny_trainer
from opsd_kernels import divergences
from opsd_kernels.methods import names
from opsd_train.commands import terminal
from opsd_train.commands.main import app
from opsd_train.commands.option_list import REST, group_of
from opsd_train.config import OPSDConfig
from opsd_train.data.rows import load_rows
from opsd_train.data.sampler import short_steps
from opsd_train.inherited import UNUSED
from opsd_train.loading import load
from opsd_train.run_options import RunOptions
from opsd_train.studies import compare_report
from opsd_train.train import make_trainer, run
from opsd_train.watch.progress import ProgressCallback, make_progress
from opsd_train.watch.record import load_run


def invoke(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, words, env={"COLUMNS": "80"})
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": -5}, "max_steps: expected a number of at least 1, got -5"),
        ({"max_steps": 0}, "max_steps: expected a number of at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate: expected a number of at least 0, got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number of at least 0, got nan"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: .* at least 1, got 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size: .* at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: .* at least 1, got 0"),
        ({"weight_decay": -0.1}, "weight_decay: .* at least 0, got -0.1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: .* at least 0, got -1.0"),
        ({"warmup_steps": -1}, "warmup_steps: .* at least 0, got -1"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected nothing, since .*; got 0.1"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: expected nothing, since .*; got 5.0"),
    ],
)
def test_inherited_numbers_are_checked(settings: dict[str, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **settings)


def test_the_first_and_the_last_step_are_logged(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=3)  # less than the 5 of logging_steps
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 3]
    assert all("forward_kl" in entry for entry in logged)


def test_a_run_that_writes_to_a_file_says_a_line_per_logged_step(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    trainer = tiny_trainer(tmp_path, max_steps=2, rollouts_recorded=1)
    run(trainer, {"name": "test", "model": "tiny"}, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    begun = lines.index("2 steps, cpu")
    assert lines[begun + 1 : begun + 2] == [f"step 0: evaluating {len(ROWS)} held-out problems ..."]
    for step, entry in zip((1, 2), load_run(tmp_path).metrics, strict=True):
        (line,) = [line for line in lines if line.startswith(f"step {step}/2")]
        assert f"loss {entry['loss']:.3f}  KL {entry['forward_kl']:.3f}" in line
    assert len([line for line in lines if line.startswith("step 2: held-out accuracy greedy ")]) == 1


def test_a_terminal_gets_the_bar() -> None:
    assert isinstance(make_progress(Console(file=io.StringIO(), force_terminal=True)), ProgressCallback)


@pytest.mark.parametrize("name", divergences.table())
def test_every_divergence_is_an_objective(name: str, tmp_path: Path) -> None:
    beta = 0.3 if divergences.table()[name].uses_beta else 0.5
    found = tiny_config(tmp_path, objective=name, beta=beta).to_objective()
    assert (found.divergence, found.beta) == (name, beta)


def test_a_method_as_objective_is_told_its_option(tmp_path: Path) -> None:
    message = "objective: expected one of .*skew_forward.*, opsd; got 'sdpo'; sdpo is a method: --method sdpo"
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, objective="sdpo")


def test_a_cpu_pins_no_memory(tmp_path: Path) -> None:
    assert tiny_config(tmp_path).dataloader_pin_memory is False


def test_warnings_of_the_command_are_lines() -> None:
    script = """
import logging, warnings
from opsd_train.commands.terminal import quiet
quiet()
code = compile("import warnings; warnings.warn('rows repeat')", "/x/opsd_train/train.py", "exec")
exec(code, {})
warnings.warn_explicit("old", DeprecationWarning, "/x/other.py", 3, registry=None, module="__main__")
warnings.warn("Could not find a config file in None - will assume")
logger = logging.getLogger("DeepSpeed")
logger.addHandler(logging.StreamHandler())
logger.warning("Setting accelerator to CPU. If you have GPU")
logger.warning("kept")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = ["warning: rows repeat", "warning: old (DeprecationWarning, /x/other.py:3)", "kept"]
    assert done.stderr.splitlines() == lines


def test_fewer_rows_than_a_step_has_are_told(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, per_device_train_batch_size=16, gradient_accumulation_steps=4, max_steps=1)
    told = r"data: 8 rows are fewer than the 64 prompts of a step; a step has 8"
    with pytest.warns(UserWarning, match=told):
        trainer = make_trainer(tiny_model(), TOKENIZER, load_rows(ROWS, config.to_templates()), [], config)
    drawn: list[int] = []
    roll_out = trainer.roll_out
    trainer.roll_out = lambda prompts, *rest: drawn.append(len(prompts)) or roll_out(prompts, *rest)  # type: ignore[method-assign,func-returns-value]
    trainer.train()
    assert drawn == [8]
    assert short_steps(8, 8, 1) is None


@pytest.mark.parametrize("given", [(), ("config.json",)])
def test_a_model_folder_without_its_files_is_told_so(given: tuple[str, ...], tmp_path: Path) -> None:
    for name in given:
        (tmp_path / name).write_text("{}")
    missing = "tokenizer.json" if given else "config.json"
    with pytest.raises(ValueError, match=f"^model: {tmp_path} has no {missing}$"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--learning-rat", "1"), "unknown option --learning-rat; did you mean --learning-rate?"),
        (("--lenght_gate=3",), "unknown option --lenght-gate; did you mean --length-gate?"),
        (("--no-such-thing",), "unknown option --no-such-thing; `opsd options` lists what there is"),
    ],
)
def test_a_misspelt_option_is_told_as_it_is_written(words: tuple[str, ...], told: str) -> None:
    assert invoke("train", *words) == (2, f"error: command line: {told}\n")


def test_every_option_is_in_a_group_and_fits_a_narrow_terminal() -> None:
    own = {field.name for field in (*fields(RunOptions), *fields(OPSDConfig))} - {
        field.name for field in fields(TrainingArguments)
    }
    assert [name for name in own if group_of(name) == REST] == []
    code, output = invoke("options")
    lines = output.splitlines()
    assert code == 0
    assert max(map(len, lines)) <= 80
    assert {f"--{name.replace('_', '-')}" for name in own} <= set(output.split())
    assert "  --learning-rate 5e-06" in [line.rstrip() for line in lines]
    assert "--adam-beta1" not in output
    assert "--label-smoothing-factor" not in output
    for name in re.findall(r"^  --([\w-]+)", invoke("options", "--all")[1], flags=re.MULTILINE):
        assert name.replace("-", "_") not in UNUSED
    found = invoke("options", "entry-clip")[1]
    assert "--entry-clip" in found
    assert "--token-clip" not in found
    assert invoke("options", "zzz")[0] == 2


def test_methods_are_listed_by_name() -> None:
    code, output = invoke("methods")
    listed = [line.split()[0] for line in output.splitlines() if line and line[0] != " "]
    assert code == 0
    assert listed == sorted(names())
    assert max(map(len, output.splitlines())) <= 80


def test_titles_and_captions_are_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(terminal, "console", narrow)
    table = Table("decoding", title="Accuracy (512 problems, 1 samples each)", caption="95 % [b]: Wilson's.")
    terminal.show(table)
    lines = narrow.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert (lines[0], lines[-1]) == ("Accuracy (512 problems, 1 samples each)", "95 % [b]: Wilson's.")


def test_a_comparison_breaks_no_word_on_a_narrow_terminal() -> None:
    one = {"value": 0.437, "low": 0.394, "high": 0.479}
    method = {
        "greedy": one, "sampled": one, "difference": {"value": -0.123, "low": -0.2, "high": -0.1},
        "pass_at_k": {"1": one, "4": one, "8": one}, "entropy": one,
        "runs": [{"seed": 0, "seconds": 1234.0, "error": None}],
    }  # fmt: skip
    labels = ("forward_kl:clip_mode=scale", "reverse_kl")
    found: Any = {
        "task": "addition", "steps": 200, "seeds": [0], "problems": 512,
        "methods": [{**method, "method": label} for label in labels],
    }  # fmt: skip
    narrow = Console(file=io.StringIO(), width=80)
    narrow.print(compare_report.table(found))
    output = narrow.file.getvalue()  # type: ignore[attr-defined]
    for word in (
        "forward_kl",
        ":clip_mode=scale",
        "reverse_kl",
        "method",
        "sampled,",
        "entropy,",
        "(0.394,",
        "0.479)",
        " s",
    ):
        assert word in output
    assert max(len(line.rstrip()) for line in output.splitlines()) <= 80
