r"""Numbers as people and LaTeX write them: the last one of a text, and whether two have the same value.

A number is `1,234.5`, `.5`, `1.5e3`, `5 \times 10^{3}`, `3/4`, `1 1/2`, `\frac{3}{4}` or `50%`; besides there
are lists like `(1, 2)`, dates and times, which are no numbers and have a value nevertheless.
"""

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

EXPONENT = r"(?:[eE][+-]?\d+(?!\w))?"
# What looks like a number (a date and a list do too), with its sign unless it is a minus between two numbers.
SIGN = r"(?:(?<![\d)%])-)?"
FIGURES = re.compile(SIGN + r"(?:(?<![\w.)])\.\d+|\d+(?:[.,]\d+)*)" + EXPONENT)
NUMBER = re.compile(r"-?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)" + EXPONENT)
MINUS = str.maketrans(dict.fromkeys("\u2212\ufe63\uff0d", "-"))  # what typesetting has in its place
VULGAR = re.compile("[¼-¾⅐-⅞]")
SPACED = "\u00a0\u2007\u2009\u202f"  # spaces that stand between thousands
GROUPS = re.compile(
    rf"(?<![\d.,])\d{{1,3}}(?P<by>\{{,\}}|\\[,;!: ]|[{SPACED}])\d{{3}}(?:(?P=by)\d{{3}})*(?!\d)"
)
LARGEST = 4_000  # digits that an exponent may add

PLAIN = FIGURES.pattern
STRICT = SIGN + r"(?:(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|(?<![\w.)])\.\d+)" + EXPONENT
GAP = r"\s{0,4}"  # bounded, so that reading takes no more than linear time
TIMES_TEN = rf"{GAP}(?:\\times|\\cdot|[×·*]){GAP}10{GAP}(?:\^|\*\*){GAP}"
PERCENT = rf"{GAP}\\?%"


def _number(figures: str) -> str:
    """The pattern of one number, made of figures."""
    term = rf"(?:\{{{GAP}-?(?:{figures}){GAP}\}}|\d)"
    fraction = rf"(?:\d+{GAP})?\\[dtc]?frac{GAP}{term}{GAP}{term}"
    ratio = rf"(?:\d+ {{1,4}})?(?:{figures}){GAP}/{GAP}-?(?:{figures})"
    power = rf"(?:{figures}){TIMES_TEN}(?:\{{{GAP}[+-]?\d+{GAP}\}}|[+-]?\d+)"
    return rf"(?:{SIGN}{fraction}|{SIGN}{ratio}|{power}|{figures})(?:{PERCENT})?"


ONE, STRICT_ONE = _number(PLAIN), _number(STRICT)
TERM = rf"\{{{GAP}-?(?:{PLAIN}){GAP}\}}|\d"
CHAIN = r"(?<!\d)(?:\d+(?:-\d+){2,}|\d+(?:/\d+){2,}|\d+(?::\d+)+)(?!\d)"
LIST = rf"{STRICT_ONE}(?:{GAP}(?:,\s|;){GAP}{STRICT_ONE})+"  # 1,2 may be a number with a decimal comma
CLOSE = rf"{GAP}[)\]}}]"
BRACKETED = rf"[(\[{{]{GAP}(?!{STRICT_ONE}{CLOSE}){STRICT_ONE}(?:{GAP}[,;]{GAP}{STRICT_ONE})+{CLOSE}"
FRACTION = re.compile(
    rf"(?P<sign>-?)(?P<whole>\d*){GAP}\\[dtc]?frac{GAP}(?P<over>{TERM}){GAP}(?P<under>{TERM})"
)
RATIO = re.compile(rf"(?P<sign>-?)(?:(?P<whole>\d+) +)?(?P<over>[^/ -]+){GAP}/{GAP}(?P<under>-?[^/ ]+)")
POWER = re.compile(rf"(.+?){TIMES_TEN}(.+)")
ITEM = re.compile(rf"(?P<list>{BRACKETED})|(?P<chain>{CHAIN})|(?P<one>{ONE})")
BARE = re.compile(rf"(?P<list>{BRACKETED}|{LIST})")
EXPONENT_OF_UNIT = re.compile(r"[^\d\s)}\]]\^\{?$")  # cm^2
# A number in front of, or behind, one of these is a part of an expression, whose value is another one.
BEFORE = re.compile(
    r"(?:\\sqrt(?:\[[^\]]*\])?\s*\{?|√\s*|\\[dtc]?frac\s*\{?|\}\s*\{|[\d)}\]]\s*(?:\^|\*\*)\s*\{?"
    r"|\d\s*(?:[*×÷·+]|\\times|\\cdot|\\div)\s*|[A-Za-z)}]\s*/\s*)$"
)
BEHIND = re.compile(r"\s*(?:\\(?:pi|sqrt)\b|[π√])|[²³¹⁰⁴-⁹]")


