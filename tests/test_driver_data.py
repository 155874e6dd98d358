"""From files to token ids: conventions of columns, bad rows, templates, budgets."""

import json
from pathlib import Path

import datasets
import pytest
from tokenizers.processors import TemplateProcessing

from driver_tiny import TOKENIZER, tiny_config, tiny_prompts
from opsd_train.data.rows import load_rows
from opsd_train.data.sampler import parts_of, short_steps
from opsd_train.demo.pretrain import build_tokenizer
from opsd_train.reading.prompts import Encoder, Templates, fill, pad_left, pad_right

TEMPLATES = Templates("{problem}", "{solution};{problem}", "{privileged_context};{prompt}")
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}]


def user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def test_problem_and_solution_go_through_the_templates() -> None:
    (row,) = load_rows([{"problem": "1+2=", "solution": "3"}], TEMPLATES)
    assert (row.student, row.teacher, row.answer) == (user("1+2="), user("3;1+2="), "3")


def test_answer_column_is_what_counts_as_right() -> None:
    (row,) = load_rows([{"problem": "1+2=", "solution": "1+2 is 3", "answer": 3}], TEMPLATES)
    assert row.answer == "3"


def test_privileged_context_is_added_to_the_last_message_alone() -> None:
    plain, chat = load_rows(
        [{"prompt": "1+1=", "privileged_context": "2"}, {"prompt": CHAT, "privileged_context": "2"}],
        TEMPLATES,
    )
    assert (plain.student, plain.teacher, plain.answer) == (user("1+1="), user("2;1+1="), None)
    assert chat.student == tuple(CHAT)
    assert chat.teacher == (CHAT[0], {"role": "user", "content": "2;1+1="})


def test_teacher_prompt_is_used_as_given() -> None:
    (row,) = load_rows([{"prompt": CHAT, "teacher_prompt": "2 it is", "answer": "2"}], TEMPLATES)
    assert (row.student, row.teacher, row.answer) == (tuple(CHAT), user("2 it is"), "2")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"problem": "1+2="}, "column 'solution', got no such column"),
        ({"problem": " ", "solution": "3"}, "column 'problem', got ' '"),
        ({"problem": "1+2=", "solution": None}, "column 'solution', got None"),
        ({"problem": 12, "solution": "3"}, "column 'problem', got 12"),
        (
            {"question": "1+2=", "solution": "3"},
            "expected columns problem and solution, .* got question, solution",
        ),
        ({"prompt": "1+2="}, "expected columns"),
        ({"privileged_context": "3"}, "column 'prompt', got no such column"),
        ({"prompt": [], "teacher_prompt": "3"}, r"column 'prompt', got \[\]"),
        ({"prompt": [{"role": "user"}], "teacher_prompt": "3"}, "messages with a role and a content"),
        (
            {"prompt": [*CHAT, {"role": "assistant", "content": "2"}], "teacher_prompt": "3"},
            "assistant's turn",
        ),
    ],
)
def test_bad_row_is_named_by_file_and_line(tmp_path: Path, record: dict, message: str) -> None:
    good = {"problem": "1+2=", "solution": "3"}
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(record)}\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl line 3: .*{message}"):
        load_rows(path, TEMPLATES)


@pytest.mark.parametrize("line", ["{", "[1]", "1+2="])
def test_line_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=r"rows\.jsonl line 1: expected a JSON object"):
        load_rows(path, TEMPLATES)


def test_parquet_reads_like_dictionaries(tmp_path: Path) -> None:
    records = [{"problem": "1+2=", "solution": "3"}, {"problem": "2+2=", "solution": "4"}]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(records).to_parquet(path)
    found = load_rows(path, TEMPLATES)
    assert [(r.student, r.teacher) for r in found] == [
        (r.student, r.teacher) for r in load_rows(records, TEMPLATES)
    ]
    assert found[1].where == f"{path} row 2"


def test_missing_empty_and_unknown_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which does not exist"):
        load_rows(tmp_path / "none.jsonl", TEMPLATES)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="at least one row"):
        load_rows(tmp_path / "empty.jsonl", TEMPLATES)
    (tmp_path / "rows.txt").write_text("problem,solution")
    with pytest.raises(ValueError, match=r"a file that ends in .jsonl"):
        load_rows(tmp_path / "rows.txt", TEMPLATES)


