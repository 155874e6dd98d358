"""What a teacher is told, text by text, and how several roles read along."""

import copy
from typing import Any

import pytest
import torch

from driver_tiny import TOKENIZER
from opsd_train.data.rows import load_rows
from opsd_train.reading.contexts import Attempt, Context, Known, context
from opsd_train.reading.prompts import CONTEXT_TEMPLATE, TEACHER_TEMPLATE, Encoder, Templates
from opsd_train.reading.roles import Reading, Roles, all_known, collate_role, group_ids
from opsd_train.reading.texts import final_answer, steps, without_thoughts

SOLUTION = "First a.\n\nThen b.\n\nThen c.\n\nSo \\boxed{\\frac{1}{2}}."


def known(own: Attempt | None = None, siblings: tuple[Attempt, ...] = (), **columns: Any) -> Known:
    return Known("What is x?", "What is x? Think.", columns, own, siblings)


def told(name: str, what: Known, **options: Any) -> str | None:
    return Context(name, options)(what)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{\\frac{1}{2}} and then \\boxed{3}.", "3"),
        ("\\boxed {a{b}c}", "a{b}c"),
        ("\\boxed{7} and \\boxed{open", "7"),
        ("it is 12\n#### 12", "12"),
        ("The answer is $42$.", "42"),
        ("Answer: **5**", "5"),
        ("nothing said", None),
        ("\\boxed{ }", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_steps_are_paragraphs_else_lines() -> None:
    assert steps("a\nb\n\n\n c") == ["a\nb", "c"]
    assert steps("a\n b\n") == ["a", "b"]
    assert steps(" \n ") == []


def test_thoughts_are_removed_also_unfinished_ones() -> None:
    assert without_thoughts("<think>x\ny</think>\nz <think>w") == "z"


def test_columns_fill_their_templates() -> None:
    assert told("plain", known()) == "What is x? Think."
    full = TEACHER_TEMPLATE.replace("{problem}", "What is x?").replace("{solution}", SOLUTION)
    assert told("full_solution", known(solution=SOLUTION)) == full
    given = CONTEXT_TEMPLATE.replace("{prompt}", "What is x? Think.").replace("{privileged_context}", "p")
    assert told("privileged_context", known(privileged_context="p")) == given
    for name in ("rubric", "feedback", "skill", "hint", "follow_up", "debate", "critique"):
        text = told(name, known(**{name: "it {problem} says"}))
        assert text is not None
        assert text.startswith("What is x?\n\n")
        assert "it {problem} says" in text  # what a value contains is never filled
        assert told(name, known(**{name: " "})) is None
        assert told(name, known()) is None
        assert told(name, known(**{name: "it"}), template=f"<{{{name}}}>") == "<it>"


def test_answer_is_the_column_or_what_the_solution_states() -> None:
    template = "{answer}"
    assert told("answer_only", known(solution=SOLUTION), template=template) == "\\frac{1}{2}"
    assert told("answer_only", known(solution=SOLUTION, answer="0.5"), template=template) == "0.5"
    assert told("answer_only", known(solution="no end"), template=template) is None


@pytest.mark.parametrize(("alpha", "shown"), [(0.25, 1), (0.3, 1), (0.5, 2), (0.99, 3), (1.0, 4)])
def test_partial_solution_shows_the_first_steps_and_the_answer(alpha: float, shown: int) -> None:
    text = told("partial_solution", known(solution=SOLUTION), alpha=alpha, template="{steps}|{answer}")
    assert text == "\n\n".join(SOLUTION.split("\n\n")[:shown]) + "|\\frac{1}{2}"
    alone = told("partial_solution", known(solution=SOLUTION), alpha=alpha, template="{steps}")
    assert alone == "\n\n".join(SOLUTION.split("\n\n")[:shown])


def test_partial_solution_without_steps_is_the_answer_alone() -> None:
    what = known(solution=SOLUTION)
    assert told("partial_solution", what, alpha=0.2) == told("answer_only", what)
    assert told("partial_solution", what, alpha=0.2, template="{steps}") is None
    assert told("partial_solution", known(solution="a\n\nb")) is None
    many = "\n".join(map(str, range(100)))
    text = told("partial_solution", known(solution=many), alpha=0.29, template="{steps}")
    assert text == "\n\n".join(map(str, range(29)))  # though 0.29 * 100 < 29 in floating point
    with pytest.raises(ValueError, match=r"alpha: expected a share in \[0, 1\]; got 1.5"):
        told("partial_solution", what, alpha=1.5)


def test_skill_by_index() -> None:
    what = known(skill=["first", " ", "third"])
    found = [told("skill", what, index=index, template="{skill}") for index in range(4)]
    assert found == ["first", None, "third", None]


def test_sibling_is_the_first_success_that_is_not_the_rollout_itself() -> None:
    good, bad = Attempt("<think>hm</think>good", 1.0), Attempt("bad", 0.0)
    half = Attempt("half", 0.5)
    template = {"template": "{demonstration}"}
    assert told("sibling", known(bad, (bad, good, half)), **template) == "good"
    assert told("sibling", known(bad, (bad, good)), thoughts=True, **template) == good.text
    assert told("sibling", known(bad, (half, good)), threshold=0.6, **template) == "good"
    several = [told("sibling", known(bad, (bad, good, half)), index=i, **template) for i in range(3)]
    assert several == ["good", "half", None]
    assert told("sibling", known(good, (bad, bad)), **template) is None
    assert told("sibling", known(good, (bad,)), own_success=True, **template) == "good"
    assert told("sibling", known(good, (half,)), own_success=True, **template) == "half"
    assert told("sibling", known(bad, (Attempt("<think>only", 1.0), half)), **template) == "half"
    assert told("sibling", known()) is None


def test_wrong_sibling_is_told_as_a_right_one_is() -> None:
    good, bad = Attempt("<think>hm</think>good", 1.0), Attempt("<think>hm</think>bad", 0.0)
    wrong = told("wrong_sibling", known(bad, (good, Attempt("<think>only", 0.0), bad)))
    assert wrong == (told("sibling", known(bad, (good,))) or "").replace("good", "bad")
    assert told("wrong_sibling", known(bad, (good, Attempt("half", 0.5)))) is None
    assert told("wrong_sibling", known(bad, (Attempt("half", 0.5),)), threshold=0.6) is not None


def test_sibling_with_feedback() -> None:
    good, bad = Attempt("good", 1.0), Attempt("bad", 0.0)
    with_demo, without = known(bad, (good,), feedback="fb"), known(bad, (bad,), feedback="fb")
    assert told("sibling", without) is None
    assert told("sibling", without, with_feedback="without") == told("feedback", known(feedback="fb"))
    assert told("sibling", with_demo, with_feedback="without") == told("sibling", with_demo)
    both = told("sibling", with_demo, with_feedback="always") or ""
    assert "good" in both
    assert "fb" in both
    with pytest.raises(ValueError, match="with_feedback: expected never, without or always; got 'no'"):
        told("sibling", without, with_feedback="no")


def test_wrong_answer_differs_from_the_right_one_in_the_answer_alone() -> None:
    right = told("answer_only", known(answer="3")) or ""
    wrong = told("wrong_answer", known(answer="3", wrong_answer="4"))
    assert wrong == right.replace("is 3.", "is 4.")
    said = [Attempt("\\boxed{3}", 0.0), Attempt("\\boxed{9}", 1.0), Attempt("\\boxed{5}", 0.0)]
    drawn = told("wrong_answer", known(Attempt("\\boxed{6}", 0.0), tuple(said), answer="3"))
    assert drawn == right.replace("is 3.", "is 5.")
    alone = told("wrong_answer", known(Attempt("\\boxed{6}", 0.0), tuple(said[:2]), answer="3"))
    assert alone == right.replace("is 3.", "is 6.")
    assert told("wrong_answer", known(said[1], tuple(said[:2]), answer="3")) is None
    half = (Attempt("\\boxed{6}", 0.5),)  # is a right one
    assert told("wrong_answer", known(half[0], half, answer="3")) is None


def test_revision_has_a_control_prompt_by_reward() -> None:
    options = {"template": "{attempt}|{control}", "rephrase": "again", "retry": "wrong"}
    assert told("revision", known(Attempt("y", 0.5)), **options) == "y|again"
    assert told("revision", known(Attempt("y", 0.4)), **options) == "y|wrong"
    assert told("revision", known()) is None


def test_critiques_stand_under_the_steps_of_the_rollout() -> None:
    own = Attempt("a\n\nb\n\nc", 0.0)
    text = told("critique", known(own, critique=["fine", "", "no", "beyond"]), template="{critique}")
    assert text == "Step 1: a\nCritique: fine\n\nStep 2: b\n\nStep 3: c\nCritique: no"
    assert told("critique", known(own, critique=["", "", "", "beyond"])) is None
    assert told("critique", known(critique=["fine"])) is None


def test_wrong_calls() -> None:
    with pytest.raises(ValueError, match=r"context: expected one of plain, full_solution, .*; got 'secret'"):
        Context("secret")
    with pytest.raises(ValueError, match="context skill: expected options among index, template; got 'ix'"):
        Context("skill", {"ix": 1})
    with pytest.raises(ValueError, match=r"template: expected a template with \{hint\}; got 'x'"):
        told("hint", known(hint="h"), template="x")
    with pytest.raises(ValueError, match=r"hint: expected a text or a list of texts; got \[3\]"):
        told("hint", known(hint=[3]))
    assert {name for name in context.functions if Context(name).on_policy} == {
        "wrong_answer",
        "sibling",
        "wrong_sibling",
        "revision",
        "critique",
    }


TEMPLATES = Templates("{problem}", "{solution};{problem}")


def test_rows_need_no_solution_where_contexts_come_from_elsewhere() -> None:
    records = [{"problem": "1+2=", "answer": 3}, {"prompt": "1+1=", "rubric": "r"}]
    with pytest.raises(ValueError, match="column 'solution', got no such column"):
        load_rows(records[:1], TEMPLATES)
    first, second = load_rows(records, TEMPLATES, privileged=False)
    assert first.teacher == first.student == ({"role": "user", "content": "1+2="},)
    assert (first.problem, first.answer, first.columns["answer"]) == ("1+2=", "3", "3")
    assert (second.problem, second.columns["rubric"]) == ("1+1=", "r")
    with pytest.raises(ValueError, match="expected columns"):
        load_rows([{"rubric": "r"}], TEMPLATES, privileged=False)


def test_rollouts_of_a_prompt_are_siblings() -> None:
    first, second = load_rows([{"problem": p, "solution": "3"} for p in ("1+2=", "2+1=")], TEMPLATES)
    rows = [first, second, first, first]
    attempts = [Attempt(str(index), 0.0) for index in range(4)]
    found = all_known(rows, attempts)
    assert group_ids(rows) == [0, 1, 0, 0]
    assert [one.own for one in found] == attempts
    assert [[a.text for a in one.siblings] for one in found] == [["2", "3"], [], ["0", "3"], ["0", "2"]]


def test_roles_read_their_contexts_or_the_plain_prompt() -> None:
    rows = load_rows([{"problem": "1+2=", "solution": "3"}, {"problem": "2+2="}], TEMPLATES, False)
    roles = Roles(
        {
            "teacher": Context("full_solution", {"template": "{solution};{problem}"}),
            "other": Context("sibling", {"template": "{demonstration};{problem}"}),
        }
    )
    assert roles.on_policy
    encoder = Encoder(TOKENIZER, 32, 9)

    def ids(text: str) -> tuple[int, ...]:
        chat = [{"role": "user", "content": text}]
        return tuple(TOKENIZER.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])

    early = roles.read(rows, encoder)
    assert early["teacher"] == Reading((ids("3;1+2="), ids("2+2=")), (True, False), 0)
    assert early["other"].privileged == (False, False)
    attempts = [Attempt("5", 0.0), Attempt("3", 1.0), Attempt("4" * 9, 1.0), Attempt("7", 0.0)]
    late = roles.read([rows[0], rows[0], rows[1], rows[1]], encoder, attempts)["other"]
    assert late == Reading(
        (ids("3;1+2="), ids("1+2="), ids("2+2="), ids("2+2=")), (True, False, False, False), 1
    )


