"""Training from a cache: the rollouts and the teacher are those that were stored."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

from driver_tiny import ROWS, TOKENIZER, tiny_config, tiny_model, tiny_prompts
from opsd_train.data.rows import load_rows
from opsd_train.offline.cache import Cache
from opsd_train.offline.collect import CacheOptions, Writer
from opsd_train.offline.train import stored_columns
from opsd_train.rollouts import Sampling, Vocabulary
from opsd_train.teachers.weights import Teacher
from opsd_train.train import make_trainer
from opsd_train.trainer import OPSDTrainer
from opsd_train.watch.record import load_run
from test_driver_run import invoke, write_rows

OPTIONS = CacheOptions(Sampling(1.0, 1.0, 0, 6, 8), samples=3, top_k=4, shard_size=7, seed=1)


def cached(out: Path, **options: Any) -> Path:
    """A cache by a student (seed 1) and a teacher (seed 3) that are not the student in training (seed 0)."""
    student = tiny_model(1)
    vocabulary = Vocabulary.of(student, TOKENIZER)
    writer = Writer(student, Teacher(tiny_model(3)), vocabulary, replace(OPTIONS, **options), {})
    writer.write(out / "cache", tiny_prompts(tiny_config(out)))
    return out / "cache"


def offline_trainer(
    out: Path, cache: Path | str, method: str | None = "lightning_opd", **settings: Any
) -> OPSDTrainer:
    config = tiny_config(out / "run", method=method, offline=str(cache), verifier="exact", **settings)
    return make_trainer(tiny_model(), TOKENIZER, load_rows(ROWS, config.to_templates()), [], config)


def first_step(trainer: OPSDTrainer) -> dict[str, torch.Tensor]:
    batches, _ = trainer.get_batch_samples(iter([trainer.prompts]), 1, torch.device("cpu"))
    trainer.student.zero_grad()
    trainer.compute_loss(trainer.student, batches[0], num_items_in_batch=1).backward()
    return batches[0]


def logits_of(prompt: tuple[int, ...], completion: tuple[int, ...], model: Any) -> torch.Tensor:
    return model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([one.grad.flatten() for one in model.parameters()])


def test_gradient_is_that_of_the_stored_log_probs(tmp_path: Path) -> None:
    """-A log s with A = log t - log s of the stored teacher, on the stored rollouts of another student."""
    cache = cached(tmp_path)
    trainer = offline_trainer(tmp_path, cache)
    assert trainer.stored is not None
    first_step(trainer)
    stored = {item.rollout.completion: item for item in Cache(cache)}
    taken = trainer.stored.take(trainer.prompts, trainer.config.seed, 0)
    model, teacher = tiny_model(), tiny_model(3)
    total, count = torch.zeros(()), 0
    for prompt, item in zip(trainer.prompts, taken, strict=True):
        completion = item.rollout.completion
        assert completion in stored
        ids = torch.tensor(completion)[:, None]
        s = log_softmax(logits_of(prompt.student_ids, completion, model), -1).gather(1, ids)[:, 0]
        with torch.no_grad():
            t = log_softmax(logits_of(prompt.teacher_ids, completion, teacher), -1).gather(1, ids)[:, 0]
        total = total - ((t - s).detach() * s).sum()
        count += len(completion)
    (total / count).backward()
    torch.testing.assert_close(gradient(trainer.student), gradient(model), rtol=1e-3, atol=1e-5)


def test_rollouts_of_a_prompt_differ_and_are_its_own(tmp_path: Path) -> None:
    cache = cached(tmp_path)
    trainer = offline_trainer(tmp_path, cache, num_generations=3)
    assert trainer.stored is not None
    items = Cache(cache)
    prompts = [prompt for prompt in trainer.prompts for _ in range(3)]
    for step in (0, 1):
        taken = trainer.stored.take(prompts, 0, step)
        for i in range(8):
            of_cache = sorted(item.rollout.completion for item in items[3 * i : 3 * i + 3])
            assert sorted(one.rollout.completion for one in taken[3 * i : 3 * i + 3]) == of_cache
            assert all(one.rollout.prompt.row is not None for one in taken)
    orders = [[x.rollout.completion for x in trainer.stored.take(prompts, 0, step)] for step in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    with pytest.raises(ValueError, match=r"offline: expected at least num_generations rollouts .*; got 3"):
        trainer.stored.take([*prompts, prompts[0]], 0, 0)


def test_rollout_log_probs_are_those_of_the_student_that_wrote(tmp_path: Path) -> None:
    trainer = offline_trainer(tmp_path, cached(tmp_path))
    assert trainer.stored is not None
    assert trainer.method is not None
    taken = trainer.stored.take(trainer.prompts, 0, 0)
    assert "data_rollout_logprob" not in stored_columns(taken, trainer.method, 0)
    corrected = replace(trainer.method, key="mimo_mopd")
    found = stored_columns(taken, corrected, 0)["data_rollout_logprob"]
    for row, item in enumerate(taken):
        length = len(item.rollout.completion)
        torch.testing.assert_close(found[row, :length], item.student_logprob)


def test_divergence_over_the_teachers_stored_entries(tmp_path: Path) -> None:
    """lsm: both distributions renormalised on the teacher's 4 most likely of 6 stored entries."""
    trainer = offline_trainer(tmp_path, cached(tmp_path, top_k=6), "lsm", method_options={"k": 4})
    assert trainer.stored is not None
    first_step(trainer)
    model, teacher, total, count = tiny_model(), tiny_model(3), torch.zeros(()), 0
    taken = trainer.stored.take(trainer.prompts, trainer.config.seed, 0)
    for prompt, item in zip(trainer.prompts, taken, strict=True):
        completion = item.rollout.completion
        with torch.no_grad():
            top = logits_of(prompt.teacher_ids, completion, teacher).topk(4)
        t = log_softmax(top.values, -1)
        z = logits_of(prompt.student_ids, completion, model)
        s = log_softmax(z.gather(1, top.indices), -1)
        total = total + (s.exp() * (s - t)).sum()
        count += len(completion)
    (total / count).backward()
    torch.testing.assert_close(gradient(trainer.student), gradient(model), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match=r"or at its 6 most likely ones .*; 'lsm' needs a live one"):
        offline_trainer(tmp_path, tmp_path / "cache", "lsm", method_options={"k": 7})


