"""A teacher behind a vLLM server: what it says is what its model says, and the loss is exact on that."""

import time

import pytest
import torch

import opsd_kernels
from driver_tiny import TOKENIZER, tiny_config, tiny_model, tiny_trainer
from fake_vllm_server import FakeServer
from opsd_kernels import Objective, Support
from opsd_train.engines.base import EngineError
from opsd_train.rollouts import collate
from opsd_train.teachers.served import most_likely
from opsd_train.trainer import TRAINING


@pytest.fixture
def server():
    fake = FakeServer(tiny_model(5), TOKENIZER)
    yield fake
    fake.close()


def make(server, tmp_path, **settings):
    given = {
        "teacher": "served",
        "teacher_url": server.url,
        "teacher_served_top_k": 5,
        "rollout_stall_seconds": 3.0,
    }
    return tiny_trainer(tmp_path, **(given | settings))


def batch_of(trainer):
    rollouts = trainer.roll_out(trainer.prompts, trainer.sampling, (TRAINING, 0))
    return collate(rollouts, trainer.vocabulary.pad_id)


def read(model, ids, mask, length):
    """Log-probs `[B, C, V]` by transformers' own forward pass, row by row without padding."""
    found = torch.full((*ids.shape[:1], length, 32), float("nan"))
    for i, (row, own) in enumerate(zip(ids, mask.bool(), strict=True)):
        with torch.no_grad():
            z = model(input_ids=row[own][None]).logits[0].log_softmax(-1)
        count = int(own[-length:].sum())
        found[i, :count] = z[-count - 1 : -1]
    return found


@pytest.mark.parametrize("scores", ["ids", "vocabulary"])
def test_log_probs_are_those_of_the_teachers_model_at_the_students_top_tokens(server, tmp_path, scores):
    trainer = make(server, tmp_path, teacher_scores=scores)
    batch = batch_of(trainer)
    mask = batch["completion_mask"].bool()
    assert not mask.all()  # completions of different lengths
    with torch.no_grad():
        _, teacher = trainer.distributions(trainer.student, batch)
    own = read(trainer.student, batch["input_ids"], batch["attention_mask"], mask.shape[1])
    theirs = read(server.model, batch["teacher_input_ids"], batch["teacher_attention_mask"], mask.shape[1])
    assert torch.equal(teacher.ids[mask].sort(-1).values, own.topk(5).indices[mask].sort(-1).values)
    torch.testing.assert_close(
        teacher.logprobs[mask], theirs.gather(-1, teacher.ids)[mask], atol=1e-5, rtol=0
    )
    assert teacher.temperature == 1.0
    assert bool(teacher.logprobs.exp().sum(-1).le(1 + 1e-6).all())


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "jsd", "opsd"])
def test_the_loss_is_that_of_a_local_teacher_on_the_same_support(server, tmp_path, objective):
    served = make(server, tmp_path, objective=objective)
    batch = batch_of(served)
    local = tiny_trainer(tmp_path / "local", model=served.student, objective=objective)
    local.teacher.model = server.model
    mask = batch["completion_mask"].bool()
    known = served.distributions(served.student, batch)[1]
    expected = opsd_kernels.loss(
        *local.distributions(local.student, batch),
        mask=mask,
        objective=served.objective,
        support_ids=known.ids,
    )
    found = served.compute_loss(served.student, batch)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert found.requires_grad


def test_a_run_with_a_served_teacher_follows_it(server, tmp_path):
    trainer = make(server, tmp_path, max_steps=6, learning_rate=3e-3, logging_steps=1, seed=1)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert trainer.config.to_teacher().served.top_k == 5
    assert "served by" in str(trainer.config.to_teacher())


def test_the_support_is_over_what_is_asked_for(tmp_path):
    given = {"teacher": "served", "teacher_url": "http://127.0.0.1:1"}
    config = tiny_config(tmp_path, teacher_rest="renormalise", **given)
    assert config.to_objective().support == Support(None, "given", "renormalise")
    assert config.to_teacher().served.top_k == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_temperature": 0.7}, "loss_temperature: expected 1 with teacher 'served'"),
        ({"teacher_url": None}, "teacher_url: expected a URL"),
        ({"teacher": "live"}, "teacher_url: expected a URL with teacher 'served' and only then"),
        ({"teacher_scores": "some"}, "teacher_scores: expected one of ids, vocabulary"),
        ({"teacher_served_top_k": 0}, "teacher_served_top_k: expected at least 1"),
        ({"teacher_rest": "some"}, "rest: expected one of"),
        ({"method": "gkd"}, "method: expected none with teacher 'served'"),
    ],
)
def test_what_a_served_teacher_cannot_do_is_refused(tmp_path, settings, message):
    given = {"teacher": "served", "teacher_url": "http://127.0.0.1:1"}
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **(given | settings))


def test_an_objective_over_the_teachers_tokens_is_refused(tmp_path):
    config = tiny_config(tmp_path, teacher="served", teacher_url="http://127.0.0.1:1")
    with pytest.raises(ValueError, match="objective: expected one over the student's tokens"):
        config.over_known(Objective("forward_kl", support=Support(5, "teacher")))
    assert (
        config.over_known(Objective("reverse_kl", support=Support(7, "student", "drop"))).support.rest
        == "drop"
    )


def test_a_server_without_the_v2_runner_is_named(server, tmp_path):
    server.says["v2"] = False
    with pytest.raises(ValueError, match=r"(?s)'ids'.*--teacher-scores vocabulary.*answered 400.*V2 model"):
        make(server, tmp_path)


def test_another_vocabulary_is_refused(server, tmp_path):
    class Other:
        def decode(self, ids):
            return TOKENIZER.decode(list(reversed(ids)))

    server.tokenizer = Other()
    with pytest.raises(ValueError, match="teacher_url: expected the student's vocabulary"):
        make(server, tmp_path)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("hang", "stalled"), ("silent", "stalled, it answers /health"), ("error", "answered 500")],
)
def test_a_teacher_that_breaks_ends_the_run(server, tmp_path, fault, message):
    trainer = make(server, tmp_path)
    batch = batch_of(trainer)
    server.fault = fault
    start = time.monotonic()
    with pytest.raises(EngineError, match=message):
        trainer.compute_loss(trainer.student, batch)
    assert time.monotonic() - start < 4


def test_top_tokens_are_found_a_few_positions_at_a_time():
    hidden, weight = torch.randn(2, 150, 4), torch.randn(9, 4)
    found = most_likely(opsd_kernels.Hidden(hidden, weight), 3)
    assert torch.equal(found, (hidden @ weight.T).topk(3).indices)
    assert most_likely(opsd_kernels.Hidden(hidden, weight), 99).shape == (2, 150, 9)
