"""Pieces beside the loss through the trainer: exposure, turns and the length gate, the sub-network."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from driver_tiny import ROWS, TOKENIZER, tiny_config, tiny_model, tiny_trainer
from opsd_train.commands.options import parse
from opsd_train.config import OPSDConfig
from opsd_train.data.rows import load_rows
from opsd_train.loading import with_lora
from opsd_train.pieces.config import PiecesConfig
from opsd_train.pieces.exposure import EXPOSURE_FILE, ExposureSettings
from opsd_train.pieces.horizon import Counting, Turns
from opsd_train.run_options import RunOptions
from opsd_train.train import make_trainer
from opsd_train.trainer import OPSDTrainer

STEPS = [
    {"problem": "1+2=", "solution": "1+2\n\n=3\n\n3\n\n3", "answer": "3"},
    {"problem": "10+20=", "solution": "10\n\n+20\n\n=\n\n30", "answer": "30"},
    {"problem": "5+5=", "answer": "10"},
    {"problem": "9+1=", "solution": "9\n\n+1\n\n=10\n\n10", "answer": "10"},
]
LINES = copy.deepcopy(TOKENIZER)  # steps are told in paragraphs
LINES.add_tokens(["\n"])
TEMPLATES = {"partial_solution": "{steps};{problem}", "full_solution": "{solution};{problem}"}


def method_trainer(
    out: Path, rows: list[dict[str, str]] = STEPS, method: str = "atesd", **settings: Any
) -> OPSDTrainer:
    given = {"per_device_train_batch_size": 4, "logging_steps": 1}
    config = tiny_config(out, method=method, context_templates=TEMPLATES, **(given | settings))
    return make_trainer(tiny_model(), LINES, load_rows(rows, config.to_templates(), False), [], config)


def exposure_of(trainer: OPSDTrainer) -> Any:
    assert trainer.pieces.exposure is not None
    return trainer.pieces.exposure


def test_exposure_sets_what_the_teacher_reads(tmp_path: Path) -> None:
    trainer = method_trainer(tmp_path, exposure='{"hold": 1}')
    for alpha, shown in ((0.5, "1+2\n\n=3"), (0.76, "1+2\n\n=3\n\n3")):
        exposure_of(trainer).controller.alpha = alpha
        (batch,), _ = trainer.get_batch_samples(iter([trainer.prompts]), 1, torch.device("cpu"))
        length = batch["completion_mask"].shape[1]
        live = batch["teacher_attention_mask"][0, :-length].bool()
        read = batch["teacher_input_ids"][0, :-length][live].tolist()
        chat = [{"role": "user", "content": f"{shown};1+2="}]
        assert read == LINES.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


def test_controller_hears_loss_and_reference(tmp_path: Path) -> None:
    """However the step is cut: the mean loss, and the solutions' log-probs one sequence at a time."""
    heard = []
    for size, parts in ((4, 1), (1, 4)):
        trainer = method_trainer(
            tmp_path, exposure={"hold": 5}, max_steps=1, per_device_train_batch_size=size,
            gradient_accumulation_steps=parts, learning_rate=0.0, seed=3,
        )  # fmt: skip
        exposure = exposure_of(trainer)
        alpha, model = 0.6, tiny_model().eval()
        exposure.controller.alpha = alpha
        total, count = 0.0, 0
        for row in STEPS:
            if "solution" not in row:
                continue
            parts_of = row["solution"].split("\n\n")
            shown = "\n\n".join(parts_of[: int(alpha * 4)])
            chat = [{"role": "user", "content": f"{shown};{row['problem']}"}]
            prompt = LINES.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            answer = LINES(row["solution"], add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                z = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            total += z.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()
            count += len(answer)
        trainer.train()
        (line,) = [x for x in trainer.state.log_history if "loss" in x]
        assert exposure.controller.losses == pytest.approx([line["loss"]], abs=1e-4)
        # The row without a solution has no reference.
        assert exposure.controller.references == pytest.approx([total / count], rel=1e-4)
        assert line["exposure"] == alpha
        heard.append(exposure.controller.losses[0])
    assert heard[0] == pytest.approx(heard[1], rel=1e-5)


def test_exposure_without_a_reference_reads_none(tmp_path: Path) -> None:
    trainer = method_trainer(tmp_path, exposure={"hold": 9, "reference": 0}, max_steps=2)
    trainer.train()
    assert exposure_of(trainer).controller.references == [0.0, 0.0]


def test_exposure_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    settings = {"exposure": {"hold": 2, "horizon": 9}, "save_strategy": "steps", "save_steps": 3}
    whole = method_trainer(tmp_path / "whole", max_steps=7, **settings)
    whole.train()
    assert (tmp_path / "whole" / "checkpoint-3" / EXPOSURE_FILE).is_file()
    resumed = method_trainer(tmp_path / "whole", max_steps=7, **settings)
    resumed.train(tmp_path / "whole" / "checkpoint-3")
    ends = [exposure_of(one).controller for one in (whole, resumed)]
    assert ends[0].alpha == ends[1].alpha
    assert ends[0].state == pytest.approx(ends[1].state)
    assert ends[0].steps == ends[1].steps == 7


def codes(texts: list[str], rows: list[dict[str, Any]], rewards: list[float]) -> dict[str, Any]:
    """Two tokens a turn."""
    return {"turn": [[0, 0, 1, 1, 2, 2] for _ in texts]}


def no_turns(texts: list[str], rows: list[dict[str, Any]], rewards: list[float]) -> dict[str, Any]:
    return {"selected": [[True] * 6 for _ in texts]}


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_turns_that_count_grow(tmp_path: Path, order: str) -> None:
    trainer = method_trainer(
        tmp_path, ROWS, "opsd", annotator=f"{__name__}:codes", per_device_train_batch_size=8,
        turns=json.dumps({"start": 1, "every": 2, "order": order}),
    )  # fmt: skip
    for step, count in ((0, 1), (1, 1), (2, 2)):
        trainer.state.global_step = step
        (batch,), _ = trainer.get_batch_samples(iter([trainer.prompts]), 1, torch.device("cpu"))
        lengths = batch["completion_mask"].sum(1).tolist()
        assert len(set(lengths)) > 1
        expected = [
            [
                t < n and (t // 2 < count if order == "forward" else t // 2 > (n - 1) // 2 - count)
                for t in range(max(lengths))
            ]
            for n in lengths
        ]
        assert batch["counted"].tolist() == expected
        assert int(batch["count_tokens"]) == sum(map(sum, expected))


@pytest.mark.parametrize("method", ["opsd", None])
@pytest.mark.parametrize("size", [8, 2])
def test_long_rollouts_do_not_count(tmp_path: Path, method: str | None, size: int) -> None:
    """The loss of a gated step is that of its short rollouts alone."""
    settings = {"logging_steps": 1, "learning_rate": 0.0, "max_steps": 1, "method": method, "seed": 5}
    settings |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    if method is not None:
        settings["context_templates"] = TEMPLATES
    config = tiny_config(tmp_path, length_gate=3, **settings)
    rows = load_rows(ROWS, config.to_templates())
    trainer = make_trainer(tiny_model(), TOKENIZER, rows, [], config)
    batches = [trainer.prompts[i : i + size] for i in range(0, 8, size)]
    made, tokens = trainer.get_batch_samples(iter(batches), 8 // size, torch.device("cpu"))
    loss = sum(trainer.compute_loss(trainer.student, one, num_items_in_batch=tokens).item() for one in made)
    model, total, count = tiny_model().eval(), 0.0, 0
    rollouts = trainer.roll_out(trainer.prompts, trainer.sampling, (0, 0))
    assert {len(one.completion) > 3 for one in rollouts} == {True, False}
    for row, one in zip(ROWS, rollouts, strict=True):
        if len(one.completion) > 3:
            continue
        logs = []
        for text in (row["problem"], f"{row['solution']};{row['problem']}"):
            chat = [{"role": "user", "content": text}]
            prompt = TOKENIZER.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            with torch.no_grad():
                z = model(torch.tensor([[*prompt, *one.completion]])).logits[0, len(prompt) - 1 : -1]
            logs.append(z.log_softmax(-1))
        s, t = logs
        terms = t.exp() * (t - s)
        total += (terms.clamp(max=0.05) if method else terms).sum().item()
        count += len(one.completion)
    assert loss == pytest.approx(total / count, rel=1e-4)


def test_sub_network_alone_moves(tmp_path: Path) -> None:
    full = tiny_trainer(tmp_path / "full", learning_rate=1e-2)
    full.train()
    (tmp_path / "run").mkdir()
    full.student.save_pretrained(tmp_path / "run" / "model")
    before = dict(tiny_model().named_parameters())
    distance = {name: (one - before[name]).abs() for name, one in full.student.named_parameters()}
    ranked = torch.cat([one.flatten() for one in distance.values()]).sort(descending=True).values
    bound = ranked[round(0.1 * len(ranked)) - 1]
    for folder in ("run", "run/model"):
        trainer = tiny_trainer(
            tmp_path / "sub", subnetwork=str(tmp_path / folder), subnetwork_share=0.1, teacher="ema",
        )  # fmt: skip
        trainer.train()
        moved = {name: one != before[name] for name, one in trainer.student.named_parameters()}
        assert not any(bool((one & (distance[name] < bound)).any()) for name, one in moved.items())
        assert sum(int(one.sum()) for one in moved.values()) > 0.05 * len(ranked)


def test_sub_networks_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="subnetwork: checkpoint: expected safetensors in"):
        tiny_trainer(tmp_path, subnetwork=str(tmp_path / "none"))
    tiny_model().save_pretrained(tmp_path / "same")
    with pytest.raises(ValueError, match="subnetwork: after: expected weights that differ"):
        tiny_trainer(tmp_path, subnetwork=str(tmp_path / "same"))
    with pytest.raises(ValueError, match="subnetwork: expected a model without adapters"):
        tiny_trainer(tmp_path, with_lora(tiny_model(), 2, 4.0, 0.0), subnetwork=str(tmp_path / "same"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exposure": "{}"}, "exposure: expected a method; got none"),
        ({"exposure": '{"hold": 0}', "method": "atesd"}, "exposure: hold: expected at least 1; got 0"),
        ({"exposure": '{"held": 1}', "method": "atesd"}, "exposure: expected options among hold, .*'held'"),
        ({"exposure": "[]", "method": "atesd"}, r"exposure: expected a JSON object, got '\[\]'"),
        ({"exposure": "{}", "method": "opsd"}, "exposure: expected a role with the context 'partial_solut"),
        ({"turns": "{}", "method": "opsd"}, "turns: expected an annotator that makes the column 'turn'"),
        ({"turns": "{}"}, "turns: expected a method; got none"),
        ({"turns": '{"start": 0}', "method": "opsd"}, "turns: expected start >= 1"),
        ({"turns": '{"order": "f2b"}', "method": "opsd"}, "turns: expected an order among forward, backward"),
        ({"length_gate": 0}, "length_gate: expected at least 1; got 0"),
        ({"subnetwork_share": 0.0}, "subnetwork_share: expected a number above 0, at most 1; got 0.0"),
        ({"subnetwork": "x", "weight_decay": 0.1}, "subnetwork: expected weight_decay 0, .*; got 0.1"),
    ],
)
def test_wrong_options(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(tmp_path, settings)


def made(out: Path, settings: dict[str, Any]) -> OPSDTrainer:
    templates = {"context_templates": TEMPLATES} if "method" in settings else {}
    config = tiny_config(out, **templates, **settings)
    return make_trainer(tiny_model(), TOKENIZER, load_rows(ROWS, config.to_templates()), [], config)


def test_annotator_without_turns_is_an_error(tmp_path: Path) -> None:
    trainer = method_trainer(tmp_path, ROWS, "opsd", annotator=f"{__name__}:no_turns", turns="{}")
    with pytest.raises(ValueError, match="turns: expected an annotator that makes the column 'turn'"):
        trainer.train()


def test_options_from_yaml_and_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    lines = ("model: here", "data: rows", "use_cpu: true", "exposure: {}", "method: atesd", "max_steps: 30")
    path.write_text("\n".join([*lines, "seed: 5"]))
    given = ["--turns", '{"every": 3}', "--annotator=a:b", "--length-gate", "7", "--extrapolate=4"]
    _, config = parse([RunOptions, OPSDConfig], [path], given, [f"--output_dir={tmp_path}"])
    assert config.to_exposure() == ExposureSettings(horizon=30, seed=5)
    assert config.to_counting() == Counting(Turns(every=3), 7)
    assert config.extrapolate == 4
    assert config.to_private() is None
    given = ["--private", '{"noise": 2}', "--exposure", '{"horizon": 8}']
    with pytest.raises(ValueError, match="private: expected exposure None, since epsilon does not cover it"):
        parse([RunOptions, OPSDConfig], [path], given, [f"--output_dir={tmp_path}"])


def test_every_option_says_what_it_is() -> None:
    for name in PiecesConfig.__annotations__:
        assert PiecesConfig.__dataclass_fields__[name].metadata["help"].endswith((".", '").'))
