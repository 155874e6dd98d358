"""Horizons of rollouts and curricula of turns."""

import pytest
import torch

from opsd_train.pieces.horizon import Counting, Turns, horizon, turn_mask

MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
TURN = torch.tensor([[0, 0, 1, 2, 7], [0, 0, 1, 1, 3], [0, 9, 9, 9, 9], [0, 0, 0, 0, 0]])


def test_progressive_horizon() -> None:
    found = [horizon["progressive"](step, 30, start=8, grow=5, every=3) for step in range(18)]
    assert found == [8] * 3 + [13] * 3 + [18] * 3 + [23] * 3 + [28] * 3 + [30] * 3
    assert horizon["progressive"](0, 4, start=8) == 4


@pytest.mark.parametrize(("rho", "tokens"), [(0.1, 1), (0.3, 3), (0.39, 3), (0.01, 1), (1.0, 10)])
def test_share_of_the_longest(rho: float, tokens: int) -> None:
    assert horizon["share"](7, 10, rho=rho) == tokens
    assert horizon["full"](7, 10) == 10
    assert horizon["share"](7, 100, rho=0.29) == 29


def test_rows_beyond_the_gate() -> None:
    assert Counting(longest=3)(0, MASK).tolist() == [[False] * 5] * 2 + MASK[2:].bool().tolist()
    assert torch.equal(Counting(longest=4)(0, MASK), MASK.bool())
    assert torch.equal(Counting()(0, MASK), MASK.bool())


def test_turns_grow_with_the_steps() -> None:
    turns = Turns(start=2, every=4)
    assert [turns.shown(step) for step in (0, 3, 4, 8, 11)] == [2, 2, 3, 4, 4]
    for order in ("forward", "backward"):
        counting = Counting(Turns(start=1, every=2, order=order), longest=3)
        for step, count in ((0, 1), (1, 1), (2, 2)):
            expected = turn_mask(MASK, TURN, count, order)
            expected[:2] = False
            assert torch.equal(counting(step, MASK, TURN), expected)


def test_turns_from_the_front_and_from_the_back() -> None:
    forward = turn_mask(MASK, TURN, 2)
    assert forward.int().tolist() == [[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 0, 0], [0] * 5]
    backward = turn_mask(MASK, TURN, 2, "backward")
    # The turn 3 of the second row is its last, and turn 2 has no tokens.
    assert backward.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [0] * 5]
    assert torch.equal(turn_mask(MASK, TURN, 9, "backward"), MASK.bool())


def test_wrong_horizons() -> None:
    for settings in ({"start": 0}, {"grow": -1}, {"every": 0}):
        with pytest.raises(ValueError, match="horizon: expected start >= 1, grow >= 0 and every >= 1"):
            horizon["progressive"](0, 9, **settings)
    for rho in (0.0, 1.1):
        with pytest.raises(ValueError, match="rho: expected a share above 0 and at most 1"):
            horizon["share"](0, 9, rho=rho)
    with pytest.raises(ValueError, match="expected start >= 1 and every >= 1; got 0 and 1"):
        Turns(0, 1)
    with pytest.raises(ValueError, match="expected an order among forward, backward; got 'f2b'"):
        Turns(order="f2b")
    with pytest.raises(ValueError, match="order: expected one of forward, backward; got 'f2b'"):
        turn_mask(MASK, TURN, 1, "f2b")
    with pytest.raises(ValueError, match="horizon: expected one of full, progressive, share; got 'long'"):
        horizon["long"]
