"""Published options by name: what they say, what beats them, and that they build what they name."""

import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from driver_tiny import ROWS, TOKENIZER, tiny_config, tiny_model
from opsd_train.commands.main import app
from opsd_train.commands.options import layers, parse
from opsd_train.commands.presets import names, preset
from opsd_train.config import OPSDConfig
from opsd_train.data.rows import load_rows
from opsd_train.demo.run import PRESET
from opsd_train.demo.run import presets as demo_presets
from opsd_train.reading.prompts import Encoder
from opsd_train.run_options import RunOptions
from opsd_train.train import make_trainer

THINKING = (
    "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %};{% endif %}{% endif %}"
)


def of(
    name: str | None, tmp_path: Path, *words: str, yaml: str | None = None
) -> tuple[RunOptions, OPSDConfig]:
    config = None
    if yaml is not None:
        config = tmp_path / "config.yaml"
        config.write_text(yaml)
    given = ["--model=m", "--data=d", f"--output_dir={tmp_path}", "--use_cpu", *words]
    options, settings = parse([RunOptions, OPSDConfig], layers(name, config), given)
    return options, settings


def test_opsd_is_the_published_run(tmp_path: Path) -> None:
    options, config = of("opsd", tmp_path)
    assert (options.lora_rank, options.lora_alpha) == (64, 128)
    objective = config.to_objective()
    assert (objective.divergence, objective.entry_clip, objective.clip_mode) == ("forward_kl", 0.05, "zero")
    assert (config.temperature, config.loss_temperature, config.top_p, config.top_k) == (1.1, 1.1, 0.95, 20)
    assert (config.learning_rate, config.max_grad_norm) == (5e-6, 0.1)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 32
    assert (config.max_completion_length, config.max_steps) == (1024, 100)
    assert (config.eval_steps, config.save_steps) == (20, 20)
    assert config.to_teacher().kind == "initial"
    assert config.student_chat_kwargs == {"enable_thinking": False}
    assert config.teacher_chat_kwargs == {"enable_thinking": True}


def test_command_line_beats_yaml_beats_preset(tmp_path: Path) -> None:
    yaml = "top_k: 5\nmax-steps: 7\nstudent_thinking: null\nteacher_thinking: null\n"
    _, config = of("opsd", tmp_path, "--max-steps", "9", "--student-thinking", "true", yaml=yaml)
    assert (config.top_k, config.max_steps, config.top_p) == (5, 9, 0.95)
    assert config.student_chat_kwargs == {"enable_thinking": True}
    assert config.teacher_chat_kwargs == {}  # null takes back what the preset says
    with pytest.raises(ValueError, match=r"preset: expected one of opsd, .*; got 'opds'; did you mean opsd"):
        of("opds", tmp_path)


@pytest.mark.parametrize("name", names())
def test_every_preset_builds_its_trainer(tmp_path: Path, name: str) -> None:
    one = preset(name)
    assert "arXiv 26" in one.source
    assert one.about
    assert one.notes
    _, config = of(name, tmp_path, "--student_template={problem}", "--teacher_template={solution};{problem}")
    if config.method is not None:
        told = {"full_solution": "solution", "answer_only": "answer", "sibling": "demonstration"}
        config.context_templates = {key: f"{{{name}}};{{problem}}" for key, name in told.items()}
    config.max_prompt_length, config.max_completion_length = 32, 6  # the tiny model has few positions
    rows = load_rows(ROWS, config.to_templates(), config.method is None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer = make_trainer(tiny_model(), TOKENIZER, rows, [], config)
    assert len(trainer.prompts) == len(ROWS)
    assert (trainer.method is None) == ("method" not in one.options)


def test_presets_of_mathematics_judge_mathematics(tmp_path: Path) -> None:
    assert {name: of(name, tmp_path)[1].eval_match for name in names()} == dict.fromkeys(names(), "math")
    assert of("opsd", tmp_path, "--eval-match=number")[1].eval_match == "number"
    assert of(None, tmp_path)[1].eval_match == "exact"


def test_context_templates_without_a_method_are_refused(tmp_path: Path) -> None:
    message = r"context_templates: without --method, .* --teacher-template .* or --context-template"
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, context_templates={"full_solution": "{solution};{problem}"})
    templates = {"full_solution": "{solution}"}
    assert tiny_config(tmp_path, method="opsd", context_templates=templates).context_templates == templates


def test_demo_has_templates_of_contexts_with_a_method_alone() -> None:
    assert demo_presets(["--max_steps=3"]) == [PRESET]
    assert demo_presets(["--seed=1", "--method", "opsd"]) == demo_presets(["--method=opsd"])
    for words, templates in ([], 0), (["--method=opsd"], 4):
        (config,) = parse([OPSDConfig], demo_presets(words), [*words, "--output_dir=x"])
        assert len(config.context_templates or ()) == templates


def test_presets_are_listed_with_their_sources() -> None:
    result = CliRunner().invoke(app, ["presets"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for name in names():
        assert name in result.output
    assert "2601.18734" in result.output
    result = CliRunner().invoke(app, ["presets", "opsd"], env={"COLUMNS": "200"})
    assert "entry_clip" in result.output
    assert CliRunner().invoke(app, ["presets", "opds"]).exit_code == 2


def test_switches_are_independent_and_reach_the_prompts(tmp_path: Path) -> None:
    tokenizer = type(TOKENIZER).from_pretrained(_saved(tmp_path))
    tokenizer.chat_template = THINKING
    config = tiny_config(tmp_path, student_thinking=False, teacher_thinking=True)
    (prompt,) = Encoder.of(tokenizer, config).encode(load_rows(ROWS[:1], config.to_templates()))
    assert tokenizer.decode(prompt.student_ids) == "<|user|>1+2=<|assistant|>;"
    assert tokenizer.decode(prompt.teacher_ids) == "<|user|>3;1+2=<|assistant|>"
    assert Encoder.of(tokenizer, config).ignored_switches() == []


def test_switch_against_chat_kwargs_is_an_error(tmp_path: Path) -> None:
    kwargs = '{"enable_thinking": true, "other": 1}'
    config = tiny_config(tmp_path, student_thinking=True, student_chat_kwargs=kwargs)
    assert config.student_chat_kwargs == {"enable_thinking": True, "other": 1}
    with pytest.raises(ValueError, match="student_thinking: expected what student_chat_kwargs says, True"):
        tiny_config(tmp_path, student_thinking=False, student_chat_kwargs=kwargs)


def test_template_without_the_switch_is_warned_of(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, teacher_thinking=True)
    rows = load_rows(ROWS, config.to_templates())
    with pytest.warns(UserWarning, match="teacher_thinking: the tokenizer's chat template has no switch"):
        make_trainer(tiny_model(), TOKENIZER, rows, [], config)


def _saved(folder: Path) -> Path:
    TOKENIZER.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"
