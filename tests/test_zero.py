"""ZeRO-3 in two processes: checkpoints that go on bit for bit, also in three, and steps that are left out."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distributed_worker import ZERO
from driver_tiny import tiny_config
from opsd_train.safety import folders
from opsd_train.safety.trees import load_tree

HERE = Path(__file__).parent
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
TWICE = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
OFFLOADED = {
    **ZERO,
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,  # which is compiled for minutes
}
RESUMED: dict[str, dict[str, Any]] = {
    "full": {"lora": False, "teacher": "live", **TWICE},
    "lora": {"lora": True, "teacher": "ema", "ema_decay": 0.5},
    "bf16": {"lora": False, "teacher": "live", "bf16": True},
    "offloaded": {"lora": False, "teacher": "live", "deepspeed": OFFLOADED},
}
BAD: dict[str, dict[str, Any]] = {
    "bad_loss": {"kind": "loss", "steps": [2], **TWICE},
    "bad_gradient": {"kind": "gradient", "steps": [2], "teacher": "ema", "lora": True},
    "bad_bf16": {"kind": "gradient", "steps": [2], "bf16": True},
    "bad_offloaded": {"kind": "loss", "steps": [2], "deepspeed": OFFLOADED},
}
SKIPPING = {"do": "skip", "lora": False, "max_steps": 4, "lr_scheduler_type": "linear"}


def launch(processes: int, folder: Path, cases: dict[str, Any]) -> list[dict[str, Any]]:
    """What every process found in every case."""
    paths = [str(HERE), str(HERE.parent), str(HERE.parent / "python"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    done = subprocess.run(
        [*command, str(processes), str(HERE / "zero_worker.py"), str(folder), json.dumps(cases)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    names = [f"rank-{rank}-of-{processes}.json" for rank in range(processes)]
    return [json.loads((folder / name).read_text(encoding="utf-8")) for name in names]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def two(out: Path) -> list[dict[str, Any]]:
    cases = {name: {"do": "resume", **case} for name, case in RESUMED.items()}
    cases |= {name: {**SKIPPING, "save_strategy": "no", **case} for name, case in BAD.items()}
    cases["ended"] = {**SKIPPING, "kind": "loss", "steps": [2, 3, 4], "max_steps": 9}
    stopped = {**RESUMED["full"], "save_strategy": "no"}
    cases["stopped"] = {"do": "stop", **stopped}
    went_on = {**RESUMED["full"], "checkpoint": str(out / "stopped" / "checkpoint-1")}
    cases["went_on"] = {"do": "go_on", **went_on}
    return launch(2, out, cases)


def same_tensors(one: Path, other: Path) -> set[str]:
    """Names of the safetensors in a folder; those in the other are to be the same bytes."""
    names = {path.name for path in one.glob("*.safetensors")}
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    return names


@needs_deepspeed
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_bit_for_bit(two: Any, out: Path, name: str) -> None:
    last, before = out / name / "checkpoint-3", out / name / "checkpoint-2"
    assert folders.what_is_wrong(last, digests=True) is None
    weights = "adapter_model.safetensors" if RESUMED[name]["lora"] else "model.safetensors"
    held = same_tensors(last, out / f"{name}-resumed" / "checkpoint-3")
    assert held >= {"optimizer.safetensors", "rank-00000.safetensors", "rank-00001.safetensors", weights}
    assert (last / weights).read_bytes() != (before / weights).read_bytes()
    model = out / name / "model" / weights
    assert model.read_bytes() == (out / f"{name}-resumed" / "model" / weights).read_bytes()
    state = load_tree(last / "optimizer")
    assert {int(one["step"]) for one in state["state"].values()} == {3}
    assert all(one["exp_avg"].any() for one in state["state"].values())
    assert bool(state["masters"]) == (name == "bf16")
    assert not {path.suffix for path in last.rglob("*")} & {".pt", ".bin", ".pth", ".pkl"}


@pytest.mark.slow
@needs_deepspeed
def test_the_state_is_the_same_in_three_processes(two: Any, out: Path) -> None:
    """Shares of a third of a weight are filled up with zeros, which is no part of what they hold."""
    names = ["full", "bf16"]
    cases = {
        f"{name}-in-three": {
            **RESUMED[name], "do": "load", "checkpoint": str(out / name / "checkpoint-2"), "max_steps": 2,
        }
        for name in names
    }  # fmt: skip
    assert [found["full-in-three"] for found in launch(3, out, cases)] == [{"processes": 3}] * 3
    for name in names:
        then = load_tree(out / name / "checkpoint-2" / "optimizer")
        now = load_tree(out / f"{name}-in-three" / "optimizer")
        assert then["state"].keys() == now["state"].keys()
        for weight, own in then["state"].items():
            for key in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(own[key], now["state"][weight][key]), (weight, key)
        assert then["param_groups"] == now["param_groups"]
        assert then["masters"].keys() == now["masters"].keys()
        assert all(torch.equal(one, now["masters"][key]) for key, one in then["masters"].items())


@needs_deepspeed
@pytest.mark.parametrize("name", BAD)
def test_a_step_is_left_out_in_both(two: list[dict[str, Any]], name: str) -> None:
    """Weights, fp32 weights, moments, numbers of steps, schedule and teacher, bit for bit."""
    for found in (rank[name] for rank in two):
        same = found["same"]
        still = {"parts", "fp32", "moments", "schedule", "rate", "teacher"}
        assert same["2"] == dict.fromkeys(still, True)
        for step in ("1", "3", "4"):
            moved = {part for part, is_same in same[step].items() if not is_same}
            assert moved >= {"fp32", "moments", "schedule", "rate"}, step
            assert ("teacher" in moved) == (BAD[name].get("teacher") == "ema")
        assert (found["schedule"], found["skipped"], found["error"], found["finite"]) == (3, 1, None, True)
        # inf is what DeepSpeed calls the norm of a step that it left out.
        norms = {step: norm for step, _, norm in found["logged"]}
        assert [step for step, norm in norms.items() if norm == "inf"] == [2]
        assert [count for _, count, _ in found["logged"]] == [0, 1, 1, 1]


@needs_deepspeed
def test_three_bad_steps_end_the_run(two: list[dict[str, Any]], out: Path) -> None:
    for found in (rank["ended"] for rank in two):
        assert "3 steps in a row, up to step 4" in found["error"]
        assert all(found["same"]["2"].values())
        assert all(found["same"]["3"].values())
    run = out / "ended"
    kept = sorted(path.name for path in run.iterdir())
    assert kept == ["bad-step-4", "checkpoint-1", "checkpoint-2", "checkpoint-3"]
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (run / f"checkpoint-{step}" / name for step in (1, 3))
        assert one.read_bytes() == other.read_bytes()
    for rank in (0, 1):
        about = json.loads((run / "bad-step-4" / f"rank-{rank}.json").read_text(encoding="utf-8"))
        assert [loss is None for loss in about["losses"]] == [rank == 1]
        assert len(about["rows"]) == 2
        assert all(row["loss"] > 0 for row in about["rows"])  # with the weights as they were


@needs_deepspeed
def test_a_signal_keeps_the_last_step(two: list[dict[str, Any]], out: Path) -> None:
    assert [rank["stopped"] for rank in two] == [{"step": 1, "code": 143}] * 2
    assert [path.name for path in (out / "stopped").iterdir()] == ["checkpoint-1"]
    assert "model.safetensors" in same_tensors(out / "full/checkpoint-3", out / "went_on/checkpoint-3")


@pytest.mark.parametrize(
    ("settings", "saves", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, "no", r"deepspeed: expected zero_optimization.stage 3, got 2"),
        (
            {"fp16": {"enabled": True}},
            "steps",
            r"expected 'no' with DeepSpeed's fp16.enabled True",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "steps",
            r"expected 'no' with DeepSpeed's zero_optimization.offload_optimizer.device 'nvme'",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(
    tmp_path: Path, settings: dict[str, Any], saves: str, message: str
) -> None:
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    config = tiny_config(tmp_path, save_strategy=saves)
    config.deepspeed_plugin = SimpleNamespace(hf_ds_config=HfDeepSpeedConfig({**ZERO, **settings}))
    with pytest.raises(ValueError, match=message):
        config.check_devices()
    if saves == "steps":
        config.save_strategy = "no"
        config.check_devices()
