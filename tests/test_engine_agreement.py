"""The engine's log-probs against the trainer's own."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from driver_tiny import tiny_config, tiny_model, tiny_prompts, tiny_trainer
from opsd_kernels import Hidden
from opsd_train.engines import agreement as module
from opsd_train.engines.agreement import Agreement, check_engine_columns, has_dropout
from opsd_train.engines.base import Completion, EngineError
from opsd_train.engines.hf import HFEngine
from opsd_train.loading import with_lora
from opsd_train.rollouts import Rollout, Sampling, collate, evaluating


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


def given(shift: float = 0.0) -> tuple[Callable[[], Hidden], dict[str, torch.Tensor]]:
    student, batch = example(shift)
    return lambda: student, batch


def test_the_same_weights_agree_to_rounding() -> None:
    agreement = Agreement()
    agreement.hear(*given())
    assert agreement.metrics()["engine_difference"] < 1e-6
    assert agreement.metrics() == {}


def test_mean_over_the_live_tokens_of_the_first_micro_batch() -> None:
    agreement = Agreement()
    student, batch = example(shift=0.05)
    batch["engine_logprobs"][1, 1:] = 77.0  # padding
    agreement.hear(lambda: student, batch)
    batch["engine_logprobs"] += 0.04
    agreement.hear(lambda: student, batch)  # the same step
    assert agreement.metrics()["engine_difference"] == pytest.approx(0.05, abs=1e-6)
    agreement.begin_step()
    agreement.hear(lambda: student, batch)
    assert agreement.metrics()["engine_difference"] == pytest.approx(0.09, abs=1e-6)


@pytest.mark.parametrize("shift", [0.11, -0.5, math.nan])
def test_other_weights_end_the_run(shift: float) -> None:
    with pytest.raises(EngineError, match="expected an engine with the student's weights"):
        Agreement().hear(*given(shift))


def test_more_than_rounding_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    Agreement().hear(*given(0.03))
    assert "0.03 nats per token" in caplog.text


def test_an_engine_that_says_nothing_is_not_compared() -> None:
    student, batch = example()
    del batch["engine_logprobs"]
    agreement = Agreement()
    agreement.hear(lambda: student, batch)
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


class Telling(HFEngine):
    """Says how likely its tokens were, as any engine does without dropout; unless it is silent."""

    silent = False

    def write(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: Sequence[int]
    ) -> list[Completion]:
        written = super().write(prompts, sampling, seed)
        return written if self.silent else [self._told(*pair) for pair in zip(prompts, written, strict=True)]

    @torch.no_grad()
    def _told(self, prompt: Sequence[int], one: Completion) -> Completion:
        with evaluating(self.student):
            z = self.student(input_ids=torch.tensor([[*prompt, *one.tokens]])).logits[0].log_softmax(-1)
        said = z[len(prompt) - 1 : -1].gather(-1, torch.tensor(one.tokens)[:, None])[:, 0]
        return Completion(one.tokens, tuple(said.tolist()), one.version)


def learnt(dropout: float) -> torch.nn.Module:
    """A LoRA student whose adapters matter."""
    student = with_lora(tiny_model(), 4, 32.0, dropout)
    torch.manual_seed(1)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return student


def gpt2(**rates: float) -> torch.nn.Module:
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return tiny_model(0, GPT2LMHeadModel, **sizes, **rates)


NO_RATES = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}


@pytest.mark.parametrize("make", [lambda: learnt(0.05), gpt2], ids=["lora", "gpt2"])
def test_dropout_is_no_difference(
    tmp_path: Path, make: Callable[[], torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does comparing change the run: the same random numbers drop the same."""
    weights = []
    for silent in (False, True):
        monkeypatch.setattr(Telling, "silent", silent)
        torch.manual_seed(0)
        settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1}
        trainer = tiny_trainer(tmp_path, make(), teacher="live", **settings)
        trainer.engine = Telling(trainer.student, trainer.vocabulary)
        trainer.train()
        log = trainer.state.log_history
        found = [line["engine_difference"] for line in log if "engine_difference" in line]
        assert len(found) == (0 if silent else 2)
        assert all(one < 1e-5 for one in found)
        weights.append([one.detach().clone() for one in trainer.student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_without_dropout_nothing_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tmp_path, learnt(0.0), teacher="live")
    trainer.engine = Telling(trainer.student, trainer.vocabulary)
    monkeypatch.delattr(module, "completion_hidden")
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("make", "drops"),
    [
        (lambda: learnt(0.0), False),
        (lambda: learnt(0.1), True),
        (lambda: gpt2(**NO_RATES), False),
        (lambda: gpt2(**NO_RATES | {"attn_pdrop": 0.1}), True),
        (tiny_model, False),
        (lambda: tiny_model(attention_dropout=0.1), True),  # of a function, not a module
    ],
)
def test_where_there_is_dropout(make: Callable[[], torch.nn.Module], drops: bool) -> None:
    assert has_dropout(make()) is drops
