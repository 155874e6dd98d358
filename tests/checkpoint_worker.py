"""What the tests of checkpoints run in two processes: `torchrun checkpoint_worker.py FOLDER CASES`."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

from distributed_worker import ZERO, without_kernels
from driver_tiny import TOKENIZER, tiny_config, tiny_model, tiny_prompts
from opsd_train.loading import with_lora
from opsd_train.trainer import OPSDTrainer

WRAPPERS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": False}},
    "zero": {"deepspeed": ZERO},
}
SETTINGS: dict[str, Any] = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
}


def make(out: Path, seed: int, wrapper: str, lora: bool, **settings: Any) -> OPSDTrainer:
    """The trainer of a case."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    model: torch.nn.Module = tiny_model(0 if lora else seed)
    if lora:
        torch.manual_seed(seed)
        model = with_lora(model, 2, 4, 0.3)  # type: ignore[arg-type]
    config = tiny_config(out, **{**SETTINGS, **WRAPPERS[wrapper], **settings})
    # Accelerate shards for accelerators alone; it may take these processes for such.
    fsdp = wrapper == "fsdp"
    kind = DistributedType.MULTI_GPU if fsdp else DistributedType.MULTI_CPU
    PartialState._shared_state["distributed_type"] = kind
    prompts = tiny_prompts(config)
    trainer = OPSDTrainer(model, config, prompts, TOKENIZER, prompts)
    assert (trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled) == (fsdp, wrapper == "zero")
    return trainer


def go(out: Path, resume: Path | None, **case: Any) -> None:
    """One run of a case; a resumed one begins with other weights and random numbers."""
    seed = 0 if resume is None else 1
    trainer = make(out, seed, **case)
    torch.manual_seed(7 + seed)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()


def main() -> None:
    """Every case as a whole, and resumed."""
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    if any(case["wrapper"] == "zero" for case in cases.values()):
        without_kernels()
    for name, case in cases.items():
        go(folder / name, None, **case)
        # After the first of the two steps of the second epoch, whose order is another one.
        go(folder / f"{name}-resumed", folder / name / "checkpoint-3", **case)


if __name__ == "__main__":
    main()
