"""What the tests of ZeRO-3 run in each process: `torchrun zero_worker.py FOLDER CASES`."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from checkpoint_worker import go, make
from distributed_worker import without_kernels
from opsd_train.safety import stops
from opsd_train.safety.keep import BadSteps
from opsd_train.safety.trees import save_tree
from opsd_train.trainer import OPSDTrainer


class Seen(TrainerCallback):
    """The state after each step as rank 0 gathers it, and this process's own share of it."""

    def __init__(self, trainer: OPSDTrainer) -> None:
        self.trainer, self.taken = trainer, {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.take(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.take(state.global_step)

    def take(self, step: int) -> None:
        trainer = self.trainer
        weights, optimizer = trainer._gathered_state()
        inner = trainer._plain_optimizer()
        self.taken[step] = {
            "whole": {"weights": weights, "optimizer": optimizer},
            "parts": [one.ds_tensor.clone() for one in trainer.student.parameters()],
            "fp32": [flat.detach().clone() for flat in inner.fp32_partitioned_groups_flat],
            "moments": [torch.as_tensor(x).clone() for one in inner.state.values() for x in one.values()],
            "schedule": trainer.lr_scheduler.state_dict()["last_epoch"],
            "rate": [group["lr"] for group in trainer.optimizer.param_groups],
            "teacher": getattr(trainer.teacher, "steps", 0),
        }

    def same(self, one: int, other: int) -> dict[str, bool]:
        """Which parts are bitwise the same after two steps."""
        first, second = self.taken[one], self.taken[other]
        return {name: equal(first[name], second[name]) for name in first if name != "whole"}


def equal(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def strike(trainer: OPSDTrainer, kind: str, steps: list[int]) -> None:
    """On rank 1, in these steps, the first micro-batch has a loss, or a gradient alone, of nan."""
    compute, seen = trainer.compute_loss, set()

    def struck(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss, step = compute(*args, **kwargs), trainer.state.global_step + 1
        if trainer.args.process_index != 1 or step not in steps or step in seen or not loss.requires_grad:
            return loss
        seen.add(step)
        if kind == "loss":
            return loss + torch.nan  # its gradient stays as it is
        loss.register_hook(lambda gradient: gradient * torch.nan)
        return loss

    trainer.compute_loss = struck  # type: ignore[method-assign]


def skip(out: Path, kind: str, steps: list[int], **case: Any) -> dict[str, Any]:
    """A run with bad steps: what they left alone."""
    trainer = make(out, 0, wrapper="zero", **case)
    strike(trainer, kind, steps)
    trainer.add_callback(seen := Seen(trainer))
    error = None
    try:
        trainer.train()
    except BadSteps as bad:
        error = str(bad)
    logs = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "same": {step: seen.same(step - 1, step) for step in seen.taken if step - 1 in seen.taken},
        "schedule": seen.taken[max(seen.taken)]["schedule"],
        "finite": all(bool(x.isfinite().all()) for x in seen.taken[max(seen.taken)]["parts"]),
        "skipped": trainer.skipped.total,
        "logged": [[line["step"], line["skipped_steps"], repr(line["grad_norm"])] for line in logs],
        "error": error,
    }


def stop(out: Path, **case: Any) -> dict[str, Any]:
    """A run that rank 1 is told to end in the middle of the second step."""
    trainer = make(out, 0, wrapper="zero", **case)
    torch.manual_seed(7)
    step = trainer.training_step

    def interrupted(*args: Any, **kwargs: Any) -> torch.Tensor:
        if trainer.state.global_step == 1 and trainer.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    trainer.training_step = interrupted  # type: ignore[method-assign]
    try:
        with stops.watched(trainer):
            trainer.train()
    except stops.Stopped as stopped:
        return {"step": stopped.step, "code": stopped.code}
    return {}


def load(out: Path, checkpoint: str, **case: Any) -> dict[str, Any]:
    """Go on from a checkpoint, perhaps of another number of processes; rank 0 writes what they hold then."""
    trainer = make(out, 1, wrapper="zero", **case)
    trainer.add_callback(seen := Seen(trainer))
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        save_tree(seen.taken[trainer.state.max_steps]["whole"]["optimizer"], out / "optimizer")
        save_tree(seen.taken[trainer.state.max_steps]["whole"]["weights"], out / "weights")
    return {"processes": trainer.args.world_size}


def resume(out: Path, **case: Any) -> dict[str, Any]:
    """A whole run, and one that goes on from its second step."""
    go(out, None, wrapper="zero", **case)
    go(out.with_name(f"{out.name}-resumed"), out / "checkpoint-2", wrapper="zero", **case)
    return {}


def go_on(out: Path, checkpoint: str, **case: Any) -> dict[str, Any]:
    """A run that was stopped, from where it stopped."""
    go(out, Path(checkpoint), wrapper="zero", **case)
    return {}


def main() -> None:
    """Every case; each process writes what it found."""
    without_kernels()
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    found = {}
    for name, case in cases.items():
        what = globals()[case.pop("do")]
        found[name] = what(folder / name, **case)
    rank = torch.distributed.get_rank()
    (folder / f"rank-{rank}-of-{torch.distributed.get_world_size()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
