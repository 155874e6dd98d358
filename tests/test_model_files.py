"""Broken files of a model: one line that names the file, wherever a model is loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from driver_tiny import ROWS, TOKENIZER, tiny_model
from opsd_train.commands.main import app
from opsd_train.loading import load, load_reader, with_lora


def configured(**settings: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def written(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text) and None
    )


def truncated(folder: Path) -> None:
    held = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(held[: len(held) // 2])


def misheaded(folder: Path) -> None:
    held = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(held[:8] + b"x" * 40 + held[48:])


def in_parts(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    parts = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))


CASES = {
    "truncated": (truncated, "whole safetensors in {}/model.safetensors"),
    "empty": (written("model.safetensors", b""), "whole safetensors in {}/model.safetensors"),
    "misheaded": (misheaded, "whole safetensors in {}/model.safetensors"),
    "a_part_is_missing": (
        in_parts,
        "model-00002-of-00002.safetensors, which {}/model.safetensors",
    ),
    "index_null": (
        written("model.safetensors.index.json", "null"),
        "an object in {}/model.safetensors",
    ),
    "config_null": (written("config.json", "null"), "an object in {}/config.json, got null"),
    "config_list": (written("config.json", "[1]"), "an object in {}/config.json, got [1]"),
    "config_cut": (written("config.json", '{"model_type"'), "JSON in {}/config.json"),
    "config_of_nothing": (written("config.json", "{}"), "a causal language model at '{}' (config.json)"),
    "config_of_words": (configured(hidden_size="big"), "a causal language model at '{}' (config.json)"),
    "generation_null": (written("generation_config.json", "null"), "an object in {}/generation_config.json"),
    "wider": (configured(hidden_size=64), "(32, 32) there and (32, 64) by the configuration"),
    "more_tokens": (configured(vocab_size=64), "(32, 32) there and (64, 32) by the configuration"),
    "more_layers": (configured(num_hidden_layers=3), "of its config.json; 9 are missing, model.layers.2."),
    "fewer_layers": (configured(num_hidden_layers=1), "9 are of further layers, model.layers.1."),
    "tokenizer_cut": (written("tokenizer.json", "{"), "JSON in {}/tokenizer.json"),
    "tokenizer_null": (written("tokenizer.json", "null"), "an object in {}/tokenizer.json, got null"),
    "tokenizer_of_nothing": (
        written("tokenizer.json", '{"model": {}}'),
        "a tokenizer at '{}' (tokenizer.json)",
    ),
    "bytes": (written("tokenizer_config.json", b"\xff\xfe"), "JSON in {}/tokenizer_config.json"),
}


def saved(folder: Path) -> Path:
    tiny_model(kind=LlamaForCausalLM).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_broken_file_is_named(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    break_it, message = CASES[case]
    break_it(saved(tmp_path))
    capfd.readouterr()
    for loads in (load, load_reader):
        with pytest.raises(ValueError, match=r"^model: expected ") as raised:
            loads(str(tmp_path))
        assert message.format(tmp_path) in str(raised.value)
        assert "\n" not in str(raised.value)
    assert "report" not in capfd.readouterr().err  # transformers' table of what does not fit


def test_a_whole_model_is_read_and_what_it_does_not_use_is_told(tmp_path: Path) -> None:
    model = saved(tmp_path)
    load_reader(str(model))
    state = tiny_model(kind=LlamaForCausalLM).state_dict()
    state["extra.weight"] = state["model.norm.weight"].clone()
    tiny_model(kind=LlamaForCausalLM).save_pretrained(model, state_dict=state)
    with pytest.warns(UserWarning, match=r"1 weights are not used, extra\.weight"):
        load(str(model))


ADAPTERS = {
    "cut": ("adapter_config.json", b"{", "JSON in {}/adapter_config.json"),
    "null": ("adapter_config.json", b"null", "an object in {}/adapter_config.json"),
    "no_base": (
        "adapter_config.json",
        b'{"peft_type": "LORA"}',
        "base_model_name_or_path in {}/",
    ),
    "weights": ("adapter_model.safetensors", b"", "whole safetensors in {}/adapter_model.safetensors"),
}


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("command", ["train", "eval", "check"])
def test_a_broken_adapter_is_one_line(case: str, command: str, tmp_path: Path) -> None:
    name, content, message = ADAPTERS[case]
    base, adapter, rows = saved(tmp_path / "base"), tmp_path / "adapter", tmp_path / "rows.jsonl"
    with_lora(load(str(base))[0], 2).save_pretrained(adapter)
    TOKENIZER.save_pretrained(adapter)
    (adapter / name).write_bytes(content)
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = [rows] if command == "check" else ["--data", rows, "--use_cpu", "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [command, *map(str, words), "--model", str(adapter)])
    assert result.exit_code == 2, result.output
    said = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert f"model: expected {message.format(adapter)}" in said[0]
