"""What the tests of several processes run in each of them: `torchrun tests/distributed_worker.py FOLDER CASES`."""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from driver_tiny import tiny_model, tiny_prompts, tiny_config, TOKENIZER
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from opsd_train.backbone import causal_lm
from opsd_train.loading import with_lora
from opsd_train.trainer import OPSDTrainer

FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": False}}
STEPS = 3
# Greedy rollouts do not depend on which process writes them, and plain gradient steps, unlike AdamW's, are in
# proportion to the gradients that are compared.
SAME = {"temperature": 0.0, "optim": "sgd", "learning_rate": 0.05, "max_steps": STEPS, "logging_steps": 1}


def make(out: Path, case: dict[str, Any], rows: int) -> OPSDTrainer:
    """The trainer of a case, whose process has so many rows of a step."""
    case = dict(case)
    model: torch.nn.Module = tiny_model(tie_word_embeddings=case.pop("tied", True))
    if case.pop("lora", False):
        torch.manual_seed(1)
        model = with_lora(model, 4, 8, 0.0)
    dtype = case.pop("dtype", None)
    model = model.to(getattr(torch, dtype)) if dtype else model
    given = {**SAME, "per_device_train_batch_size": rows, **case}
    config = tiny_config(out, **given)
    prompts = tiny_prompts(config)
    return OPSDTrainer(model, config, prompts, TOKENIZER, prompts[:5])


def outcome(trainer: OPSDTrainer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Trains, and returns the whole weights that are trained and what was logged."""
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    weights = {}
    for name, weight in trainer.student.named_parameters():
        if weight.requires_grad:
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            weights[name] = whole.detach().clone().contiguous()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    return weights, {"logs": logs, "before": before, "after": after}


def main() -> None:
    """Runs every case in turn; the first process writes the weights, what was logged, or the error."""
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for name, case in cases.items():
        AcceleratorState._reset_state()
        GradientState._reset_state()
        settings = {**(FSDP if case.pop("sharded", False) else {}), **case}
        found: dict[str, Any]
        try:
            trainer = make(folder / name, settings, settings.pop("rows", 4))
            weights, found = outcome(trainer)
            main = trainer.is_world_process_zero()
            if main:
                save_file(weights, folder / f"{name}.safetensors")
        except Exception:
            found, main = {"error": traceback.format_exc()}, True
            print(name, found["error"], flush=True)
        if main:
            (folder / f"{name}.json").write_text(json.dumps(found))
        print(name, "done", flush=True)


if __name__ == "__main__":
    main()
