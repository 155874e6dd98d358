"""The driver starts without the packages that only some runs need."""

import subprocess
import sys

WITHOUT = """
import importlib.util, sys
missing = {"deepspeed", "vllm", "reasoning_gym", "tensorboard", "wandb", "trackio", "triton"}
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in missing else find(name, *rest)
sys.modules |= dict.fromkeys(missing)
import opsd_train.commands.main, opsd_train.evaluation.run, opsd_train.train
print("started")
"""


def test_the_driver_starts_without_optional_packages() -> None:
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=300, check=False
    )
    assert found.stdout == "started\n", found.stderr
