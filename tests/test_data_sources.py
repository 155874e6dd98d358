"""Where rows come from: files of each format, globs, folders, the hub, generated problems."""

import json
import sys
from pathlib import Path

import datasets
import pytest

from driver_tiny import tiny_config
from opsd_train.data import generated, sources
from opsd_train.data.rows import Reading, load, load_rows
from opsd_train.evaluation.verify import Verifier
from opsd_train.reading.prompts import Prompt, Templates
from opsd_train.run_options import RunOptions

TEMPLATES = Templates("{problem}", "{solution};{problem}", "{privileged_context};{prompt}")
RECORDS = [{"problem": "1+2=", "solution": "3"}, {"problem": "2+2=", "solution": "4"}]


def jsonl(path: Path, records: list[dict] = RECORDS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def seen(source: str | Path, **choice: object) -> list[tuple[str, str]]:
    """Problem and place of every row."""
    reading = Reading(sources.Choice(**choice))  # type: ignore[arg-type]
    return [(row.problem, row.where) for row in load_rows(source, TEMPLATES, reading=reading)]


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    lines = jsonl(tmp_path / "rows.jsonl")
    whole = tmp_path / "rows.json"
    whole.write_text(json.dumps(RECORDS))
    table = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(RECORDS).to_parquet(table)
    cells = tmp_path / "rows.csv"
    cells.write_text('problem,solution\n"1+2=",3\n2+2=,4\n')
    expected = load_rows(RECORDS, TEMPLATES)
    for path, where in (
        (lines, f"{lines} line 2"),
        (whole, f"{whole} row 2"),
        (table, f"{table} row 2"),
        (cells, f"{cells} line 3"),
    ):
        found = load_rows(path, TEMPLATES)
        assert [(row.student, row.teacher, row.answer) for row in found] == [
            (row.student, row.teacher, row.answer) for row in expected
        ], path
        assert found[1].where == where


def test_csv_cells_span_lines_and_empty_ones_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('problem,solution,answer\n"1+\n2=",3,\n2+2=,4,four\n', newline="")
    first, second = load_rows(path, TEMPLATES)
    assert (first.problem, first.answer, first.where) == ("1+\n2=", "3", f"{path} line 2")
    assert (second.answer, second.where) == ("four", f"{path} line 4")


def test_lines_after_a_byte_order_mark_and_with_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    text = json.dumps({"problem": "1\u2028+1=", "solution": "2"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert seen(path) == [("1\u2028+1=", f"{path} line 1")]


def test_glob_reads_its_files_in_order(tmp_path: Path) -> None:
    second = jsonl(tmp_path / "part" / "b.jsonl", RECORDS[1:])
    first = jsonl(tmp_path / "part" / "a.jsonl", RECORDS[:1])
    assert seen(str(tmp_path / "**" / "*.jsonl")) == [
        ("1+2=", f"{first} line 1"),
        ("2+2=", f"{second} line 1"),
    ]
    with pytest.raises(ValueError, match="which does not exist"):
        seen(str(tmp_path / "*.parquet"))


def test_folder_of_files_keeps_splits_apart_and_lines(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "data" / "train-0.jsonl", RECORDS[:1])
    test = jsonl(tmp_path / "data" / "test-0.jsonl", RECORDS[1:])
    assert seen(tmp_path) == [("1+2=", f"{train} line 1")]
    assert seen(tmp_path, split="test") == seen(f"{tmp_path}?split=test") == [("2+2=", f"{test} line 1")]
    with pytest.raises(ValueError, match=r"expected split 'dev' in .*, got train, test"):
        seen(tmp_path, split="dev")
    (tmp_path / "data" / "more.csv").write_text("problem,solution\n3+3=,6\n")
    with pytest.raises(ValueError, match=r"files of one format in .*, got .*\.jsonl and .*more\.csv"):
        seen(tmp_path)


def test_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected data files in the folder"):
        seen(tmp_path)


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    train, test = (datasets.Dataset.from_list([record]) for record in RECORDS)
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    assert seen(tmp_path / "one") == [("1+2=", f"{tmp_path / 'one'} row 1")]
    assert seen(tmp_path / "both", split="test") == [("2+2=", f"{tmp_path / 'both'} row 1")]
    with pytest.raises(ValueError, match=r"expected split 'dev' in .*both, got train, test"):
        seen(tmp_path / "both", split="dev")


def test_hub_id_with_configuration_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(*given: object, **named: object) -> datasets.Dataset:
        calls.append((given, named))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert seen("openai/gsm8k:main")[1] == ("2+2=", "openai/gsm8k:main [train] row 2")
    seen("openai/gsm8k?split=test&revision=abc")
    seen("openai/gsm8k", split="test", revision="v1")
    # Nothing but these: code of a data set is never run.
    assert calls == [
        (("openai/gsm8k", name), {"split": split, "revision": revision, "trust_remote_code": False})
        for name, split, revision in (("main", "train", None), (None, "test", "abc"), (None, "test", "v1"))
    ]
    with pytest.raises(ValueError, match=r"expected options among split, revision in .*, got 'spilt'"):
        seen("openai/gsm8k?spilt=test")


def test_hub_that_cannot_be_reached_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object, **named: object) -> None:
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(ValueError, match=r"no/rows is no file or folder here, and as a hub id .*reach it"):
        seen("no/rows")


def test_corrupt_parquet_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=r"expected readable data at .*rows\.parquet"):
        seen(path)


def test_columns_are_renamed_and_the_record_is_kept(tmp_path: Path) -> None:
    record = {"question": "1+2=", "answer": "1+2 is 3\n#### 3", "level": 1}
    options = RunOptions(model="m", data="d", columns='{"problem": "question", "solution": "answer"}')
    (row,) = load_rows([record], TEMPLATES, reading=options.reading())
    assert row.problem == "1+2="
    assert row.answer == "1+2 is 3\n#### 3"
    assert row.columns == {"problem": "1+2=", "solution": "1+2 is 3\n#### 3", "level": 1}
    assert row.record == record
    with pytest.raises(ValueError, match="row 1: expected a column 'question' to read 'problem'"):
        load_rows([{"a": 1, "b": 2}], TEMPLATES, reading=options.reading())
    with pytest.raises(ValueError, match="columns: expected the name of a column for 'problem', got 3"):
        RunOptions(model="m", data="d", columns='{"problem": 3}')


def test_generated_problems_come_with_worked_solutions_and_their_score() -> None:
    rows = load_rows("reasoning_gym:gsm_symbolic?size=20&seed=5", TEMPLATES)
    assert len(rows) == 20
    assert all("\n" in row.columns["solution"] and row.answer is not None for row in rows)
    score = Verifier.named("reasoning_gym").function
    for row in rows:
        # The solution begins with other numbers than the answer: what counts is what is stated last.
        assert score(str(row.columns["solution"]), row.answer, columns=row.columns) == 1.0
        assert score(f"It is {int(row.answer or 0) + 1}.", row.answer, columns=row.columns) < 0.5
        assert score("", row.answer, columns=row.columns) == 0.0
    (again, *_) = load_rows("reasoning_gym:gsm_symbolic?size=20&seed=5", TEMPLATES)
    assert again.problem == rows[0].problem


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("12 + 5 is 17, and 17 legs", 1.0),
        ("Thinking. <answer>17</answer> or 18", 1.0),
        (r"so \boxed{17}", 1.0),
        ("<think>the answer is 18</think>The answer is 17.", 1.0),
        ("The answer is 18.", 0.0),
    ],
)
def test_what_a_completion_states_is_scored(completion: str, reward: float) -> None:
    entry = {"question": "?", "answer": "17", "metadata": {}}
    columns = {"reasoning_gym": {"task": "leg_counting", "settings": "{}", "entry": entry}}
    assert generated.score(completion, "17", columns) == reward


