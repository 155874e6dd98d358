"""What the tests of several processes run in each of them: `torchrun distributed_worker.py FOLDER CASES`."""

import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file

from driver_tiny import ROWS, TOKENIZER, tiny_config, tiny_model, tiny_prompts
from head_gathers import HeadGathers
from opsd_train.data.rows import load_rows
from opsd_train.engines.base import Completion
from opsd_train.engines.hf import HFEngine
from opsd_train.evaluation.verify import Verifier
from opsd_train.loading import with_lora
from opsd_train.rollouts import Sampling, Vocabulary, generate
from opsd_train.sharding import state_of
from opsd_train.train import make_trainer
from opsd_train.trainer import OPSDTrainer
from opsd_train.watch.inspection import inspect_rollouts

ZERO = {
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
# Tiny weights are whole all the time otherwise.
PARTITIONED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
WRAPPERS: dict[str, dict[str, Any]] = {
    "none": {},
    "ddp": {},
    "fsdp": {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": False}},
    "zero": {"deepspeed": ZERO},
    "zero_parts": {"deepspeed": {**ZERO, "zero_optimization": {"stage": 3, **PARTITIONED}}},
}
# Greedy rollouts do not depend on which process writes them, and plain gradient steps, unlike AdamW's, are in
# proportion to the gradients that are compared.
SAME = {
    "temperature": 0.0,
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_steps": 3,
    "logging_steps": 1,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}
TEMPLATES = {
    "full_solution": "{solution};{problem}",
    "wrong_answer": "{wrong};{problem}",
    "plain": "{problem}",
}


class Prescribed(HFEngine):
    """Completions that the prompt alone decides: a greedy token in bf16 depends on who shares its batch."""

    def write(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: Sequence[int]
    ) -> list[Completion]:
        """Three to six tokens, the last of which ends it."""
        written = [[(sum(ids) * (2 + k)) % 10 + 4 for k in range(2 + sum(ids) % 4)] for ids in prompts]
        return [Completion((*one, TOKENIZER.eos_token_id)) for one in written]


def make(out: Path, case: dict[str, Any], rows: int) -> OPSDTrainer:
    """The trainer of a case, a process of which has so many rows of a micro-batch."""
    case = dict(case)
    prescribed = case.pop("prescribed", False)
    trainer = _make(out, case, rows)
    if prescribed:
        trainer.engine = Prescribed(trainer.student, trainer.vocabulary)
    return trainer


def _make(out: Path, case: dict[str, Any], rows: int) -> OPSDTrainer:
    model: torch.nn.Module = tiny_model(tie_word_embeddings=case.pop("tied", True))
    data = by_length(model) if case.pop("sorted", False) else ROWS
    if case.pop("lora", False):
        torch.manual_seed(1)
        model = with_lora(model, 4, 8, 0.0)  # type: ignore[arg-type]
    config = tiny_config(
        out, **{**SAME, **WRAPPERS[case.pop("wrapper")], "per_device_train_batch_size": rows, **case}
    )
    # accelerate shards on accelerators alone; FSDP2 itself knows CPUs too.
    sharded = DistributedType.MULTI_GPU if config.fsdp else DistributedType.MULTI_CPU
    if config.world_size > 1:
        PartialState._shared_state["distributed_type"] = sharded
    held_out = tiny_prompts(config)[:5]
    if config.method is None:
        return OPSDTrainer(model, config, tiny_prompts(config, data), TOKENIZER, held_out)
    told = [{**row, "wrong_answer": "4"} for row in data]
    trainer = make_trainer(model, TOKENIZER, load_rows(told, config.to_templates(), False), [], config)
    trainer.held_out = held_out
    trainer.method = trainer.method and replace(trainer.method, verifier=Verifier("odd", odd_is_right))
    return trainer


def odd_is_right(completion: str, answer: str | None) -> float:
    """A reward that a random model gets now and then."""
    return float(len(completion) % 2)


def lengths(model: Any, problems: list[str]) -> list[int]:
    """Tokens of the greedy completions."""
    ids = [
        TOKENIZER.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True)
        for p in problems
    ]
    vocabulary = Vocabulary.of(model, TOKENIZER)
    written = generate(model, [one["input_ids"] for one in ids], Sampling(0.0, 1.0, 0, 6), vocabulary, (0,))
    return [len(one) for one in written]


def by_length(model: Any) -> list[dict[str, str]]:
    """The rows, those with short greedy completions first."""
    found = lengths(model, [row["problem"] for row in ROWS])
    return [row for _, row in sorted(zip(found, ROWS, strict=True), key=lambda pair: pair[0])]


def outcome(trainer: OPSDTrainer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Trains, and returns the whole weights that are trained and what was logged and found."""
    before, gathers = trainer.evaluate(), HeadGathers()
    trainer.add_callback(gathers)
    trainer.train()
    found = {"before": before, "after": trainer.evaluate(), "sharded": trainer.ranks.sharded}
    found |= {"gathers": gathers.steps, "saved": gathers.saved}
    found["logs"] = [line for line in trainer.state.log_history if "loss" in line]
    found["written"] = [list(one.completion) for one in written_after(trainer)]
    if trainer.method is None:
        records = inspect_rollouts(trainer, trainer.held_out[:2])
        found["kl"] = [token["forward_kl"] for record in records for token in record["tokens"]]
    trained = {name for name, weight in trainer.student.named_parameters() if weight.requires_grad}
    return {name: one for name, one in state_of(trainer.student).items() if name in trained}, found


def written_after(trainer: OPSDTrainer) -> Any:
    """What the trained student writes, by every process together."""
    greedy = replace(trainer.sampling, temperature=0.0)
    return trainer.roll_out(trainer.held_out, greedy, (1, trainer.state.global_step))


def without_kernels() -> None:
    """Import DeepSpeed. It would compile a kernel for shared memory, for minutes; without it, gloo does."""
    import deepspeed  # noqa: F401

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


def main() -> None:
    """Runs every case in turn; the first process writes the weights and the rest, any its error."""
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    if any(case["wrapper"].startswith("zero") for case in cases.values()):
        without_kernels()
    for name, case in cases.items():
        AcceleratorState._reset_state()
        GradientState._reset_state()
        try:
            trainer = make(folder / name, case, case.pop("rows", 4))
            weights, found = outcome(trainer)
            if trainer.is_world_process_zero():
                save_file(weights, folder / f"{name}.safetensors")
                (folder / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
        except Exception:
            (folder / f"{name}.error").write_text(traceback.format_exc(), encoding="utf-8")


if __name__ == "__main__":
    main()
