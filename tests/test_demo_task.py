"""The demo's task, its tokenizer, and the model that ships with it."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

from opsd_train.demo.pretrain import (
    MODEL_DIR,
    Options,
    build_model,
    build_tokenizer,
    encode,
    evaluate,
    training_loss,
)
from opsd_train.demo.task import (
    STUDENT_TEMPLATE,
    TEACHER_TEMPLATE,
    Problem,
    held_out_problems,
    is_held_out,
    report_problems,
    train_problems,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()


def summands(row: dict[str, str]) -> tuple[int, int]:
    a, b = row["problem"].removesuffix("=").split("+")
    return int(a), int(b)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_split_is_symmetric_and_holds_out_one_in_eight() -> None:
    pairs = torch.randint(100, 1000, (8_000, 2), generator=generator(0)).tolist()
    assert all(is_held_out(a, b) == is_held_out(b, a) for a, b in pairs)
    share = sum(is_held_out(a, b) for a, b in pairs) / len(pairs)
    assert share == pytest.approx(1 / 8, abs=0.015)  # four standard errors


def test_the_split_is_the_same_on_every_machine() -> None:
    assert [b for b in range(100, 150) if is_held_out(123, b)] == [103, 114, 117, 127, 136, 143]


def test_train_and_held_out_problems_share_no_pair_in_either_order() -> None:
    train = {tuple(sorted(summands(row))) for row in train_problems(4_000, generator(1))}
    held_out = {tuple(sorted(summands(row))) for row in held_out_problems()}
    assert not train & held_out


def test_the_report_is_on_problems_that_pretraining_did_not_choose_its_end_on() -> None:
    chosen_on = {tuple(sorted(summands(row))) for row in held_out_problems()}
    reported = [summands(row) for row in report_problems()]
    assert len(set(reported)) == 512
    assert all(is_held_out(a, b) for a, b in reported)
    assert not chosen_on & {tuple(sorted(pair)) for pair in reported}


def test_answers_are_the_sums_of_three_digit_numbers() -> None:
    rows = train_problems(500, generator(2)) + held_out_problems()
    assert all(set(row) == {"problem", "solution"} for row in rows)
    assert all(int(row["solution"]) == sum(summands(row)) for row in rows)
    assert all(100 <= summand <= 999 for row in rows for summand in summands(row))


def test_draws_repeat_with_their_seed() -> None:
    assert train_problems(300, generator(3)) == train_problems(300, generator(3))
    assert train_problems(300, generator(3)) != train_problems(300, generator(4))
    assert held_out_problems(300) == held_out_problems(512)[:300]
    assert len({row["problem"] for row in held_out_problems()}) == len(held_out_problems()) == 512
    assert train_problems(0, generator(3)) == []


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="b: expected 100 to 999, got 99"):
        Problem.addition(100, 99)
    with pytest.raises(ValueError, match="count: expected at least 0, got -1"):
        held_out_problems(-1)


def test_one_token_per_character_and_back(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "579;123+456="
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    marked = "<|user|>123+456=<|assistant|>579<|end|>"
    ids = tokenizer(marked)["input_ids"]
    assert len(ids) == 3 + len("123+456=579")
    assert tokenizer.decode(ids) == marked
    assert tokenizer.decode(ids, skip_special_tokens=True) == "123+456=579"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")


def test_a_character_outside_the_alphabet_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="UNK"):
        tokenizer("12*3=")


def test_the_chat_template_writes_prompt_and_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    user = {"role": "user", "content": "123+456="}
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>123+456=<|assistant|>"
    answer = {"role": "assistant", "content": "579"}
    assert tokenizer.apply_chat_template([user, answer], tokenize=False) == prompt + "579<|end|>"
    with pytest.raises(Exception, match="expected user or assistant, got system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "1"}], tokenize=False)


def test_student_and_teacher_see_the_same_completion_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = held_out_problems(16)
    student, student_mask = encode(tokenizer, rows, STUDENT_TEMPLATE)
    teacher, teacher_mask = encode(tokenizer, rows, TEACHER_TEMPLATE)
    assert torch.equal(student[student_mask], teacher[teacher_mask])
    expected = "".join(row["solution"] + "<|end|>" for row in rows)
    assert tokenizer.decode(student[student_mask]) == expected
    assert tokenizer.decode(teacher[0][~teacher_mask[0]], skip_special_tokens=True) == (
        rows[0]["solution"] + ";" + rows[0]["problem"]
    )


def test_the_shipped_files_fit_what_the_script_builds(tokenizer: PreTrainedTokenizerBase) -> None:
    built = build_tokenizer()
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.chat_template == built.chat_template
    assert tokenizer.padding_side == built.padding_side == "left"
    story = json.loads((MODEL_DIR / "pretraining.json").read_text(encoding="utf-8"))
    assert story["options"]["seed"] == Options.seed
    assert story["held_out"]["problems"] == len(held_out_problems())
    assert 2e6 < (MODEL_DIR / "model.safetensors").stat().st_size < 4e6


def test_the_shipped_model_is_small_and_servable(model: Qwen3ForCausalLM) -> None:
    assert 0.6e6 <= model.num_parameters() <= 1.0e6
    assert model.config.head_dim >= 32
    assert model.config.tie_word_embeddings
    assert model.dtype == torch.float32


def test_the_shipped_model_adds_poorly_and_copies_well(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = held_out_problems(128)
    plain = evaluate(model, tokenizer, rows, STUDENT_TEMPLATE)
    hint = evaluate(model, tokenizer, rows, TEACHER_TEMPLATE)
    assert 0.30 <= plain.greedy <= 0.50
    assert plain.sampled < plain.greedy
    assert hint.greedy > 0.97
    assert hint.sampled > 0.95


@pytest.mark.parametrize("template", [STUDENT_TEMPLATE, TEACHER_TEMPLATE])
def test_the_accuracy_from_one_pass_is_that_of_decoding(model: Any, tokenizer: Any, template: str) -> None:
    rows = held_out_problems(64)
    chats = [[{"role": "user", "content": template.format(**row)}] for row in rows]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompts, do_sample=False, temperature=None)
    texts = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(text == row["solution"] for text, row in zip(texts, rows, strict=True))
    assert evaluate(model, tokenizer, rows, template).greedy == right / len(rows)


def test_a_pretraining_step_lowers_the_loss_and_spares_the_prompt() -> None:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    fresh = build_model(tokenizer)
    rows = train_problems(32, generator(5))
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = training_loss(fresh, tokenizer, rows, hinted=16)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert losses[0] == pytest.approx(torch.tensor(32.0).log().item(), abs=0.3)  # uniform over 32 tokens
