"""The report says what the record says, to any eye and without running any of it."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd_train.report.charts import Series, draw, number, ticks
from opsd_train.report.highlight import FULL_NATS, LEVELS, contrast, level_of, palette
from opsd_train.report.page import verdict, write_report
from opsd_train.watch.record import Accuracy, RunRecord, load_run
from run_samples import AFTER, BEFORE, accuracy, rollout, token


class Page(HTMLParser):
    """Elements and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += " ".join(["", *data.replace("\u00a0", " ").split()])

    def having(self, css_class: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.elements if css_class in (attrs.get("class") or "").split()]


def page_of(folder: Path) -> tuple[str, Page]:
    path = write_report(folder)
    assert path == folder / "report.html"
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


# --- the page


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    record = RunRecord(tmp_path)
    for step in range(1, 201):
        loss = math.nan if step == 77 else 0.6 * math.exp(-step / 50)
        record.log(step, {"loss": loss, "forward_kl": loss, "reverse_kl": 2 * loss, "memory_gb": 0.5})
    record.add_evaluation(BEFORE)
    record.add_evaluation(AFTER)
    for step in (0, 40, 90, 200):
        record.add_rollouts([rollout(step, [token("5"), token("1", 1.0), token("9", None)])])
    record.write_info(
        {
            "name": "three-digit addition",
            "model": "demo",
            "parameters": 812_544,
            "objective": {"divergence": "forward_kl", "beta": 0.5, "entry_clip": 0.05, "clip_mode": "scale"},
            "seconds": 67.2,
            "config": {"hub": "https://example.org/model", "lora": {"rank": 16, "dropout": None}},
            "versions": {"torch": "2.13.0"},
        }
    )
    return tmp_path


def test_the_page_holds_the_numbers(run_folder: Path) -> None:
    _, page = page_of(run_folder)
    for words in (
        "rose from 38.4 % (95 % CI 34.2 to 42.7) to 97.0 % (95 % CI 95.1 to 98.2) in 200 steps.",
        "38.4 % 192 of 500 CI 34.2 to 42.7 97.0 % 485 of 500 CI 95.1 to 98.2 +58.6",
        "30.0 % 150 of 500 CI 26.1 to 34.2 84.2 % 421 of 500 CI 80.7 to 87.1 +54.2",
        "813 k",
        "forward kl, entry clip 0.05, clip mode scale",
        "1 min 7 s",
        "lora.rank 16",
        "torch 2.13.0",
        "1 not finite",
    ):
        assert words in page.text
    assert "dropout" not in page.text
    steps = re.findall(r"Step (\d+) ✗ wrong mean ([\d.]+) nats", page.text)
    assert steps == [("0", "0.50"), ("90", "0.50"), ("200", "0.50")]  # before, nearest the middle, after


def test_the_page_needs_nothing_from_elsewhere(run_folder: Path) -> None:
    html, page = page_of(run_folder)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "img", "iframe", "object", "use"})
    for _, attrs in page.elements:
        assert attrs.keys().isdisjoint({"src", "href", "srcset", "action"})
        assert not any(name.startswith("on") for name in attrs)
    assert "url(" not in html
    assert "@import" not in html
    assert html.count("https://") == 1  # the setting's text


def test_text_of_a_run_is_inert(tmp_path: Path) -> None:
    attack = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>"
    record = RunRecord(tmp_path)
    record.log(1, {"loss": 1.0})
    hostile = rollout(0, [token(attack, 3.0, teacher_top=attack)], prompt=attack)
    record.add_rollouts([{**hostile, "teacher_prompt": attack, "answer": attack}])
    record.write_info({"name": attack, "config": {attack: attack}, "versions": {attack: attack}})
    _, page = page_of(tmp_path)
    assert {"script", "img"}.isdisjoint(tag for tag, _ in page.elements)
    assert (
        page.text.count(attack) == 14
    )  # title twice, settings 4, prompts 2, answer, token, teacher's, worst 3
    (drawn,) = page.having("t")
    assert f"teacher's first choice {attack} at 98.0%" in (drawn["title"] or "")


