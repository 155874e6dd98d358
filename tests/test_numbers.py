"""When two texts state the same number: what people, LaTeX and typesetting write for it."""

from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opsd_train.evaluation.figures import last_figures
from opsd_train.evaluation.judge import same_mathematics, same_number

GROUPING = (",", "{,}", "\\,", "\u202f", "\u00a0", "\u2009")
SAME = [
    (".5", "0.5"),
    ("p = -.5", "-0.5"),
    ("the answer is 3 / 4", "0.75"),
    (r"\boxed{\dfrac{3}{4}}", "3/4"),
    (r"so $-\frac34$", "-0.75"),
    (r"1\frac{1}{2}", "3/2"),
    ("-1 1/2", "-1.5"),
    ("1\u00bd", "1.5"),
    ("50%", "0.5"),
    ("50\\%", "50"),
    ("(1, 2)", "( 1,2 )"),
    (r"\left(1, \frac{1}{2}\right)", "(1, 0.5)"),
    (r"\{2, 1\}", "{1, 2}"),
    ("x = 1, 2", "1, 2"),
    ("(1,234)", "1234"),
    ("on 2023-11-05", "2023-11-05"),
    ("at 12:30", "12:30"),
    ("25 cm^2", "25"),
    (r"5 \times 10^{3}", "5000"),
    ("In 2023\u00a0100 people", "100"),
]
DIFFERENT = [
    ("p = .05", "5"),
    ("the answer is 3/4", "1/4"),
    ("the answer is 3/4", "4"),
    (r"\boxed{\frac{1}{4}}", "3/4"),
    (r"\boxed{\frac{\pi}{4}}", "4"),
    (r"\boxed{1{,}234}", "234"),
    (r"\boxed{1\,234}", "234"),
    ("1\u202f234", "234"),
    ("(1, 2)", "(3, 2)"),
    ("(1, 2]", "[1, 2]"),
    ("x = 3, 2", "1, 2"),
    ("2023-11-05", "1999-12-05"),
    ("2023-11-05", "5"),
    ("3/4/2024", "1/4/2024"),
    ("at 12:30", "30"),
    ("50%", "5"),
    ("50%", "60%"),
    ("2^{10}", "10"),
    (r"\sqrt{2}", "2"),
    (r"2\pi", "2"),
    ("1/0", "1/0"),
]


@pytest.mark.parametrize(("completion", "answer"), SAME)
def test_the_same_value_in_other_figures(completion: str, answer: str) -> None:
    assert same_number(completion, answer)


@pytest.mark.parametrize(("completion", "answer"), DIFFERENT)
def test_another_value_with_the_same_last_figures(completion: str, answer: str) -> None:
    assert not same_number(completion, answer)


@pytest.mark.parametrize("by", GROUPING)
def test_thousands_are_grouped(by: str) -> None:
    shown = f"\\boxed{{1{by}234}}"
    for same in (same_number, same_mathematics):
        assert same(shown, "1234")
        assert same(f"1{by}234{by}567.5 in all", "1234567.5")
        assert not same(shown, "234")


@pytest.mark.parametrize(
    ("completion", "answer", "same"),
    [
        ("p = .05", "5", False),
        ("the answer is 3/4", "1/4", False),
        (r"\boxed{\frac{1}{4}}", "3/4", False),
        ("(1, 2)", "(1, 2)", True),
        ("(1, 2)", "(3, 2)", False),
        ("2023-11-05", "2023-11-05", True),
        ("2023-11-05", "1999-12-05", False),
        ("2023-11-06", "2023-12-05", False),  # the same difference
        ("\u22123", "-3", True),
    ],
)
def test_mathematics_reads_them_too(completion: str, answer: str, same: bool) -> None:
    assert same_mathematics(completion, answer) is same


NUMBERS = st.builds(Fraction, st.integers(-9_999_999, 9_999_999), st.sampled_from([1, 2, 4, 5, 8, 10, 100]))


@st.composite
def written(draw: st.DrawFn, value: Fraction) -> str:
    """One of the forms in which the value can be written."""
    minus = draw(st.sampled_from(["-", "\u2212"])) if value < 0 else ""
    size, by = abs(value), draw(st.sampled_from(GROUPING))
    decimal = f"{float(size):.3f}"
    forms = [
        f"{size.numerator}/{size.denominator}",
        f"\\frac{{{size.numerator}}}{{{size.denominator}}}",
        decimal,
        decimal.removeprefix("0") if size else "0",
        f"{float(size):,.4f}".replace(",", by),
        f"{float(100 * size):.3f}%",
    ]
    return draw(st.sampled_from(["", "so it is ", "x=", "\\boxed{"])) + minus + draw(st.sampled_from(forms))


@settings(max_examples=120, deadline=None)
@given(st.data(), NUMBERS)
def test_a_value_equals_itself_in_every_form(data: st.DataObject, value: Fraction) -> None:
    assert same_number(data.draw(written(value)), data.draw(written(value)))


@settings(max_examples=120, deadline=None)
@given(st.data(), NUMBERS, NUMBERS)
def test_values_that_differ_are_equal_in_no_form(data: st.DataObject, one: Fraction, two: Fraction) -> None:
    assume(one not in (two, two * 100, two / 100))  # a percentage may stand for its figures
    assume(one != two)
    assert not same_number(data.draw(written(one)), data.draw(written(two)))


@pytest.mark.parametrize("text", ["1 " * 20_000, "1" + " " * 20_000, "(1,2" * 3_000, "1-1-" * 3_000])
def test_a_long_text_is_read_in_linear_time(text: str) -> None:
    same_number(text, "1")  # quadratic, one of these takes minutes


def test_figures_alone() -> None:
    assert [last_figures(text) for text in ("1,2", "1,234 km", ".05", "no")] == ["1,2", "1234", ".05", None]
    assert last_figures(r"\frac{1}{4}") is None
