"""Rollouts by a vLLM server, against a fake one that breaks in every way that was thought of."""

import sys
import time
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model

from driver_tiny import TOKENIZER, tiny_config, tiny_model, tiny_trainer
from fake_vllm_server import VERSION, FakeServer
from opsd_train.description import describe
from opsd_train.engines.base import EngineError
from opsd_train.engines.hf import HFEngine
from opsd_train.engines.table import ENGINES, Kind
from opsd_train.rollouts import Sampling, generate
from opsd_train.safety.deadline import OutOfTime, within
from server_engines import GREEDY, PROMPTS, STALL, make, move


@pytest.fixture
def server():
    # Its own weights, and a head of its own as for a server on a CPU.
    fake = FakeServer(tiny_model(9, tie_word_embeddings=False), TOKENIZER)
    yield fake
    fake.close()


def own_logprobs(student, prompt, tokens):
    with torch.no_grad():
        z = student(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
    return z[len(prompt) - 1 : -1].gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def test_rollouts_are_those_of_the_weights_of_the_last_follow(server, tmp_path):
    student = tiny_model()
    engine = make(server.url, tmp_path, student)
    vocabulary = engine.vocabulary
    seen = set()
    for version in (0, 1):
        engine.follow(version)
        assert engine.proof.difference < 1e-5
        written = engine.write(PROMPTS, GREEDY, (0, 0, version))
        assert [one.tokens for one in written] == generate(student, PROMPTS, GREEDY, vocabulary, (0,))
        for prompt, one in zip(PROMPTS, written, strict=True):
            assert one.version == version
            torch.testing.assert_close(
                torch.tensor(one.logprobs), own_logprobs(student, prompt, one.tokens), atol=1e-5, rtol=0
            )
        seen.add(tuple(one.tokens for one in written))
        move(student)
    assert len(seen) == 2
    engine.close()
    assert not (tmp_path / "vllm-sync").exists()


def test_log_probs_are_at_temperature_one_whatever_is_sampled_with(server, tmp_path):
    student = tiny_model()
    engine = make(server.url, tmp_path, student)
    engine.follow(0)
    for one, prompt in zip(engine.write(PROMPTS, Sampling(0.7, 1.0, 0, 6), (0,)), PROMPTS, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.logprobs), own_logprobs(student, prompt, one.tokens), atol=1e-5, rtol=0
        )


def test_a_request_leaves_nothing_to_the_models_generation_defaults(server, tmp_path):
    student = tiny_model()
    engine = make(server.url, tmp_path, student)
    engine.follow(0)
    server.calls.clear()
    told: list[str] = []
    with engine.telling(told.append, GREEDY):
        engine.write(PROMPTS, Sampling(0.9, 0.8, 7, 6), (0,))
    assert told[-1] == "greedy, 3 of 3 completions"
    (settings,) = {str(body["sampling_params"]) for body in server.asked("/inference/v1/generate")}
    settings = server.asked("/inference/v1/generate")[0]["sampling_params"]
    assert settings["ignore_eos"] is True
    assert settings["stop_token_ids"] == list(engine.vocabulary.eos_ids)
    assert (settings["temperature"], settings["top_p"], settings["top_k"]) == (0.9, 0.8, 7)
    assert "seed" not in settings  # vLLM on a CPU has none


def test_after_a_deadline_others_are_written(server, tmp_path):
    student = tiny_model()
    engine = make(server.url, tmp_path, student)
    engine.follow(0)
    with within(1e-9), pytest.raises(OutOfTime):
        engine.write(PROMPTS, GREEDY, (0,))
    written = engine.write(PROMPTS, GREEDY, (0,))
    assert [one.tokens for one in written] == generate(student, PROMPTS, GREEDY, engine.vocabulary, (0,))


