"""Methods through the trainer: what each role reads and the loss is told, however a step is cut."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

import opsd_kernels
from driver_tiny import ROWS, TOKENIZER, tiny_config, tiny_model
from opsd_kernels import methods
from opsd_kernels.methods.needs import columns
from opsd_train.data.rows import load_rows
from opsd_train.evaluation.verify import Verifier
from opsd_train.method import MethodRun
from opsd_train.reading.prompts import Encoder
from opsd_train.train import make_trainer
from opsd_train.trainer import OPSDTrainer

TEMPLATES = {
    name: f"{{{column}}};{{problem}}"
    for name, column in (
        ("full_solution", "solution"),
        ("answer_only", "answer"),
        ("wrong_answer", "answer"),
        ("sibling", "demonstration"),
        ("skill", "skill"),
        ("feedback", "feedback"),
        ("debate", "debate"),
    )
}
# Ten methods that differ in teachers, supports, weights, rewards and reductions.
TEN = (
    "opsd", "pw_opsd", "sdpo", "srpo", "demopsd", "purified_opsd", "cepo", "tip", "vopd", "skill_sd",
    "tsd_kd", "scope",
)  # fmt: skip


def method_trainer(out: Path, method: str, **settings: Any) -> OPSDTrainer:
    told = {"skill": "1", "wrong_answer": "4", "feedback": "5"}
    rows = [{**row, **told} for row in ROWS]
    config = tiny_config(
        out, method=method, context_templates=TEMPLATES, verifier="exact", logging_steps=1, **settings
    )
    return make_trainer(tiny_model(), TOKENIZER, load_rows(rows, config.to_templates(), False), [], config)


@pytest.mark.parametrize("method", TEN)
def test_a_few_steps_move_the_weights(tmp_path: Path, method: str) -> None:
    trainer = method_trainer(tmp_path, method, num_generations=4, max_steps=3)
    trainer.method = trainer.method and replace_verifier(trainer)
    before = torch.cat([p.detach().flatten().clone() for p in trainer.student.parameters()])
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in trainer.student.parameters()])
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 3
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)
    assert float((after - before).abs().max()) > 1e-5


def odd_is_right(completion: str, answer: str | None) -> float:
    return 1.0 if len(completion) % 2 else 0.0


def replace_verifier(trainer: OPSDTrainer) -> MethodRun:
    """Rewards that differ among the rollouts of a prompt, as a random model's are all wrong."""
    assert trainer.method is not None
    return replace(trainer.method, verifier=Verifier("odd", odd_is_right))


def test_the_loss_is_the_definition_s(tmp_path: Path) -> None:
    """demopsd's two teachers read two prompts: the barycenter from full logits, one sequence at a time."""
    trainer = method_trainer(tmp_path, "purified_opsd")
    batches, tokens = trainer.get_batch_samples(iter([trainer.prompts]), 1, torch.device("cpu"))
    loss = trainer.compute_loss(trainer.student, batches[0], num_items_in_batch=tokens)
    total, model = torch.zeros(()), tiny_model()
    for row, rollout in enumerate(trainer.roll_out(trainer.prompts, trainer.sampling, (0, 0))):
        problem, solution = ROWS[row]["problem"], ROWS[row]["solution"]
        logits = {}
        for role, text in (
            ("student", problem),
            ("privileged", f"{solution};{problem}"),
            ("context_only", solution),
            ("base", problem),
        ):
            chat = [{"role": "user", "content": text}]
            prompt = TOKENIZER.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            z = model(torch.tensor([[*prompt, *rollout.completion]])).logits[0]
            logits[role] = z[len(prompt) - 1 : -1]
        difference = logits["privileged"] - logits["context_only"]
        centred = difference - difference.mean(-1, keepdim=True)
        target = log_softmax(log_softmax(logits["base"], -1) + 10 * torch.tanh(centred / 10), -1).detach()
        s = log_softmax(logits["student"], -1)
        total = total + divergence_of("purified_opsd", s, target).sum()
    torch.testing.assert_close(loss, (total / tokens).detach(), rtol=1e-4, atol=1e-5)


