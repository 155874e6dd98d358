"""What judges completions only reads them: no text of a model or of a data set is run as code."""

import ast
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym

from driver_tiny import TOKENIZER, tiny_config
from opsd_train.data import generated
from opsd_train.data.rows import load_rows
from opsd_train.evaluation.judge import same_mathematics
from opsd_train.evaluation.verify import Verifier
from opsd_train.reading.prompts import Encoder, Prompt, Templates

TEMPLATES = Templates("{problem}", "{solution};{problem}")
RUN = {"eval", "exec", "parse_expr", "sympify"}
# Files of the package that run text, but none that `score` gives them: when problems are made, or by a
# function of the same name that is the package's own.
NOT_OF_SCORES = {
    "arithmetic/basic_arithmetic.py", "arithmetic/gsm_symbolic/generators_00_49.py",
    "arithmetic/gsm_symbolic/generators_50_99.py", "code/codeio.py", "logic/propositional_logic.py",
}  # fmt: skip


def row_of(task: str) -> dict[str, Any]:
    (row,) = load_rows(f"reasoning_gym:{task}?size=1", TEMPLATES, privileged=False)
    return dict(row.columns)


def test_tasks_whose_scorers_run_text_are_all_known() -> None:
    folder, found = Path(reasoning_gym.__file__).parent, set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                if name in RUN:
                    found.add(str(path.relative_to(folder)))
    assert found > NOT_OF_SCORES
    assert {Path(name).stem for name in found - NOT_OF_SCORES} == generated.EVALUATED - {"composite"}


@pytest.mark.parametrize("task", ["binary_matrix", "countdown", "n_queens", "simple_integration"])
@pytest.mark.parametrize("form", ["{}", "<answer>{}</answer>"])
def test_no_completion_is_run(tmp_path: Path, task: str, form: str) -> None:
    columns = row_of(task)
    made = tmp_path / "made"
    with pytest.raises(ValueError, match=f"got '{task}', whose scorer .* --eval-match .* number, math or"):
        generated.score(form.format(f"__import__('os').system('touch {made}')"), "1", columns)
    assert not made.exists()


def test_no_text_of_a_row_is_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    code = f"__import__('os').system('touch {made}')"
    for task, entry in (
        ("number_sorting", {"answer": code, "metadata": {}}),
        ("bitwise_arithmetic", {"answer": "1", "metadata": {"problem": code}}),
    ):
        columns = {"reasoning_gym": {"task": task, "settings": "{}", "entry": entry}}
        with pytest.raises(ValueError, match=f"got '{task}', whose scorer"):
            generated.score("[1]", "1", columns)
    assert not made.exists()


def test_a_run_refuses_such_a_task_before_anything_is_written(tmp_path: Path) -> None:
    (row,) = load_rows("reasoning_gym:spiral_matrix?size=1", TEMPLATES)
    judge = Verifier.named("reasoning_gym")
    with pytest.raises(ValueError, match=r"spiral_matrix\?seed=0 row 1: expected a task whose scorer only"):
        judge.require([Prompt((1,), (1,), row.answer, row.where, row)])
    config = tiny_config(tmp_path, method="sdpo", num_generations=2, verifier="reasoning_gym")
    method = config.to_method(Encoder(TOKENIZER, 64, 64))
    assert method is not None
    with pytest.raises(ValueError, match="row 1: expected a task whose scorer only reads"):
        method.check([row])


@pytest.mark.parametrize(
    "form", ["{}", "\\boxed{{{}}}", "The answer is ${}$.", "$$1+{}$$", "answer is 1+({})"]
)
def test_mathematics_runs_no_completion(tmp_path: Path, form: str) -> None:
    made = tmp_path / "made"
    for code in (f"__import__('os').system('touch {made}')", f"open('{made}','w')"):
        assert not same_mathematics(form.format(code), "5")
        assert not same_mathematics("5", form.format(code) if "boxed" in form else "4")
    assert not made.exists()


def test_a_completion_too_deep_for_the_parser_is_no_answer() -> None:
    assert generated.score("[" * 100_000, "1", row_of("game_of_life")) == 0.0
