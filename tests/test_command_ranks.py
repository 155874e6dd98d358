"""`torchrun ... -m opsd_train train` under FSDP2: a signal stops both processes, and the run goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import psutil

from driver_tiny import ROWS, TOKENIZER, tiny_model
from opsd_train.safety import folders
from opsd_train.watch.completions import kept

HERE = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
WORDS = ["--student-template", "{problem}", "--teacher-template", "{solution};{problem}"]
ALWAYS = [
    *("--max-completion-length", "4", "--per-device-train-batch-size", "2", "--lora-rank", "2"),
    *("--logging-steps", "1", "--eval-steps", "1000", "--save-strategy", "steps", "--save-steps", "1000"),
    *("--save-completions-every", "1", "--use-cpu", "true", "--fsdp", "true", "--fsdp-config", "fsdp.json"),
]


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    """The command, in a folder that has model, rows and fsdp.json."""
    paths = [str(HERE.parent), str(HERE.parent / "python"), os.environ.get("PYTHONPATH", "")]
    what = ["--model", "model", "--data", "rows.jsonl", "--eval-data", "rows.jsonl", "--out", "run"]
    return subprocess.Popen(
        [*LAUNCH, "-m", "opsd_train", "train", *what, *WORDS, *ALWAYS, *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def steps(run: Path) -> list[int]:
    """Those that metrics were written of."""
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []


def test_sharded_run_stops_all_ranks_and_goes_on(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = {"version": 2, "cpu_ram_efficient_loading": False}
    (tmp_path / "fsdp.json").write_text(json.dumps(config))
    run = tmp_path / "run"
    launcher = start(tmp_path, "--max-steps", "10000")
    try:
        end = time.monotonic() + 300
        while len(steps(run)) < 2 and launcher.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        ranks = psutil.Process(launcher.pid).children()
        ranks[-1].send_signal(signal.SIGTERM)  # one of the two hears of it
        error = launcher.communicate(timeout=60)[1]
    finally:
        launcher.kill()
    (checkpoint,) = run.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert error.count(f"ended: stopped by SIGTERM after step {step}, which run/{checkpoint.name} holds") == 2
    assert "exitcode  : 143" in error  # torchrun may end the other one in the middle of its goodbye
    assert not any(rank.is_running() for rank in ranks)
    assert (folders.read_marker(checkpoint) or {})["processes"] == 2
    resumed = start(tmp_path, "--max-steps", str(step + 1), "--resume-from-checkpoint", "last")
    try:
        error = resumed.communicate(timeout=300)[1]
    finally:
        resumed.kill()
    assert resumed.returncode == 0, error[-3000:]
    assert steps(run) == list(range(1, step + 2))
    found = json.loads((run / "evaluations.json").read_text())
    assert [one["step"] for one in found] == [0, step + 1]
    assert (run / "model" / "adapter_model.safetensors").is_file()
    assert len(kept(run)) == step + 1
    for path in kept(run):  # two rows of each process, none of them twice
        assert pandas.read_parquet(path)["where"].nunique() == 4
    sharded = json.loads((run / "run.json").read_text())["config"]["fsdp_config"]
    assert sharded["version"] == 2
