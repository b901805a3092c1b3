"""The laws of a report in a browser: it works from the disk, at any width, with a keyboard, and without scripts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, DRIVER, Browser, browser
from report_runs import evaluated, shifted, three

from multimodal.report import folders, page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver"),
]

TABS = ["overview", "results", "curves", "pictures", "configuration"]
SEEN = "return [...document.querySelectorAll('section')].filter(s => s.offsetParent).map(s => s.id)"
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    runs = three(root)
    runs.append(
        evaluated(root / "a-name-without-end-optimizer.lr=0.001-towers.image.width=1024-seed=12", shifted(-0.2))
    )
    read = folders.read(runs)
    page.write(root / "report.html", page.render([*read[:3], folders.read_run(runs[3], HOSTILE), read[3]]))
    return root / "report.html"


@pytest.fixture(scope="module")
def _window() -> Iterator[Browser]:
    with browser() as window:
        yield window


@pytest.fixture
def window(_window: Browser, report: Path) -> Browser:
    _window.resize(1280)
    _window.open(report)
    return _window


def test_nothing_is_fetched_and_nothing_goes_wrong(window: Browser, report: Path) -> None:
    for tab in TABS:
        window.open(report, f"#{tab}")
        assert window.run(SEEN) == [tab]
    assert window.console() == []
    assert window.requests() == []


def test_tabs_switch_by_click_and_by_key(window: Browser) -> None:
    assert window.run(SEEN) == ["overview"]
    for tab in TABS:
        window.click(f"#tab-{tab}")
        assert window.run(SEEN) == [tab]
        assert window.run("return document.querySelector('[aria-selected=true]').hash") == f"#{tab}"
    for key, tab in (
        ("\ue014", "overview"),
        ("\ue014", "results"),
        ("\ue010", "configuration"),
        ("\ue012", "pictures"),
    ):
        window.press(key)  # right, right, end, left
        assert window.run(SEEN) == [tab]
        assert window.run("return document.activeElement.id") == f"tab-{tab}"


def test_a_click_on_a_header_sorts_the_rows(window: Browser) -> None:
    window.click("#tab-overview")
    column = (
        "return [...document.querySelectorAll('#overview table')[0].tBodies[0].rows].map(r => r.cells[%d].textContent)"
    )
    top1 = window.run(
        "return [...document.querySelectorAll('#overview thead')[0].rows[0].cells]"
        ".findIndex(c => c.textContent.includes('shapes') && c.textContent.includes('top1'))"
    )
    header = f"#overview table thead th:nth-child({top1 + 1})"
    given = window.run(column % top1)
    window.click(f"{header} button")
    assert window.run(f"return document.querySelector('{header}').ariaSort") == "descending"
    assert window.run(column % top1) == sorted(given, key=float, reverse=True) != given
    window.click(f"{header} button")
    assert window.run(f"return document.querySelector('{header}').ariaSort") == "ascending"
    assert window.run(column % top1) == sorted(given, key=float)


def test_what_is_not_there_is_sorted_to_the_end(window: Browser) -> None:
    column = "return [...document.querySelector('#overview table').tBodies[0].rows].map(r => r.cells[2].textContent)"
    for _ in range(2):
        window.click("#overview table thead th:nth-child(3) button")
        assert window.run(column)[:2] == ["60", "60"]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_not_wider_than_its_window(window: Browser, report: Path, width: int, scheme: str) -> None:
    window.resize(width, scheme=scheme)
    for tab in TABS:
        window.open(report, f"#{tab}")
        if tab == "configuration":
            window.run("document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert window.run("return innerWidth") == width
        assert window.run("return document.documentElement.scrollWidth") <= width, tab


def test_a_picture_is_enlarged_and_put_back(window: Browser) -> None:
    window.click("#tab-pictures")
    window.click(".pictures button")
    assert window.run("return document.querySelector('dialog').open && document.querySelector('dialog img').src") == (
        window.run("return document.querySelector('.pictures img').src")
    )
    window.press("\ue00c")  # escape
    assert not window.run("return document.querySelector('dialog').open")


def test_the_values_under_the_pointer_are_told(window: Browser) -> None:
    window.click("#tab-curves")
    told = "return document.querySelector('.wide .last').textContent.trim()"
    last = window.run(told)
    move = (
        "const svg = document.querySelector('.wide svg'), box = svg.getBoundingClientRect();"
        "svg.dispatchEvent(new PointerEvent('%s', {clientX: box.left + 0.48 * box.width, clientY: box.top + 5}))"
    )
    window.run(move % "pointermove")
    assert window.run(told).split() == ["3.59", "3.69", "at", "30"]
    window.run(move % "pointerleave")
    assert window.run(told) == last


def test_a_run_can_be_hidden_from_the_curves(window: Browser) -> None:
    curves = "return [...document.querySelectorAll('.wide .curve')].map(c => getComputedStyle(c).display)"
    window.click("#tab-curves")
    assert window.run(curves) == ["inline", "inline"]
    window.click(".runs .run button")
    assert window.run(curves) == ["none", "inline"]


def test_a_hostile_name_is_only_text(window: Browser) -> None:
    assert window.run("return document.querySelectorAll('img[src=x]').length") == 0
    assert HOSTILE in window.run("return document.querySelector('#overview table').textContent")
    assert window.console() == []


def test_all_is_there_without_scripts(window: Browser, report: Path) -> None:
    with browser() as other:
        other.without_scripts()
        other.open(report)
        text = other.text()
    for words in ("Overview", "90.9 [89.6, 92.1]", "train/loss", "shapes: confusion matrix", "Configuration"):
        assert words in text
