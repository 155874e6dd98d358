"""SIGTERM while a run waits for others: a server's rollouts, a served teacher, a verifier."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from driver_tiny import TOKENIZER, tiny_model, tiny_prompts, tiny_trainer
from fake_vllm_server import FakeServer, Handler
from opsd_train.engines.client import ServerClient
from opsd_train.evaluation.verify import Verifier
from opsd_train.safety import stops

SOON = 5.0  # seconds in which a run leaves, though what it waits for takes 20


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer(tiny_model(9, tie_word_embeddings=False), TOKENIZER)
    yield fake
    fake.close()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes the server stream for 20 s, an event in every 50 ms, or write nothing for as long."""

    def begin() -> None:
        def stream(handler: Handler, body: Any) -> None:
            interrupt_soon()
            handler.close_connection = True
            handler.send_response(200)
            handler.end_headers()
            end = time.monotonic() + 20
            while time.monotonic() < end and not handler.fake.free.wait(0.05):
                handler.wfile.write(b'data: {"choices": []}\n\n' if body.get("stream") else b" ")
                handler.wfile.flush()

        monkeypatch.setattr(Handler, "generate", stream)
        monkeypatch.setitem(Handler._answer.__globals__["ROUTES"], "/inference/v1/generate", stream)

    return begin


def interrupt_soon() -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()


def test_rollouts_of_a_server_are_left(server: FakeServer, slow: Callable[[], None], tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, rollouts="vllm-server", vllm_url=server.url, max_steps=3)
    trainer.engine.follow(0)
    trainer.engine_behind = False
    slow()
    start = time.monotonic()
    with pytest.raises(stops.Stopped), stops.watched(trainer):
        trainer.train()
    assert time.monotonic() - start < SOON
    trainer.engine.close()


def test_a_served_teacher_is_left(server: FakeServer, slow: Callable[[], None], tmp_path: Path) -> None:
    settings = {"teacher": "served", "teacher_url": server.url, "teacher_served_top_k": 5}
    trainer = tiny_trainer(tmp_path, max_steps=3, **settings)
    slow()
    start = time.monotonic()
    with pytest.raises(stops.Stopped), stops.watched(trainer):
        trainer.train()
    assert time.monotonic() - start < SOON


def test_a_transfer_is_not_left(server: FakeServer, tmp_path: Path) -> None:
    """Ranks gather weights together: who left would leave the others waiting."""
    trainer = tiny_trainer(tmp_path, rollouts="vllm-server", vllm_url=server.url)
    with pytest.raises(stops.Stopped), stops.watched(trainer):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        trainer.engine.follow(0)
        assert trainer.engine.version == 0
        ServerClient(server.url).get("/health")
        stops.check()
    trainer.engine.close()


def test_a_verifier_is_left_between_two_rows(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    prompts = tiny_prompts(trainer.config)
    seen = []

    def slowly(completion: str, answer: str) -> float:
        seen.append(completion)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return 1.0

    with pytest.raises(stops.Stopped), stops.watched(trainer):
        Verifier("slowly", slowly).rewards(["a"] * len(prompts), prompts)
    assert len(seen) == 2
