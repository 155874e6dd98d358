"""How long a call to a server may take, and that none takes longer."""

import sys
import time

import pytest

from driver_tiny import TOKENIZER, tiny_model
from fake_vllm_server import FakeServer
from opsd_train.engines import patience
from opsd_train.engines.base import EngineError
from opsd_train.engines.client import ServerClient
from opsd_train.engines.patience import Patience
from server_engines import make


@pytest.fixture
def server():
    fake = FakeServer(tiny_model(9, tie_word_embeddings=False), TOKENIZER)
    yield fake
    fake.close()


def test_a_transfer_has_the_time_that_its_bytes_take(server, tmp_path, monkeypatch):
    student = tiny_model()
    engine = make(server.url, tmp_path, student, rollout_stall_seconds=2.0)
    assert engine.sync.size == sum(one.nbytes for one in student.parameters()) > 10_000
    rpc = sys.modules["fake_vllm_server"].ROUTES["/collective_rpc"]

    def slowly(*given):
        time.sleep(2.5)
        return rpc(*given)

    monkeypatch.setitem(sys.modules["fake_vllm_server"].ROUTES, "/collective_rpc", slowly)
    monkeypatch.setattr(patience, "RATE", engine.sync.size / 4)
    engine.follow(0)
    assert engine.version == 0
    monkeypatch.setattr(patience, "RATE", engine.sync.size / 0.1)
    with pytest.raises(EngineError, match="/collective_rpc: stalled"):
        engine.follow(1)


def test_how_long_a_call_may_take():
    usual = Patience()
    assert usual.answer == 27
    assert usual.moving(540e6) == pytest.approx(32.4)  # 135 M parameters in fp32
    assert usual.moving(140e9) == pytest.approx(1427)  # 70 G in bf16
    assert usual.reading(64, 0) < 30
    assert usual.reading(10**9, 10**12) == usual.request == 600
    told = Patience(30, 7)
    assert (told.answer, told.moving(140e9), told.request) == (27, 7, 7)


def test_every_call_ends_though_a_server_answers_nothing(server):
    server.fault = "hang"
    client = ServerClient(server.url, Patience(1.0))
    for call in (lambda: client.get("/health"), lambda: client.post("/reset_prefix_cache")):
        start = time.monotonic()
        with pytest.raises(EngineError, match="stalled"):
            call()
        assert time.monotonic() - start < 2
