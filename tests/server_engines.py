"""Engines over a fake server, and `opsd train` as a process beside one."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

import opsd_train
from driver_tiny import ROWS, TOKENIZER, tiny_config
from opsd_train.engines.server import ServerEngine
from opsd_train.engines.server import make as make_server_engine
from opsd_train.rollouts import Sampling, Vocabulary
from opsd_train.safety import folders
from opsd_train.safety.checkpoints import complete

DEMO = Path(opsd_train.__file__).parent / "demo" / "model"
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
GREEDY = Sampling(0.0, 1.0, 0, 6)
STALL = 3.0  # seconds; 30 outside of tests


def make(url: str, folder: Path, student: torch.nn.Module, **settings) -> ServerEngine:
    given = {"vllm_url": url, "rollout_stall_seconds": STALL}
    config = tiny_config(folder, rollouts="vllm-server", **(given | settings))
    return make_server_engine(config, student, TOKENIZER, Vocabulary.of(student, TOKENIZER))


def move(student: torch.nn.Module, seed: int = 1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * parameter.std().clamp(min=0.5) * torch.randn_like(parameter))


class Command:
    """`opsd train` with the demo's model and a checkpoint after every step, in a session of its own.

    Args:
        folder: of what it reads and prints, and of the run.
        arguments: further ones.
    """

    def __init__(self, folder: Path, *arguments: str, model: Path = DEMO) -> None:
        self.out, self.said = folder / "run", folder / "said"
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        given = {
            "model": model, "data": rows, "out": self.out, "use_cpu": True, "save_strategy": "steps",
            "save_steps": 1, "save_total_limit": 3, "per_device_train_batch_size": 4, "logging_steps": 1,
            "max_completion_length": 4, "rollouts_recorded": 1, "student_template": "{problem}",
            "teacher_template": "{solution};{problem}",
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in given.items()]
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "opsd_train", "train", *words, *arguments],
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )
        self.started: set[psutil.Process] = set()

    def until(self, step: int, seconds: float) -> None:
        """Wait for a checkpoint of that step or a later one, and remember what runs by then."""
        end = time.monotonic() + seconds
        while not [one for one in complete(self.out) if int(one.name.split("-")[1]) >= step]:
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < end, self.said.read_text()
            time.sleep(0.1)
        self.started = {psutil.Process(self.process.pid)}
        self.started |= set(psutil.Process(self.process.pid).children(recursive=True))

    def ends(self, seconds: float) -> int:
        """Its exit status, within so many seconds; nothing that it started is left."""
        try:
            code = self.process.wait(seconds)
            psutil.wait_procs(self.started, timeout=2)
            left = [one for one in self.started if one.is_running() and one.status() != "zombie"]
            assert not left
            return code
        finally:
            self.process.kill()

    def message(self) -> str:
        """The one line that it ended with, and no traceback."""
        text = self.said.read_text()
        assert "Traceback" not in text
        assert text.count("ended: ") == 1
        (line,) = text.partition("ended: ")[2].splitlines()
        return line

    def last_step(self) -> int:
        """The step of its newest checkpoint, whose digests are right."""
        found = complete(self.out)[-1]
        assert folders.what_is_wrong(found, digests=True) is None
        return int(found.name.split("-")[1])