def test_a_token_wears_its_divergence_and_what_the_teacher_wanted(tmp_path: Path) -> None:
    known = [0.0, 0.25, 1.0, 2.25, 4.0, 9.0, None]
    record = RunRecord(tmp_path)
    record.add_rollouts([rollout(0, [token(" 1\n", kl) for kl in known] + [token("7", 0.6)])])
    html, page = page_of(tmp_path)
    classes = [str(attrs["class"]).split()[1] for attrs in page.having("t")]
    assert classes == ["k0", "k4", "k8", "k12", "k16", "k16", "unknown", "k6"]
    for shade in (palette(dark=False)[8], palette(dark=True)[8]):
        assert f".k8 .c {{ background: {shade.background}; color: {shade.text} }}" in html
    assert page.text.count("7 98%") == 5  # at 1, 2.25, 4, 9 and 0.6 nats
    assert [str(attrs["class"]) for attrs in page.having("w")] == ["w"] * 4 + ["w same"]
    assert html.count("1↵</span>") == 9  # two more among the worst
    title = page.having("k8")[-1]["title"] or ""
    assert "forward KL 1.000 nats" in title
    assert "student's probability 50.0% (log -0.69)" in title
    assert "teacher's probability 1.0% (log -4.61)" in title


def test_the_teachers_own_context_is_marked(run_folder: Path) -> None:
    html, _ = page_of(run_folder)
    assert "<mark>hint 579 </mark>123+456=</pre>" in html


def test_a_long_rollout_is_cut_and_says_so(tmp_path: Path) -> None:
    RunRecord(tmp_path).add_rollouts([rollout(0, [token("5")] * 1_500)])
    _, page = page_of(tmp_path)
    assert len(page.having("t")) == 400
    assert "1,100 more tokens are in rollouts.json" in page.text


def test_problems_that_recur_come_first(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    for step in (0, 100):
        singles = [rollout(step, [token("5")], prompt=f"{step}-{index}=") for index in range(20)]
        record.add_rollouts([*singles, rollout(step, [token("5")], prompt="both=")])
    _, page = page_of(tmp_path)
    prompts = re.findall(r"Student reads (\S+=)", page.text)
    assert prompts == ["both=", "0-0=", "100-0=", "0-1=", "100-1=", "0-2=", "100-2=", "0-3="]


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (accuracy(485, 0.951, 0.982), "rose from"),
        (accuracy(10, 0.011, 0.036), "fell from"),
        (accuracy(200, 0.358, 0.444), "the intervals overlap, so this is no clear change."),
    ],
)
def test_the_verdict_follows_the_intervals(tmp_path: Path, after: Accuracy, words: str) -> None:
    record = RunRecord(tmp_path)
    record.add_evaluation(BEFORE)
    record.add_evaluation({**AFTER, "greedy": after})
    assert words in verdict(load_run(tmp_path))


def test_what_could_not_be_read_is_told(tmp_path: Path) -> None:
    RunRecord(tmp_path).log(1, {"loss": 1.0})
    (tmp_path / "rollouts.json").write_text('[{"step": 0}]')
    _, page = page_of(tmp_path)
    assert "rollouts.json: 1 of 1 entries incomplete; left out" in page.text
    with pytest.raises(ValueError, match="directory: expected a run folder"):
        write_report(tmp_path / "absent")


