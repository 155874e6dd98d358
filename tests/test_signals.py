"""SIGTERM anywhere in a run: the last complete step is kept, ranks end together, and nothing else changes."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from driver_tiny import tiny_model, tiny_trainer
from opsd_train.loading import with_lora
from opsd_train.rollouts import Vocabulary
from opsd_train.safety import stops
from opsd_train.trainer import OPSDTrainer

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 5, "logging_steps": 1,
    "teacher": "ema", "ema_decay": 0.5,
}  # fmt: skip


def trainer_of(out: Path, **settings: Any) -> OPSDTrainer:
    """Dropout, so that the global random state matters."""
    torch.manual_seed(0)
    return tiny_trainer(out, with_lora(tiny_model(), 2, 4, 0.5), **(SETTINGS | settings))


def weights(trainer: OPSDTrainer) -> list[torch.Tensor]:
    return [one.detach().clone() for one in trainer.student.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> OPSDTrainer:
    trainer = trainer_of(tmp_path_factory.mktemp("undisturbed"))
    trainer.train()
    return trainer


def interrupt(signum: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), signum)


class At(TrainerCallback):
    """The signal at the moment that a callback's event is called for the n-th time."""

    def __init__(self, event: str, count: int, signum: int = signal.SIGTERM) -> None:
        self.left, self.signum = count, signum
        setattr(self, event, self.strike)

    def strike(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            interrupt(self.signum)


@pytest.mark.parametrize(
    ("event", "count", "step"),
    [
        ("on_substep_end", 7, 2),  # the first part of step 3
        ("on_pre_optimizer_step", 3, 3),  # the gradient is there: the step is as good as done
        ("on_step_end", 3, 3),
        ("on_log", 3, 3),
    ],
)
def test_half_a_step_is_dropped_and_done_again(
    tmp_path: Path, undisturbed: OPSDTrainer, event: str, count: int, step: int
) -> None:
    trainer = trainer_of(tmp_path)
    trainer.add_callback(At(event, count))
    said = rf"stopped by SIGTERM after step {step}, which .*-{step} holds; .*last"
    with pytest.raises(stops.Stopped, match=said), stops.watched(trainer):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    resumed = trainer_of(tmp_path)
    resumed.train(True)
    assert resumed.state.global_step == 5
    assert same(weights(resumed), weights(undisturbed))
    first, second = (
        {line["step"]: line["loss"] for line in one.state.log_history if "loss" in line}
        for one in (resumed, undisturbed)
    )
    assert first == second
    assert same(list(resumed.teacher.average.values()), list(undisturbed.teacher.average.values()))


def test_loss_of_half_a_step_is_not_logged(tmp_path: Path) -> None:
    """The checkpoint has the loss of the steps since the last line, and nothing of the one dropped."""
    whole = trainer_of(tmp_path / "whole", logging_steps=4)
    whole.train()
    trainer = trainer_of(tmp_path, logging_steps=4)
    trainer.add_callback(At("on_substep_end", 8))
    with pytest.raises(stops.Stopped, match="after step 2"), stops.watched(trainer):
        trainer.train()
    resumed = trainer_of(tmp_path, logging_steps=4)
    resumed.train(True)
    first, second = (
        [(line["step"], line["loss"]) for line in one.state.log_history if "loss" in line]
        for one in (resumed, whole)
    )
    assert first == second
    assert [step for step, _ in first] == [1, 4, 5]


def strike_while_generating(trainer: OPSDTrainer, when: Callable[[], bool]) -> list[int]:
    """The signal at the first token for which `when` holds; returns what counts the tokens from there on."""
    after = [0]
    generate = trainer.student.get_base_model().prepare_inputs_for_generation

    def counted(*args: Any, **kwargs: Any) -> Any:
        if not after[0] and when():
            interrupt()
        after[0] += bool(after[0]) or stops.requested() is not None
        return generate(*args, **kwargs)

    trainer.student.get_base_model().prepare_inputs_for_generation = counted
    return after


def test_rollouts_stop_at_the_next_token(tmp_path: Path) -> None:
    def long_winded(out: Path) -> OPSDTrainer:
        trainer = trainer_of(out, generation_batch_size=2)
        trainer.engine.vocabulary = Vocabulary(0, (1,))  # so that completions rarely end
        return trainer

    trainer = long_winded(tmp_path)
    after = strike_while_generating(trainer, lambda: trainer.state.global_step == 2)
    with pytest.raises(stops.Stopped, match="after step 2"), stops.watched(trainer):
        trainer.train()
    assert after == [1]  # of 6
    resumed = long_winded(tmp_path)
    resumed.train(True)
    whole = long_winded(tmp_path / "whole")
    whole.train()
    assert same(weights(resumed), weights(whole))


def test_evaluation_stops_and_its_step_is_kept(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, eval_strategy="steps", eval_steps=2)
    evaluated: list[int] = []
    evaluate = trainer.evaluate

    def noted(*args: Any, **kwargs: Any) -> Any:
        evaluated.append(trainer.state.global_step)
        return evaluate(*args, **kwargs)

    trainer.evaluate = noted  # type: ignore[method-assign]
    after = strike_while_generating(trainer, lambda: evaluated == [2, 4])
    with pytest.raises(stops.Stopped, match="after step 4"), stops.watched(trainer):
        trainer.train()
    assert after == [1]
    assert (tmp_path / "checkpoint-4" / "ema_teacher.safetensors").is_file()


def test_signal_in_a_step_spares_its_evaluation(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, eval_strategy="steps", eval_steps=1, logging_steps=9)
    trainer.add_callback(At("on_step_end", 1))
    with pytest.raises(stops.Stopped, match="after step 1"), stops.watched(trainer):
        trainer.train()
    assert [sorted(line) for line in trainer.state.log_history if "eval_runtime" in line] == []
    assert trainer.state.log_history[0]["step"] == 1  # its metrics are not lost


def test_last_step_is_kept_without_a_save_strategy(tmp_path: Path) -> None:
    """After training too, when what follows it is stopped."""
    trainer = trainer_of(tmp_path, max_steps=2)

    def run() -> None:
        trainer.train()
        interrupt()
        trainer.evaluate()

    with pytest.raises(stops.Stopped, match="after step 2"), stops.watched(trainer):
        run()
    resumed = trainer_of(tmp_path, max_steps=2)
    resumed.train(True)
    assert same(weights(resumed), weights(trainer))


def test_nothing_is_saved_before_a_step_is_complete(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.add_callback(At("on_substep_end", 2))
    with pytest.raises(stops.Stopped, match="before a step was complete") as stopped, stops.watched(trainer):
        trainer.train()
    assert (stopped.value.code, stopped.value.checkpoint) == (143, None)
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_checkpoint_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=1)
    trainer.add_callback(At("on_substep_end", 5))
    saved: list[int] = []
    save = trainer._save_checkpoint
    trainer._save_checkpoint = lambda *args, **kwargs: (
        saved.append(trainer.state.global_step) or save(*args, **kwargs)
    )
    with pytest.raises(stops.Stopped, match="after step 1"), stops.watched(trainer):
        trainer.train()
    assert saved == [1]


def test_search_along_the_weights_path_is_not_left_half_way(tmp_path: Path) -> None:
    settings = {"extrapolate": 3, "max_steps": 2, "per_device_train_batch_size": 1, "logging_steps": 1}
    whole = tiny_trainer(tmp_path / "whole", **settings)
    whole.train()
    trainer = tiny_trainer(tmp_path, **settings)
    score = trainer.pieces.extrapolation.score
    trainer.pieces.extrapolation.score = lambda: interrupt() or score()
    with pytest.raises(stops.Stopped, match="after step 1"), stops.watched(trainer):
        trainer.train()
    resumed = tiny_trainer(tmp_path, **settings)
    resumed.train(True)
    assert same(weights(resumed), weights(whole))


def test_second_sigint_leaves_at_once(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    before = [signal.getsignal(signum) for signum in stops.SIGNALS]
    with stops.watched(trainer):
        interrupt(signal.SIGINT)
        assert stops.requested() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            interrupt(signal.SIGINT)
        interrupt()
        with pytest.raises(stops.Stopped) as stopped, stops.agreed():
            pass
        assert stopped.value.code == 130  # the first one counts
    assert [signal.getsignal(signum) for signum in stops.SIGNALS] == before
    assert stops.requested() is None
    with stops.agreed():
        stops.check()


def test_handlers_are_the_main_thread_s_alone(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    before = [signal.getsignal(signum) for signum in stops.SIGNALS]
    seen: list[Any] = []

    def elsewhere() -> None:
        with stops.watched(trainer):
            seen.append([signal.getsignal(signum) for signum in stops.SIGNALS])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]
    with stops.watched(trainer):
        with pytest.raises(RuntimeError, match="one run at a time"), stops.watched(trainer):
            pass
        child = os.fork()
        if child == 0:
            interrupt()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert stops.requested() is None
        with stops.deferred():
            interrupt()
            assert stops.requested() is None
            with stops.agreed():
                stops.check()
        assert stops.requested() == signal.SIGTERM
