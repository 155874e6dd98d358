"""Heads with adapters, and the lines of the README, for models of which `model.model` is no backbone."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import Gemma2ForCausalLM

import opsd_kernels
from driver_tiny import tiny_model
from opsd_kernels.integrations import hf
from opsd_kernels.integrations.hf import causal_lm, check_head, head_of

IDS = torch.tensor([[4, 5, 6, 7, 8]])
README = (Path(__file__).parents[1] / "README.md").read_text()


def _adapted(tied: bool = False, train: bool = False, **settings: Any) -> Any:
    """A model under PEFT whose adapters do something."""
    config = LoraConfig(r=2, lora_alpha=6, **({"target_modules": ["q_proj", "lm_head"]} | settings))
    model = get_peft_model(tiny_model(tie_word_embeddings=tied), config).train(train)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_()
    return model


ADAPTED: dict[str, Callable[[], Any]] = {
    "LoRA on the head": _adapted,
    "LoRA on the layers of a model with tied weights": lambda: _adapted(True, target_modules=["q_proj"]),
    "LoRA on tied embeddings": lambda: _adapted(True, target_modules=["q_proj", "embed_tokens"]),
    "a head of its own": lambda: _adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tied, a head of its own": lambda: _adapted(True, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "dropout that is off": lambda: _adapted(lora_dropout=0.5),
}


@pytest.mark.parametrize("model", ADAPTED.values(), ids=ADAPTED)
def test_adapters_are_part_of_the_head(model: Callable[[], Any]) -> None:
    one = model()
    check_head(one, IDS)
    with one.disable_adapter():
        check_head(one, IDS)
    if hasattr(causal_lm(one).get_output_embeddings(), "merge"):
        one.merge_adapter()
        check_head(one, IDS)


def test_the_gradient_reaches_the_adapter_of_the_head() -> None:
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    found, expected = [], []
    for gradients, project in (
        (found, lambda m: opsd_kernels.backends.reference.logits(head_of(m)(hidden))),
        (expected, lambda m: causal_lm(m).get_output_embeddings()(hidden)),
    ):
        model = _adapted()
        project(model).square().sum().backward()
        head = causal_lm(model).get_output_embeddings()
        gradients.extend(head.get_parameter(f"lora_{side}.default.weight").grad for side in "AB")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (lambda: _adapted(use_dora=True), "plain LoRA .* got adapter 'default' with a variant of LoRA"),
    "bias": (lambda: _adapted(lora_bias=True), "adapter 'default' with a bias"),
    "dropout": (lambda: _adapted(train=True, lora_dropout=0.5), "adapter 'default' with dropout"),
    "some tokens": (
        lambda: _adapted(True, target_modules=["q_proj"], trainable_token_indices=[3]),
        "a linear layer as its head, got TrainableTokensWrapper",
    ),
    "virtual tokens": (
        lambda: get_peft_model(
            tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=32)
        ),
        "got PROMPT_TUNING, whose virtual tokens",
    ),
    "no model": (lambda: nn.Linear(2, 2), "a causal language model of transformers, got Linear"),
}


@pytest.mark.parametrize(("model", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_more_than_a_linear_head_is_refused(model: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"model: expected .*{message}"):
        head_of(model())


def test_a_linear_layer_with_another_product_is_refused() -> None:
    class Quantised(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).round()

    model = tiny_model(tie_word_embeddings=False)
    model.set_output_embeddings(Quantised(32, 32))
    with pytest.raises(ValueError, match="a linear layer as its head, got Quantised"):
        head_of(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_soft_cap_that_bf16_would_hide_is_seen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest logit changes by less than the last bit of a bf16 number."""
    model = _capped(40.0).to(dtype)
    check_head(model, IDS)
    monkeypatch.setattr(hf, "head_of", lambda m: replace(head_of(m), softcap=None))
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM differ from that by 0\.\d\d%"):
        check_head(model, IDS)


def _capped(softcap: float = 3.0) -> Any:
    settings = {"final_logit_softcapping": softcap, "query_pre_attn_scalar": 16}
    return tiny_model(kind=Gemma2ForCausalLM, **settings).eval()


EXAMPLES: dict[str, tuple[Callable[[], Any], int]] = {
    "plain": (lambda: tiny_model().eval(), 1),
    "plain, by head_of": (lambda: tiny_model().eval(), 2),
    "PEFT": (lambda: _adapted(True, target_modules=["q_proj", "down_proj"]), 2),
    "soft-cap": (_capped, 2),
}


@pytest.mark.parametrize(("model", "block"), EXAMPLES.values(), ids=EXAMPLES)
def test_the_lines_of_the_readme(model: Callable[[], Any], block: int) -> None:
    """Run as they are; compared with the definition over the model's own logits, gradients too."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    generator = torch.Generator().manual_seed(0)
    C = 4
    completion = torch.randint(3, 32, (2, C), generator=generator)
    student_ids, teacher_ids = (
        torch.cat([torch.randint(3, 32, (2, n), generator=generator), completion], 1) for n in (5, 9)
    )
    mask = torch.tensor([[True] * C, [True, True, False, False]])

    def by_the_lines(one: Any) -> torch.Tensor:
        names = {"torch": torch, "F": F, "opsd_kernels": opsd_kernels, "model": one, "mask": mask, "C": C}
        names |= {"student_ids": student_ids, "teacher_ids": teacher_ids}
        exec(blocks[block], names | {"lm_head": causal_lm(one).get_output_embeddings()}, names)
        return names["loss"]

    def by_definition(one: Any) -> torch.Tensor:
        log_s, log_t = (one(ids).logits[:, -C - 1 : -1].log_softmax(-1) for ids in (student_ids, teacher_ids))
        log_t = log_t.detach()
        return (log_t.exp() * (log_t - log_s)).sum(-1)[mask].mean()

    found, expected = model(), model()
    expected.load_state_dict(found.state_dict())
    losses = by_the_lines(found), by_definition(expected)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    gradients = [
        torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None])
        for one in (found, expected)
    ]
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()