def test_a_server_with_a_gpu_is_told_seeds(server, tmp_path):
    server.says["device"] = "cuda"
    engine = make(server.url, tmp_path, tiny_model())
    engine.follow(0)
    runs = [engine.write(PROMPTS, Sampling(1.0, 1.0, 0, 6), (0, 0, n)) for n in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_lora_is_sent_merged(server, tmp_path):
    student = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    move(student)
    engine = make(server.url, tmp_path, student)
    engine.follow(0)
    assert engine.proof.difference < 1e-5
    written = engine.write(PROMPTS, GREEDY, (0,))
    with student.disable_adapter():
        without = generate(student.get_base_model(), PROMPTS, GREEDY, engine.vocabulary, (0,))
    assert [one.tokens for one in written] != without
    assert [one.tokens for one in written] == generate(
        student.get_base_model(), PROMPTS, GREEDY, engine.vocabulary, (0,)
    )


def test_lora_adapters_are_versioned_and_the_one_before_is_unloaded(server, tmp_path):
    base = tiny_model()
    server.model.load_state_dict(base.state_dict() | {"lm_head.weight": base.lm_head.weight})
    student = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    engine = make(server.url, tmp_path, student, vllm_sync="lora")
    for version in (3, 4):
        engine.follow(version)
        written = engine.write(PROMPTS, GREEDY, (0,))
        assert [one.tokens for one in written] == generate(base, PROMPTS, GREEDY, engine.vocabulary, (0,))
        assert list(server.adapters) == [engine.tag]
        assert engine.tag.endswith(f"-{version}")
        move(student)
    engine.follow(4)  # a run that was resumed at the same step
    assert list(server.adapters) == [engine.tag]
    engine.close()
    assert not server.adapters


def test_a_run_trains_on_rollouts_of_the_server(server, tmp_path):
    trainer = tiny_trainer(
        tmp_path, rollouts="vllm-server", vllm_url=server.url, temperature=0.0, max_steps=2, seed=3
    )
    trainer.train()
    assert describe(trainer)["versions"]["vllm"] == VERSION
    by_server = trainer.state.log_history
    same = tiny_trainer(tmp_path / "hf", temperature=0.0, max_steps=2, seed=3)
    same.train()
    weights = zip(trainer.student.parameters(), same.student.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in weights)
    assert by_server


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("die", "died"),
        ("hang", "stalled"),
        ("silent", "stalled.*no token"),
        ("error", "answered 500: .*EngineCore"),
        ("mixed", "expected rollouts of weights"),
        ("short", "as many log-probs"),
        ("late", "first end-of-sequence"),
    ],
)
def test_a_fault_while_writing_is_found(server, tmp_path, fault, message):
    engine = make(server.url, tmp_path, tiny_model())
    engine.follow(0)
    server.fault = fault
    start = time.monotonic()
    with pytest.raises(EngineError, match=message):
        engine.write(PROMPTS, Sampling(1.0, 1.0, 0, 6), (0,))
    assert time.monotonic() - start < STALL + 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("half", "do not have the trainer's bits|log-probs to within"),
        ("stale", "do not have the trainer's bits"),
        ("restarted", "expected weights"),
        ("hang", "stalled"),
        ("silent", "stalled, no answer within 3 s"),
        ("stuck", "/collective_rpc: stalled, no answer within 3 s"),
    ],
)
def test_a_fault_while_weights_are_sent_is_found(server, tmp_path, fault, message):
    student = tiny_model()
    engine = make(server.url, tmp_path, student)
    engine.follow(0)
    move(student)
    server.fault = fault
    start = time.monotonic()
    with pytest.raises(EngineError, match=message):
        engine.follow(1)
    assert time.monotonic() - start < STALL + 1
    assert not list((tmp_path / "vllm-sync").rglob("*.safetensors"))  # weights that nobody reads


def test_weights_that_did_not_arrive_are_found_by_log_probs_alone(server, tmp_path):
    student = tiny_model()
    engine = make(server.url, tmp_path, student, vllm_checksums=False)
    engine.follow(0)
    move(student)
    server.fault = "stale"
    with pytest.raises(EngineError, match="differ by"):
        engine.follow(1)


def test_a_transfer_that_broke_off_leaves_no_version_that_lies(server, tmp_path, monkeypatch):
    engine = make(server.url, tmp_path, tiny_model())
    engine.follow(0)
    monkeypatch.setitem(sys.modules["fake_vllm_server"].ROUTES, "/collective_rpc", lambda *_: (500, "broken"))
    with pytest.raises(EngineError, match="500"):
        engine.follow(1)
    assert server.version.endswith("-1-incomplete")


