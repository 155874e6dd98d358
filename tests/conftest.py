"""What every test of the engine runs under."""

import os
import secrets
from collections.abc import Iterator

import pytest
import torch

# Triton reads this once, when it is first imported: kernels run in its interpreter, on a CPU.
os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    """What fresh random cases are drawn by."""
    parser.addoption("--fuzz-seed", type=int, help="of the fresh random cases; another one in each run")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """One seed for all of Hypothesis, before its plugin reads it; pytest-xdist hands it to its workers."""
    if config.option.fuzz_seed is None:
        config.option.fuzz_seed = secrets.randbelow(2**32)
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = config.option.fuzz_seed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How to draw the same random cases again."""
    line = f"python -m pytest --fuzz-seed {config.option.fuzz_seed}"
    terminalreporter.write_line(f"fresh random cases: repeat with {line}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: one that began last would leave the other processes idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


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
