"""Rollouts by a real vLLM server on a CPU, which the tests start: the demo's model, in fp32."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd_train.config import OPSDConfig
from opsd_train.engines.base import EngineError
from opsd_train.engines.patience import Patience
from opsd_train.engines.server import make as make_server_engine
from opsd_train.rollouts import Sampling, Vocabulary, generate
from opsd_train.teachers.served import Scorer, ServedRule
from server_engines import DEMO, Command

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

SERVER = (
    "--dtype float32 --enforce-eager --max-model-len 64 --max-logprobs -1 "
    "--enable-lora --max-loras 2 --max-lora-rank 8"
)
PROMPTS = [[2, 5, 6, 14, 7, 15, 3], [2, 9, 14, 8, 15, 3], [2, 12, 12, 14, 11, 15, 3]]
GREEDY = Sampling(0.0, 1.0, 0, 16)
SAMPLED = Sampling(0.8, 0.9, 20, 16)


def processes(group):
    """What runs in a group of processes."""
    lines = subprocess.run(["ps", "-eww", "-o", "pid,pgid,stat,args"], capture_output=True, text=True).stdout
    rows = [line.split(None, 3) for line in lines.splitlines()[1:]]
    return {int(pid): args for pid, own, stat, args in rows if int(own) == group and stat[0] != "Z"}


def move(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * parameter.std().clamp(min=0.02) * torch.randn_like(parameter))


def differences(model, prompts, written):
    found = []
    for prompt, one in zip(prompts, written, strict=True):
        with torch.no_grad():
            z = model(input_ids=torch.tensor([[*prompt, *one.tokens]])).logits[0].log_softmax(-1)
        own = z[len(prompt) - 1 : -1].gather(-1, torch.tensor(one.tokens)[:, None])[:, 0]
        found += (own - torch.tensor(one.logprobs)).abs().tolist()
    return found


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """The demo's model; vLLM's server encodes texts, so the tokenizer has to know what an unknown word is."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    shutil.copytree(DEMO, folder)
    words = json.loads((folder / "tokenizer.json").read_text())
    words["model"]["unk_token"] = next(iter(words["model"]["vocab"]))
    (folder / "tokenizer.json").write_text(json.dumps(words))
    return folder


@pytest.fixture(scope="module")
def engine(model_folder, tmp_path_factory):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    out = tmp_path_factory.mktemp("run")
    config = OPSDConfig(
        output_dir=str(out),
        use_cpu=True,
        rollouts="vllm-server",
        vllm_start=True,
        vllm_url=f"http://127.0.0.1:{port}",
        vllm_server_args=SERVER,
    )
    switches = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in switches.items():
            patch.setenv(name, value)
        student = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        made = make_server_engine(config, student, tokenizer, Vocabulary.of(student, tokenizer))
    made.config, made.tokenizer, made.student = config, tokenizer, student
    yield made
    made.close()


def test_after_a_transfer_the_server_writes_what_the_trainer_would(engine):
    student, seen = engine.student, []
    for version in (0, 1):
        engine.follow(version)
        greedy = engine.write(PROMPTS, GREEDY, (0, 0, version))
        assert [one.tokens for one in greedy] == generate(student, PROMPTS, GREEDY, engine.vocabulary, (0,))
        sampled = engine.write(PROMPTS * 16, SAMPLED, (0, 0, version))
        assert len({one.tokens for one in sampled}) > len(PROMPTS)
        assert max(differences(student, PROMPTS * 16, sampled)) < 1e-3
        assert {one.version for one in sampled} == {version}
        seen.append([one.tokens for one in greedy])
        move(student, seed=version)
    assert seen[0] != seen[1]
    assert engine.proof.difference < 1e-3
    assert len(engine.proof.compared) == 17  # the norms: on a CPU vLLM repacks everything else


def test_a_served_teacher_says_what_transformers_says(engine):
    engine.follow(2)
    scorer = Scorer(ServedRule(engine.client.url, 4, "vocabulary"), engine.tokenizer)
    tokens = [2, 5, 6, 14, 7, 15, 3, 8, 9, 1]
    wanted = np.array([[8, 1, 30], [9, 5, 2], [1, 0, 4]])
    (found,) = scorer.score([tokens], [wanted])
    with torch.no_grad():
        z = engine.student(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)[-4:-1]
    assert np.abs(found - z.gather(-1, torch.from_numpy(wanted)).numpy()).max() < 1e-3


