"""Checkpoints of two processes: one folder, random numbers of each, and the same run bit for bit after it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opsd_train.safety import folders

HERE = Path(__file__).parent
CASES: dict[str, dict[str, Any]] = {
    "ddp": {"wrapper": "ddp", "lora": True, "teacher": "ema"},
    "fsdp": {"wrapper": "fsdp", "lora": False, "teacher": "live"},
    "fsdp_lora": {"wrapper": "fsdp", "lora": True},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    paths = [str(HERE), str(HERE.parent), str(HERE.parent / "python"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "checkpoint_worker.py"), str(out), json.dumps(CASES)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("case", CASES)
def test_run_of_two_processes_goes_on_bit_for_bit(two: Path, case: str) -> None:
    whole, resumed, before = (two / one for one in (case, f"{case}-resumed", f"{case}/checkpoint-3"))
    last = whole / "checkpoint-4"
    assert folders.what_is_wrong(last, digests=True) is None
    assert (folders.read_marker(last) or {})["processes"] == 2
    held = {path.name for path in last.glob("*.safetensors")}
    weights = "adapter_model.safetensors" if CASES[case]["lora"] else "model.safetensors"
    assert {"optimizer.safetensors", "rank-00000.safetensors", "rank-00001.safetensors", weights} <= held
    for name in held:
        assert (resumed / "checkpoint-4" / name).read_bytes() == (last / name).read_bytes(), name
    assert (last / weights).read_bytes() != (before / weights).read_bytes()
    assert (whole / "model" / weights).read_bytes() == (resumed / "model" / weights).read_bytes()
    checkpoints = [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert sorted(path.name for path in whole.iterdir()) == [*checkpoints, "model"]
