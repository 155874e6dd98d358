"""The engine's log-probs against the trainer's own."""

import math
from pathlib import Path

import pytest
import torch

from driver_tiny import tiny_config, tiny_prompts
from opsd_kernels import Hidden
from opsd_train.engines.agreement import Agreement, check_engine_columns
from opsd_train.engines.base import EngineError
from opsd_train.rollouts import Rollout, collate


def example(shift: float = 0.0) -> tuple[Hidden, dict[str, torch.Tensor]]:
    """Three tokens and one, of which the engine says `shift` too much."""
    torch.manual_seed(0)
    ids = [(3, 1, 4), (2,)]
    hidden, head = torch.randn(2, 3, 8), torch.randn(7, 8)
    logprobs = torch.log_softmax(hidden.double() @ head.double().T, dim=-1)
    said = [
        tuple(logprobs[row, i, token].item() + shift for i, token in enumerate(one))
        for row, one in enumerate(ids)
    ]
    padded = torch.tensor([[3, 1, 4], [2, 0, 0]])
    return Hidden(hidden, head), {
        "input_ids": torch.cat([torch.ones(2, 2, dtype=torch.int64), padded], dim=1),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        "engine_logprobs": torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(one) for one in said], batch_first=True
        ),
    }


def test_the_same_weights_agree_to_rounding() -> None:
    agreement = Agreement()
    agreement.hear(*example())
    assert agreement.metrics()["engine_difference"] < 1e-6
    assert agreement.metrics() == {}


def test_mean_over_the_live_tokens_of_the_first_micro_batch() -> None:
    agreement = Agreement()
    student, batch = example(shift=0.05)
    batch["engine_logprobs"][1, 1:] = 77.0  # padding
    agreement.hear(student, batch)
    batch["engine_logprobs"] += 0.04
    agreement.hear(student, batch)  # the same step
    assert agreement.metrics()["engine_difference"] == pytest.approx(0.05, abs=1e-6)
    agreement.begin_step()
    agreement.hear(student, batch)
    assert agreement.metrics()["engine_difference"] == pytest.approx(0.09, abs=1e-6)


@pytest.mark.parametrize("shift", [0.11, -0.5, math.nan])
def test_other_weights_end_the_run(shift: float) -> None:
    with pytest.raises(EngineError, match="expected an engine with the student's weights"):
        Agreement().hear(*example(shift))


def test_more_than_rounding_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    Agreement().hear(*example(0.03))
    assert "0.03 nats per token" in caplog.text


def test_an_engine_that_says_nothing_is_not_compared() -> None:
    student, batch = example()
    del batch["engine_logprobs"]
    agreement = Agreement()
    agreement.hear(student, batch)
    assert agreement.metrics() == {}


def test_collate_pads_what_the_engine_said(tmp_path: Path) -> None:
    prompts = tiny_prompts(tiny_config(tmp_path))
    said = [
        Rollout(prompts[0], (5, 6, 1), False, (-1.0, -2.0, -3.0), 4),
        Rollout(prompts[1], (7, 1), False, (-4.0, -5.0), 4),
    ]
    assert collate(said, 0)["engine_logprobs"].tolist() == [[-1.0, -2.0, -3.0], [-4.0, -5.0, 0.0]]
    assert "engine_logprobs" not in collate([said[0], Rollout(prompts[1], (7, 1), False)], 0)


def test_log_probs_at_another_temperature_are_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, loss_temperature=2.0)
    check_engine_columns(("rollout_logprob",), config)  # transformers writes: the student's own stand in
    config.rollouts = "vllm"
    check_engine_columns(("reward",), config)
    with pytest.raises(ValueError, match="loss_temperature: expected 1"):
        check_engine_columns(("rollout_logprob",), config)