def divergence_of(method: str, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    objective = methods.recipe(method).terms[0].loss
    assert isinstance(objective, opsd_kernels.Objective)
    return opsd_kernels.loss(
        opsd_kernels.Logits(s), opsd_kernels.Logits(t.detach()), objective=objective, reduction="none",
        backend="reference",
    )  # fmt: skip


@pytest.mark.parametrize("method", ["pw_opsd", "opsd", "cepo", "demopsd"])
def test_how_a_step_is_cut_up_is_no_matter(tmp_path: Path, method: str) -> None:
    gradients = []
    for size, parts in ((8, 1), (2, 4)):
        trainer = method_trainer(
            tmp_path, method, num_generations=4, per_device_train_batch_size=size,
            gradient_accumulation_steps=parts, max_grad_norm=1e9, learning_rate=0.0, max_steps=1,
        )  # fmt: skip
        trainer.method = trainer.method and replace_verifier(trainer)
        trainer.train()
        (line,) = [x for x in trainer.state.log_history if "loss" in x]
        gradients.append(line["grad_norm"])
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-4)


def test_groups_share_a_prompt_and_their_advantages_sum_to_zero(tmp_path: Path) -> None:
    trainer = method_trainer(tmp_path, "skill_sd", num_generations=4)
    trainer.method = trainer.method and replace_verifier(trainer)
    loader = iter(trainer.get_train_dataloader())
    prompts = next(loader)
    assert len(prompts) == 8
    assert [prompt.where for prompt in prompts[:4]] == [prompts[0].where] * 4
    assert prompts[4].where != prompts[0].where
    (batch,), _ = trainer.get_batch_samples(iter([prompts]), 1, torch.device("cpu"))
    advantage = batch["data_advantage"]
    assert advantage.shape == (8,)
    assert advantage[:4].sum().item() == pytest.approx(0, abs=1e-5)
    assert advantage[4:].sum().item() == pytest.approx(0, abs=1e-5)


def test_a_role_of_the_initial_weights_stays_when_the_teacher_moves(tmp_path: Path) -> None:
    trainer = method_trainer(tmp_path, "exopd", teacher="live", learning_rate=0.05, num_generations=2)
    assert trainer.readers is not None
    assert trainer.readers.initial is not trainer.readers.teacher
    batches, _ = trainer.get_batch_samples(iter([trainer.prompts]), 1, torch.device("cpu"))
    before = trainer.readers.read(trainer.student, batches[0], 1.0)[2]
    trainer.train()
    after = trainer.readers.read(trainer.student, batches[0], 1.0)[2]
    name = "reference_logprob"
    torch.testing.assert_close(before[name], after[name])


def test_the_horizon_bounds_the_rollouts_of_a_step(tmp_path: Path) -> None:
    horizon = {"name": "progressive", "start": 1, "grow": 2, "every": 1}
    trainer = method_trainer(tmp_path, "vopd", horizon=json.dumps(horizon), max_steps=3)
    lengths = []
    for step in range(3):
        trainer.state.global_step = step
        batches, _ = trainer.get_batch_samples(iter([trainer.prompts]), 1, torch.device("cpu"))
        lengths.append(int(batches[0]["completion_mask"].sum(1).max()))
    assert lengths[0] == 1
    assert lengths[1] <= 3
    assert lengths[2] <= 5


def test_an_option_moves_with_the_step(tmp_path: Path) -> None:
    schedule = {"coefficient": {"start": 0.5, "end": 0.0, "steps": 4}}
    trainer = method_trainer(tmp_path, "skill_sd", method_schedule=json.dumps(schedule), num_generations=2)
    assert trainer.method is not None
    found = [trainer.method.recipe(step).terms[1].coefficient for step in (0, 1, 4, 9)]
    assert found == [0.5, 0.375, 0.0, 0.0]


