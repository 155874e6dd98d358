"""The in-process vLLM engine on a fake package: what it asks for and in which order, and how it fails."""

import math
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from driver_tiny import TOKENIZER, tiny_config, tiny_model, tiny_trainer
from fake_vllm import LOGPROB, Behaviour, die, fake_vllm, hang
from opsd_train.engines import agreement
from opsd_train.engines.base import Completion, EngineError
from opsd_train.engines.vllm import VLLMEngine
from opsd_train.rollouts import Sampling, Vocabulary
from opsd_train.safety.deadline import OutOfTime, within

PROMPTS = [(3, 4), (5, 6, 7), (8,)]
SENT = ["reload_weights", "reset"]
WOKEN = ["wake ['weights']", "reload_weights", "wake None", "reset"]
SAMPLING = Sampling(temperature=0.7, top_p=0.9, top_k=5, max_tokens=4)


@pytest.fixture
def behaviour(monkeypatch: pytest.MonkeyPatch) -> Behaviour:
    found = Behaviour()
    for name, module in fake_vllm(found).items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def engine(tmp_path: Path, model: torch.nn.Module | None = None, **settings) -> VLLMEngine:
    model = tiny_model() if model is None else model
    config = tiny_config(tmp_path, rollouts="vllm", **settings)
    return VLLMEngine(config, model, Vocabulary.of(model, TOKENIZER))


def test_completions_come_in_the_order_of_the_prompts_with_their_version(
    behaviour: Behaviour, tmp_path: Path
) -> None:
    one = engine(tmp_path)
    one.follow(7)
    written = one.write(PROMPTS, SAMPLING, (0, 0))
    assert written == [Completion((5, 5, 5, 1), (LOGPROB,) * 4, version=7)] * 3
    assert one.versions == {"vllm": sys.modules["vllm"].__version__}
    asked = {tuple(prompt): params for _, prompt, params in behaviour.calls[2:]}
    assert sorted(asked) == sorted(PROMPTS)
    params = asked[3, 4].__dict__
    assert (params["temperature"], params["top_p"], params["top_k"], params["max_tokens"]) == (0.7, 0.9, 5, 4)
    assert params["stop_token_ids"] == [1, *range(20, 32)]
    assert params["ignore_eos"] is True
    assert params["logprobs"] == 0
    assert "seed" not in params


def test_finished_requests_are_told(behaviour: Behaviour, tmp_path: Path) -> None:
    one, told = engine(tmp_path), []
    one.follow(0)
    with one.telling(told.append, SAMPLING):
        one.write(PROMPTS, SAMPLING, (0, 0))
    assert told == [f"sampled, {done} of 3 completions" for done in (1, 2, 3)]


def test_after_a_deadline_others_are_written(behaviour: Behaviour, tmp_path: Path) -> None:
    one = engine(tmp_path)
    one.follow(0)
    with within(1e-9), pytest.raises(OutOfTime):
        one.write(PROMPTS, SAMPLING, (0, 0))
    written = one.write(PROMPTS[:2], SAMPLING, (0, 0))
    assert written == [Completion((5, 5, 5, 1), (LOGPROB,) * 4)] * 2
    asked = [call[1] for call in behaviour.calls if call[0] == "write"]
    assert asked == [[8], [5, 6, 7], [3, 4]]  # the two that were not written yet are forgotten


