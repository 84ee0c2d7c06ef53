"""The report as a browser shows it: drawn, within the page's width, without a network."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis import summary
from tests import synthetic
from tests.browser import chromium, needs_browser, size

pytestmark = needs_browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("run") / "run"
    synthetic.write(folder)
    summary.finish(folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.mark.parametrize("width", [1280, 400])
def test_the_report_fits_its_window_and_draws_every_chart(browser: Any, report: Path,
                                                          width: int) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    size(browser, width)
    browser.get(report.as_uri())
    charts = "return [...document.querySelectorAll('figure > div')].map(c => {" \
             " const s = c.querySelector('svg, canvas');" \
             " return s ? s.getBoundingClientRect().width : 0 })"
    WebDriverWait(browser, 60).until(lambda b: (w := b.execute_script(charts)) and all(w))
    widths = browser.execute_script(charts)
    assert len(widths) >= 8
    assert max(widths) <= width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    clipped = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')]"
        ".filter(s => s.scrollWidth > s.clientWidth).length")
    assert (clipped == 0) == (width > 1000)  # on a phone, and only there, tables scroll
    assert [x for x in browser.get_log("browser") if x["level"] == "SEVERE"] == []
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)")
    assert [x for x in loaded if x.startswith("http")] == []
