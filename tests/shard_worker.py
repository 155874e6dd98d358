"""What the test of sharded checkpoints runs in each of two processes: `torchrun shard_worker.py FOLDER`."""

import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from driver_tiny import TOKENIZER, tiny_model
from opsd_train.loading import with_lora
from opsd_train.safety.optimizer_state import full_state, full_weights, set_full_state, set_full_weights
from opsd_train.safety.student_files import write_student
from opsd_train.safety.trees import load_tree, save_tree


def made(lora: bool, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model sharded over the processes, and its optimizer."""
    model: torch.nn.Module = tiny_model(0 if lora else seed, tie_word_embeddings=False)
    if lora:
        torch.manual_seed(seed)
        model = with_lora(model, 2, 4, 0.0)  # type: ignore[arg-type]
    fully_shard(model)
    trained = [one for one in model.parameters() if one.requires_grad]
    assert all(isinstance(one, DTensor) for one in trained)
    return model, torch.optim.AdamW(trained, lr=1e-2)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    """One optimizer step on tokens."""
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """Write a checkpoint after a step, load it into another model, and compare the two after the next."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    ids = torch.arange(8).reshape(2, 4) + rank
    for lora in (False, True):
        folder = Path(sys.argv[1]) / str(lora)
        model, optimizer = made(lora, 0)
        step(model, optimizer, ids)
        weights, state = full_weights(model), full_state(model, optimizer)
        if rank == 0:
            folder.mkdir()
            write_student(model, TOKENIZER, folder, weights, own_names=True)
            save_tree(state, folder / "optimizer")
        torch.distributed.barrier()
        other, resumed = made(lora, 1)
        set_full_weights(other, folder)
        set_full_state(other, resumed, load_tree(folder / "optimizer"))
        step(model, optimizer, ids)
        step(other, resumed, ids)
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        same = [torch.equal(*(getattr(one, "_local_tensor", one) for one in pair)) for pair in pairs]
        assert all(same), f"lora {lora}: {sum(same)} of {len(same)}"
    (Path(sys.argv[1]) / f"done-{rank}").touch()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