@pytest.mark.parametrize(
    ("method", "steps", "published"),
    [
        ("cepo", (0, 10, 25, 40), (0.5, 0.3, 0.0, 0.0)),
        ("rlsd", (0, 10, 25, 50), (0.5, 0.4, 0.25, 0.0)),
    ],
)
def test_lambda_falls_as_published(
    tmp_path: Path, method: str, steps: tuple[int, ...], published: tuple[float, ...]
) -> None:
    """Unless the run names a value, or a schedule, of its own."""

    def mixes(**settings: Any) -> list[float]:
        run = tiny_config(tmp_path, method=method, num_generations=2, **settings).to_method(
            Encoder(TOKENIZER, 64, 64)
        )
        assert run is not None
        return [run.recipe(step).terms[0].loss.options["mix"] for step in steps]  # type: ignore[union-attr]

    assert mixes() == pytest.approx(published)
    assert mixes(method_options={"mix": 0.4}) == [0.4] * 4
    own = {"mix": {"start": 1.0, "end": 0.0, "steps": 50}}
    assert mixes(method_schedule=own) == pytest.approx([1 - min(step, 50) / 50 for step in steps])


def test_reopold_s_second_phase_and_trace_s_end_come_by_themselves(tmp_path: Path) -> None:
    encoder = Encoder(TOKENIZER, 64, 64)
    run = tiny_config(tmp_path, method="reopold").to_method(encoder)
    assert run is not None
    kept = [run.recipe(step).terms[0].weights[0].name for step in (0, 49, 50, 500)]
    assert kept == ["reward_above", "reward_above", "top_entropy", "top_entropy"]
    run = tiny_config(tmp_path, method="trace", num_generations=2).to_method(encoder)
    assert run is not None
    for step, strength in ((0, 0.5), (10, 0.5), (25, 0.25), (40, 0.0)):
        assert run.recipe(step) == methods.recipe("trace", strength=strength)


def test_an_annotator_makes_the_columns_that_nobody_else_can(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="annotator: expected a function that makes the column 'selected'"):
        method_trainer(tmp_path, "tt_opd", num_generations=2).train()
    trainer = method_trainer(tmp_path, "tt_opd", annotator=f"{__name__}:every_other")
    batches, _ = trainer.get_batch_samples(iter([trainer.prompts]), 1, torch.device("cpu"))
    mask, selected = batches[0]["completion_mask"].bool(), batches[0]["data_selected"]
    assert selected.shape == mask.shape
    assert bool(selected[0, 0])
    assert not bool(selected[:, 1].any())


def every_other(texts: list[str], rows: list[dict[str, Any]], rewards: list[float]) -> dict[str, Any]:
    assert len(texts) == len(rows) == len(rewards)
    assert rows[0]["problem"] == "1+2="
    return {"selected": [[i % 2 == 0 for i in range(6)] for _ in texts]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "opsdd"}, "method: expected one of .*did you mean 'opsd'"),
        ({"method": "opsd", "method_options": '{"tau": 1}'}, "opsd: expected options among entry_clip"),
        ({"method": "opsd", "contexts": '{"wrong": "plain"}'}, "contexts: expected roles among teacher"),
        ({"method": "opsd", "contexts": '{"teacher": "rubric"}'}, "the context 'rubric' can tell"),
        ({"method_options": '{"tau": 1}'}, "method_options: expected nothing without a method"),
        ({"method": "opsd", "verifier": "nobody"}, "verifier: expected one of exact"),
        ({"method": "opsd", "horizon": '{"name": "x"}'}, "horizon: expected one of full"),
        ({"num_generations": 0}, "num_generations: expected at least 1"),
        ({"method": "opsd", "entry_clip": 0.1}, r"entry_clip: .*\(it is one of method_options\)"),
        ({"method": "opsd", "objective": "jsd"}, "objective: expected nothing with a method; got 'jsd'"),
        ({"method": "opsd", "method_schedule": "[1]"}, "method_schedule: expected a JSON object"),
        ({"method": "opsd", "method_schedule": '{"beta": 1}'}, "expected start, end, steps .*'beta'; got 1"),
        ({"method": "opsd", "method_schedule": '{"beta": {"start": 1}}'}, "got {'start': 1}"),
    ],
)  # fmt: skip
def test_wrong_options(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(tmp_path, settings)


def made(out: Path, settings: dict[str, Any]) -> OPSDTrainer:
    config = tiny_config(out, **settings)
    return make_trainer(tiny_model(), TOKENIZER, load_rows(ROWS, config.to_templates()), [], config)


def test_needs_are_what_the_functions_ask_for() -> None:
    assert columns(methods.recipe("opsd")) == ()
    assert set(columns(methods.recipe("cepo"))) == {"advantage", "negative_logprob"}
