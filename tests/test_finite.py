"""A step that is not finite trains nothing, is counted, and ends the run if it is one of many in a row."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from driver_tiny import TOKENIZER, tiny_config, tiny_model, tiny_trainer
from opsd_train.data.rows import load_rows
from opsd_train.loading import with_lora
from opsd_train.pieces.private import NotFinite, PrivateGradient
from opsd_train.safety.keep import BadSteps
from opsd_train.train import make_trainer
from opsd_train.trainer import OPSDTrainer
from opsd_train.watch.progress import RecordCallback
from opsd_train.watch.record import METRICS, RunRecord
from poison import KINDS, Snapshots, poison
from ranks import run_ranks

EMA = {"teacher": "ema", "ema_decay": 0.5, "logging_steps": 3, "lr_scheduler_type": "linear"}
ALL = {"weights", "moments", "schedule", "teacher", "teacher steps"}


def after(trainer: OPSDTrainer) -> list[torch.Tensor]:
    return [one.detach().clone() for one in trainer.student.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_grad_norm": 0.0}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}],
    ids=["whole", "no clipping", "accumulated"],
)
def test_step_is_skipped(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=4, **EMA, **settings)
    poison(trainer, kind, [2])
    snapshots = Snapshots(trainer)
    behind: list[bool] = []
    write = trainer.engine.write
    trainer.engine.write = lambda *args: behind.append(trainer.engine.version) or write(*args)
    trainer.train()
    assert snapshots.same(1, 2) == dict.fromkeys(ALL, True)
    for earlier, later in ((0, 1), (2, 3), (3, 4)):
        assert snapshots.same(earlier, later) == dict.fromkeys(ALL, False)
    assert snapshots.taken[4]["schedule"] == snapshots.taken[4]["teacher steps"] == 3
    assert trainer.state.global_step == 4
    assert behind == [0, 1, 1, 3]  # after the skipped step the engine has the weights already
    assert all(bool(one.isfinite().all()) for one in trainer.student.parameters())


def test_a_run_without_bad_steps_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = tiny_trainer(tmp_path, max_steps=3)
    guarded.train()
    monkeypatch.setattr(OPSDTrainer, "_judge", lambda *args: None)
    plain = tiny_trainer(tmp_path, max_steps=3)
    plain.train()
    assert same(after(guarded), after(plain))


@pytest.mark.parametrize(
    ("kind", "value"), [("loss", math.nan), ("loss", math.inf), ("weight gradient", math.nan)]
)
def test_log_is_raw_and_goes_on(tmp_path: Path, kind: str, value: float) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=6, logging_steps=3, logging_first_step=False)
    poison(trainer, kind, [2], value)
    trainer.add_callback(RecordCallback(RunRecord(tmp_path / "run")))
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 6]
    assert [line["skipped_steps"] for line in lines] == [1, 1, 1]
    assert [line["grad_norm"] is None for line in lines] == [True, False, False]
    assert [line["loss"] is None for line in lines] == [kind == "loss", False, False]
    raw = trainer.state.log_history[0]
    assert not math.isfinite(raw["loss"] if kind == "loss" else raw["grad_norm"])
    if kind == "loss":
        assert raw["loss"] == value or math.isnan(value)
    reference = tiny_trainer(tmp_path, max_steps=1, logging_steps=1)
    reference.train()
    assert 0.1 < lines[1]["loss"] / reference.state.log_history[0]["loss"] < 10  # one step's, not a sum


def test_three_in_a_row_end_the_run(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 9, "per_device_train_batch_size": 4}
    trainer = tiny_trainer(tmp_path, gradient_accumulation_steps=2, **settings)
    poison(trainer, "teacher row", [2, 4, 5, 6, 7])
    snapshots = Snapshots(trainer)
    with pytest.raises(BadSteps, match=r"3 steps in a row, up to step 6; .*bad-step-6 holds.* is 3\."):
        trainer.train()
    assert snapshots.same(3, 5) == dict.fromkeys(ALL, True)
    assert same(after(trainer), snapshots.taken[3]["weights"])
    kept = sorted(folder.name for folder in tmp_path.glob("checkpoint-*"))
    assert kept == [f"checkpoint-{step}" for step in range(1, 6)]
    saved = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    own = dict(trainer.student.named_parameters())
    assert all(torch.equal(tensor, own[name]) for name, tensor in saved.items())

    about = json.loads((tmp_path / "bad-step-6" / "rank-0.json").read_text())
    assert (about["step"], about["rank"], about["skipped_steps"]) == (6, 0, 4)
    assert about["grad_norm"] is None
    assert [loss is None for loss in about["losses"]] == [False, True]
    wheres = [f"row {i + 1}" for i in range(8)]
    assert sorted(row["where"] for row in about["rows"]) == wheres
    assert [(row["batch"], row["row"]) for row in about["rows"]] == [(b, r) for b in (0, 1) for r in range(4)]
    assert all(math.isfinite(row["loss"]) for row in about["rows"])  # the poison struck once, not in them
    tensors = load_file(tmp_path / "bad-step-6" / "rank-0.safetensors")
    length = tensors["1.completion_mask"].shape[1]
    by_where = {prompt.where: prompt for prompt in trainer.prompts}
    for row, ids, mask in zip(
        about["rows"][4:], tensors["1.input_ids"], tensors["1.attention_mask"], strict=True
    ):
        read = ids[:-length][mask[:-length].bool()]
        assert tuple(read.tolist()) == by_where[row["where"]].student_ids


def test_row_that_is_to_blame_is_named(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_bad_steps=1)
    bad = trainer.prompts[2]
    source = trainer.teacher.source

    def poisoned(ids: torch.Tensor, mask: torch.Tensor, length: int) -> Any:
        found = source(ids, mask, length)
        for row in range(len(ids)):
            if tuple(ids[row, :-length][mask[row, :-length].bool()].tolist()) == bad.teacher_ids:
                found.hidden[row] = torch.nan
        return found

    trainer.teacher.source = poisoned
    with pytest.raises(BadSteps, match="1 steps in a row, up to step 1"):
        trainer.train()
    rows = json.loads((tmp_path / "bad-step-1" / "rank-0.json").read_text())["rows"]
    assert [row["where"] for row in rows if row["loss"] is None] == [bad.where]


def test_resuming_is_exact_and_keeps_the_counts(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, **EMA}
    whole = tiny_trainer(tmp_path, **settings)
    poison(whole, "loss", [2, 3, 5])
    whole.train()
    resumed = tiny_trainer(tmp_path, **settings)
    poison(resumed, "loss", [2, 3, 5])
    resumed.train(tmp_path / "checkpoint-3")
    assert same(after(whole), after(resumed))
    assert (whole.skipped.total, resumed.skipped.total) == (3, 3)
    again = tiny_trainer(tmp_path, **settings)
    poison(again, "loss", [4])
    with pytest.raises(BadSteps, match="3 steps in a row, up to step 4"):  # of which the checkpoint has two
        again.train(tmp_path / "checkpoint-3")


def test_lora_adapters_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer = tiny_trainer(tmp_path, with_lora(tiny_model(), 2, 4, 0.0), max_steps=3, **EMA)
    poison(trainer, "weight gradient", [1, 3])
    snapshots = Snapshots(trainer)
    trainer.train()
    assert snapshots.same(0, 1) == snapshots.same(2, 3) == dict.fromkeys(ALL, True)
    assert not snapshots.same(1, 2)["weights"]


def test_exposure_does_not_hear_of_it(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(TOKENIZER)  # steps are told in paragraphs
    tokenizer.add_tokens(["\n"])
    rows = [{"problem": "1+2=", "solution": "1+2\n\n=3\n\n3", "answer": "3"}] * 4
    config = tiny_config(
        tmp_path,
        method="atesd",
        exposure={"hold": 5},
        context_templates={"partial_solution": "{steps};{problem}"},
        per_device_train_batch_size=4,
        max_steps=3,
    )
    data = load_rows(rows, config.to_templates(), False)
    trainer = make_trainer(tiny_model(), tokenizer, data, [], config)
    poison(trainer, "loss", [2])
    trainer.train()
    assert trainer.pieces.exposure is not None
    controller = trainer.pieces.exposure.controller
    assert controller.steps == 2
    assert all(math.isfinite(loss) for loss in controller.losses)


def private_trainer(out: Path, **settings: Any) -> OPSDTrainer:
    private = {"clip": 0.5, "noise": 1e-3, "seed": 7}
    return tiny_trainer(
        out, private=private, per_device_train_batch_size=4, logging_steps=1, max_grad_norm=0.0, **settings
    )


def test_private_step_drops_the_row(tmp_path: Path) -> None:
    """The whole step goes on with the noise, since leaving it out would tell what the row was."""
    trainer = private_trainer(tmp_path, max_steps=3)
    poison(trainer, "teacher row", [2])
    snapshots = Snapshots(trainer)
    trainer.train()
    assert not snapshots.same(1, 2)["weights"]
    assert all(bool(one.isfinite().all()) for one in trainer.student.parameters())
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["dropped_rows"] for line in lines] == [0, 1, 1]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0]
    assert [math.isnan(line["loss"]) for line in lines] == [False, True, False]
    ended = private_trainer(tmp_path, max_steps=9)
    poison(ended, "teacher row", [1, 2, 3])
    with pytest.raises(BadSteps, match="3 steps in a row, up to step 3"):
        ended.train()


def test_private_sum_is_as_before_a_row_that_is_not_finite() -> None:
    weight = torch.zeros(2, requires_grad=True)
    private = PrivateGradient([weight], 1.0, 0.0, torch.Generator())
    private.add(weight.sum() * 0.1)
    with pytest.raises(NotFinite, match="its norm is nan"):
        private.add(weight.sum() * torch.nan)
    private.finish(1)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.full((2,), 0.1))


def test_config_says_how_many(tmp_path: Path) -> None:
    assert tiny_config(tmp_path).max_bad_steps == 3
    with pytest.raises(ValueError, match="max_bad_steps: expected a number at least 1, got 0"):
        tiny_config(tmp_path, max_bad_steps=0)


def test_ranks_skip_and_end_together(tmp_path: Path) -> None:
    """One rank alone sees what is not finite."""
    cases = [
        {"kind": "gradient", "steps": 4, "bad": [2]},
        {"kind": "loss", "steps": 4, "bad": [2]},
        {"kind": "loss", "steps": 6, "bad": [2, 3, 4]},
    ]
    ranks = run_ranks(tmp_path, cases)
    for case in (0, 1):
        for found in (rank[case] for rank in ranks):
            assert found["weights"]["1"] == found["weights"]["2"]
            assert len(set(map(str, found["weights"].values()))) == 3
            assert (found["error"], found["skipped"], found["schedule"]) == (None, 1, 3)
        assert ranks[0][case]["weights"] == ranks[1][case]["weights"]
    losses = [[math.isnan(loss) for loss in ranks[0][case]["losses"]] for case in (0, 1)]
    assert losses == [[False] * 4, [False, True, False, False]]
    assert "3 steps in a row, up to step 4" in ranks[0][2]["error"]
    assert ranks[0][2]["error"] == ranks[1][2]["error"]
    folder = tmp_path / "run-2" / "bad-step-4"
    about = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["losses"][0] is None for one in about] == [False, True]
    assert all(len(one["rows"]) == 2 for one in about)
    assert sorted(path.name for path in folder.iterdir()) == [
        f"rank-{rank}.{kind}" for rank in (0, 1) for kind in ("json", "safetensors")
    ]