def test_what_is_missing_leaves_no_hole(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.write_info({})
    _, page = page_of(tmp_path)
    assert "Nothing has been measured yet." in page.text
    assert {"section", "table", "svg"}.isdisjoint(tag for tag, _ in page.elements)

    record.log(1, {"loss": 0.5})
    _, page = page_of(tmp_path)
    assert "Accuracy was not measured; the loss was 0.5 at step 1." in page.text
    (line,) = [attrs for tag, attrs in page.elements if tag == "path" and attrs.get("class") == "line"]
    assert re.fullmatch(r"M[\d.]+,[\d.]+h4", str(line["d"]))

    record.add_evaluation(BEFORE)
    record.add_rollouts([{**rollout(0, []), "answer": None, "correct": None}])
    _, page = page_of(tmp_path)
    assert "Greedy accuracy is 38.4 % (95 % CI 34.2 to 42.7) at step 0." in page.text
    assert "not graded" in page.text
    assert "nothing written" in page.text
    assert "Right answer" not in page.text


# --- colours and charts


def test_colours_grow_with_the_root_of_the_divergence() -> None:
    known = [0.0, -1e-9, 0.25, 1.0, 2.25, FULL_NATS, 50.0, math.inf]
    assert [level_of(kl) for kl in known] == [0, 0, 4, 8, 12, LEVELS, LEVELS, LEVELS]
    assert level_of(None) is None
    assert level_of(math.nan) is None


@pytest.mark.parametrize("dark", [False, True])
def test_every_shade_can_be_read_and_told_apart(dark: bool) -> None:
    shades = palette(dark)
    assert len(shades) == LEVELS + 1
    assert all(contrast(shade.background, shade.text) >= 4.5 for shade in shades)
    paper = [contrast(shade.background, shades[0].background) for shade in shades]
    assert paper == sorted(
        set(paper)
    )  # ever further from the page: it reads without colour vision and in print
    assert paper[-1] > 7


def test_colours_are_srgb() -> None:
    assert palette(dark=False)[0].background == "#ffffff"
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    deepest = palette(dark=False)[-1].background
    red, green, blue = (int(deepest[at : at + 2], 16) for at in (1, 3, 5))
    assert blue > green > red


@given(st.floats(-1e9, 0), st.floats(0, 1e9))
def test_ticks_enclose_the_data_and_zero(low: float, high: float) -> None:
    marks = ticks(low, high)
    slack = 1e-6 * (high - low) + 1e-12
    assert marks[0] <= low + slack
    assert marks[-1] >= high - slack
    assert 0.0 in marks
    assert 2 <= len(marks) <= 7
    assert marks == sorted(set(marks))


def test_ticks_and_numbers_are_round() -> None:
    assert ticks(0, 0.62) == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert ticks(0, 200) == [0.0, 50.0, 100.0, 150.0, 200.0]
    assert ticks(0, 0) == [0.0, 1.0]
    known = [0, 0.25, 12.5, 1_953, 12_500, 2e-4, 1.5e-4]
    assert [number(x) for x in known] == ["0", "0.25", "12.5", "1,953", "12.5k", "2e-4", "1.5e-4"]


def test_a_gap_is_left_open_and_a_spike_of_a_long_curve_stays() -> None:
    chart = draw("Loss", "", [Series("", [1, 2, 3, 4], [1.0, math.nan, 1.0, 1.0])])
    assert chart is not None
    assert chart.lines[0].path.count("M") == 2
    assert chart.note == "1 not finite"
    values = [0.1] * 20_000
    values[12_345] = 1.0
    chart = draw("Loss", "", [Series("", range(20_000), values)])
    assert chart is not None
    heights = [float(pair.split(",")[1]) for pair in re.split("L", chart.lines[0].raw[1:])]
    assert len(heights) <= 480
    assert min(heights) == 10.0  # the top of the area
    assert draw("Loss", "", [Series("", [1], [math.nan])]) is None


def test_error_bars_stand_where_the_interval_is() -> None:
    chart = draw(
        "Accuracy", "%", [Series("greedy", [0, 200], [50.0, 100.0], [(25.0, 75.0), (90.0, 100.0)])], top=100
    )
    assert chart is not None
    first, last = chart.lines[0].dots
    bottom, top = 156.0, 10.0
    assert first[1:4] == (83.0, bottom + 0.75 * (top - bottom), bottom + 0.25 * (top - bottom))
    assert last[1:3] == (top, top)
    assert first[4] == "greedy, step 0: 50.0 % (95 % CI 25.0 to 75.0)"


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (
            {"how": "stopped", "why": "SIGTERM", "step": 71, "of": 200},
            "Stopped by SIGTERM after step 71 of 200; resume with --resume-from-checkpoint last.",
        ),
        (None, "At step 0 when this page was written. If the run was killed, resume with"),
        ({"how": "finished", "step": 2, "of": 2}, "The run is finished; nothing was measured."),
    ],
)
def test_a_run_says_first_how_it_ended(tmp_path: Path, ended: dict[str, object] | None, said: str) -> None:
    RunRecord(tmp_path).write_info({"ended": ended})
    _, page = page_of(tmp_path)
    assert said in page.text
    over = ended is not None and ended["how"] == "finished"
    assert ("Nothing has been measured yet." in page.text) is not over
    assert any(attrs.get("class") == "banner" for _, attrs in page.elements) is not over
