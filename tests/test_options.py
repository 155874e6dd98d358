"""Options are checked at the start, whatever they concern."""

from dataclasses import fields
from pathlib import Path

import pytest

from driver_tiny import tiny_config
from opsd_train.config import OPSDConfig
from opsd_train.run_options import RunOptions

FLOATS = [one.name for one in fields(OPSDConfig) if "float" in str(one.type) and "list" not in str(one.type)]


def test_there_are_options_with_numbers() -> None:
    assert {"learning_rate", "temperature", "ema_decay", "entry_clip", "adam_epsilon"} <= set(FLOATS)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("name", FLOATS)
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected .*"):
        tiny_config(tmp_path, **{name: float(value)})


@pytest.mark.parametrize("name", ["lora_alpha", "lora_dropout"])
def test_so_is_one_of_the_model_s(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected a finite number, got inf"):
        RunOptions(model="m", data="d", **{name: float("inf")})


@pytest.mark.parametrize("value", ['{"clip": Infinity}', {"clip": float("nan")}])
def test_so_is_one_in_json(tmp_path: Path, value: str | dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"^private: expected a"):
        tiny_config(tmp_path, private=value)


@pytest.mark.parametrize("path", ["no_such_module:judge", "json:no_such_function"])
def test_a_verifier_is_looked_for_without_a_method_too(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match=f"^verifier: expected a function at '{path}'"):
        tiny_config(tmp_path, verifier=path)
