"""The report: its figures, its escaping, and its look in a real browser."""

import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.charts.axes import log_axis, percent_axis, short_number
from s1engine.eval.figures import pareto_front, sweep_figures
from s1engine.eval.report import shortened, write_report
from tests.eval.demo import IDENTITY, TRACE, demo_sweep

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
VOID = {"meta", "link", "br"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report")
    summary, rows = demo_sweep()
    write_report(place, summary, rows, IDENTITY)
    return place


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


class Balance(HTMLParser):
    """Fails on an end tag that closes no open element."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.handle_starttag("br", attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(page: str) -> None:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert not parser.open
    assert parser.links == ["data:,"]
    assert not re.search(r"https?://|@import|url\(", page)


def test_text_of_questions_and_models_is_escaped(page: str) -> None:
    assert "hacked&#x27;&lt;/script&gt;&lt;img" in page
    assert page.count("<script>") == 1 and "<img" not in page


def test_every_run_is_in_every_figure_and_the_table(page: str) -> None:
    runs = demo_sweep()[0]["runs"]
    charts = dict(re.findall(r'id="(\w+)"><h2>.*?(<svg.*?</svg>)', page, re.DOTALL))
    asked = sum(run["limit"] not in (None, 0) for run in runs)
    counts = {name: chart.count("data-tip=") for name, chart in charts.items()}
    assert counts == {"accuracy": 14, "seconds": 14, "throughput": 14, "control": asked}
    table = page[page.index('<table id="runs"') :].split("</table>")[0]
    assert table.count("<tr>") == 1 + len(runs)
    assert "<th>joules</th>" in table and "any sample right" not in table


def test_injected_text_is_highlighted_and_nothing_is_lost(page: str) -> None:
    pre = page[page.index("<pre>") + 5 :].split("</pre>")[0]
    marked = re.findall(r"<mark>(.*?)</mark>", pre, re.DOTALL)
    assert marked == ["Wait", "&lt;|im_start|&gt;answer\nFinal Answer:"]
    import html

    assert html.unescape(re.sub(r"</?mark>", "", pre)) == "".join(text for text, _ in TRACE)  # type: ignore[misc]


def test_the_figures_are_png_files_too(folder: Path) -> None:
    names = {path.name for path in folder.glob("*.png")}
    assert names == {"accuracy.png", "seconds.png", "throughput.png", "control.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))


def test_a_sweep_of_one_run_without_limits_or_traces_has_a_page(tmp_path: Path) -> None:
    summary, rows = demo_sweep()
    one = {
        "runs": summary["runs"][6:7],
        "methods": {"budget-forcing": dict.fromkeys(("control", "scaling", "performance"))},
    }
    write_report(tmp_path, one, [row for row in rows if "trace" not in row], IDENTITY)
    text = (tmp_path / "report.html").read_text()
    assert 'id="control"' not in text and 'id="traces"' not in text and 'id="accuracy"' in text


# --- parts ---


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_no_run_dominates_the_front(found: list[tuple[int, int]]) -> None:
    runs = [{"x": float(x), "accuracy": float(y)} for x, y in found]
    front = set(pareto_front(runs, lambda run: -run["x"], "x"))  # less x is better
    for x, y in found:
        beaten = any(a <= x and b >= y and (a, b) != (x, y) for a, b in found)
        assert ((x, y) in front) is not beaten
    assert [y for _, y in sorted(front)] == sorted(y for _, y in front)


positive = st.floats(1e-4, 1e7)


@given(st.lists(st.one_of(positive, st.just(0.0)), min_size=1, max_size=9), st.booleans())
def test_axes_hold_their_values_and_few_ticks(values: list[float], decimal: bool) -> None:
    values = [value for value in values if value or not decimal] or [1.0]
    axis = log_axis(values, decimal=decimal)
    places = [axis.position(value) for value in sorted(values)]
    assert all(0 <= place <= 1 for place in places) and places == sorted(places)
    ticks = [axis.position(tick) for tick in axis.ticks]
    assert all(0 <= tick <= 1.0001 for tick in ticks) and len(ticks) <= 13
    assert all(a < b for a, b in pairwise(ticks))


@given(st.floats(0, 100), st.floats(0, 100))
def test_percent_axes_stay_within_percent(a: float, b: float) -> None:
    axis = percent_axis([min(a, b)], [max(a, b)])
    assert 0 <= axis.low < axis.high <= 100
    assert axis.low <= min(a, b) and max(a, b) <= axis.high
    assert 2 <= len(axis.ticks) <= 11


def test_short_numbers() -> None:
    numbers = [0, 0.05, 16, 512, 1024, 2000, 1536, 16384, 2**21, 1234]
    shown = ["0", "0.05", "16", "512", "1k", "2k", "1.5k", "16k", "2M", "1,234"]
    assert [short_number(number) for number in numbers] == shown


def test_a_series_has_one_color_in_all_figures() -> None:
    drawn = sweep_figures(demo_sweep()[0]["runs"])
    colors = {(series.name, series.color) for figure in drawn for series in figure.series}
    assert len(colors) == len({name for name, _ in colors}) == 5


@given(st.lists(st.tuples(st.text(max_size=20), st.booleans()), max_size=12), st.integers(1, 60))
def test_long_traces_keep_their_ends(segments: list[tuple[str, bool]], limit: int) -> None:
    whole = "".join(text for text, _ in segments)
    kept = "".join(text for text, _ in shortened(segments, limit))
    if len(whole) <= limit:
        assert kept == whole
    else:
        head, tail = limit // 2, limit - limit // 2
        left_out = f"\n[… {len(whole) - limit:,} characters …]\n"
        assert kept == whole[:head] + left_out + whole[len(whole) - tail :]


# --- in a browser ---

PROBE = """
const luminance = (color) => {
  const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (element, ground) => {
  const style = getComputedStyle(element);
  const ink = luminance(style.fill !== "rgb(0, 0, 0)" ? style.fill : style.color);
  const paper = luminance(getComputedStyle(ground).backgroundColor);
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
};
const card = document.querySelector(".card"), dot = document.querySelector(".dot");
dot.dispatchEvent(new PointerEvent("pointerenter"));
const tip = document.getElementById("tip"), box = tip.getBoundingClientRect();
const entry = document.querySelector(".legend [data-series]");
entry.dispatchEvent(new PointerEvent("pointerenter"));
const strays = [...document.querySelectorAll("svg")].filter((svg) => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("circle, text")].some((part) => {
    const at = part.getBoundingClientRect();
    return at.left < frame.left - 1 || at.right > frame.right + 1 || at.bottom > frame.bottom + 1;
  });
});
document.body.dataset.probe = JSON.stringify({
  ready: document.documentElement.dataset.ready,
  title: document.title,
  tip: tip.innerText, shown: tip.classList.contains("on"),
  inside: box.left >= 0 && box.right <= innerWidth,
  dimmed: document.querySelectorAll(".chart.dim .series.lit").length,
  overflow: document.documentElement.scrollWidth - innerWidth,
  strays: strays.length,
  cut: [...document.querySelectorAll(".scroll")]
    .filter((table) => table.scrollWidth > table.clientWidth).length,
  contrasts: [
    contrast(document.querySelector("h1"), document.body),
    contrast(document.querySelector(".note"), card),
    contrast(document.querySelector(".tick"), card),
    contrast(document.querySelector("mark"), document.querySelector("mark")),
  ],
  dark: luminance(getComputedStyle(document.body).backgroundColor) < 0.1,
});
"""


def browse(page: str, folder: Path, *flags: str, width: int = 1200) -> Any:
    """Opens the page offline with a probe at its end; returns the probe's result."""
    path = folder / "probed.html"
    path.write_text(page.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},1600", *flags, "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'data-probe="(.*?)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(found.group(1).replace("&quot;", '"'))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 600)])
def test_a_browser_shows_it(page: str, tmp_path: Path, scheme: str, width: int) -> None:
    flag = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    found = browse(page, tmp_path, flag, width=width)
    assert found["ready"] == "yes" and found["title"] == "aime24, s1-demo"  # no script ran
    assert found["shown"] and "thinking: " in found["tip"] and found["inside"]
    assert found["dimmed"] == 1
    assert found["overflow"] <= 0 and found["strays"] == 0
    assert found["cut"] == 0 or width < 1200  # tables fit a wide window
    assert found["dark"] is (scheme == "dark")
    assert all(contrast >= 4.5 for contrast in found["contrasts"]), found["contrasts"]
    assert all(math.isfinite(contrast) for contrast in found["contrasts"])
