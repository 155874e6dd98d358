"""Completions as Parquet: what is in the files, who can read them, and that none is ever half there."""

import os
from pathlib import Path

import datasets
import pandas
import pytest
from pyarrow import parquet

from driver_tiny import ROWS, TOKENIZER, tiny_config, tiny_prompts, tiny_trainer
from opsd_train.rollouts import Rollout
from opsd_train.watch import completions
from opsd_train.watch.completions import SCHEMA, kept, to_rows, write_parquet
from opsd_train.watch.record import RunRecord
from test_driver_methods import method_trainer, replace_verifier


def test_the_completions_of_every_second_step_are_kept(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=5, save_completions_every=2)
    written: dict[int, list[Rollout]] = {}
    roll_out = trainer.roll_out

    def watched(prompts: list, sampling: object, stream: tuple[int, int]) -> list[Rollout]:
        written[stream[1] + 1] = roll_out(prompts, sampling, stream)
        return written[stream[1] + 1]

    trainer.roll_out = watched
    trainer.train()
    assert [path.name for path in kept(tmp_path)] == ["step-000002.parquet", "step-000004.parquet"]
    for step, path in zip((2, 4), kept(tmp_path), strict=True):
        frame = pandas.read_parquet(path)
        assert parquet.read_schema(path).equals(SCHEMA)
        assert frame["token_ids"].map(tuple).tolist() == [one.completion for one in written[step]]
        assert frame["where"].tolist() == [one.prompt.where for one in written[step]]
        assert frame["truncated"].tolist() == [one.truncated for one in written[step]]
        assert set(frame["step"]) == {step}
        assert set(frame["version"]) == {step - 1}  # the weights are those before the step
        assert frame["reward"].isna().all()
        first = frame.iloc[0]
        assert first["prompt"] == TOKENIZER.decode(written[step][0].prompt.student_ids)
        assert first["completion"] == TOKENIZER.decode(first["token_ids"], skip_special_tokens=True)
    found = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "completions" / "*.parquet"), split="train",
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    assert len(found) == 16


def test_a_methods_rewards_are_kept(tmp_path: Path) -> None:
    trainer = method_trainer(tmp_path, "sdpo", num_generations=4, max_steps=1, save_completions_every=1)
    trainer.method = replace_verifier(trainer)  # a text of odd length is right
    trainer.train()
    frame = pandas.read_parquet(kept(tmp_path)[0])
    expected = [float(len(text) % 2) for text in frame["completion"]]
    assert frame["reward"].tolist() == expected
    assert set(expected) == {0.0, 1.0}
    assert frame["answer"].tolist() == [
        ROWS[int(where.split()[1]) - 1]["solution"] for where in frame["where"]
    ]


def test_none_are_kept_if_none_are_asked_for(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, max_steps=2, save_completions_every=0).train()
    assert not (tmp_path / completions.FOLDER).exists()
    with pytest.raises(ValueError, match="save_completions_every: expected a number at least 0, got -1"):
        tiny_config(tmp_path, save_completions_every=-1)


def test_a_crash_while_writing_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "completions" / "step-000001.parquet"
    prompt = tiny_prompts(tiny_config(tmp_path))[0]
    rows = to_rows([Rollout(prompt, (3, 4, 1), False)], TOKENIZER, 1, [1.0])
    write_parquet(path, rows)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_parquet(path, rows * 100)
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_text_that_utf8_has_no_form_for_is_kept_readable(tmp_path: Path) -> None:
    prompt = tiny_prompts(tiny_config(tmp_path))[0]
    (row,) = to_rows([Rollout(prompt, (3,), True, version=7)], TOKENIZER, 1)
    write_parquet(tmp_path / "one.parquet", [row | {"completion": "half \ud83d"}])
    (found,) = pandas.read_parquet(tmp_path / "one.parquet").to_dict("records")
    assert found["completion"] == "half ?"
    assert found["version"] == 7


def test_a_run_that_is_replaced_takes_its_completions_along(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.write_info({})
    prompt = tiny_prompts(tiny_config(tmp_path))[0]
    for name in ("step-000001.parquet", "mine.parquet"):
        write_parquet(tmp_path / "completions" / name, to_rows([Rollout(prompt, (3,), True)], TOKENIZER, 1))
    RunRecord(tmp_path, "replace")
    assert [path.name for path in (tmp_path / "completions").iterdir()] == ["mine.parquet"]