def test_nothing_is_generated_and_no_teacher_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = offline_trainer(tmp_path, cached(tmp_path), max_steps=3, logging_steps=1)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("not in a run from a cache")

    monkeypatch.setattr(trainer.engine, "write", never)
    monkeypatch.setattr(trainer.engine, "follow", never)
    monkeypatch.setattr(Teacher, "source", never)
    before = [one.detach().clone() for one in trainer.student.parameters()]
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.student.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": None}, "offline: expected a method; got none"),
        ({"method": "opsd"}, "offline: expected a method whose teacher is known .*'opsd' needs a live one"),
        ({"method": "demopsd"}, "offline: expected a method with a single teacher .*'demopsd' needs"),
        # The student's most likely entries, of which a cache cannot know the teacher's log-probs.
        ({"method": "opd_topk_sg"}, "known .* at its 4 most likely ones .*'opd_topk_sg' needs a live one"),
        ({"method": "skill_sd", "teacher": "ema"}, "offline: expected teacher 'initial', .*; got 'ema'"),
        ({"contexts": {"teacher": "plain"}}, "offline: expected contexts {}, since the cache holds"),
        ({"horizon": {"name": "share"}}, "offline: expected horizon {}"),
        ({"loss_temperature": 0.5}, "offline: expected loss_temperature 1.0, that of the cache's .* got 0.5"),
        ({"teacher_template": "{solution}+{problem}"}, "offline: expected a cache of the 8 rows of data"),
        ({"offline": "/no/cache"}, "cache: expected a readable cache.json in /no/cache"),
    ],
)
def test_what_a_cache_cannot_serve_is_refused(tmp_path: Path, settings: dict, message: str) -> None:
    cache = cached(tmp_path)
    with pytest.raises(ValueError, match=message):
        offline_trainer(tmp_path, **({"cache": cache} | rename(settings)))


def rename(settings: dict[str, Any]) -> dict[str, Any]:
    return {"cache" if name == "offline" else name: value for name, value in settings.items()}


def test_command(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl")
    given = ["--model", tmp_path / "model", "--data", rows, "--use_cpu", "--student_template", "{problem}"]
    given += ["--teacher_template", "{solution};{problem}", "--max_completion_length", 3]
    code, output = invoke("cache", *given, "--samples", 2, "--out", tmp_path / "cache")
    assert code == 0, output
    given += ["--method", "lightning_opd", "--offline", tmp_path / "cache", "--max_steps", 2]
    given += ["--logging_steps", 1, "--save_strategy", "no", "--eval-data", rows]
    code, output = invoke("train", *given, "--out", tmp_path / "out")
    assert code == 0, output
    run = load_run(tmp_path / "out")
    assert [entry["step"] for entry in run.metrics] == [1, 2]
    assert [entry["step"] for entry in run.evaluations] == [0, 2]
    assert run.rollouts == []
    code, output = invoke("train", *given, "--method", "opsd", "--out", tmp_path / "other")
    assert code == 2
    assert "offline: expected a method whose teacher is known" in output