@dataclass(frozen=True)
class Value:
    """What a text states: one number or several, and the form in which they stand.

    The form is `number`, `percent`, `chain` (a date, a time, a ratio), or the brackets of a list, none for a
    bare one.
    """

    parts: tuple[Fraction, ...]
    form: str

    def equals(self, other: "Value") -> bool:
        """Whether both are the same; where one alone is a percentage, its sign is 1/100 or a mere unit."""
        forms = {self.form, other.form}
        if forms == {"number", "percent"}:
            share, whole = (self, other) if self.form == "percent" else (other, self)
            return whole.parts[0] in (share.parts[0], share.parts[0] / 100)
        if forms == {"{}"}:
            return sorted(self.parts) == sorted(other.parts)
        return self.parts == other.parts and (len(forms) == 1 or "" in forms)


def same_value(text: str, answer: str) -> bool:
    """Whether the last value that a text states is that of the answer; an answer may be a bare list too."""
    shown, expected = _plain(text), _plain(answer)
    listed = BARE.fullmatch(expected.strip(" $."))
    if listed and not NUMBER.fullmatch(listed[0]):
        found = list(BARE.finditer(shown))
        return bool(found) and _same(_listed(found[-1][0]), _listed(listed[0]))
    return _same(_last(shown), _last(expected))


def is_chain(text: str) -> bool:
    """Whether a text is a date, a time or a ratio, which mathematics would read as something to compute."""
    return re.fullmatch(CHAIN, _plain(text).strip(" $.")) is not None


def is_listed(text: str) -> bool:
    """Whether a text is a list of numbers in brackets."""
    return re.fullmatch(BRACKETED, _plain(text).strip(" $.")) is not None


def last_figures(text: str) -> str | None:
    """The last thing in a text that is written as a number, without the commas between its thousands.

    What is not one number, like `1,2`, is given as it stands; None of a text without figures, and of one that
    ends in a fraction, a list or a part of an expression.
    """
    found = _last_match(plain := _plain(text))
    if found is None or found["one"] is None or _is_operand(plain, found):
        return None
    shown = re.sub(rf"{PERCENT}$", "", found["one"])
    if not FIGURES.fullmatch(shown):
        return None
    return shown.replace(",", "") if NUMBER.fullmatch(shown) else shown


def _same(found: Value | None, expected: Value | None) -> bool:
    return found is not None and expected is not None and found.equals(expected)


def ungrouped(text: str) -> str:
    """The text with `-` for each minus, `1/2` for a sign that is a fraction, and thousands closed up."""
    text = text.translate(MINUS).replace("\u2044", "/")
    text = VULGAR.sub(lambda sign: " " + unicodedata.normalize("NFKC", sign[0]).replace("\u2044", "/"), text)
    text = GROUPS.sub(lambda group: group[0].replace(group["by"], ""), text)
    return text.replace("{,}", ",")


def _plain(text: str) -> str:
    """The text `ungrouped`, with brackets as they are without LaTeX."""
    for latex, sign in ((r"\left", ""), (r"\right", ""), (r"\{", "{"), (r"\}", "}")):
        text = text.replace(latex, sign)
    return ungrouped(text)


def _last_match(text: str) -> re.Match[str] | None:
    """The last item that is no exponent of a unit."""
    found = [one for one in ITEM.finditer(text) if not EXPONENT_OF_UNIT.search(text[: one.start()][-16:])]
    return found[-1] if found else None


def _is_operand(text: str, found: re.Match[str]) -> bool:
    return bool(BEFORE.search(text[: found.start()][-64:]) or BEHIND.match(text, found.end()))


def _last(text: str) -> Value | None:
    found = _last_match(text)
    if found is None or _is_operand(text, found):
        return None
    if found["chain"] is not None:
        return Value(tuple(Fraction(part) for part in re.findall(r"\d+", found["chain"])), "chain")
    if found["list"] is not None:
        return _listed(found["list"])
    value = _one(found["one"])
    return None if value is None else Value((value,), "percent" if found["one"].endswith("%") else "number")


def _listed(text: str) -> Value | None:
    """A list, whose percentages are shares."""
    form = text[0] + text[-1] if text[0] in "([{" else ""
    parts = []
    for item in re.findall(STRICT_ONE, text):
        value = _one(item)
        if value is None:
            return None
        parts.append(value / 100 if item.endswith("%") else value)
    return Value(tuple(parts), form)


def _one(text: str) -> Fraction | None:
    """One number of any form; None for figures that are none, and for a division by 0."""
    text = re.sub(rf"{PERCENT}$", "", text).strip()
    if match := FRACTION.fullmatch(text):
        return _mixed(match["sign"], match["whole"], match["over"].strip("{ }"), match["under"].strip("{ }"))
    if match := RATIO.fullmatch(text):
        return _mixed(match["sign"], match["whole"] or "", match["over"], match["under"])
    if match := POWER.fullmatch(text):
        return _figures(f"{match[1]}e{match[2].strip('{ }')}")
    return _figures(text)


def _mixed(sign: str, whole: str, over: str, under: str) -> Fraction | None:
    numerator, denominator = _figures(over), _figures(under)
    if numerator is None or not denominator:
        return None
    value = (_figures(whole) or 0) + numerator / denominator
    return -value if sign else value


def _figures(text: str) -> Fraction | None:
    if not NUMBER.fullmatch(text):
        return None
    try:
        value = Decimal(text.replace(",", ""))
    except InvalidOperation:  # an exponent beyond what there is room for
        return None
    return Fraction(value) if abs(value.adjusted()) <= LARGEST else None
