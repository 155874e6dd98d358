"""The report in a real browser: headless Chromium, where one is installed."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from opsd_train.report.page import write_report
from opsd_train.watch.record import RunRecord
from run_samples import AFTER, BEFORE, rollout, token

BROWSER = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--enable-logging=stderr",
)  # fmt: skip
WIDTHS = (320, 390, 1000)  # a small phone, a phone, a desk
# The page itself runs no script, so another one measures it from around it.
MEASURE = """
<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    return {
      width: root.clientWidth, needed: root.scrollWidth, height: root.scrollHeight,
      paper: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
      fetched: frame.contentWindow.performance.getEntriesByType("resource").map(one => one.name),
      beyond: [...page.body.querySelectorAll("*")].filter(
        one => one.getBoundingClientRect().right > root.clientWidth + 0.5 && !one.closest("svg, pre, .w")
      ).map(one => `${one.tagName}.${one.className}`),
      drawn: page.querySelectorAll("svg").length,
    };
  });
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything in it, and words longer than a phone is wide."""
    folder = tmp_path_factory.mktemp("run")
    record = RunRecord(folder)
    for step in range(1, 61):
        times = {"step_seconds": 2.0, "rollout_seconds": 1.0, "teacher_seconds": 0.3, "loss_seconds": 0.2}
        kl = {"forward_kl": 1 / step, "reverse_kl": 2 / step, "kl_0_8": 1 / step, "kl_8_32": 2 / step}
        record.log(step, {"loss": 1 / step, "completion_length": 99.0, "teacher_mass": 0.9, **times, **kl})
    passes = [{"k": k, "value": 0.5, "low": 0.4, "high": 0.6} for k in (1, 4, 8)]
    record.add_evaluation(BEFORE)
    record.add_evaluation({**AFTER, "samples": 8, "pass_at_k": passes})
    long = [token("x" * 300, 3.0, teacher_top="y" * 300), *[token(" word", 1.0)] * 200, token("\n", 0.1)]
    for step in (0, 200):
        record.add_rollouts([rollout(step, long, prompt="p" * 500), rollout(step, [token("5", 0.7)])])
    record.write_info({"name": "n" * 90, "config": {"output_dir": "/d" * 100}, "versions": {"torch": "2.13"}})
    return write_report(folder)


def browse(folder: Path, dark: bool, *arguments: str) -> tuple[str, list[str]]:
    """What the browser printed, and what pages said on its console."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [str(BROWSER), *QUIET, f"--user-data-dir={folder / 'profile'}", scheme, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)


@pytest.mark.parametrize(("dark", "paper"), [(False, "rgb(255, 255, 255)"), (True, "rgb(24, 24, 24)")])
def test_nothing_is_fetched_said_or_wider_than_the_screen(
    report: Path, tmp_path: Path, dark: bool, paper: str
) -> None:
    page = html.escape(report.read_text(encoding="utf-8"))
    frame = f'<iframe width="{{}}" height="800" frameborder="0" srcdoc="{page}"></iframe>'
    frames = "".join(frame.replace("{}", str(width)) for width in WIDTHS)
    around = tmp_path / "around.html"
    around.write_text(f'<meta charset="utf-8"><pre id="found"></pre>{MEASURE}{frames}', encoding="utf-8")
    dom, said = browse(tmp_path, dark, "--virtual-time-budget=5000", "--dump-dom", around.as_uri())
    measured = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert measured is not None
    found: list[dict[str, Any]] = json.loads(html.unescape(measured[1]))
    assert [one["width"] for one in found] == list(WIDTHS)
    for one in found:
        assert one["beyond"] == []
        assert one["needed"] <= one["width"]
        assert one["height"] > 2_000
        assert one["paper"] == paper
        assert one["fetched"] == []
        assert one["drawn"] >= 6
    assert said == []


@pytest.mark.parametrize("dark", [False, True])
def test_the_picture_is_not_blank(report: Path, tmp_path: Path, dark: bool) -> None:
    picture = tmp_path / "report.png"
    _, said = browse(tmp_path, dark, "--window-size=1000,2400", f"--screenshot={picture}", report.as_uri())
    assert said == []
    pixels = imread(picture)[..., :3]
    assert pixels.shape == (2400, 1000, 3)
    paper = pixels[0, 0]
    assert bool(paper.mean() < 0.2) is dark
    inked = abs(pixels - paper).max(axis=2) > 0.2
    assert 0.01 < inked.mean() < 0.5
    for part in range(0, 2400, 600):  # something is drawn from the top to the bottom
        assert inked[part : part + 600].mean() > 0.003
    accent = abs(pixels - ([0.525, 0.663, 1.0] if dark else [0.184, 0.373, 0.816])).max(axis=2) < 0.02
    assert accent.sum() > 300  # curves, in the colour of their scheme
