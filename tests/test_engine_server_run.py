"""A server that the run starts, and runs whose server fails; the package vllm is a fake one."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from driver_tiny import TOKENIZER, tiny_model
from fake_vllm_server import FakeServer
from opsd_train.commands.main import app
from opsd_train.rollouts import generate
from server_engines import DEMO, GREEDY, PROMPTS, Command, make

PACKAGE = "import runpy, sys; sys.argv[0] = {fake!r}; runpy.run_path({fake!r}, run_name='__main__')"


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "package" / "vllm" / "entrypoints" / "openai"
    folder.mkdir(parents=True)
    (folder / "api_server.py").write_text(
        PACKAGE.format(fake=str(Path(__file__).with_name("fake_vllm_server.py")))
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "package"), prepend=":")
    server = FakeServer(tiny_model(), TOKENIZER)  # for a port that is free
    server.close()
    return server.url


def commands() -> str:
    return subprocess.run(["ps", "-eww", "-o", "pid,args"], capture_output=True, text=True, check=True).stdout


def gone(what: str, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while what in commands():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def start(package, tmp_path):
    student = tiny_model()
    return make(package, tmp_path, student, vllm_start=True, rollout_stall_seconds=30.0), student


def test_a_server_that_the_run_starts_ends_with_close(package, tmp_path):
    engine, student = start(package, tmp_path)
    port = package.rpartition(":")[2]
    try:
        assert f"--port {port}" in commands()
        engine.follow(0)
        written = engine.write(PROMPTS, GREEDY, (0,))
        assert [one.tokens for one in written] == generate(student, PROMPTS, GREEDY, engine.vocabulary, (0,))
    finally:
        engine.close()
    assert gone(f"--port {port}", 0)
    engine.close()


RUN = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_engine_server_run import start
engine, _ = start({url!r}, Path({out!r}))
engine.follow(0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_server_that_the_run_starts_ends_though_the_run_is_killed(package, tmp_path):
    code = RUN.format(tests=str(Path(__file__).parent), url=package, out=str(tmp_path))
    found = subprocess.run([sys.executable, "-c", code], timeout=120)
    assert found.returncode == -9
    assert gone(f"--port {package.rpartition(':')[2]}", 15)


def test_a_run_whose_server_is_killed_ends_and_can_be_resumed(package, tmp_path):
    server = ["--rollouts=vllm-server", "--vllm_start=true", f"--vllm_url={package}"]
    command = Command(tmp_path, *server, "--max_steps=10000")
    try:
        command.until(2, 300)
        (killed,) = [one for one in command.started if "vllm.entrypoints" in one.cmdline()[2]]
        killed.kill()
        assert command.ends(30) == 1
    finally:
        command.process.kill()
    assert command.message().startswith(f"vLLM server at {package}, /")
    assert "died" in command.message()
    step = command.last_step()
    assert step >= 2
    again = Command(tmp_path, *server, f"--max_steps={step + 1}", "--resume_from_checkpoint=last")
    assert again.ends(300) == 0, again.said.read_text()
    assert again.last_step() == step + 1
    assert gone(f"--port {package.rpartition(':')[2]}", 0)


def test_a_run_without_its_server_ends_with_one_message(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1+2=", "teacher_prompt": "3;1+2="}))
    words = ["train", "--model", DEMO, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "run"]
    url = [
        "--use-cpu",
        "--max-completion-length",
        "8",
        "--rollouts",
        "vllm-server",
        "--vllm-url",
        "http://127.0.0.1:9",
    ]
    found = CliRunner().invoke(app, [str(word) for word in (*words, *url)])
    assert isinstance(found.exception, SystemExit)
    assert found.exit_code == 1
    assert "ended: vllm_url: vLLM server at http://127.0.0.1:9, /health: died or is not there" in found.output
