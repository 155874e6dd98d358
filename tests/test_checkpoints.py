"""Which checkpoints count, what is deleted, and what an error while writing leaves."""

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from checkpoint_runs import content, go
from driver_tiny import tiny_trainer
from opsd_train.safety import checkpoints, folders
from opsd_train.safety.atomic import CheckpointError
from opsd_train.safety.checkpoints import checkpoint_of, newest_checkpoint


def test_rotation_keeps_the_newest_and_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    rotate = checkpoints.rotate

    def watched(newest: Path, limit: int | None, best: Path | None) -> None:
        seen.append([one.name for one in checkpoints.complete(newest.parent)])
        rotate(newest, limit, best)

    monkeypatch.setattr(checkpoints, "rotate", watched)
    go(tmp_path, max_steps=4, save_total_limit=1)
    numbers = [[f"checkpoint-{step}" for step in steps] for steps in ((1,), (1, 2), (2, 3), (3, 4))]
    assert seen == numbers
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4"]


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    go(tmp_path, max_steps=3)
    one, two, three = (tmp_path / f"checkpoint-{step}" for step in (1, 2, 3))
    os.truncate(three / "optimizer.safetensors", 100)
    (two / "complete.json").unlink()
    (tmp_path / "tmp-checkpoint-4").mkdir()
    with pytest.warns(
        UserWarning, match="not whole: checkpoint-2 .*missing.*checkpoint-3 .*100 bytes.*tmp-"
    ) as told:
        assert newest_checkpoint(tmp_path) == str(one)
    assert len(told) == 1
    for torn, why in ((two, "complete.json is missing"), (three, "optimizer.safetensors has 100 bytes")):
        with pytest.raises(ValueError, match=f"expected a whole checkpoint at {torn}; {why}"):
            checkpoint_of(torn, None)
    with (one / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.warns(UserWarning, match="not whole"):
        assert newest_checkpoint(tmp_path) == str(one)  # a look at the sizes alone
    with pytest.raises(ValueError, match=r"content of model.safetensors is not what was written"):
        checkpoint_of(one, None)


def test_what_an_interrupted_write_left_is_removed_at_the_next(tmp_path: Path) -> None:
    for name in ("tmp-checkpoint-7", "tmp-checkpoint-1", "tmp-notes", "checkpoint-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("cut off")
    go(tmp_path, max_steps=1)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-0", "checkpoint-1", "tmp-notes"]
    assert not (tmp_path / "checkpoint-1" / "file").exists()


@pytest.mark.parametrize("what", ["disk full", "not permitted", "no room for a file"])
def test_error_while_writing_ends_the_run_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    go(tmp_path, max_steps=2)
    before = {step: content(tmp_path / f"checkpoint-{step}") for step in (1, 2)}
    code = errno.ENOSPC if what == "disk full" else errno.EACCES
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if what == "no room for a file":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    else:

        def failing(*arguments: Any) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(folders.os, "fsync" if what == "disk full" else "rename", failing)
    try:
        with pytest.raises(
            CheckpointError, match=r"at step 3 failed: .*whole in .*: checkpoint-1, checkpoint-2$"
        ):
            go(tmp_path, tmp_path / "checkpoint-2", max_steps=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-2"]
    assert {step: content(tmp_path / f"checkpoint-{step}") for step in (1, 2)} == before
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_folder_in_the_way_is_kept_unless_a_run_wrote_it(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.save_model()
    trainer.save_model()
    assert sorted(os.listdir(tmp_path)) == ["model"]
    (tmp_path / "model" / "notes.md").write_text("mine")
    with pytest.warns(
        UserWarning, match=r"held files that are not the driver's; it is kept as .*model.kept-1"
    ):
        trainer.save_model(tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == ["model", "model.kept-1"]
    assert (tmp_path / "model.kept-1" / "notes.md").read_text() == "mine"
    assert folders.what_is_wrong(tmp_path / "model", digests=True) is None
    assert "training_args.bin" not in os.listdir(tmp_path / "model")


@pytest.mark.parametrize(
    "given",
    [
        {
            "load_best_model_at_end": True,
            "save_strategy": "steps",
            "eval_strategy": "steps",
            "save_steps": 20,
        },
        {"save_only_model": True},
        {"save_on_each_node": True},
        {"push_to_hub": True},
    ],
)
def test_options_that_checkpoints_do_not_follow(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(given))}: expected False"):
        tiny_trainer(tmp_path, **given)
