"""Phase times, the metrics of a step, their sums over ranks, the progress bar, and trackers."""

import contextlib
import io
import math
import re
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState

from driver_tiny import tiny_config, tiny_prompts, tiny_trainer
from opsd_kernels import Hidden, Masses, Sampled, TokenStats
from opsd_train.evaluation.examine import to_metrics
from opsd_train.rollouts import Rollout
from opsd_train.watch.meter import FIELDS, Meter
from opsd_train.watch.metrics import BUCKETS, METRICS, bucket_name, teacher_mass
from opsd_train.watch.phases import PHASES, Phases
from opsd_train.watch.progress import ProgressCallback, make_progress
from opsd_train.watch.trackers import aim
from run_samples import BEFORE
from test_driver_methods import method_trainer, replace_verifier

CPU = torch.device("cpu")


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_a_phase_inside_another_counts_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, phases = Clock(monkeypatch), Phases(CPU)
    for _ in range(2):
        phases.begin_step()
        with phases.phase("rollout"):
            clock.now += 5.0
        with phases.phase("backward"):
            clock.now += 1.0
            for name, seconds in (("teacher", 2.0), ("student", 3.0), ("loss", 0.5)):
                with phases.phase(name):
                    clock.now += seconds
            clock.now += 4.0
        phases.end_step()
        with phases.phase("rollout"):  # an evaluation
            clock.now += 100.0
    assert phases.seconds == {"rollout": 10.0, "teacher": 4.0, "student": 6.0, "loss": 1.0, "backward": 10.0}
    with pytest.raises(ValueError, match=r"phase: expected one of sync, rollout, .*; got 'lunch'"):
        phases.phase("lunch").__enter__()


def test_a_phase_that_fails_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, phases = Clock(monkeypatch), Phases(CPU)
    phases.begin_step()
    with contextlib.suppress(RuntimeError), phases.phase("backward"), phases.phase("loss"):
        clock.now += 1.0
        raise RuntimeError
    with phases.phase("student"):
        clock.now += 2.0
    phases.end_step()
    assert phases.seconds == {"loss": 1.0, "backward": 0.0, "student": 2.0}


class Event:
    """A CUDA event that is read only after the device was waited for."""

    waited = False
    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        Event.made += 1
        self.at = Event.made

    def elapsed_time(self, end: "Event") -> float:
        assert Event.waited
        return 1000.0 * (end.at - self.at)


def test_on_a_gpu_phases_are_events_and_the_device_is_waited_for_once_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[object] = []

    def wait(device: object) -> None:
        Event.waited = True
        waits.append(device)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(Meter, "_reset", lambda meter: vars(meter).update(_busy=0.0, _steps=0))
    meter = Meter(torch.device("cuda"), 8)
    meter.begin_step()
    with meter.phase("backward"), meter.phase("loss"):
        pass
    assert waits == []
    meter.end_step()
    assert len(waits) == 1
    assert meter._phases.seconds == {"loss": 1.0, "backward": 2.0}


def stats_of(kl: torch.Tensor) -> TokenStats:
    return TokenStats(*(kl + at for at in range(len(TokenStats._fields))))


