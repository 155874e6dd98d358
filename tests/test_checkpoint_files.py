"""What a checkpoint's files hold: state as trees, weights by name, shards of two processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from checkpoint_runs import EVERY, student
from driver_tiny import tiny_model, tiny_trainer
from opsd_train.safety.optimizer_state import set_state
from opsd_train.safety.student_files import load_student, write_student
from opsd_train.safety.trees import load_tree, save_tree


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
