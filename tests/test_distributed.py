"""Two processes on a CPU do what one does: DDP, FSDP2 and ZeRO-3 through accelerate, with gloo."""

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
from accelerate.utils import DistributedType
from safetensors.torch import load_file

import distributed_worker as worker
from driver_tiny import tiny_config, tiny_model
from opsd_train.sharding import Ranks, through

HERE = Path(__file__).parent
ACCUMULATED = {"rows": 2, "gradient_accumulation_steps": 2}
CHECKPOINTED = {"gradient_checkpointing": True}
FOUR = {"rows": 1, "gradient_accumulation_steps": 4}
CASES: dict[str, dict[str, Any]] = {
    "ddp_full": {"wrapper": "ddp"},
    "ddp_lora": {"wrapper": "ddp", "lora": True, "teacher": "ema", **CHECKPOINTED, **ACCUMULATED},
    "ddp_untied": {"wrapper": "ddp", "tied": False, "teacher": "sync", **CHECKPOINTED},
    "ddp_order": {"wrapper": "ddp", "rows": 2, "max_steps": 4, "teacher": "live"},
    "ddp_method": {
        "wrapper": "ddp", "method": "scope", "num_generations": 2, "context_templates": worker.TEMPLATES,
    },
    "ddp_empty": {
        "wrapper": "ddp", "sorted": True, "length_gate": 1, "max_steps": 1,
        "train_sampling_strategy": "sequential",
    },
    "fsdp_full": {"wrapper": "fsdp"},
    "fsdp_lora": {"wrapper": "fsdp", "lora": True},
    "fsdp_live": {"wrapper": "fsdp", "tied": False, "teacher": "live"},
    "fsdp_untied": {
        "wrapper": "fsdp", "tied": False, "teacher": "trust_region", **CHECKPOINTED, **ACCUMULATED,
    },
    "fsdp_lora_ema": {"wrapper": "fsdp", "lora": True, "teacher": "ema", "ema_decay": 0.5},
    "fsdp_method": {"wrapper": "fsdp", "method": "purified_opsd", "teacher": "ema"},
    "fsdp_bf16": {"wrapper": "fsdp", "bf16": True, "prescribed": True},
    "fsdp_four": {"wrapper": "fsdp", **FOUR},
    "fsdp_four_untied": {"wrapper": "fsdp", "tied": False, "teacher": "live", **CHECKPOINTED, **FOUR},
    "fsdp_four_lora": {"wrapper": "fsdp", "lora": True, "tied": False, **FOUR},
    "fsdp_four_tied": {"wrapper": "fsdp", "lora": True, "teacher": "ema", **FOUR},
}  # fmt: skip
ZERO_CASES: dict[str, dict[str, Any]] = {
    "zero_full": {"wrapper": "zero"},
    "zero_lora": {"wrapper": "zero", "lora": True, "teacher": "ema", "ema_decay": 0.5, **ACCUMULATED},
    "zero_untied": {"wrapper": "zero", "tied": False, "teacher": "live", **CHECKPOINTED},
    "zero_four": {"wrapper": "zero_parts", **FOUR},
    "zero_four_untied": {"wrapper": "zero_parts", "tied": False, "teacher": "live", **CHECKPOINTED, **FOUR},
    "zero_four_lora": {"wrapper": "zero_parts", "lora": True, "tied": False, **FOUR},
    "zero_four_tied": {"wrapper": "zero_parts", "lora": True, "teacher": "live", **FOUR},
}


def launch(folder: Path, cases: dict[str, Any]) -> Path:
    """Runs the cases in two processes; returns the folder with what they wrote."""
    (folder / "cases").write_text(json.dumps(cases), encoding="utf-8")
    paths = [str(HERE), str(HERE.parent / "python"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "distributed_worker.py"), str(folder), str(folder / "cases")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("two"), CASES)


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("zero"), ZERO_CASES)


def alone(out: Path, case: dict[str, Any]) -> worker.OPSDTrainer:
    """The same case in this process: all rows of a step in one batch."""
    given = {**case, "wrapper": "none"}
    rows = 2 * given.pop("rows", 4) * given.pop("gradient_accumulation_steps", 1)
    return worker.make(out, given, rows)