def filled(meter: Meter, seed: int, rows: int) -> Meter:
    """A meter that has seen `rows` completions of up to 40 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 41, (rows,), generator=generator)
    mask = torch.arange(40) < lengths[:, None]
    prompt = tiny_prompts(tiny_config(Path("unused")))[0]
    meter.count([Rollout(prompt, (3,) * int(n), bool(n == 40)) for n in lengths])
    meter.reward([float(n % 2) for n in lengths])
    kl = torch.rand(rows, 40, generator=generator)
    kl[~mask] = math.nan  # what does not count does no harm
    meter.add(stats_of(kl), mask, Masses(kl / 2, kl / 4))
    meter.kl, meter.mask, meter.lengths = kl, mask, lengths
    return meter


def test_means_by_position_of_lengths_and_of_mass() -> None:
    meter = filled(Meter(CPU, 64), 0, 12)
    kl, mask, lengths = meter.kl.double(), meter.mask, meter.lengths
    found = meter.read()
    for bucket in BUCKETS:
        start, end = bucket
        inside = kl[:, start:end][mask[:, start:end]]
        if len(inside):
            assert found[bucket_name(bucket)] == pytest.approx(float(inside.mean()), rel=1e-9)
        else:
            assert bucket_name(bucket) not in found
    assert [bucket_name(bucket) for bucket in BUCKETS][::2] == ["kl_0_8", "kl_32_128", "kl_512_up"]
    assert found["forward_kl"] == pytest.approx(float(kl[mask].mean()))
    assert found["teacher_mass"] == pytest.approx(float(kl[mask].mean()) / 4)
    assert found["student_mass"] == pytest.approx(float(kl[mask].mean()) / 2)
    assert found["completion_length"] == pytest.approx(float(lengths.double().mean()))
    assert (found["completion_length_min"], found["completion_length_max"]) == (lengths.min(), lengths.max())
    assert found["reward"] == pytest.approx(float((lengths % 2).double().mean()))
    assert found.keys() <= METRICS.keys()
    assert all(isinstance(value, float) for value in found.values())
    empty = meter.read()  # it starts anew
    assert not {"forward_kl", "kl_0_8", "reward", "teacher_mass"} & empty.keys()
    assert (empty["completion_length"], empty["completion_length_max"]) == (0.0, 0.0)


def test_three_ranks_read_what_one_would() -> None:
    ranks = [filled(Meter(CPU, 64), seed, rows) for seed, rows in ((0, 5), (1, 2))] + [Meter(CPU, 64)]
    vectors: list[torch.Tensor] = []
    for rank in ranks:
        rank.total = lambda sums: vectors.append(sums) or sums
        rank.read()
    refilled = [filled(Meter(CPU, 64), seed, rows) for seed, rows in ((0, 5), (1, 2))] + [Meter(CPU, 64)]
    alone = Meter(CPU, 64)
    for seed, rows in ((0, 5), (1, 2)):
        filled(alone, seed, rows)
    expected = alone.read()
    for rank in refilled:
        rank.total = lambda sums: torch.stack(vectors).sum(0)
        found = rank.read()
        for name in (*FIELDS, "kl_0_8", "kl_8_32", "kl_32_128", "teacher_mass", "reward", "truncated_share",
                     "completion_length", "completion_length_min", "completion_length_max"):  # fmt: skip
            assert found[name] == pytest.approx(expected[name], rel=1e-12), name


def test_mass_on_the_students_most_likely_tokens() -> None:
    torch.manual_seed(0)
    student, teacher = (
        Hidden(torch.randn(2, 3, 8), torch.randn(30, 8)),
        Hidden(torch.randn(2, 3, 8), torch.randn(30, 8)),
    )
    mask = torch.tensor([[True, True, False], [True, False, False]])
    logits = [source.hidden @ source.weight.T / 0.7 for source in (student, teacher)]
    ids = logits[0].topk(5).indices
    expected = [z.softmax(-1).gather(-1, ids).sum(-1) * mask for z in logits]
    for asked in (teacher, {"teacher": teacher, "plain": student}):
        found = teacher_mass(student, asked, mask, 5, 0.7)
        assert found is not None
        for one, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(one, exact, rtol=1e-5, atol=1e-6)
    whole = teacher_mass(student, teacher, mask, 99, 1.0)
    assert whole is not None
    torch.testing.assert_close(whole.teacher, mask.float())
    assert teacher_mass(student, teacher, mask, 0, 1.0) is None
    assert teacher_mass(student, Sampled(torch.zeros(2, 3), 1.0), mask, 5, 1.0) is None


def test_a_runs_lines_hold_named_plain_numbers_whose_phases_fit_into_the_step(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path, max_steps=4, logging_steps=2, gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 4]
    for entry in logged:
        assert entry.keys() - {"step"} <= METRICS.keys()
        assert all(type(value) in (int, float) and math.isfinite(value) for value in entry.values())
        phases = [entry[f"{name}_seconds"] for name in PHASES]
        assert all(seconds > 0 for seconds in phases)
        assert sum(phases) <= entry["step_seconds"]
        assert sum(phases) >= 0.5 * entry["step_seconds"]
        assert 0 < entry["teacher_mass"] <= entry["student_mass"] + 1e-6 <= 1 + 2e-6
        assert entry["kl_0_8"] == pytest.approx(entry["forward_kl"])  # at most six tokens
        assert 0 < entry["memory_gb"] <= entry["peak_memory_gb"] + 0.01


def test_a_methods_phases_are_counted(tmp_path: Path) -> None:
    trainer = method_trainer(tmp_path, "sdpo", num_generations=4, max_steps=1)
    trainer.method = replace_verifier(trainer)
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert min(logged[f"{name}_seconds"] for name in PHASES) > 0
    assert 0 < logged["teacher_mass"] <= 1
    assert 0 < logged["reward"] < 1
    assert logged.keys() - {"step"} <= METRICS.keys()


def test_the_progress_bar_shows_the_phases_on_a_narrow_terminal() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    callback = ProgressCallback(console)
    args, control = tiny_config(Path("unused")), TrainerControl()
    state = TrainerState(max_steps=100, global_step=5)
    callback.on_train_begin(args, state, control)
    logs = {
        "loss": 0.5,
        "forward_kl": 0.4,
        "student_entropy": 0.62,
        "tokens_per_second": 1e4,
        "memory_gb": 9.9,
    }
    times = {f"{name}_seconds": 10.0 + at for at, name in enumerate(PHASES)} | {"sync_seconds": 0.0}
    callback.on_log(args, state, control, logs=logs | times)
    callback.on_train_end(args, state, control)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    assert "loss 0.500  KL 0.400  H 0.62  10,000 tok/s" in shown
    below = "s/step: rollout 11.00  teacher 12.00  student 13.00  loss 14.00  back"
    assert below in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("terminal", [False, True])
def test_an_evaluation_on_the_way_stays_to_be_read(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
    callback, control = make_progress(console), TrainerControl()
    args, state = tiny_config(Path("unused")), TrainerState(max_steps=100, global_step=20)
    if terminal:
        callback.on_train_begin(args, state, control)
    callback.on_evaluate(args, state, control, metrics=to_metrics(BEFORE))
    callback.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    told = "step 20: held-out accuracy greedy 38.4%  (34.2% to 42.7%)  sampled 30.0%  (26.1% to 34.2%)"
    assert told in [line.strip() for line in shown.splitlines()]


def test_tensorboard_gets_every_metric_in_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    out = tmp_path / "out"
    trainer = tiny_trainer(out, max_steps=2, logging_steps=1, report_to="tensorboard")
    aim(trainer)
    trainer.evaluate()  # before training, as a run does
    trainer.train()
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    tags = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in logged[0].keys() - {"step"}} <= tags
    assert {"eval/greedy_accuracy", "eval/pass_at_1_low"} <= tags
    for name in ("loss", "kl_0_8", "rollout_seconds", "teacher_mass"):
        found = [(one.step, one.value) for one in events.Scalars(f"train/{name}")]
        assert found == [(at, pytest.approx(entry[name])) for at, entry in enumerate(logged, start=1)]
    assert list(elsewhere.iterdir()) == []


def test_a_loss_that_is_not_finite_does_not_stop_a_tracker(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=1, logging_steps=1, report_to="tensorboard")
    aim(trainer)
    with torch.no_grad():
        trainer.teacher.model.lm_head.weight.fill_(torch.nan)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert math.isnan(events.Scalars("train/loss")[0].value)


def test_a_tracker_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report_to: expected none or some of .*; got 'paper'"):
        tiny_config(tmp_path, report_to="paper")
    with pytest.raises(ValueError, match="report_to: expected a tracker that is installed; 'clearml' is not"):
        tiny_config(tmp_path, report_to=["tensorboard", "clearml"])
    assert tiny_config(tmp_path).report_to == []
