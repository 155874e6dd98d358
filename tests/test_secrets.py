"""Passwords and API keys: they reach the server, and no file, message or record."""

import base64
import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from driver_tiny import TOKENIZER, tiny_config, tiny_model, tiny_trainer
from fake_vllm_server import FakeServer, Handler
from opsd_train.commands import terminal
from opsd_train.commands.main import app
from opsd_train.demo.run import MODEL
from opsd_train.engines.base import EngineError
from opsd_train.engines.client import ServerClient
from opsd_train.engines.launch import Launch
from opsd_train.engines.patience import Patience
from opsd_train.engines.server_args import ServerArguments
from opsd_train.redaction import redact, redacted
from opsd_train.teachers.rule import TeacherRule
from opsd_train.teachers.served import ServedRule
from opsd_train.train import run

PASSWORD, KEY = "s3cret-pass", "s3cret-key"
URL = f"http://user:{PASSWORD}@127.0.0.1:9"
ARGUMENTS = f"--dtype float32 --api-key {KEY}"


def hidden(text: Any) -> bool:
    return PASSWORD not in str(text) and KEY not in str(text)


@pytest.mark.parametrize(
    "text",
    [
        URL,
        f"at {URL}/v1, /health: died",
        f"http://user:{PASSWORD}/with@sign@host:1",
        f"--vllm_url=user:{PASSWORD}@host:8000",
        ARGUMENTS,
        f"--api-key={KEY}",
        f"--vllm_server_args='--host ::1 --api_key {KEY}'",
        f"VLLM_API_KEY={KEY} python",
        f"{{'api_key': '{KEY}'}}",
    ],
)
def test_a_text_is_shown_without_them(text: str) -> None:
    assert hidden(redact(text))
    assert "***" in redact(text)
    assert hidden(redacted({"a": [text, 1], "b": {"c": (text,)}}))


def test_other_texts_stay() -> None:
    for text in ("{problem}\n\nWrite to a@b.c: 3@4", "http://127.0.0.1:8000/v1", "expected `--api-key` here"):
        assert redact(text) == text


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The Authorization of every request to the server."""
    found: list[str | None] = []
    parse = Handler.parse_request

    def note(handler: Handler) -> bool:
        sound = parse(handler)
        found.append(handler.headers["Authorization"])
        return sound

    monkeypatch.setattr(Handler, "parse_request", note)
    return found


def test_they_reach_the_server(asked: list[str | None]) -> None:
    server = FakeServer(tiny_model(9, tie_word_embeddings=False), TOKENIZER)
    try:
        pair = base64.b64encode(f"us er:{PASSWORD}".encode()).decode()
        given = server.url.replace("//", f"//us%20er:{PASSWORD}@")
        for client, sent in (
            (ServerClient(given, Patience(5.0)), f"Basic {pair}"),
            (ServerClient(server.url, Patience(5.0), KEY), f"Bearer {KEY}"),
            (ServerClient(server.url, Patience(5.0)), None),
        ):
            assert client.healthy(5.0) is None
            assert (client.url, asked[-1]) == (server.url, sent)
    finally:
        server.close()


@pytest.mark.parametrize(
    "url", [f"user:{PASSWORD}@host:1", f"http://u:{PASSWORD}@h:port", f"http://{PASSWORD}@"]
)
def test_a_wrong_url_is_told_without_them(url: str) -> None:
    with pytest.raises(ValueError, match="vllm_url: expected http://host:port") as caught:
        ServerClient(url)
    assert hidden(caught.value)


def test_what_fails_is_told_without_them(tmp_path: Path) -> None:
    assert hidden(ServerClient(URL, Patience(1.0)).healthy(1.0))
    with pytest.raises(EngineError) as caught:
        tiny_trainer(tmp_path, rollouts="vllm-server", vllm_url=URL)
    assert hidden(caught.value)
    with pytest.raises(ValueError, match="teacher_url: expected") as refused:
        tiny_config(tmp_path, teacher_url=URL)
    assert hidden(refused.value)
    with pytest.raises(ValueError, match="without vllm_start") as refused:
        tiny_config(tmp_path, vllm_server_args=ARGUMENTS)
    assert hidden(refused.value)
    assert hidden(TeacherRule("served", served=ServedRule(URL)))


def test_a_server_that_is_started_gets_the_key_where_nobody_reads_it(tmp_path: Path) -> None:
    launch = Launch("http://127.0.0.1:8000", "model", arguments=ServerArguments.of(ARGUMENTS))
    assert launch.environment["VLLM_API_KEY"] == KEY
    assert launch.command[-2:] == ["--dtype", "float32"]
    assert hidden(launch.command)
    assert hidden(launch)
    with pytest.raises(ValueError, match="vllm_url: expected") as caught:
        Launch(f"http://user:{PASSWORD}@elsewhere:1", "model")
    assert hidden(caught.value)


def test_no_file_of_a_run_holds_them(tmp_path: Path) -> None:
    """Not its record, its report, a checkpoint, or what trackers are told."""
    given: dict[str, Any] = {"vllm_url": URL, "vllm_start": True, "vllm_server_args": ARGUMENTS}
    given |= {"save_strategy": "steps", "save_steps": 1, "report_to": "tensorboard"}
    trainer = tiny_trainer(tmp_path, max_steps=1, rollouts_recorded=1, **given)
    assert (trainer.config.vllm_url, trainer.config.server_arguments.api_key) == (URL, KEY)
    said = io.StringIO()
    about = {"name": "n", "model": "m", "options": {"arguments": [f"--vllm_url={URL}"]}}
    assert run(trainer, about, Console(file=said)) == tmp_path / "report.html"
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) > 8
    for path, held in files.items():
        assert hidden(held.decode("latin-1")), path
    config = json.loads((tmp_path / "run.json").read_text())["config"]
    assert config["vllm_url"] == "http://***@127.0.0.1:9"
    assert config["vllm_server_args"] == "--dtype float32 --api-key ***"
    for shown in (said.getvalue(), trainer.config, repr(trainer.config), trainer.config.to_json_string()):
        assert hidden(shown)


def test_the_command_says_nothing_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"problem": "1+2=", "solution": "3"}\n')
    given = ["train", "--model", str(MODEL), "--data", str(rows), "--use-cpu", "--out", str(tmp_path / "run")]
    given += ["--rollouts", "vllm-server", "--vllm-url", URL]
    given += ["--student-template", "{problem}", "--teacher-template", "{solution};{problem}"]
    given += ["--max-completion-length", "4"]
    found = CliRunner().invoke(app, given)
    assert found.exit_code == 1, found.output
    assert "vllm_url: vLLM server at http://127.0.0.1:9, /health: died or is not there" in found.output
    assert hidden(found.output)
    monkeypatch.setattr(warnings, "formatwarning", terminal._as_line)
    assert hidden(warnings.formatwarning(UserWarning(f"no answer of {URL}"), UserWarning, "f", 1))