def test_the_fast_way_to_ask_is_refused_where_vllm_has_it_not(engine):
    said = "(?s)--teacher-scores vocabulary .*answered 400: .*requires the V2 model runner"
    with pytest.raises(ValueError, match=said):
        Scorer(ServedRule(engine.client.url, 4, "ids"), engine.tokenizer)


@torch.no_grad()
def logprobs(student) -> torch.Tensor:
    """What a student says of the first prompt's next token."""
    return student(torch.tensor([PROMPTS[0]])).logits[0, -1].log_softmax(-1)


def test_adapters_are_loaded_by_version(engine, tmp_path):
    engine.follow(3)
    student = get_peft_model(
        engine.student, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    settings = {
        "vllm_sync": "lora",
        "vllm_start": False,
        "vllm_server_args": "",
        "vllm_sync_dir": str(tmp_path),
    }
    config = OPSDConfig(
        output_dir=str(tmp_path), use_cpu=True, rollouts="vllm-server", vllm_url=engine.client.url, **settings
    )
    own = make_server_engine(config, student, engine.tokenizer, engine.vocabulary)
    seen = []
    for version in (0, 1):
        own.follow(version)
        written = own.write(PROMPTS, GREEDY, (0,))
        assert max(differences(student, PROMPTS, written)) < 1e-3
        seen.append(logprobs(student))
        named = [one["id"] for one in engine.client.get("/v1/models")["data"]]
        assert named[1:] == [own.tag]
        move(student, seed=7)
    # The trainer's own have moved by far more than the server's differ from them.
    assert (seen[0] - seen[1]).abs().max() > 1e-2
    own.close()
    student.unload()


@pytest.fixture
def freeze(engine):
    """Stops vLLM's own process, not that which answers requests; it goes on when the test has ended."""
    stopped = []

    def stop():
        core = next(pid for pid, args in processes(server_of(engine)).items() if "EngineCore" in args)
        stopped.append(core)
        os.kill(core, signal.SIGSTOP)

    yield stop
    for core in stopped:
        os.kill(core, signal.SIGCONT)


def test_an_engine_that_stands_still_is_found(engine, freeze, monkeypatch):
    engine.follow(4)
    monkeypatch.setattr(engine.client, "patience", Patience(15))
    freeze()
    start = time.monotonic()
    with pytest.raises(EngineError, match="stalled"):
        engine.write(PROMPTS, GREEDY, (0,))
    assert time.monotonic() - start < 15


def test_an_engine_that_stands_still_in_a_transfer_is_found(engine, freeze, monkeypatch):
    engine.follow(5)
    monkeypatch.setattr(engine.client, "patience", Patience(15))
    post = engine.client.post

    def freezing(path, *given):
        if path == "/collective_rpc":
            freeze()
        return post(path, *given)

    monkeypatch.setattr(engine.client, "post", freezing)
    start = time.monotonic()
    with pytest.raises(EngineError, match="/collective_rpc: stalled, no answer within 14 s"):
        engine.follow(6)
    assert time.monotonic() - start < 15


def test_a_run_whose_server_is_killed_ends_and_can_be_resumed(engine, model_folder, tmp_path):
    engine.follow(7)  # it has recovered
    group = server_of(engine)
    assert len(processes(group)) > 1
    server = ["--rollouts=vllm-server", f"--vllm_url={engine.client.url}"]
    command = Command(tmp_path, *server, "--max_steps=10000", model=model_folder)
    try:
        command.until(2, 300)
        os.kill(group, signal.SIGKILL)
        assert command.ends(30) == 1
    finally:
        command.process.kill()
    assert "died" in command.message()
    engine.close()
    assert not processes(group)
    info = json.loads((command.out / "run.json").read_text())
    assert info["versions"]["vllm"] == vllm.__version__
    step = command.last_step()
    again = Command(tmp_path, f"--max_steps={step + 1}", "--resume_from_checkpoint=last", model=model_folder)
    assert again.ends(300) == 0, again.said.read_text()
    assert again.last_step() == step + 1


def server_of(engine):
    """The group of the server's processes."""
    return next(pid for pid, args in processes_of(engine).items() if "api_server" in args)


def processes_of(engine):
    """The children of the process that keeps the server."""
    found = subprocess.run(
        ["ps", "-ww", "-o", "pid,args", "--ppid", str(engine.child.process.pid)],
        capture_output=True,
        text=True,
    )
    return {int(line.split()[0]): line for line in found.stdout.splitlines()[1:]}
