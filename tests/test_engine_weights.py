"""The student's weights as an engine is sent them: names, shapes and values of the checkpoint."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, MixtralForCausalLM, PreTrainedModel

from driver_tiny import tiny_model
from opsd_train.engines.weights import checksum, weights_of
from opsd_train.teachers.effective import frozen_copy

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 32}


def saved(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def lora(model: PreTrainedModel, **settings) -> torch.nn.Module:
    given = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    student = get_peft_model(model, LoraConfig(**(given | settings)))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return student


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_values_are_those_of_the_checkpoint(tied: bool, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    pairs = list(weights_of(model))
    assert len(dict(pairs)) == len(pairs)
    assert ("lm_head.weight" in dict(pairs)) is not tied
    same(dict(pairs), saved(model, tmp_path))


def test_saved_buffers_are_sent_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2LMHeadModel.config_class(**GPT2))
    model.transformer.h[0].register_buffer("scale", torch.ones(3))
    model.transformer.h[0].register_buffer("cache", torch.ones(3), persistent=False)
    same(dict(weights_of(model)), saved(model, tmp_path))


def test_experts_are_apart_as_in_the_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    model = MixtralForCausalLM(MixtralForCausalLM.config_class(**sizes, **heads))
    found = dict(weights_of(model))
    assert any(".experts.2." in name for name in found)
    same(found, saved(model, tmp_path))


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_are_merged_and_the_student_stays_as_it_is(tied: bool, tmp_path: Path) -> None:
    student = lora(tiny_model(tie_word_embeddings=tied))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    found = dict(weights_of(student))
    after = student.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    same(found, saved(frozen_copy(student), tmp_path))
    plain = dict(weights_of(tiny_model(tie_word_embeddings=tied)))
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, plain[name])]
    assert len(changed) == 2 * 7


def test_transposed_layers_and_module_copies_are_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2LMHeadModel.config_class(**GPT2, tie_word_embeddings=False))
    student = lora(model, target_modules=["c_attn"], modules_to_save=["ln_f"], fan_in_fan_out=True)
    with torch.no_grad():
        student.get_base_model().transformer.ln_f.modules_to_save["default"].weight.fill_(3.0)
    found = dict(weights_of(student))
    assert found["transformer.ln_f.weight"].eq(3).all()
    same(found, saved(frozen_copy(student), tmp_path))


def test_bf16_weights_are_rounded_once() -> None:
    student = lora(tiny_model().to(torch.bfloat16), target_modules=["q_proj"])
    layer = student.get_base_model().model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    found = dict(weights_of(student))["model.layers.0.self_attn.q_proj.weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())


def test_switched_off_adapters_are_not_merged() -> None:
    student = lora(tiny_model())
    with student.disable_adapter():
        off = checksum(weights_of(student))
    assert off == checksum(weights_of(tiny_model())) != checksum(weights_of(student))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "plain LoRA"),
        ({"target_modules": ["embed_tokens"]}, "tied head"),
        ({"modules_to_save": ["lm_head"]}, "tied head"),
        ({"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]}, "plain LoRA"),
        ({"trainable_token_indices": [3]}, "tied head"),
    ],
)
def test_what_cannot_be_merged_is_refused(settings: dict, message: str) -> None:
    student = lora(tiny_model(), **settings)
    with pytest.raises(ValueError, match=message):
        list(weights_of(student))


def test_a_checksum_sees_a_bit_a_name_a_shape_and_a_swap() -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(3, 5), "b": torch.randn(3, 5).bfloat16()}
    expected = checksum(weights.items())
    assert expected == checksum(reversed(weights.items()))
    flipped = weights["a"].clone()
    flipped.view(torch.int32)[2, 4] ^= 1
    others = [
        weights | {"a": flipped},
        weights | {"a": weights["a"].flip(0)},
        weights | {"a": weights["a"].reshape(5, 3)},
        {"a": weights["a"], "c": weights["b"]},
        {"a": weights["a"]},
        weights | {"b": weights["b"].float()},
    ]
    assert len({expected, *(checksum(other.items()) for other in others)}) == 7
