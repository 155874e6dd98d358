"""Caches of rollouts and teacher log-probs: what is in them, that they are whole, and resuming."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import opsd_kernels
from driver_tiny import TOKENIZER, tiny_config, tiny_model, tiny_prompts
from opsd_train.backbone import completion_hidden, head_source
from opsd_train.demo.run import MODEL
from opsd_train.demo.task import is_held_out
from opsd_train.offline import cache as offline_cache
from opsd_train.offline.cache import Cache, collate_cached
from opsd_train.offline.collect import CacheOptions, Writer
from opsd_train.reading.prompts import Prompt
from opsd_train.rollouts import Sampling, Vocabulary, collate
from opsd_train.teachers.weights import Teacher, TrustRegionTeacher
from test_driver_run import invoke, write_rows

OPTIONS = CacheOptions(Sampling(1.0, 1.0, 0, 6, 4), samples=2, top_k=3, temperature=0.7, shard_size=5, seed=1)


def writer(teacher_seed: int = 3, **settings: object) -> Writer:
    student = tiny_model()
    vocabulary = Vocabulary.of(student, TOKENIZER)
    teacher = Teacher(tiny_model(teacher_seed))
    return Writer(student, teacher, vocabulary, replace(OPTIONS, **settings), {"model": "tiny"})


def prompts_of(tmp_path: Path) -> list[Prompt]:
    return tiny_prompts(tiny_config(tmp_path))


def test_columns_are_those_of_whole_rows_of_logits(tmp_path: Path) -> None:
    made, prompts = writer(), prompts_of(tmp_path)
    made.write(tmp_path / "cache", prompts)
    cache = Cache(tmp_path / "cache")
    assert len(cache) == 16
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "cache.json", *(f"shard-0000{i}.parquet" for i in range(4)),
    ]  # fmt: skip
    assert len({cached.rollout.completion for cached in cache}) > 8
    for i, cached in enumerate(cache):
        rollout = cached.rollout
        assert rollout.prompt == replace(prompts[i // 2], row=None)
        length = len(rollout.completion)
        assert 1 <= length <= 6
        assert rollout.truncated == (rollout.completion[-1] not in made.vocabulary.eos_ids)
        chosen = torch.tensor(rollout.completion)[:, None]
        for model, ids, column in (
            (made.student, rollout.prompt.student_ids, cached.student_logprob),
            (made.teacher.model, rollout.prompt.teacher_ids, cached.teacher_logprob),
        ):
            with torch.no_grad():
                z = model(torch.tensor([ids + rollout.completion])).logits[0, len(ids) - 1 : -1]
            log_p = (z.double() / 0.7).log_softmax(-1)
            torch.testing.assert_close(column.double(), log_p.gather(1, chosen)[:, 0], atol=1e-4, rtol=1e-4)
        top = log_p.sort(descending=True)
        torch.testing.assert_close(cached.top_logprobs.double(), top.values[:, :3], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(log_p.gather(1, cached.top_ids), top.values[:, :3], atol=1e-4, rtol=1e-4)
        assert cached.top_ids.shape == (length, 3)


def test_log_probs_are_those_of_token_stats(tmp_path: Path) -> None:
    made = writer()
    made.write(tmp_path / "cache", prompts_of(tmp_path))
    cache = Cache(tmp_path / "cache")
    batch = collate_cached(cache[:7], made.vocabulary.pad_id)
    mask = batch["completion_mask"].bool()
    length = mask.shape[1]
    sources = []
    with torch.no_grad():
        for model, who in ((made.student, ""), (made.teacher.model, "teacher_")):
            ids, seen = batch[f"{who}input_ids"], batch[f"{who}attention_mask"]
            sources.append(head_source(model, completion_hidden(model, ids, seen, length)))
    stats = opsd_kernels.token_stats(
        *sources, mask=mask, token_ids=batch["input_ids"][:, -length:], temperature=0.7
    )
    torch.testing.assert_close(batch["rollout_logprob"], stats.student_logprob, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch["teacher_logprob"], stats.teacher_logprob, atol=1e-4, rtol=1e-4)


def test_batches_are_padded(tmp_path: Path) -> None:
    made = writer()
    made.write(tmp_path / "cache", prompts_of(tmp_path))
    items = Cache(tmp_path / "cache")[2:9]
    batch = collate_cached(items, made.vocabulary.pad_id)
    plain = collate([item.rollout for item in items], made.vocabulary.pad_id)
    assert all(torch.equal(batch[name], plain[name]) for name in plain)
    dead = ~batch["completion_mask"].bool()
    assert dead.any()
    assert not batch["teacher_logprob"][dead].any()
    assert bool((batch["top_ids"][dead] == -1).all())
    assert bool((batch["top_logprobs"][dead] == -torch.inf).all())
    assert bool(batch["top_logprobs"][~dead].isfinite().all())
    for i, item in enumerate(items):
        assert torch.equal(batch["top_ids"][i, : len(item.top_ids)], item.top_ids)
        assert torch.equal(batch["rollout_logprob"][i, : len(item.top_ids)], item.student_logprob)


def test_whole_vocabulary_and_none(tmp_path: Path) -> None:
    prompts = prompts_of(tmp_path)
    writer(top_k=32).write(tmp_path / "all", prompts)
    for cached in Cache(tmp_path / "all"):
        torch.testing.assert_close(cached.top_logprobs.exp().sum(-1), torch.ones(len(cached.top_ids)))
    writer(top_k=0).write(tmp_path / "none", prompts)
    cache = Cache(tmp_path / "none")
    assert cache[-1].top_ids.shape == (len(cache[-1].rollout.completion), 0)
    assert collate_cached(cache[:3], 0)["top_ids"].shape[-1] == 0
    with pytest.raises(ValueError, match="top_k: expected at most 32, the vocabulary; got 33"):
        writer(top_k=33).write(tmp_path / "more", prompts)
    with pytest.raises(IndexError):
        cache[16]


def test_shards_draw_from_different_random_numbers(tmp_path: Path) -> None:
    writer(shard_size=8, samples=24).write(tmp_path / "cache", prompts_of(tmp_path)[:1])
    drawn = [cached.rollout.completion for cached in Cache(tmp_path / "cache")]
    assert drawn[:8] != drawn[8:16] != drawn[16:]


def test_mixture_of_weights_cannot_be_cached(tmp_path: Path) -> None:
    made = writer()
    mixture = TrustRegionTeacher(made.teacher, made.student, 0.1)
    with pytest.raises(ValueError, match=r"teacher: expected one with hidden states .*; got LogLinear"):
        replace(made, teacher=mixture).write(tmp_path / "cache", prompts_of(tmp_path))


def rows_of(folder: Path) -> list[tuple]:
    return [
        (cached.rollout, cached.teacher_logprob.tolist(), cached.top_ids.tolist()) for cached in Cache(folder)
    ]


def test_cache_that_was_cut_off_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(tmp_path)
    writer().write(tmp_path / "whole", prompts)
    real, renamed = os.replace, []

    def fails_at_the_third(source: object, target: Path) -> None:
        if Path(target).suffix == ".parquet":
            renamed.append(target)
            if len(renamed) == 3:
                raise OSError("no space left")
        real(source, target)

    monkeypatch.setattr(offline_cache.os, "replace", fails_at_the_third)
    with pytest.raises(OSError, match="no space left"):
        writer().write(tmp_path / "cut", prompts)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [
        "cache.json", "shard-00000.parquet", "shard-00001.parquet",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"expected 4 shards .* 2 are missing, the first shard-00002"):
        Cache(tmp_path / "cut")
    heard: list[tuple[int, int]] = []
    kept = (tmp_path / "cut" / "shard-00001.parquet").stat().st_mtime_ns
    writer().write(tmp_path / "cut", prompts, lambda *given: heard.append(given))
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (tmp_path / "cut" / "shard-00001.parquet").stat().st_mtime_ns == kept
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def test_another_cache_in_the_folder_is_an_error(tmp_path: Path) -> None:
    prompts = prompts_of(tmp_path)
    writer().write(tmp_path / "cache", prompts)
    for settings, message in [
        ({"top_k": 4}, "holds a cache with top_k 3, not 4; choose another folder"),
        ({"seed": 2}, "seed 1, not 2"),
        ({"sampling": replace(OPTIONS.sampling, temperature=0.5)}, "sampling .*1.0.*, not .*0.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            writer(**settings).write(tmp_path / "cache", prompts)
    with pytest.raises(ValueError, match="holds a cache with prompts"):
        writer().write(tmp_path / "cache", prompts[::-1])
    with pytest.raises(ValueError, match=r"cache: expected a readable cache.json in"):
        Cache(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples: expected at least 1; got 0"),
        ({"top_k": -1}, "top_k: expected at least 0; got -1"),
        ({"shard_size": 0}, "shard_size: expected at least 1; got 0"),
        ({"temperature": 0.0}, "temperature: expected a number above 0; got 0.0"),
    ],
)
def test_wrong_options(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(OPTIONS, **settings)


def test_command_with_another_teacher(tmp_path: Path) -> None:
    for name, seed in (("model", 0), ("teacher", 3)):
        tiny_model(seed).save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    rows = write_rows(tmp_path / "rows.jsonl")
    given = ["--model", tmp_path / "model", "--data", rows, "--use_cpu", "--student_template", "{problem}"]
    given += ["--teacher_template", "{solution};{problem}", "--max_completion_length", 3]
    given += ["--teacher-model", tmp_path / "teacher", "--teacher-top-k", 2, "--samples", 3]
    code, output = invoke("cache", *given, "--out", tmp_path / "cache")
    assert code == 0, output
    assert "24 rollouts" in output
    cache = Cache(tmp_path / "cache")
    assert cache.info["teacher"] == str(tmp_path / "teacher")
    cached = cache[5]
    prompt, completion = cached.rollout.prompt, cached.rollout.completion
    with torch.no_grad():
        z = tiny_model(3)(torch.tensor([prompt.teacher_ids + completion])).logits
    z = z[0, len(prompt.teacher_ids) - 1 : -1]
    expected = z.log_softmax(-1).topk(2)
    torch.testing.assert_close(cached.top_logprobs, expected.values, atol=1e-4, rtol=1e-4)
    code, output = invoke("cache", *given, "--out", tmp_path / "cache", "--seed", 1)
    assert code == 2
    assert "error: out:" in output
    tokens = TOKENIZER.__class__.from_pretrained(tmp_path / "teacher")
    tokens.add_tokens(["more"])
    tokens.save_pretrained(tmp_path / "teacher")
    code, output = invoke("cache", *given, "--out", tmp_path / "other")
    assert code == 2
    assert "teacher_model: expected the student's vocabulary; 1 tokens differ, for one 'more'" in output


@pytest.mark.skipif(not MODEL.is_dir(), reason="the demo's model is not in this checkout")
def test_command_on_the_demo_caches_training_problems(tmp_path: Path) -> None:
    code, output = invoke("cache", "--demo", "--out", tmp_path / "cache")
    assert code == 0, output
    cache = Cache(tmp_path / "cache")
    assert len(cache) == 1024
    for cached in cache[:50]:
        found = re.search(r"(\d+)\+(\d+)=", TOKENIZER.decode(list(cached.rollout.prompt.student_ids)))
        assert not is_held_out(int(found[1]), int(found[2]))
