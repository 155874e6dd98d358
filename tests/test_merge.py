"""`opsd merge`: adapters and the model below become one model in a new folder."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from driver_tiny import TOKENIZER, tiny_model
from opsd_train.commands.main import app
from opsd_train.loading import load, with_lora

IDS = torch.tensor([[3, 4, 5, 6, 7]])


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A run folder with adapters that change the logits, and these logits."""
    tiny_model().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    model = with_lora(load(str(tmp_path / "base"))[0], 4, 8.0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "run.json").write_text("{}")
    with torch.no_grad():
        return tmp_path / "run", model.eval()(IDS).logits


def merge(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["merge", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("inside", ["", "model"])
def test_a_merged_model_has_the_logits_of_its_parts(
    adapter: tuple[Path, torch.Tensor], tmp_path: Path, inside: str
) -> None:
    run, expected = adapter
    code, output = merge(run / inside, "--out", tmp_path / "merged")
    assert (code, output) == (0, f"written: {tmp_path / 'merged'}\n")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        found = model(IDS).logits
        below = load(str(tmp_path / "base"))[0](IDS).logits
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= 1e-5 * scale
    assert (below - expected).abs().max() > 0.1 * scale
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_nothing_is_replaced_and_nothing_half_written_stays(
    adapter: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = adapter
    (tmp_path / "full").mkdir()
    code, output = merge(run, "--out", tmp_path / "full")
    assert (code, output) == (
        2,
        f"error: out: expected a folder that is not there yet, got {tmp_path / 'full'}\n",
    )

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("opsd_train.loading.write_student", full)
    assert merge(run, "--out", tmp_path / "new")[0] == 2
    assert {one.name for one in tmp_path.iterdir()} == {"base", "run", "full"}


def test_a_model_without_adapters_is_refused(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    code, output = merge(tmp_path / "base", "--out", tmp_path / "new")
    assert code == 2
    assert output == f"error: model: expected adapters at '{tmp_path / 'base'}', got a model without any\n"
    assert not (tmp_path / "new").exists()
