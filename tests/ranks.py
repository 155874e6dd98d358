"""Two processes that train together on the CPU: a small linear model in DDP over gloo, case after case.

python ranks.py '{"out": FOLDER, "cases": [CASE, ...]}'   in torchrun's environment (RANK, WORLD_SIZE, ...)
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from opsd_train.safety import stops
from opsd_train.safety.finite import FiniteSteps
from opsd_train.safety.keep import BadSteps

TIMEOUT = 240


def run_ranks(out: Path, cases: list[dict[str, Any]], code: int = 0) -> list[list[dict[str, Any]]]:
    """What each of two ranks found in each case; both have to end with the code.

    A case has `steps`, and may have `parts` of a step, `bad` steps that are not finite on rank 1 (their
    `kind` being loss or gradient), `signal_at` [step, part] or `dawdle_at` step (a rollout of a minute) at
    which rank 1 alone gets a SIGTERM, and `resume`, a folder in `out`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    given = json.dumps({"out": str(out), "cases": cases})
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, given],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [rank.communicate(timeout=TIMEOUT)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    found = [rank.returncode for rank in ranks]
    assert found == [code, code], (found, *errors)
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


class Arguments(TrainingArguments):
    """Those of transformers, and the one that `FiniteSteps` asks for."""

    max_bad_steps = 3


class Toy(FiniteSteps):
    """Mean squared error; what happens on rank 1 is in `case`."""

    loss_is_scaled_for_ga = True
    case: dict[str, Any]
    part = 1
    signalled = 0.0

    def happens(self, what: str) -> bool:
        """Whether that is to happen now, here."""
        now, here = self.state.global_step + 1, self.accelerator.process_index == 1
        chosen = self.case.get(what)
        if what == "bad":
            return here and now in (chosen or [])
        return here and chosen == ([now, self.part] if what == "signal_at" else now)

    def interrupt(self) -> None:
        """The signal."""
        self.signalled = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)

    def get_batch_samples(self, *args: Any) -> Any:
        """The rollouts of a step, which take their time in one of them, on both ranks."""
        self.expect(None)
        self.part = 1
        with stops.agreed():
            if self.happens("dawdle_at"):
                self.interrupt()
            end = time.monotonic() + 60 * (self.case.get("dawdle_at") == self.state.global_step + 1)
            while time.monotonic() < end:
                time.sleep(0.01)
                stops.check()
        return super().get_batch_samples(*args)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One part of a step."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.happens("bad") and self.case["kind"] == "loss":
            loss = loss * torch.nan  # the gradient stays finite
        self.hear(inputs, loss)
        if self.happens("signal_at"):
            self.interrupt()
        self.part += 1
        return loss

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> torch.Tensor:
        """Mean squared error."""
        loss = (model(inputs["x"]) - inputs["y"]).square().mean()
        if self.happens("bad") and self.case["kind"] == "gradient" and model.training:
            loss.register_hook(lambda gradient: gradient * torch.nan)
        return loss


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.taken: dict[int, list[float]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.taken[state.global_step] = kwargs["model"][0].weight.detach().flatten().tolist()


def run_case(out: Path, number: int, case: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """What a case brought on this rank, and the code to exit with."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5))
    draws = torch.Generator().manual_seed(1)
    rows = [{"x": torch.randn(3, generator=draws), "y": torch.randn(2, generator=draws)} for _ in range(64)]
    arguments = Arguments(
        output_dir=str(out / f"run-{number}"), use_cpu=True, ddp_backend="gloo", max_steps=case["steps"],
        per_device_train_batch_size=2, gradient_accumulation_steps=case.get("parts", 1),
        learning_rate=0.1, logging_steps=1, logging_nan_inf_filter=False, save_strategy="no",
        report_to="none", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Toy(model=model, args=arguments, train_dataset=rows)
    trainer.case = case
    trainer.add_callback(weights := Weights())
    error, code = None, 0
    try:
        with stops.watched(trainer):
            trainer.train(str(out / case["resume"]) if "resume" in case else None)
    except BadSteps as bad:
        error = str(bad)
    except stops.Stopped as stopped:
        error, code = str(stopped), stopped.code
    found = {
        "weights": weights.taken,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "skipped": trainer.skipped.total,
        "schedule": trainer.lr_scheduler.last_epoch,
        "error": error,
        "seconds": time.monotonic() - trainer.signalled,
    }
    return found, code


def main() -> None:
    """All cases, and the last one's exit code."""
    given = json.loads(sys.argv[1])
    out = Path(given["out"])
    results = []
    for number, case in enumerate(given["cases"]):
        results.append(run_case(out, number, case))
        torch.distributed.barrier()  # the next case may read what rank 0 is still writing
    (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps([found for found, _ in results]))
    torch.distributed.destroy_process_group()
    sys.exit(results[-1][1])


if __name__ == "__main__":
    main()