@pytest.mark.parametrize(
    ("completion", "answer", "stated"),
    [
        (r"it is \boxed{\frac{1}{4}}", "4", r"\frac{1}{4}"),
        ("1,2", "12", "1,2"),
        ("The answer is 3,5", "35", "3,5"),
        ("so 1,234", "1234", "1234"),
        ("so 12.11", "12.11", "12.11"),
        ("The answer is \u22125", "-5", "-5"),
    ],
)
def test_commas_are_dropped_between_thousands_alone(completion: str, answer: str, stated: str) -> None:
    assert generated.stated(completion, answer) == stated


def test_task_without_worked_solution_states_the_answer_and_open_ones_an_example() -> None:
    (row,) = load_rows("reasoning_gym:chain_sum?size=1&min_terms=2&max_terms=2&max_digits=1", TEMPLATES)
    assert row.columns["solution"] == f"The answer is {row.answer}."
    assert row.problem.count("+") + row.problem.count(" - ") == 1
    (row,) = load_rows("reasoning_gym:propositional_logic?size=1", TEMPLATES)
    assert row.columns["solution"].startswith("The answer is ")
    with pytest.raises(ValueError, match=r"graph_color.* row 1: expected text in column 'solution'"):
        load_rows("reasoning_gym:graph_color?size=1", TEMPLATES)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "reasoning_gym:gsm_symblic",
            r"expected a task of reasoning-gym, got 'gsm_symblic'; did you mean",
        ),
        ("reasoning_gym:gsm_symbolic?sized=5", "expected options among difficulty, .* got 'sized'"),
        (
            "reasoning_gym:gsm_symbolic?size=none",
            "expected a size of at least 1 .* got 'none'",
        ),
        (
            "reasoning_gym:chain_sum?min_terms=9&max_terms=3",
            "expected settings that the task 'chain_sum'",
        ),
    ],
)
def test_wrong_task_option_or_setting_is_named(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_rows(source, TEMPLATES)


def test_training_and_held_out_problems_are_different_ones(tmp_path: Path) -> None:
    few = "&min_terms=2&max_terms=2&min_digits=1&max_digits=1"  # 9 * 9 * 2 problems at most
    options = RunOptions(
        model="m",
        data=f"reasoning_gym:chain_sum?size=400{few}",
        eval_data=f"reasoning_gym:chain_sum?size=40{few}",
    )
    found = load(options, tiny_config(tmp_path))
    training, held_out = ([row.problem for row in rows] for rows in (found.rows, found.held_out))
    assert len(set(held_out)) == len(held_out) > 20
    assert len(set(training)) == len(training) > 50
    assert not set(training) & set(held_out)
    assert [note.split(":")[0] for note in found.notes] == ["eval_data", "data"]
    # Seeds s + i: a neighbouring seed would draw the same problems again.
    options.eval_data = f"reasoning_gym:chain_sum?size=40&seed=399{few}"
    with pytest.raises(ValueError, match="which have the seeds 0 to 399; got 399 to 438"):
        load(options, tiny_config(tmp_path))
    options.eval_data = f"reasoning_gym:chain_sum?size=40&seed=400{few}"
    assert load(options, tiny_config(tmp_path)).held_out


def test_shared_problems_of_files_are_told(tmp_path: Path) -> None:
    train, test = jsonl(tmp_path / "a.jsonl"), jsonl(tmp_path / "b.jsonl", RECORDS[1:])
    found = load(RunOptions(model="m", data=str(train), eval_data=str(test)), tiny_config(tmp_path / "run"))
    assert found.notes == ("data: 1 of 2 training rows have a held-out problem",)
    assert len(found.rows) == 2


def test_verifier_rewards_rollouts_of_generated_rows_alone() -> None:
    (row,) = load_rows("reasoning_gym:leg_counting?size=1", TEMPLATES)
    judge = Verifier.named("reasoning_gym")
    prompt = Prompt((1,), (1,), row.answer, row.where, row)
    assert judge.rewards([f"It is {row.answer}.", "No idea."], [prompt, prompt]) == [1.0, 0.0]
    (other,) = load_rows(RECORDS[:1], TEMPLATES)
    with pytest.raises(ValueError, match=r"row 1: .* expected a row of reasoning_gym:TASK, got one without"):
        judge.rewards(["3"], [Prompt((1,), (1,), "3", other.where, other)])


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ValueError, match="expected the package reasoning-gym for reasoning_gym:gcd"):
        load_rows("reasoning_gym:gcd", TEMPLATES)
