"""Checkpoints: what is in them, that a run goes on from them bit for bit, and which ones count."""

import errno
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM, TrainerCallback, TrainerState

from driver_tiny import tiny_model, tiny_trainer
from opsd_train.loading import with_lora
from opsd_train.safety import checkpoints, folders
from opsd_train.safety.atomic import CheckpointError
from opsd_train.safety.checkpoints import checkpoint_of, newest_checkpoint
from opsd_train.safety.optimizer_state import set_state
from opsd_train.safety.student_files import load_student, write_student
from opsd_train.safety.trees import load_tree, save_tree
from opsd_train.trainer import OPSDTrainer
from opsd_train.watch.record import RunRecord, load_run

EVERY = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
OWN = {"training_args.json", "trainer_state.json", "adapter_config.json"}  # name folders or hold times


def student(lora: bool, seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    if not lora:
        return tiny_model(seed).to(dtype)
    model = tiny_model(0)
    torch.manual_seed(seed)  # LoRA draws its A
    return with_lora(model, rank=2, alpha=4, dropout=0.3)


def go(
    out: Path,
    resume: Path | None = None,
    lora: bool = False,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> OPSDTrainer:
    """A run over 8 prompts. One that is resumed begins with other weights and another random state."""
    model = student(lora, 0 if resume is None else 1, dtype)
    given = {"max_steps": 5, "teacher": "ema", "per_device_train_batch_size": 2, **EVERY, **settings}
    trainer = tiny_trainer(out, model, **given)
    if resume is not None:
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def content(folder: Path) -> dict[str, bytes]:
    files = (folders.read_marker(folder) or {})["files"]
    return {name: (folder / name).read_bytes() for name in files if name not in OWN}


MATRIX: dict[str, dict[str, Any]] = {
    "adamw, into the second epoch": {},  # four steps an epoch, and the last of the first is a checkpoint
    "schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1},
    "rmsprop": {"optim": "rmsprop"},
    "adafactor in bf16": {"optim": "adafactor", "dtype": torch.bfloat16},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "generations": {"num_generations": 2, "per_device_train_batch_size": 4},
    "lora with dropout": {"lora": True},
}


@pytest.mark.parametrize("name", MATRIX)
def test_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, name: str) -> None:
    steps = 4 if name.startswith("adamw") else 2
    settings = {"max_steps": steps + 1 if steps == 4 else 4, **MATRIX[name]}
    go(tmp_path / "whole", **settings)
    resumed = go(tmp_path / "resumed", tmp_path / "whole" / f"checkpoint-{steps}", **settings)
    assert resumed.state.global_step == settings["max_steps"]
    first, last = (content(tmp_path / "whole" / f"checkpoint-{one}") for one in (1, settings["max_steps"]))
    assert last == content(tmp_path / "resumed" / f"checkpoint-{settings['max_steps']}")
    moved = {"optimizer.safetensors", "scheduler.json", "ema_teacher.safetensors"}
    moved |= {"adapter_model.safetensors" if settings.get("lora") else "model.safetensors"}
    if settings.get("lora"):  # dropout draws
        moved |= {"rank-00000.safetensors"}
    assert all(first[one] != last[one] for one in moved)
    assert {"rank-00000.json", "rank-00000.safetensors", "position.json"} <= last.keys()


def test_losses_between_two_lines_of_the_log_are_kept(tmp_path: Path) -> None:
    whole = go(tmp_path / "whole", logging_steps=3, max_steps=3)
    resumed = go(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-2", logging_steps=3, max_steps=3)
    losses = [[one["loss"] for one in run.state.log_history if "loss" in one] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 1
    last = [run.state.log_history[-1]["train_loss"] for run in (whole, resumed)]
    alone = go(tmp_path / "alone", logging_steps=1, max_steps=3)
    steps = [one["loss"] for one in alone.state.log_history if "loss" in one]
    assert last[0] == pytest.approx(sum(steps) / 3, rel=1e-5)
    assert last[1] == pytest.approx(steps[2], rel=1e-5)  # of the steps of that call


class CutOff(TrainerCallback):
    """Ends a run between the two micro-batches of its third step."""

    def on_substep_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_losses_of_a_step_that_was_cut_off_are_not_kept(tmp_path: Path) -> None:
    settings = {**MATRIX["accumulation"], "teacher": "live", "max_steps": 3, "logging_steps": 3}
    whole = go(tmp_path / "whole", **settings)
    cut = tiny_trainer(tmp_path, tiny_model(), **{**settings, "save_strategy": "steps", "save_steps": 20})
    cut.add_callback(CutOff())
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    cut._save_checkpoint(cut.model, None)
    resumed = go(tmp_path / "resumed", tmp_path / "checkpoint-2", **settings)
    losses = [[one["loss"] for one in run.state.log_history if "loss" in one] for run in (whole, resumed)]
    assert losses[0] == losses[1]


def test_resuming_a_run_that_is_over_changes_nothing(tmp_path: Path) -> None:
    go(tmp_path, max_steps=3)
    before = content(tmp_path / "checkpoint-3")
    resumed = go(tmp_path, tmp_path / "checkpoint-3", max_steps=3)
    assert resumed.state.global_step == 3
    resumed.save_model(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == before["model.safetensors"]


def test_rotation_keeps_the_newest_and_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    rotate = checkpoints.rotate

    def watched(newest: Path, limit: int | None, best: Path | None) -> None:
        seen.append([one.name for one in checkpoints.complete(newest.parent)])
        rotate(newest, limit, best)

    monkeypatch.setattr(checkpoints, "rotate", watched)
    go(tmp_path, max_steps=4, save_total_limit=1)
    numbers = [[f"checkpoint-{step}" for step in steps] for steps in ((1,), (1, 2), (2, 3), (3, 4))]
    assert seen == numbers
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4"]


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    go(tmp_path, max_steps=3)
    one, two, three = (tmp_path / f"checkpoint-{step}" for step in (1, 2, 3))
    os.truncate(three / "optimizer.safetensors", 100)
    (two / "complete.json").unlink()
    (tmp_path / "tmp-checkpoint-4").mkdir()
    with pytest.warns(
        UserWarning, match="not whole: checkpoint-2 .*missing.*checkpoint-3 .*100 bytes.*tmp-"
    ) as told:
        assert newest_checkpoint(tmp_path) == str(one)
    assert len(told) == 1
    for torn, why in ((two, "complete.json is missing"), (three, "optimizer.safetensors has 100 bytes")):
        with pytest.raises(ValueError, match=f"expected a whole checkpoint at {torn}; {why}"):
            checkpoint_of(torn, None)
    with (one / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.warns(UserWarning, match="not whole"):
        assert newest_checkpoint(tmp_path) == str(one)  # a look at the sizes alone
    with pytest.raises(ValueError, match=r"content of model.safetensors is not what was written"):
        checkpoint_of(one, None)


def test_what_an_interrupted_write_left_is_removed_at_the_next(tmp_path: Path) -> None:
    for name in ("tmp-checkpoint-7", "tmp-checkpoint-1", "tmp-notes", "checkpoint-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("cut off")
    go(tmp_path, max_steps=1)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-0", "checkpoint-1", "tmp-notes"]
    assert not (tmp_path / "checkpoint-1" / "file").exists()


@pytest.mark.parametrize("what", ["disk full", "not permitted", "no room for a file"])
def test_error_while_writing_ends_the_run_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    go(tmp_path, max_steps=2)
    before = {step: content(tmp_path / f"checkpoint-{step}") for step in (1, 2)}
    code = errno.ENOSPC if what == "disk full" else errno.EACCES
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if what == "no room for a file":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    else:

        def failing(*arguments: Any) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(folders.os, "fsync" if what == "disk full" else "rename", failing)
    try:
        with pytest.raises(
            CheckpointError, match=r"at step 3 failed: .*whole in .*: checkpoint-1, checkpoint-2$"
        ):
            go(tmp_path, tmp_path / "checkpoint-2", max_steps=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-2"]
    assert {step: content(tmp_path / f"checkpoint-{step}") for step in (1, 2)} == before
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_folder_in_the_way_is_kept_unless_a_run_wrote_it(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.save_model()
    trainer.save_model()
    assert sorted(os.listdir(tmp_path)) == ["model"]
    (tmp_path / "model" / "notes.md").write_text("mine")
    with pytest.warns(
        UserWarning, match=r"held files that are not the driver's; it is kept as .*model.kept-1"
    ):
        trainer.save_model(tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == ["model", "model.kept-1"]
    assert (tmp_path / "model.kept-1" / "notes.md").read_text() == "mine"
    assert folders.what_is_wrong(tmp_path / "model", digests=True) is None
    assert "training_args.bin" not in os.listdir(tmp_path / "model")


@pytest.mark.parametrize(
    "given",
    [
        {
            "load_best_model_at_end": True,
            "save_strategy": "steps",
            "eval_strategy": "steps",
            "save_steps": 20,
        },
        {"save_only_model": True},
        {"save_on_each_node": True},
        {"push_to_hub": True},
    ],
)
def test_options_that_checkpoints_do_not_follow(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(given))}: expected False"):
        tiny_trainer(tmp_path, **given)


def test_checkpoint_of_another_model_or_run(tmp_path: Path) -> None:
    go(tmp_path, max_steps=1, teacher="live", per_device_train_batch_size=8)
    checkpoint = tmp_path / "checkpoint-1"
    other = tiny_trainer(tmp_path, tiny_model(hidden_size=16), teacher="live")
    with pytest.raises(
        ValueError, match=r"this model's weights; .*\(32, 32\) there and \(32, 16\) in the model"
    ):
        other.train(checkpoint)
    with pytest.raises(ValueError, match=r"expected .*adapter_model.safetensors for adapters; got none"):
        tiny_trainer(tmp_path, student(True, 0), teacher="live").train(checkpoint)
    with pytest.warns(UserWarning, match="other rows: seed 7, not 42; rollouts_per_step 4, not 8"):
        go(tmp_path, checkpoint, max_steps=1, teacher="live", seed=7, per_device_train_batch_size=4)


def test_metrics_of_a_resumed_run_have_every_step_once(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    for step in range(1, 6):
        record.log(step, {"loss": float(step)})
    correct = {"correct": 1, "total": 2, "accuracy": 0.5, "low": 0.1, "high": 0.9}
    for step in (0, 3, 5):
        record.add_evaluation({"step": step, "greedy": correct, "sampled": correct})  # type: ignore[typeddict-item]
    again = RunRecord(tmp_path, "resume")
    again.rewind(3)
    again.rewind(3)
    assert [one["step"] for one in load_run(tmp_path).metrics] == [1, 2, 3]
    again.log(4, {"loss": 40.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(one["step"], one["loss"]) for one in lines] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert [one["step"] for one in load_run(tmp_path).evaluations] == [0, 3]
    dropped = [json.loads(line) for line in (tmp_path / "superseded.jsonl").read_text().splitlines()]
    assert [one["metrics"]["step"] for one in dropped[:2]] == [4, 5]
    assert dropped[2]["evaluations"]["step"] == 5
    assert len(dropped) == 3


def test_trees_come_back_as_they_were(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    tree = {
        "group": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1], "foreach": None, "fused": True}],
        "state": {0: {"step": torch.tensor(3.0), "view": tensor.t()}, 1: {"step": torch.tensor(3.0)}},
        "same": [tensor, tensor, tensor[0]],
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "worst": [float("inf"), float("-inf"), np.float64(0.1)],
        "keys": np.array([4294967295, 1], dtype=np.uint32),
        "$odd": {"$tensor": "not one"},
    }
    save_tree(tree, tmp_path / "tree")
    found = load_tree(tmp_path / "tree")
    assert list(found) == list(tree)
    assert found["group"] == tree["group"]
    assert type(found["group"][0]["betas"]) is tuple
    assert torch.equal(found["state"][0]["view"], tensor.t())
    assert found["state"][1]["step"].shape == ()
    assert torch.equal(found["same"][2], tensor[0])
    assert found["half"].dtype == torch.bfloat16
    assert found["worst"] == tree["worst"]
    assert found["keys"].dtype == np.uint32
    assert found["keys"].tolist() == [4294967295, 1]
    assert found["$odd"] == tree["$odd"]
    save_tree({"not": float("nan")}, tmp_path / "nan")
    assert np.isnan(load_tree(tmp_path / "nan")["not"])
    for wrong in (torch.float32, {1, 2}, object()):
        with pytest.raises(
            ValueError, match=f"state.0.it: expected state that .* got a {type(wrong).__name__}"
        ):
            save_tree([{"it": wrong}], tmp_path / "state")


def test_optimizer_state_keeps_its_precision() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    fine = torch.tensor([1.0001, 2.0002, 3.0003])
    saved = optimizer.state_dict() | {"state": {0: {"momentum_buffer": fine}}}
    set_state(optimizer, saved)
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], fine)
    with pytest.raises(ValueError, match=r"an optimizer over groups of \[1\] parameters; got \[2\]"):
        set_state(optimizer, {"state": {}, "param_groups": [{"params": [0, 1]}]})


def test_weights_in_the_layout_of_the_model_in_memory(tmp_path: Path) -> None:
    sizes = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "tie_word_embeddings": False,
    }
    model, other = (tiny_model(seed, Qwen3MoeForCausalLM, **sizes) for seed in (0, 1))
    tokenizer = tiny_trainer(tmp_path / "run").tokenizer
    for own_names in (True, False):
        write_student(model, tokenizer, tmp_path / str(own_names), own_names=own_names)
    load_student(other, tmp_path / "True")
    assert all(torch.equal(one, other.state_dict()[name]) for name, one in model.state_dict().items())
    published = load_file(tmp_path / "False" / "model.safetensors")
    assert published["model.layers.0.mlp.experts.1.gate_proj.weight"].shape == (16, 32)
    for own_names in (True, False):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(own_names), trust_remote_code=False)
        assert all(torch.equal(one, loaded.state_dict()[name]) for name, one in model.state_dict().items())


def test_parameters_trained_beside_adapters_are_kept(tmp_path: Path) -> None:
    def beside(seed: int) -> torch.nn.Module:
        model = student(True, seed)
        model.get_base_model().model.norm.weight.requires_grad_(True)
        return model

    trainer = tiny_trainer(tmp_path, beside(0), teacher="live", **EVERY)
    trainer.train()
    fresh = beside(1)
    load_student(fresh, tmp_path / "checkpoint-2")
    trained = {name: one for name, one in trainer.student.named_parameters() if one.requires_grad}
    assert all(torch.equal(one, trained[name]) for name, one in fresh.named_parameters() if one.requires_grad)
    assert (trained["base_model.model.model.norm.weight"] != 1).any()


def test_shards_are_gathered_and_spread_again(tmp_path: Path) -> None:
    """FSDP2 over two processes: weights and AdamW's state through a checkpoint's files, full and LoRA."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parent / "python"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(here / "shard_worker.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"done-0", "done-1"} <= set(os.listdir(tmp_path))
