"""Quantised weights and ways of attention: what reaches `from_pretrained`, and what is refused before it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from driver_tiny import TOKENIZER, tiny_model
from opsd_train import quantized
from opsd_train.adapters import Wanted
from opsd_train.loading import Source, load_source, load_student
from opsd_train.quantized import check_quantized
from opsd_train.run_options import RunOptions


@pytest.fixture
def model(tmp_path: Path) -> str:
    tiny_model().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `from_pretrained` was given; with stand-ins for bitsandbytes and a GPU."""
    found: dict[str, Any] = {}
    load_as_it_is = AutoModelForCausalLM.from_pretrained

    def spy(name: str, **given: Any) -> Any:
        found.update(given)
        given.pop("quantization_config", None)
        return load_as_it_is(name, **given)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    monkeypatch.setattr(quantized, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(quantized, "is_available", lambda: True)
    return found


@pytest.mark.parametrize("bits", [4, 8])
def test_the_configuration_of_quantised_weights_is_passed_on(
    model: str, told: dict[str, Any], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[torch.nn.Module] = []
    own = quantized.prepare_model_for_kbit_training
    monkeypatch.setattr(
        quantized,
        "prepare_model_for_kbit_training",
        lambda found, **how: prepared.append(found) or own(found, **how),
    )
    options = RunOptions(model=model, data="", dtype="bfloat16", lora_rank=2, **{f"load_in_{bits}bit": True})
    student, _ = load_student(options.source(), options.lora())
    config = told["quantization_config"]
    assert (config.load_in_4bit, config.load_in_8bit) == (bits == 4, bits == 8)
    if bits == 4:
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert told["dtype"] == torch.bfloat16
    assert len(prepared) == 1
    assert {name for name, one in student.named_parameters() if one.requires_grad} == {
        name for name, _ in student.named_parameters() if "lora_" in name
    }


def test_quantised_weights_need_adapters_to_train(model: str, told: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="load_in_4bit: expected lora_rank with it"):
        load_student(Source(model, bits=4), Wanted())
    with pytest.raises(ValueError, match="load_in_8bit: expected for training alone"):
        load_source(Source(model, bits=8))


@pytest.mark.parametrize(("spec", "message"), [(None, "the package bitsandbytes"), (1, "a GPU, found none")])
def test_what_is_missing_is_named(model: str, spec: Any, message: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda name: spec)
    monkeypatch.setattr(quantized, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"load_in_4bit: expected {message}"):
        load_student(Source(model, bits=4), Wanted(2))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("teacher", "ema"),
        ("teacher", "sync"),
        ("rollouts", "vllm"),
        ("fsdp", True),
        ("deepspeed", "zero.json"),
    ],
)
def test_options_that_quantised_weights_do_not_go_with(name: str, value: Any) -> None:
    given = {"teacher": "initial", "rollouts": "hf", "fsdp": [], "deepspeed": None}
    check_quantized(4, SimpleNamespace(**given))
    check_quantized(0, SimpleNamespace(**(given | {name: value})))
    with pytest.raises(ValueError, match=f"{name}: expected .*, with load_in_8bit; got {value!r}"):
        check_quantized(8, SimpleNamespace(**(given | {name: value})))


@pytest.mark.parametrize(
    "given",
    [{"load_in_4bit": True, "load_in_8bit": True}, {"load_in_4bit": True, "gguf_file": "a"},
     {"load_in_8bit": True, "gguf_file": "a"}],
)  # fmt: skip
def test_ways_to_load_that_exclude_each_other(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"load_in_.bit: expected "):
        RunOptions(model="m", data="d", **given)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_is_the_one_that_was_asked_for(model: str, told: dict[str, Any], name: str) -> None:
    options = RunOptions(model=model, data="", attn_implementation=name)
    for found, _ in (load_source(options.source()), load_student(options.source(), options.lora())):
        assert found.config._attn_implementation == name
    load_source(Source(model))
    told.clear()
    load_source(Source(model))
    assert "attn_implementation" not in told


def test_other_names_of_attention_are_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"attn_implementation: expected one of eager, .*sdpa.*; got 'fast'"):
        Source("m", attention="fast")