def test_a_context_of_columns_beyond_its_budget_is_an_error() -> None:
    rows = load_rows([{"problem": "1+2=", "solution": "3" * 9}], TEMPLATES)
    roles = Roles({"teacher": Context("full_solution", {"template": "{solution};{problem}"})})
    with pytest.raises(ValueError, match="row 1: expected a context 'full_solution' of at most 9 tokens"):
        roles.read(rows, Encoder(TOKENIZER, 32, 9))
    bad = load_rows([{"problem": "1+2=", "solution": "3", "hint": {}}], TEMPLATES)
    with pytest.raises(ValueError, match="row 1: hint: expected a text"):
        Roles({"teacher": Context("hint")}).read(bad, Encoder(TOKENIZER, 32, 9))


def test_collated_role_has_the_completions_at_the_end() -> None:
    found = collate_role("other", [(4, 5, 6), (7,)], [(8,), (9, 10)], pad_id=0)
    assert torch.equal(found["other_input_ids"], torch.tensor([[4, 5, 6, 8, 0], [0, 0, 7, 9, 10]]))
    assert torch.equal(found["other_attention_mask"], torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]))


SWITCHED = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
    "{% if enable_thinking is defined and not enable_thinking %}={% else %}+{% endif %}{% endif %}"
)


def test_who_is_told_nothing_reads_the_student_s_ids_whatever_the_teacher_s_switch() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = SWITCHED
    encoder = Encoder(tokenizer, 32, 32, {"enable_thinking": False}, {"enable_thinking": True})
    rows = load_rows([{"problem": "1+2=", "solution": "3"}, {"problem": "2+2="}], TEMPLATES, False)
    students = tuple(prompt.student_ids for prompt in encoder.encode(rows))
    assert [tokenizer.decode(ids) for ids in students] == ["1+2==", "2+2=="]
    roles = {"reference": Context("plain"), "teacher": Context("full_solution", {"template": "{solution};"})}
    found = Roles(roles).read(rows, encoder)
    assert found["reference"].ids == students
    assert found["teacher"].privileged == (True, False)
    assert tokenizer.decode(found["teacher"].ids[0]) == "3;+"
    assert found["teacher"].ids[1] == students[1]
    long = Roles({"teacher": Context("sibling", {"template": "{demonstration}"})}).read(
        rows, encoder, [Attempt("4" * 40, 1.0), Attempt("5", 1.0)]
    )
    assert long["teacher"].ids == students