def compare(folder: Path, name: str, case: dict[str, Any], out: Path, tolerance: float = 1e-6) -> None:
    error = folder / f"{name}.error"
    assert not error.exists(), error.read_text(encoding="utf-8")
    found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    weights = load_file(folder / f"{name}.safetensors")
    trainer = alone(out, case)
    start = {key: one.detach().clone() for key, one in trainer.student.named_parameters()}
    expected, told = worker.outcome(trainer)
    assert weights.keys() == expected.keys()
    assert max(float((expected[key] - start[key]).abs().max()) for key in expected) > 5e-3
    for key in expected:
        torch.testing.assert_close(weights[key], expected[key], rtol=0, atol=tolerance)
    near = {"rel": 1e-5, "abs": 1e-6} if tolerance < 1e-5 else {"rel": 5e-2}
    for mine, other in zip(found["logs"], told["logs"], strict=True):
        assert (mine["loss"], mine["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), **near)
    assert found["sharded"] == (case["wrapper"] != "ddp")
    assert found["after"]["eval_greedy_total"] == len(trainer.held_out) == 5
    if tolerance < 1e-5:
        assert found["written"] == told["written"]
        assert found.get("kl") == (None if "kl" not in told else pytest.approx(told["kl"], abs=1e-5))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(two: Path, tmp_path: Path, name: str) -> None:
    """Weights after some steps, losses, gradient norms, evaluations: the rows of a step in two shares."""
    compare(two, name, CASES[name], tmp_path, 1e-3 if "bf16" in name else 1e-6)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("name", ZERO_CASES)
def test_two_processes_with_deepspeed_are_one(zero: Path, tmp_path: Path, name: str) -> None:
    compare(zero, name, ZERO_CASES[name], tmp_path)


@pytest.mark.parametrize("name", [name for name in CASES | ZERO_CASES if "four" in name])
def test_a_head_is_gathered_once_per_step(request: pytest.FixtureRequest, name: str) -> None:
    """For rollouts, teacher and student, forward and backward, in all four micro-batches of each step."""
    if name in ZERO_CASES:
        pytest.importorskip("deepspeed")
    folder = request.getfixturevalue("two" if name in CASES else "zero")
    found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert found["gathers"][:2] == [1, 1]
    assert found["saved"] == [True] * 3


def test_a_process_without_tokens_takes_part(tmp_path: Path) -> None:
    """In `ddp_empty` no row of the second process counts."""
    trainer = alone(tmp_path, CASES["ddp_empty"])
    found = worker.lengths(trainer.student, [row["problem"] for row in worker.by_length(trainer.student)])
    assert found[0] == 1
    assert min(found[4:]) > 1


def stub(**settings: Any) -> Any:
    """An accelerator without processes."""
    plugin = SimpleNamespace(**settings.pop("plugin", {}))
    given = {"num_processes": 2, "process_index": 1, "distributed_type": DistributedType.MULTI_CPU}
    return SimpleNamespace(**given | settings, state=SimpleNamespace(fsdp_plugin=plugin))


def test_processes_draw_from_streams_of_their_own() -> None:
    model = tiny_model()
    first, second = (Ranks(stub(process_index=at), model).seeded((3, 0, 5)) for at in (0, 1))
    assert first == (3, 0, 5)  # that of a run alone
    assert second == (3, 0, 5, 1)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ({"fsdp_version": 1, "cpu_ram_efficient_loading": False}, "expected version 2, got 1"),
        ({"fsdp_version": 2, "cpu_ram_efficient_loading": True}, "expected cpu_ram_efficient_loading false"),
    ],
)
def test_fsdp_that_the_driver_cannot_train_under_is_refused(plugin: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"fsdp_config: {message}"):
        Ranks(stub(plugin=plugin, distributed_type=DistributedType.FSDP), tiny_model())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"private": {}}, "private: expected None with 2 processes"),
        ({"extrapolate": 2}, "extrapolate: expected 0 with 2 processes"),
        ({"torch_compile": True}, "torch_compile: expected False with 2 processes"),
        (
            {"num_generations": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
            r"per_device_train_batch_size: expected a multiple of num_generations \(2\) with 2 processes",
        ),
    ],
)
def test_what_is_for_one_process_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    config = tiny_config(tmp_path, **settings)
    monkeypatch.setattr(type(config), "world_size", 2)
    with pytest.raises(ValueError, match=message):
        config.check_devices()


def test_several_devices_in_one_process_are_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config._n_gpu = 2
    with pytest.raises(ValueError, match="expected one device per process, got 2 in one"):
        config.check_devices()


def test_a_forward_pass_is_replaced_and_put_back() -> None:
    """Hooks fire around it, in order; the modules may be called inside, also where they had a forward set."""
    outer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    inner = outer[0]
    inner.forward = own = lambda x: x + 1  # as accelerate sets one
    seen: list[str] = []
    for name, module in (("outer", outer), ("inner", inner)):
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(f"into {name}"))
        module.register_forward_hook(lambda *_, name=name: seen.append(f"out of {name}"))
    found = through([(outer, outer), (inner, inner)], lambda: torch.tensor(float(len(seen))))
    assert seen == ["into outer", "into inner", "out of inner", "out of outer"]
    assert found == 2
    assert inner.forward is own
    assert "forward" not in outer.__dict__
    with pytest.raises(ZeroDivisionError):
        through([(outer, inner)], lambda: 1 / 0)
    assert inner.forward is own


def test_a_loss_keeps_its_precision_in_a_wrapper_that_rounds() -> None:
    """As FSDP2 does with bf16: the value is the one computed, the gradient goes through what came back."""
    layer = torch.nn.Linear(2, 2)
    layer.register_forward_hook(lambda module, args, output: output.bfloat16())
    loss = through([(layer, layer)], lambda: layer.weight.sum() * 1.001)
    assert loss.dtype == torch.float32
    assert loss.item() == (layer.weight.sum() * 1.001).item()
    loss.backward()
    torch.testing.assert_close(layer.weight.grad, torch.full((2, 2), 1.001))
