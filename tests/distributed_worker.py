"""What the tests of several processes run in each of them: `torchrun tests/distributed_worker.py FOLDER CASES`."""

import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file

from driver_tiny import ROWS, TOKENIZER, tiny_config, tiny_model, tiny_prompts
from opsd_train.data import load_rows
from opsd_train.inspection import inspect_rollouts
from opsd_train.loading import with_lora
from opsd_train.sharding import state_of
from opsd_train.train import make_trainer
from opsd_train.trainer import OPSDTrainer
from opsd_train.verify import Verifier

ZERO = {
    "deepspeed": {
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
}
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": False}}
WRAPPERS: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp": FSDP, "zero": ZERO}
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
    held_out = tiny_prompts(config)[:5]
    if config.method is None:
        return OPSDTrainer(model, config, tiny_prompts(config), TOKENIZER, held_out)
    rows = load_rows([{**row, "wrong_answer": "4"} for row in ROWS], config.to_templates(), False)
    trainer = make_trainer(model, TOKENIZER, rows, [], config)
    trainer.held_out = held_out
    trainer.method = trainer.method and replace(trainer.method, verifier=Verifier("odd", odd_is_right))
    return trainer


def odd_is_right(completion: str, answer: str | None) -> float:
    """A reward that a random model gets now and then."""
    return float(len(completion) % 2)


def outcome(trainer: OPSDTrainer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Trains, and returns the whole weights that are trained and what was logged."""
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trained = {name for name, weight in trainer.student.named_parameters() if weight.requires_grad}
    weights = {name: one for name, one in state_of(trainer.student).items() if name in trained}
    logs = [line for line in trainer.state.log_history if "loss" in line]
    found = {"logs": logs, "before": before, "after": after}
    if trainer.method is None:
        records = inspect_rollouts(trainer, trainer.held_out[:2])
        found["kl"] = [token["forward_kl"] for record in records for token in record["tokens"]]
    return weights, found


def main() -> None:
    """Runs every case in turn; the first process writes the weights, what was logged, or the error."""
    if "zero" in sys.argv[3:]:
        import deepspeed  # noqa: F401

        # Compiles a kernel for shared memory, for minutes; without it, gloo does.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for name, case in cases.items():
        AcceleratorState._reset_state()
        GradientState._reset_state()
        settings = {**WRAPPERS[case.pop("wrapper")], **case}
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