def test_fill_leaves_other_braces_and_values_alone() -> None:
    filled = fill(r"{problem} \boxed{} {solution} {other}", problem="a {solution}", solution="b {problem}")
    assert filled == r"a {solution} \boxed{} b {problem} {other}"


@pytest.mark.parametrize(
    ("field", "template", "message"),
    [
        ("student", "{solution}{problem}", "student_template: the student must not see"),
        ("student", "Solve it.", "student_template: expected a template with {problem}"),
        ("teacher", "{problem}", "teacher_template: expected a template with {solution}"),
        ("context", "{prompt}", "context_template: expected a template with {privileged_context}"),
    ],
)
def test_template_without_its_columns_is_an_error(field: str, template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Templates(**{field: template})


def test_prompts_are_the_chat_template_s_tokens(tmp_path: Path) -> None:
    (prompt,) = tiny_prompts(tiny_config(tmp_path), [{"problem": "1+2=", "solution": "3"}])
    assert TOKENIZER.decode(prompt.student_ids) == "<|user|>1+2=<|assistant|>"
    assert TOKENIZER.decode(prompt.teacher_ids) == "<|user|>3;1+2=<|assistant|>"


@pytest.mark.parametrize(("student", "teacher"), [(5, 100), (7, 11), (100, 9), (8, 10)])
def test_prompt_over_its_budget_names_the_row_and_both_lengths(student: int, teacher: int) -> None:
    rows = load_rows([{"problem": "1=", "solution": "1"}, {"problem": "10+20=", "solution": "30"}], TEMPLATES)
    fits = Encoder(TOKENIZER, 8, 11).encode(rows)
    assert [(len(p.student_ids), len(p.teacher_ids)) for p in fits] == [(4, 6), (8, 11)]
    message = (
        rf"row 2: .* has 8 tokens \(max_prompt_length {student}\), "
        rf"the teacher's 11 \(max_teacher_prompt_length {teacher}\)"
    )
    with pytest.raises(ValueError, match=message):
        Encoder(TOKENIZER, student, teacher).encode(rows)


@pytest.mark.parametrize(("positions", "fits"), [(None, True), (15, True), (14, False)])
def test_longer_prompt_and_completion_may_fill_the_positions(positions: int | None, fits: bool) -> None:
    rows = load_rows([{"problem": "10+20=", "solution": "30"}], TEMPLATES)
    encoder = Encoder(TOKENIZER, 8, 11, max_completion_length=4, positions=positions)
    if fits:
        assert len(encoder.encode(rows)) == 1
        return
    with pytest.raises(ValueError, match="row 1: its longer prompt has 11 tokens,"):
        encoder.encode(rows)


def test_special_tokens_are_the_chat_template_s_own() -> None:
    """A tokenizer that begins every text with BOS does so where there is no template, and not once more."""
    tokenizer = build_tokenizer()
    first = tokenizer.convert_tokens_to_ids("<|user|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", first)]
    )
    rows = load_rows([{"problem": "1+2=", "solution": "3"}], TEMPLATES)
    (prompt,) = Encoder(tokenizer, 100, 100).encode(rows)
    assert tokenizer.decode(prompt.student_ids) == "<|user|>1+2=<|assistant|>"
    assert tokenizer.decode(prompt.teacher_ids) == "<|user|>3;1+2=<|assistant|>"
    tokenizer.chat_template = None
    (prompt,) = Encoder(tokenizer, 100, 100).encode(rows)
    assert tokenizer.decode(prompt.student_ids) == "<|user|>1+2="


def test_padding() -> None:
    ids, mask = pad_left([(1, 2, 3), (4,)], 0)
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = pad_right([(1, 2, 3), (4,)], 0)
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_step_with_as_many_rows_as_it_wants_is_not_short() -> None:
    assert short_steps(8, 8, 1) is None
    assert "7 rows are fewer than the 8 prompts" in (short_steps(7, 8, 1) or "")
    assert parts_of([2, 0, 3]) == [slice(0, 2), slice(2, 2), slice(2, 5)]