def test_what_vllm_is_started_with(behaviour: Behaviour, tmp_path: Path) -> None:
    engine(tmp_path, tiny_model(max_position_embeddings=80).bfloat16(), seed=9, vllm_kv_cache_gb=0.5)
    options = behaviour.options
    assert options["dtype"] == "bfloat16"
    assert options["max_model_len"] == 80
    assert options["seed"] == 9
    assert options["kv_cache_memory_bytes"] == 1 << 29
    assert options["generation_config"] == "vllm"
    assert options["trust_remote_code"] is False
    assert not Path(options["model"]).exists()  # it was a temporary folder


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_is_sent_on_a_cpu(behaviour: Behaviour, tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    one = engine(tmp_path, model)
    one.follow(0)
    assert torch.equal(behaviour.weights["lm_head.weight"], model.lm_head.weight)
    assert behaviour.calls == ["reload_weights", "reset"]


def test_the_process_is_as_before(behaviour: Behaviour, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    seen, set_threads = [], torch.set_num_threads

    def disturb() -> None:
        seen.append(os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"])
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        torch.set_num_threads(2)
        torch.set_num_threads = lambda count: None

    behaviour.at_start = behaviour.at_step = disturb
    states = [torch.get_rng_state(), str(np.random.get_state()), random.getstate()]
    one = engine(tmp_path)
    one.follow(0)
    assert seen == ["0"]
    assert torch.set_num_threads is set_threads
    assert torch.get_num_threads() == 1
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
    assert os.environ["VLLM_NO_USAGE_STATS"] == "0"
    behaviour.at_step = lambda: (torch.rand(1), np.random.rand(), random.random())
    one.write(PROMPTS, SAMPLING, (0, 0))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert [str(np.random.get_state()), random.getstate()] == states[1:]


def test_random_numbers_are_functions_of_the_seed(behaviour: Behaviour, tmp_path: Path) -> None:
    one, drawn = engine(tmp_path), []
    one.follow(0)
    behaviour.at_step = lambda: drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
    for seed in ((0, 1), (0, 1), (0, 2)):
        one.write(PROMPTS[:1], SAMPLING, seed)
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (0, [*SENT, "write", *SENT, "write", "write"]),
        (1, [*SENT, "write", "sleep 1", *WOKEN, "write", "sleep 1", "wake None", "write"]),
        (2, [*SENT, "write", "sleep 2", *WOKEN, "write", "sleep 2", *WOKEN, "write"]),
    ],
)
def test_sleep_and_waking_in_the_right_order(
    behaviour: Behaviour, tmp_path: Path, level: int, expected: list[str]
) -> None:
    one = engine(tmp_path, vllm_sleep_level=level)
    one.on_gpu = True
    one.follow(0)
    one.write(PROMPTS[:1], SAMPLING, (0, 0))
    one.rest()
    one.rest()
    one.follow(1)
    one.write(PROMPTS[:1], SAMPLING, (0, 0))
    one.rest()
    assert one.write(PROMPTS[:1], SAMPLING, (0, 0))[0].version == 1  # no new weights in between
    assert [call if isinstance(call, str) else call[0] for call in behaviour.calls] == expected


def test_rest_does_nothing_on_a_cpu(behaviour: Behaviour, tmp_path: Path) -> None:
    one = engine(tmp_path)
    one.follow(0)
    one.rest()
    assert not any("sleep" in call for call in behaviour.calls)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"at_step": hang}, r"no progress for 0\.5 s while writing rollouts"),
        ({"at_step": die}, "died while writing rollouts: RuntimeError: CUDA error"),
        ({"token": 32}, "expected tokens of the student's 32 entries from vLLM, got 32"),
        ({"at_step": lambda: time.sleep(0.7)}, "no progress"),
    ],
)
def test_a_failing_writer_is_an_error_and_is_not_used_again(
    behaviour: Behaviour, tmp_path: Path, wrong: dict, message: str
) -> None:
    one = engine(tmp_path, rollout_stall_seconds=0.5)
    one.follow(0)
    behaviour.__dict__.update(wrong)
    with pytest.raises(EngineError, match=message):
        one.write(PROMPTS, SAMPLING, (0, 0))
    behaviour.__dict__.update(at_step=None, token=5)
    with pytest.raises(EngineError, match="cannot write, it failed while writing"):
        one.write(PROMPTS, SAMPLING, (0, 0))
    one.close()
    assert behaviour.calls[-1] == "shutdown"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"takes": 3}, "stopped taking weights after 3"),
        ({"at_weights": die}, "died while taking over weights: RuntimeError"),
        ({"at_weights": hang}, "no progress for 0.5 s while taking over weights"),
        ({"forgets": False}, "did not forget"),
    ],
)
def test_half_the_weights_write_nothing(
    behaviour: Behaviour, tmp_path: Path, wrong: dict, message: str
) -> None:
    one = engine(tmp_path, rollout_stall_seconds=0.5)
    one.follow(0)
    behaviour.__dict__.update(wrong)
    with pytest.raises(EngineError, match=message):
        one.follow(1)
    behaviour.__dict__.update(takes=None, at_weights=None, forgets=True)
    with pytest.raises(EngineError, match="cannot write"):
        one.write(PROMPTS, SAMPLING, (0, 0))