@pytest.mark.parametrize(
    ("says", "settings", "message"),
    [
        ({"dev": False}, {}, "VLLM_SERVER_DEV_MODE=1"),
        ({"scale_out": False}, {}, "--enable-scale-out"),
        ({"logprobs_mode": "processed_logprobs"}, {}, "raw_logprobs"),
        ({"own_head": False}, {}, "keeps a tied head apart"),
        ({}, {"vllm_sync": "nccl"}, "vllm_sync: expected GPUs on both sides"),
        ({}, {"vllm_sync": "lora"}, "vllm_sync: expected a student with LoRA"),
        ({}, {"vllm_url": "localhost:8000"}, "vllm_url: expected http"),
    ],
)
def test_a_server_that_cannot_do_it_is_refused(server, tmp_path, says, settings, message):
    server.says |= says
    with pytest.raises(ValueError, match=message):
        make(server.url, tmp_path, tiny_model(), **settings)


def test_another_vocabulary_is_refused(server, tmp_path):
    class Other:
        def decode(self, ids):
            return TOKENIZER.decode(list(reversed(ids)))

    server.tokenizer = Other()
    with pytest.raises(ValueError, match="vllm_url: expected the student's vocabulary"):
        make(server.url, tmp_path, tiny_model())


def test_lora_needs_a_server_with_adapters(server, tmp_path):
    server.says["lora"] = False
    student = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="--enable-lora"):
        make(server.url, tmp_path, student, vllm_sync="lora")


def test_a_server_that_is_not_there_is_named_with_the_command_that_starts_it(server, tmp_path):
    server.close()
    with pytest.raises(EngineError, match=r"(?s)not there.*VLLM_SERVER_DEV_MODE=1 .*--enable-scale-out"):
        make(server.url, tmp_path, tiny_model())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm_sync": "ipc"}, "vllm_sync: expected one of disk, nccl, lora"),
        ({"rollout_stall_seconds": 0}, "rollout_stall_seconds: expected"),
        ({"vllm_call_seconds": 0}, "vllm_call_seconds: expected"),
        ({"vllm_concurrency": 0}, "vllm_concurrency: expected at least 1"),
        ({"vllm_server_args": "--x"}, "vllm_server_args: expected nothing without vllm_start"),
        ({"vllm_master": "host"}, "vllm_master: expected host:port"),
        *(
            ({"vllm_start": True, "vllm_server_args": words}, f"vllm_server_args: expected {told}")
            for words, told in (
                ("--host 0.0.0.0", "no --host, .*--vllm-public"),
                ("--dtype float32 --host=::", "no --host"),
                ("--hos 0.0.0.0 --api-key k", "no --host"),
                ("--uds /tmp/socket", "no --uds"),
                ("--config file.yaml", "no --config"),
                ("--port 1", "no --port"),
                ("--api-key", "one key"),
                ("--api-key one two", "one key"),
                ("--api-key one --api_key=two", "`--api-key` once, got it 2 times"),
                ("--dtype 'float32", "arguments as a shell takes them"),
            )
        ),
        (
            {"vllm_start": True, "vllm_public": True, "vllm_server_args": "--host 0.0.0.0"},
            "vllm_server_args: expected `--api-key` beside --host",
        ),
    ],
)
def test_options_out_of_range(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, rollouts="vllm-server", **settings)


def test_an_engine_is_a_module_and_a_line_in_the_table(tmp_path, monkeypatch):
    own = ModuleType("own_engine")
    own.make = lambda config, student, tokenizer, vocabulary: HFEngine(student, vocabulary)
    monkeypatch.setitem(sys.modules, "own_engine", own)
    monkeypatch.setitem(ENGINES, "own", Kind("own_engine", "a test"))
    trainer = tiny_trainer(tmp_path, rollouts="own", max_steps=1)
    trainer.train()
    assert trainer.engine.version == 0
    with pytest.raises(ValueError, match="expected one of hf, vllm, vllm-server, own; got 'other'"):
        tiny_config(tmp_path, rollouts="other")
