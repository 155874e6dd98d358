"""Where a run hands its weights to a server: of no other run, with nothing left of runs that were killed."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from driver_tiny import TOKENIZER, tiny_model
from fake_vllm_server import FakeServer
from opsd_train.engines.base import EngineError
from opsd_train.engines.launch import ChildServer
from opsd_train.engines.place import place_of
from opsd_train.run_folder import check_output
from server_engines import make

KILLED = """
import os, signal
from pathlib import Path
from opsd_train.engines.place import place_of
with place_of("dead", Path({shared!r})) as own:
    (own / "dead-3.partial").mkdir()
    (own / "dead-3.partial" / "model.safetensors").write_bytes(bytes(100))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer(tiny_model(9, tie_word_embeddings=False), TOKENIZER)
    yield fake
    fake.close()


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    assert subprocess.run([sys.executable, "-c", KILLED.format(shared=str(shared))]).returncode == -9
    (shared / "mine").mkdir()
    assert (shared / "dead" / "dead-3.partial" / "model.safetensors").is_file()
    with place_of("one", shared) as one:
        assert names(shared) == {"mine", "one"}
        with place_of("other", shared) as other:  # a run beside it
            assert one.is_dir()
            assert other == shared / "other"
        assert names(shared) == {"mine", "one"}
    assert names(shared) == {"mine"}


def test_an_empty_shared_folder_goes_with_the_last_run(tmp_path: Path) -> None:
    with place_of("one", tmp_path / "shared"):
        pass
    assert not names(tmp_path)


def test_two_runs_of_the_same_configuration_have_versions_of_their_own(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        engine = make(server.url, Path("opsd-run"), tiny_model(), seed=3)
        engine.follow(0)
        tags.append(engine.tag)
        engine.close()
    assert tags[0] != tags[1]
    assert all(len(tag) == len("0123456789abcdef-0") and tag.endswith("-0") for tag in tags)


def test_the_name_of_a_run_takes_no_number_of_the_seeded_ones(server: FakeServer, tmp_path: Path) -> None:
    import torch

    student = tiny_model()
    before = torch.get_rng_state()
    make(server.url, tmp_path, student).close()
    assert torch.equal(torch.get_rng_state(), before)


def failing(tmp_path: Path, url: str) -> None:
    """A server that does not start, since its interpreter has no such module."""
    make(url, tmp_path, tiny_model(), vllm_start=True, rollout_start_seconds=60)


def test_a_start_that_failed_leaves_its_log_alone_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeServer(tiny_model(), TOKENIZER)  # for a port that is free
    server.close()
    monkeypatch.setattr("opsd_train.engines.launch.MODULE", "no_such_module")
    for _ in range(2):
        check_output(tmp_path, "error")
        with pytest.raises(EngineError, match=r"(?s)ended with 1 at its start: .*no_such_module"):
            failing(tmp_path, server.url)
        assert names(tmp_path) == {"vllm-server.log"}


def test_a_server_that_cannot_be_started_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeServer(tiny_model(), TOKENIZER)
    server.close()

    def refuse(*_: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(ChildServer, "__init__", refuse)
    with pytest.raises(OSError, match="no more processes"):
        failing(tmp_path, server.url)
    assert not names(tmp_path)


def test_a_folder_with_what_a_killed_start_left_can_be_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "vllm-sync" / "0123" / "start").mkdir(parents=True)
    (tmp_path / "vllm-server.log").touch()
    check_output(tmp_path, "error")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"expected an empty folder or a run, but .* thesis.tex"):
        check_output(tmp_path, "error")
