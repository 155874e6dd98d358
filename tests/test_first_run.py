"""What somebody meets who trains for the first time: refusals before loading, lines in a file, warnings."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from driver_tiny import ROWS, tiny_config, tiny_trainer
from opsd_kernels import divergences
from opsd_train.train import run
from opsd_train.watch.progress import ProgressCallback, make_progress
from opsd_train.watch.record import load_run


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
        ({"num_train_epochs": 2.0}, "num_train_epochs: expected nothing, since max_steps says .*; got 2.0"),
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
    assert lines[:2] == ["2 steps, cpu", f"step 0: evaluating {len(ROWS)} held-out problems ..."]
    for step, entry in zip((1, 2), load_run(tmp_path).metrics, strict=True):
        (line,) = [line for line in lines if line.startswith(f"step {step}/2")]
        assert f"loss {entry['loss']:.3f}  KL {entry['forward_kl']:.3f}" in line
    assert len([line for line in lines if line.startswith("step 2: held-out accuracy greedy ")]) == 1


def test_a_terminal_gets_the_bar() -> None:
    assert isinstance(make_progress(Console(file=io.StringIO(), force_terminal=True)), ProgressCallback)


@pytest.mark.parametrize("name", divergences.table())
def test_every_divergence_is_an_objective(name: str, tmp_path: Path) -> None:
    found = tiny_config(tmp_path, objective=name, beta=0.3).to_objective()
    assert (found.divergence, found.beta) == (name, 0.3)


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
