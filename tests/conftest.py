"""What every test of the engine runs under."""

import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads this once, when it is first imported: kernels run in its interpreter, on a CPU.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _engine_conditions(request: pytest.FixtureRequest) -> Iterator[None]:
    """For the engine and its kernels: one thread, and memory from `torch.empty` is full of NaN.

    PyTorch poisons uninitialised memory in its deterministic mode, so a buffer or accumulator that is read
    before it is written shows.
    """
    if not request.module.__name__.startswith(("test_engine", "test_triton")):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