@pytest.mark.parametrize(
    ("record", "templates", "option"),
    [
        ({"problem": "1+2=", "solution": "3"}, {"student": "Solve {problem}"}, "student_template"),
        ({"problem": "1+2=", "solution": "3"}, {"teacher": "See {solution};{problem}"}, "teacher_template"),
        ({"prompt": "1+2=", "privileged_context": "3"}, {"student": "{problem}"}, "context_template"),
        ({"prompt": "1+2=", "teacher_prompt": "See"}, {"student": "{problem}"}, "teacher_prompt"),
        ({"prompt": "See", "teacher_prompt": "1"}, {"student": "{problem}"}, "prompt"),
    ],
)
def test_text_without_tokens_names_where_it_is_from(record: dict, templates: dict, option: str) -> None:
    given = Templates(**({"student": "{problem}", "teacher": "{solution};{problem}"} | templates))
    with pytest.raises(
        ValueError, match=f"row 1: {option}: expected text that the tokenizer can encode, got"
    ):
        Encoder(TOKENIZER, 64, 64).encode(load_rows([record], given))


def test_context_without_tokens_names_its_template() -> None:
    rows = load_rows([{"problem": "1+2=", "answer": "3"}, {"problem": "2+2="}], TEMPLATES, False)
    for role, options in (("answer_only", {}), ("answer_only", {"template": "{answer} it is"})):
        with pytest.raises(ValueError, match=r"row 1: context_templates \('answer_only'\): expected text"):
            Roles({"teacher": Context(role, options)}).read(rows, Encoder(TOKENIZER, 64, 64))
