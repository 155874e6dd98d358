"""Runs that begin with the adapters of an earlier one: they go on, and their initial teacher has them too."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file

from driver_tiny import ROWS, TOKENIZER, tiny_config, tiny_model
from opsd_train.adapters import Wanted
from opsd_train.loading import Source, load, load_student, with_lora
from opsd_train.run_options import RunOptions
from opsd_train.train import run, train
from opsd_train.trainer import OPSDTrainer
from opsd_train.watch.record import load_run

IDS = torch.tensor([[3, 4, 5, 6, 7]])
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """Adapters that change the logits, in a folder as a run writes it."""
    return adapted(base, tmp_path / "adapter", None)


def adapted(base: Path, folder: Path, targets: list[str] | None) -> Path:
    below, tokenizer = load(str(base))
    if targets is None:
        model = with_lora(below, 4, 8.0, 0.0)
    else:
        model = get_peft_model(below, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits  # type: ignore[no-any-return]


def on_adapters(base: Path, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(load(str(base))[0], str(adapter)))


def prepared(out: Path, model: Path, lora: dict | None = None, **settings: object) -> OPSDTrainer:
    rows = out.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = RunOptions(model=str(model), data=str(rows), **(lora or {}))
    return train(options, tiny_config(out, **settings), Console(quiet=True))


@pytest.mark.parametrize("rank", [0, 4])
def test_without_a_learning_rate_not_a_bit_changes(
    base: Path, adapter: Path, tmp_path: Path, rank: int
) -> None:
    given = on_adapters(base, adapter)
    assert (given - logits(load(str(base))[0])).abs().max() > 0.1
    trainer = prepared(tmp_path / "out", adapter, {"lora_rank": rank}, learning_rate=0.0, max_steps=1)
    trainer.train()
    assert torch.equal(logits(trainer.student), given)
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(on_adapters(base, tmp_path / "saved"), given)


def test_the_initial_teacher_has_the_adapters_and_keeps_them(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    given = on_adapters(base, adapter)
    trainer = prepared(tmp_path / "out", adapter, learning_rate=0.05)
    trainer.train()
    assert not torch.allclose(logits(trainer.student), given, atol=1e-2)
    with trainer.teacher.weights():
        assert torch.equal(logits(trainer.teacher.model), given)
    trained = {name for name, one in trainer.student.named_parameters() if one.requires_grad}
    assert trained
    assert all(".default." in name for name in trained)


def test_a_run_from_adapters_is_saved_evaluated_and_resumed_bit_for_bit(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    console = Console(quiet=True)
    kept = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    run(prepared(tmp_path / "whole", adapter, max_steps=3, **kept), {}, console)
    run(prepared(tmp_path / "cut", adapter, max_steps=2, **kept), {}, console)
    again = {"max_steps": 3, "resume_from_checkpoint": "last", **kept}
    run(prepared(tmp_path / "cut", adapter, **again), {}, console, existing="resume")
    whole, cut = (load_file(tmp_path / name / "model" / WEIGHTS) for name in ("whole", "cut"))
    first = load_file(adapter / WEIGHTS)
    assert whole.keys() == cut.keys() == first.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not all(torch.equal(whole[name], first[name]) for name in whole)
    assert not [one for one in (tmp_path / "whole" / "model").iterdir() if one.is_dir()]
    assert load_run(tmp_path / "whole").info["parameters"] == sum(
        one.numel() for one in load_student(Source(str(adapter)), Wanted())[0].parameters()
    )
    evaluated = logits(load(str(tmp_path / "whole" / "model"))[0])
    expected = on_adapters(base, tmp_path / "whole" / "model")
    torch.testing.assert_close(evaluated, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(2), "lora_rank: expected 4, as the adapters in .* have it, or nothing, to go on .*; got 2"),
        (Wanted(4, 16.0), "lora_alpha: expected 8, as the adapters in .*; got 16"),
        (Wanted(0, None, 0.5), r"lora_dropout: expected 0, as the adapters in .*; got 0\.5"),
    ],
)
def test_adapters_of_another_shape_are_refused(adapter: Path, wanted: Wanted, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_student(Source(str(adapter)), wanted)


@pytest.mark.parametrize(("name", "wanted"), [("alpha", Wanted(0, 8.0)), ("dropout", Wanted(0, None, 0.0))])
def test_what_adapters_have_is_refused_where_there_are_none(base: Path, name: str, wanted: Wanted) -> None:
    got = f"{getattr(wanted, name):g}"
    message = f"lora_{name}: expected lora_rank with it, or adapters at '{base}'; got {got} alone"
    with pytest.raises(ValueError, match=message):
        load_student(Source(str(base)), wanted)


def test_adapters_on_other_layers_are_refused_where_a_rank_is_asked_for(base: Path, tmp_path: Path) -> None:
    folder = adapted(base, tmp_path / "few", ["q_proj", "v_proj"])
    message = r"lora_rank: .* are on 4 layers \(q_proj, v_proj\), and lora_rank 4 asks for every .* 14 layers"
    with pytest.raises(ValueError, match=message):
        load_student(Source(str(folder)), Wanted(4))
    student, _ = load_student(Source(str(folder)), Wanted())
    assert torch.equal(logits(student), on_adapters(base, folder))


def test_weights_that_are_not_those_of_the_adapters_are_refused(adapter: Path) -> None:
    held = load_file(adapter / WEIGHTS)
    save_file(dict(list(held.items())[1:]), adapter / WEIGHTS)
    for loads in (load, lambda name: load_student(Source(name), Wanted())):
        with pytest.raises(ValueError, match=f"model: expected {adapter / WEIGHTS} to hold the weights"):
            loads(str(adapter))


def test_what_was_trained_beside_adapters_is_loaded_too(base: Path, tmp_path: Path) -> None:
    model = with_lora(load(str(base))[0], 2, 4.0, 0.0)
    norm = "base_model.model.model.norm.weight"
    trained = torch.full((32,), 0.5)
    model.save_pretrained(tmp_path / "adapter")
    save_file({norm: trained}, tmp_path / "adapter" / "trained_beside_adapters.safetensors")
    student, _ = load_student(Source(str(tmp_path / "adapter")), Wanted())
    assert torch.equal(dict(student.named_parameters())[norm], trained)
    assert dict(student.named_parameters())[norm].requires_grad
    assert torch.equal(load(str(tmp_path / "adapter"))[0].model.norm.weight, trained)
