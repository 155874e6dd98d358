"""A vLLM server as a child of the run, which it never outlives."""

import os
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from opsd_train.engines import keeper
from opsd_train.engines.base import EngineError
from opsd_train.engines.client import ServerClient
from opsd_train.engines.server_args import ServerArguments
from opsd_train.redaction import redact, redacted_url
from opsd_train.run_folder import SERVER_LOG

MODULE = "vllm.entrypoints.openai.api_server"
TAIL = 2000  # characters of the log that an error shows
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM knows
FLAGS = {
    "nccl": ["--weight-transfer-config", '{"backend":"nccl"}'],
    "disk": [],
    "lora": ["--enable-lora", "--max-loras", "2"],
}


@dataclass(frozen=True)
class Launch:
    """How the server is started.

    Args:
        url: where it listens, on this machine.
        model: folder or hub id.
        sync: how it gets weights, see `sync.py`.
        arguments: further ones of the server.
        python: an interpreter that has vLLM.
        log: file that gets what the server prints.
        rank: of the adapters, with `lora`.
    """

    url: str
    model: str
    sync: str = "disk"
    arguments: ServerArguments = field(default_factory=ServerArguments)
    python: str = sys.executable
    log: Path = field(default=Path(SERVER_LOG))
    rank: int = 16

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.hostname not in ("127.0.0.1", "localhost") or parts.port is None:
            raise ValueError(
                f"vllm_url: expected http://127.0.0.1:PORT for a server that the run starts; got "
                f"{redacted_url(self.url)!r}"
            )

    @property
    def command(self) -> list[str]:
        """What is run; `environment` goes with it."""
        port = str(urlsplit(self.url).port)
        own = ["--model", self.model, "--host", "127.0.0.1", "--port", port, "--enable-scale-out"]
        rank = []
        if self.sync == "lora":
            rank = ["--max-lora-rank", str(next(one for one in RANKS if one >= self.rank))]
        return [self.python, "-m", MODULE, *own, *FLAGS[self.sync], *rank, *self.arguments.words]

    @property
    def environment(self) -> dict[str, str]:
        """The switches of the routes that weights arrive by, and the key."""
        switches = {"VLLM_SERVER_DEV_MODE": "1"}
        if self.arguments.api_key is not None:  # not an argument, which lists of processes and the log show
            switches["VLLM_API_KEY"] = self.arguments.api_key
        return switches | ({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if self.sync == "lora" else {})

    def __str__(self) -> str:
        """A line for a shell, without the key."""
        switches = [f"{name}={value}" for name, value in self.environment.items()]
        return redact(" ".join([*switches, shlex.join(self.command)]))


class ChildServer:
    """A server that was started, and ends with this process in whatever way it ends.

    Args:
        launch: how.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        with launch.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, keeper.__file__, *launch.command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **launch.environment},
                start_new_session=True,
            )

    def wait(self, client: ServerClient, seconds: float) -> None:
        """Until it is healthy; EngineError if it ends before, or is not after so many seconds."""
        end = time.monotonic() + seconds
        while client.healthy(2.0) is not None:
            if self.process.poll() is not None:
                raise EngineError(
                    f"vLLM server: ended with {self.process.returncode} at its start: {self.said()}"
                )
            if time.monotonic() > end:
                self.close()
                raise EngineError(f"vLLM server: not there after {seconds:.0f} s: {self.said()}")
            time.sleep(0.5)

    def said(self) -> str:
        """Where its log is, and how it ends."""
        text = self.launch.log.read_text(errors="replace")
        return f"{self.launch.log} ends with\n{text[-TAIL:]}"

    def close(self) -> None:
        """End it, and wait until it is gone."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(2 * keeper.GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
