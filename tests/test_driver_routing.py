"""Spans of tokens, and the choice of a teacher's rollout."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opsd_train.reading.routing import (
    Markers,
    Outcomes,
    Spans,
    best_rollout,
    share_inside,
    token_at,
)

TEXT = "We assume x.\n  Thus é = 3.\n\nA hence-\nso \\boxed{3}"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pairs: tokens of several characters, and characters of several tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["We assume Thus boxed"] * 2, trainers.BpeTrainer(initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)


TOKENIZER = byte_tokenizer()
IDS = TOKENIZER(TEXT)["input_ids"]


def test_token_of_a_character() -> None:
    owner = []
    for index in range(len(IDS)):
        owner += [index] * (len(TOKENIZER.decode(IDS[: index + 1])) - len(owner))
    assert len(owner) == len(TEXT)
    assert len(IDS) < len(TEXT)
    assert [token_at(TOKENIZER, IDS, character) for character in range(len(TEXT))] == owner


def test_markers_annotate_lines() -> None:
    def lines(correct: bool) -> list[str]:
        return [TEXT[start:end] for start, end in Markers()(TEXT, correct)]

    assert lines(True) == ["  Thus é = 3.", "A hence-", "so \\boxed{3}"]
    assert lines(False) == ["We assume x.", "so \\boxed{3}"]


def test_spans_are_coded_by_correctness() -> None:
    def where(text: str, correct: bool) -> list[tuple[int, int]]:
        start = text.index("Thus")
        return [(start, start + len("Thus é"))]

    codes = Spans(where)([IDS, IDS[:-1]], [True, False], TOKENIZER, len(IDS) + 2)
    assert codes.shape == (2, len(IDS) + 2)
    for row, code in enumerate((1, 2)):
        marked = (codes[row] == code).nonzero().flatten().tolist()
        assert TOKENIZER.decode([IDS[token] for token in marked]) == " Thus é"
        assert set(codes[row].tolist()) == {0, code}


@pytest.mark.parametrize(("most", "kept"), [(0.25, 0.25), (0.1, 0.1), (1.0, 1.0)])
def test_spans_have_a_budget(most: float, kept: float) -> None:
    spans = Spans(lambda text, correct: [(0, len(text)), (0, 3)], most)
    codes = spans([IDS], [True], TOKENIZER, len(IDS))
    count = int(kept * len(IDS))
    assert codes[0].tolist() == [1] * count + [0] * (len(IDS) - count)


def test_span_inside_a_token_is_that_token() -> None:
    start = TEXT.index("hus")
    codes = Spans(lambda text, correct: [(start, start + 2)])([IDS], [True], TOKENIZER, len(IDS))
    assert [TOKENIZER.decode([IDS[token]]) for token in codes[0].nonzero().flatten()] == [" Thus"]


def test_span_outside_the_text_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"annotate: expected spans with 0 <= start < end <= \d+; got \(3, 3\)"
    ):
        Spans(lambda text, correct: [(3, 3)])([IDS], [True], TOKENIZER, len(IDS))


def test_share_of_tokens_that_the_student_finds_likely() -> None:
    tokens = torch.tensor([3, 4, 5, 6])
    top = torch.tensor([[3, 1], [1, 4], [4, 3], [0, 0]])
    assert share_inside(tokens, top) == 0.5


def test_best_rollout_is_right_first_then_likely() -> None:
    assert best_rollout([False, True, True], [0.9, 0.2, 0.3]) == 2
    assert best_rollout([False, False], [0.1, 0.3]) == 1
    assert best_rollout([True, True], [0.3, 0.3]) == 0
    with pytest.raises(
        ValueError, match="shares: expected one for each of at least one rollout; got 1 for 2"
    ):
        best_rollout([True, True], [0.3])
    with pytest.raises(ValueError, match="got 0 for 0"):
        best_rollout([], [])


def test_a_reward_of_half_is_right() -> None:
    outcomes = Outcomes(torch.tensor([0.49, 0.5, 0.51]), torch.ones(3, dtype=torch.bool))
    assert outcomes.correct.tolist() == [False, True, True]
