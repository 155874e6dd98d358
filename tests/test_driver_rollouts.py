"""Sampling, and the batch that student and teacher read."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from driver_tiny import TOKENIZER, tiny_config, tiny_model, tiny_prompts
from opsd_train.reading.prompts import Prompt
from opsd_train.rollouts import (
    Rollout,
    Sampling,
    Vocabulary,
    check_alignment,
    collate,
    evaluating,
    generate,
    until_end,
)

SAMPLED = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=6)
GREEDY = replace(SAMPLED, temperature=0.0)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_model()


@pytest.fixture(scope="module")
def vocabulary(model) -> Vocabulary:
    return Vocabulary.of(model, TOKENIZER)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, ...]]:
    config = tiny_config(tmp_path_factory.mktemp("run"))
    return [prompt.student_ids for prompt in tiny_prompts(config)]


def test_end_of_sequence_is_the_last_token_kept() -> None:
    assert until_end([5, 6, 1, 0, 0], eos_ids=(1, 9)) == (5, 6, 1)
    assert until_end([5, 9, 1], eos_ids=(1, 9)) == (5, 9)
    assert until_end([5, 6], eos_ids=(1,)) == (5, 6)
    assert until_end([1, 1], eos_ids=(1,)) == (1,)


def test_greedy_completions_do_not_depend_on_the_padding(model, prompts, vocabulary) -> None:
    together = generate(model, prompts, GREEDY, vocabulary, seed=(0,))
    alone = [generate(model, [prompt], GREEDY, vocabulary, seed=(0,))[0] for prompt in prompts]
    assert together == alone
    assert len(set(together)) > 2


def test_greedy_completions_follow_the_model_s_most_likely_token(model, prompts, vocabulary) -> None:
    for prompt, completion in zip(
        prompts, generate(model, prompts, GREEDY, vocabulary, seed=(0,)), strict=True
    ):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            best = model(ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert best.tolist() == list(completion)


def test_seed_decides_the_rollouts_and_the_global_state_stays(model, prompts, vocabulary) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = generate(model, prompts, SAMPLED, vocabulary, seed=(0, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    assert generate(model, prompts, SAMPLED, vocabulary, seed=(0, 1, 2)) == first
    assert generate(model, prompts, SAMPLED, vocabulary, seed=(0, 1, 3)) != first


def test_top_k_and_top_p_narrow_down_to_greedy(model, prompts, vocabulary) -> None:
    greedy = generate(model, prompts, GREEDY, vocabulary, seed=(0,))
    assert generate(model, prompts, replace(SAMPLED, top_k=1), vocabulary, seed=(0,)) == greedy
    assert generate(model, prompts, replace(SAMPLED, top_p=1e-6), vocabulary, seed=(0,)) == greedy
    assert generate(model, prompts, SAMPLED, vocabulary, seed=(0,)) != greedy


def test_sampled_tokens_have_the_model_s_probabilities(model, prompts, vocabulary) -> None:
    draws = 4_000
    one = replace(SAMPLED, max_tokens=1)
    counts = torch.zeros(32)
    for completion in generate(model, [prompts[0]] * draws, one, vocabulary, seed=(0,)):
        counts[completion[0]] += 1
    with torch.no_grad():
        expected = model(torch.tensor([prompts[0]])).logits[0, -1].softmax(-1)
    # Total variation of a fair sample: at most about sqrt(V / draws) / 2.
    assert (counts / draws - expected).abs().sum() / 2 < 0.045


def test_generation_defaults_of_the_model_do_not_apply(prompts, vocabulary) -> None:
    model = tiny_model()
    plain = generate(model, prompts, SAMPLED, vocabulary, seed=(0,))
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 1
    model.generation_config.min_new_tokens = 6
    assert generate(model, prompts, SAMPLED, vocabulary, seed=(0,)) == plain
    assert model.generation_config.repetition_penalty == 5.0


def test_generation_leaves_the_mode_as_it_was(prompts, vocabulary) -> None:
    model = tiny_model().train()
    generate(model, prompts[:1], SAMPLED, vocabulary, seed=(0,))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_puts_every_module_s_own_mode_back(training: bool) -> None:
    model = tiny_model().train(training)
    model.model.layers[0].train(not training)
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes


def test_no_prompts_no_completions(model, vocabulary) -> None:
    assert generate(model, [], SAMPLED, vocabulary, seed=(0,)) == []


def test_batch_size_covers_every_prompt(model, prompts, vocabulary) -> None:
    whole = generate(model, prompts, GREEDY, vocabulary, seed=(0,))
    assert generate(model, prompts, replace(GREEDY, batch_size=3), vocabulary, seed=(0,)) == whole


def test_vocabulary_knows_every_end_of_sequence(model) -> None:
    other = tiny_model()
    other.generation_config.eos_token_id = [7, 9]
    assert Vocabulary.of(other, TOKENIZER).eos_ids == (7, 9, TOKENIZER.eos_token_id)
    assert Vocabulary.of(model, TOKENIZER).pad_id == TOKENIZER.pad_token_id


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    prompts = [Prompt((4, 5), (6, 7, 8), None, "row 1"), Prompt((4, 5, 6, 7), (9,), None, "row 2")]
    return collate([Rollout(prompts[0], (10, 11, 1), False), Rollout(prompts[1], (12, 1), False)], pad_id=0)


def test_student_and_teacher_read_the_same_completion(batch) -> None:
    assert batch["input_ids"].tolist() == [[0, 0, 4, 5, 10, 11, 1], [4, 5, 6, 7, 12, 1, 0]]
    assert batch["teacher_input_ids"].tolist() == [[6, 7, 8, 10, 11, 1], [0, 0, 9, 12, 1, 0]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]]
    assert batch["teacher_attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]]
    assert batch["completion_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    "key", ["input_ids", "teacher_input_ids", "attention_mask", "teacher_attention_mask"]
)
def test_copy_shifted_by_one_is_refused(batch, key: str) -> None:
    shifted = batch | {key: batch[key].roll(1, dims=1)}
    with pytest.raises(ValueError, match=r"same completion; they differ in row \d of the batch at token \d"):
        check_alignment(shifted)


def test_one_other_token_is_refused(batch) -> None:
    batch["teacher_input_ids"][1, -2] += 1
    with pytest.raises(ValueError, match="differ in row 1 of the batch at token 1 of the completion"):
        check_alignment(batch)


def test_config_without_room_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_completion_length: expected a number at least 1, got 0"):
        tiny_config(tmp_path, max_completion_length=0)