def test_many_weights_may_take_longer_than_a_stall(behaviour: Behaviour, tmp_path: Path) -> None:
    one = engine(tmp_path, rollout_stall_seconds=1.5)
    behaviour.at_weights = lambda: time.sleep(0.1)
    one.follow(3)
    assert len(behaviour.weights) * 0.1 > 1.5
    assert one.version == 3


def test_a_start_that_hangs_or_fails_is_an_error(behaviour: Behaviour, tmp_path: Path) -> None:
    behaviour.at_start = hang
    with pytest.raises(EngineError, match="while starting"):
        engine(tmp_path, rollout_start_seconds=0.5)
    behaviour.at_start = die
    with pytest.raises(EngineError, match="did not start: RuntimeError: CUDA error"):
        engine(tmp_path)

    def refuse() -> None:
        raise ValueError("Model architectures ['X'] are not supported for now.")

    behaviour.at_start = refuse
    with pytest.raises(ValueError, match="vLLM can start with; it says: Model architectures"):
        engine(tmp_path)


def test_writing_before_any_weights_or_after_the_end_is_an_error(
    behaviour: Behaviour, tmp_path: Path
) -> None:
    one = engine(tmp_path)
    with pytest.raises(EngineError, match="not been given any weights"):
        one.write(PROMPTS, SAMPLING, (0, 0))
    one.close()
    one.close()
    assert behaviour.calls == ["shutdown"]
    with pytest.raises(EngineError, match="closed"):
        one.follow(0)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([(3,) * 61], {}, r"prompts: expected 1 to 60 tokens, since vLLM was started for 64 .* got 61"),
        ([()], {}, "prompts: expected 1 to 60"),
        (PROMPTS, {"temperature": 2.5}, "temperature: expected 0, or 0.01 to 2"),
        (PROMPTS, {"temperature": 0.001}, "temperature: expected 0, or 0.01 to 2"),
    ],
)
def test_what_vllm_would_do_in_another_way_is_refused(
    behaviour: Behaviour, tmp_path: Path, prompts: list, settings: dict, message: str
) -> None:
    one = engine(tmp_path, tiny_model(max_position_embeddings=64))
    one.follow(0)
    with pytest.raises(ValueError, match=message):
        one.write(prompts, Sampling(**(SAMPLING.__dict__ | settings)), (0, 0))
    assert one.write(PROMPTS, SAMPLING, (0, 0))  # it still works


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollouts": "sglang"}, "rollouts: expected one of hf, vllm"),
        ({"vllm_dtype": "int8"}, "vllm_dtype: expected one of auto"),
        ({"vllm_sleep_level": 3}, "vllm_sleep_level: expected 0, 1 or 2"),
        ({"vllm_gpu_memory_utilization": 1.0}, "vllm_gpu_memory_utilization"),
        ({"vllm_kv_cache_gb": 0.0}, "vllm_kv_cache_gb: expected a number above 0"),
        ({"rollout_stall_seconds": 0.0}, "rollout_stall_seconds: expected a number above 0"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **settings)


def test_a_missing_an_old_and_a_changed_package_are_refused(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"rollouts: expected the package vllm 0\.32 or newer"):
        engine(tmp_path)
    old = fake_vllm(Behaviour(), "0.19.1")["vllm"]
    monkeypatch.setitem(sys.modules, "vllm", old)
    with pytest.raises(ValueError, match=r"got 0\.19\.1"):
        engine(tmp_path)
    changed = fake_vllm(Behaviour(), "1.0")["vllm"]
    del changed.LLM.reset_prefix_cache
    monkeypatch.setitem(sys.modules, "vllm", changed)
    with pytest.raises(ValueError, match="has no reset_prefix_cache"):
        engine(tmp_path)


def test_the_trainer_sends_weights_after_every_step(
    behaviour: Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "ALARM", math.inf)  # the fake's log-probs are none of a model
    trainer = tiny_trainer(tmp_path, rollouts="vllm", max_steps=2, vllm_sleep_level=0)
    behaviour.token = 4
    trainer.train()
    written = [call if isinstance(call, str) else call[0] for call in behaviour.calls]
    assert written == ["reload_weights", "reset", *["write"] * 8] * 2
    assert not torch.equal(behaviour.weights["lm_head.weight"], trainer.student.lm_head.weight)
    trainer.evaluate()
    assert torch.equal(behaviour.weights["lm_head.weight"], trainer.student.lm_head.weight)
