"""What the driver tells each teacher of a method by itself, and what it refuses to compare."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from driver_tiny import ROWS, TOKENIZER, tiny_config, tiny_model
from opsd_train.data.rows import load_rows
from opsd_train.evaluation.verify import Verifier
from opsd_train.method import MethodRun
from opsd_train.reading.prompts import Encoder
from opsd_train.train import make_trainer
from opsd_train.trainer import OPSDTrainer
from test_driver_methods import TEMPLATES, method_trainer, replace_verifier

CPU = torch.device("cpu")


def run_of(out: Path, method: str, **settings: Any) -> MethodRun:
    run = tiny_config(out, method=method, **settings).to_method(Encoder(TOKENIZER, 64, 64))
    assert run is not None
    return run


@pytest.mark.parametrize("method", ["gkd", "tip", "vopd", "exopd"])
def test_another_model_reads_what_the_student_reads(tmp_path: Path, method: str) -> None:
    other = run_of(tmp_path, method, teacher="model", teacher_model="somewhere")
    assert other.roles.contexts["teacher"].name == "plain"
    assert run_of(tmp_path, method).roles.contexts["teacher"].name == "full_solution"
    told = run_of(
        tmp_path, method, teacher="model", teacher_model="somewhere", contexts={"teacher": "answer_only"}
    )
    assert told.roles.contexts["teacher"].name == "answer_only"


def test_another_model_is_told_what_its_method_names(tmp_path: Path) -> None:
    run = run_of(tmp_path, "opsd", teacher="model", teacher_model="somewhere")
    assert run.roles.contexts["teacher"].name == "full_solution"


def test_a_method_without_a_teacher_needs_no_solutions(tmp_path: Path) -> None:
    assert run_of(tmp_path, "acpo", num_generations=2).roles.contexts["teacher"].name == "plain"


def test_both_streams_of_sdpo_s_trust_region_read_the_demonstration(tmp_path: Path) -> None:
    trainer = method_trainer(
        tmp_path,
        "sdpo",
        method_options={"trust_region": 0.1},
        teacher="live",
        num_generations=4,
        temperature=5.0,
    )
    judge = Once()
    trainer.method = replace(trainer.method, verifier=Verifier("once", judge))  # type: ignore[type-var]
    (batch,), _ = trainer.get_batch_samples(iter([[trainer.prompts[2]] * 8]), 1, CPU)
    # The one that is right has no sibling to learn from.
    assert batch["data_privileged"].tolist() == [reward == 0 for reward in judge.rewards]
    assert sum(judge.rewards) == 1
    torch.testing.assert_close(batch["initial_input_ids"], batch["privileged_input_ids"])
    assert batch["initial_input_ids"].shape[1] > batch["input_ids"].shape[1]
    assert trainer.readers is not None
    assert trainer.readers.initial is not trainer.readers.teacher
    assert torch.isfinite(trainer.compute_loss(trainer.student, batch, num_items_in_batch=1))


class Once:
    """A reward of 1 for the first rollout that says anything, 0 for the others."""

    def __init__(self) -> None:
        self.rewards: list[float] = []

    def __call__(self, completion: str, answer: str | None) -> float:
        self.rewards.append(float(bool(completion.strip()) and 1.0 not in self.rewards))
        return self.rewards[-1]


def test_a_rollout_without_a_wrong_answer_has_the_teacher_s_own_evidence(tmp_path: Path) -> None:
    """CEPO's weight is 1 there (2605.19436): the ratio of the teacher's probability to itself."""
    rows = [{**row, "wrong_answer": "4"} if i == 0 else row for i, row in enumerate(ROWS)]
    config = tiny_config(
        tmp_path, method="cepo", context_templates=TEMPLATES, verifier="exact", num_generations=2
    )
    trainer = make_trainer(tiny_model(), TOKENIZER, load_rows(rows, config.to_templates(), False), [], config)
    trainer.method = replace(trainer.method, verifier=Verifier("right", lambda c, a: 1.0))  # type: ignore[type-var]
    (batch,), _ = trainer.get_batch_samples(iter([trainer.prompts[:3]]), 1, CPU)
    assert batch["wrong_privileged"].tolist() == [True, False, False]
    assert trainer.readers is not None
    mask = batch["completion_mask"].bool()
    _, teachers, data = trainer.readers.read(trainer.student, batch, 1.0)
    ids = batch["input_ids"][:, -mask.shape[1] :]
    teacher = teachers["teacher"]
    log_t = (teacher.hidden @ teacher.weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    same = (data["negative_logprob"] - log_t).abs()
    assert float(same[1:][mask[1:]].max()) < 1e-5
    assert float(same[0][mask[0]].max()) > 1e-3


def test_scope_s_paths_are_divided_by_their_tokens_of_the_whole_step(tmp_path: Path) -> None:
    """A micro-batch may have few right rollouts, or none: what it holds of a path is no share of its own."""
    found = []
    for size, parts in ((8, 1), (4, 2)):
        trainer = method_trainer(
            tmp_path, "scope", num_generations=4, per_device_train_batch_size=size, temperature=5.0,
            gradient_accumulation_steps=parts, max_grad_norm=1e9, learning_rate=0.0, max_steps=1,
        )  # fmt: skip
        trainer.method = replace(trainer.method, verifier=Verifier("once", Once()))  # type: ignore[type-var]
        trainer.train()
        (line,) = [x for x in trainer.state.log_history if "loss" in x]
        found.append((line["loss"], line["grad_norm"]))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize(("start", "end"), [(0.1, 0.0), (0.0, 0.1)])
def test_a_coefficient_may_end_or_begin_at_zero(tmp_path: Path, start: float, end: float) -> None:
    """The term is left out where it is 0, and with it a teacher."""
    trainer = method_trainer(
        tmp_path, "pi_play", num_generations=4, max_steps=3,
        method_schedule={"kl": {"start": start, "end": end, "steps": 2}},
    )  # fmt: skip
    trainer.method = replace_verifier(trainer)
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("rlsd", {}, "num_generations: expected at least 2 for method 'rlsd'"),
        ("sdpo", {}, "num_generations: expected at least 2 for method 'sdpo'"),
        ("rlsd", {"num_generations": 3}, "expected a divisor of the 8 rollouts of a step.*got 3"),
        (
            "scope",
            {"num_generations": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
            r"per_device_train_batch_size: expected a multiple of num_generations \(4\).*got 2",
        ),
        ("selfci", {}, "the roles 'integrity' and 'utility' to read different contexts; got 'feedback'"),
    ],
)
def test_what_could_not_be_compared_is_refused(
    tmp_path: Path, method: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_of(tmp_path, method, **settings)


def test_groups_are_whole_where_they_are_compared(tmp_path: Path) -> None:
    settings = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert run_of(tmp_path, "scope", **settings).key == "scope"
    own = {"teacher": {"name": "sibling", "own_success": True}}
    assert run_of(tmp_path, "sdpo", contexts=own).key == "sdpo"


def test_the_teacher_s_template_is_that_of_the_context(tmp_path: Path) -> None:
    plain = trainer_of(tmp_path, method=None)
    method = trainer_of(tmp_path, method="opsd", objective="forward_kl")
    (expected,), _ = plain.get_batch_samples(iter([plain.prompts]), 1, CPU)
    (found,), _ = method.get_batch_samples(iter([method.prompts]), 1, CPU)
    torch.testing.assert_close(found["teacher_input_ids"], expected["teacher_input_ids"])


def trainer_of(out: Path, **settings: Any) -> OPSDTrainer:
    config = tiny_config(out, **settings)
    return make_trainer(tiny_model(), TOKENIZER, load_rows(ROWS, config.to_templates()), [], config)


def test_the_half_of_a_solution_does_not_state_the_answer(tmp_path: Path) -> None:
    """AVSD's second view (2605.20643) is the first half; its third is the answer."""
    contexts = run_of(tmp_path, "avsd").roles.contexts
    assert "{answer}" not in contexts["view2"].options["template"]
    assert "{steps}" in contexts["view2"].options["template"]
