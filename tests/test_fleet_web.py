"""Locust's page on the master of a fleet: the form, the Streaming tab and the charts show what all
workers do, and a second test follows the first."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.browser import chromium, complaints, needs_browser, wait
from tests.fleets import OPEN_LOOP
from tests.test_locust_web import Locust, drawn, press, text

pytestmark = pytest.mark.slow


@pytest.fixture(name="page")
def _page(tmp_path: Path) -> Iterator[Locust]:
    with Locust(tmp_path, OPEN_LOOP, "--processes", "2", "--scenario", "smoke", "--plan-seed", "7",
                "--server-options", "--speed 3") as page:
        yield page.wait_for_page()


def outcome(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = msgspec.json.decode((folder / "fleet.json").read_bytes())
    return value


def runs(page: Locust, before: str | None) -> bool:
    now = page.now()
    return now["test"] != before and bool(now["rows"]) and now["rows"][-1]["n"] > 40


def test_tests_follow_each_other_and_each_is_exact(page: Locust) -> None:
    assert "--rate" in page.swarm(scenario="smoke")["message"]
    for nth in (1, 2):
        before = page.now()["test"]  # whose rows stand until the next begins
        assert page.swarm(scenario="smoke", rate="20")["success"] is True, page.log()
        page.until(functools.partial(runs, page, before), "it runs")
        total = page.now()["rows"][-1]
        assert total["good_frac"] is not None
        assert total["ttft_p50_s"] > 0
        assert total["inflight"] >= 0
        assert 8 < total["good_rps"] < 30
        page.stop()
        folders = sorted((page.place / "runs").iterdir())
        assert len(folders) == nth
        assert outcome(folders[-1])["exact"] is True, outcome(folders[-1])["says"]
        assert sum(e["planned"] for e in outcome(folders[-1])["entries"]) > 40
        assert page.get("/loadgen/report").status_code == 200


@needs_browser
def test_the_streaming_tab_shows_the_whole_fleet(page: Locust, tmp_path: Path) -> None:
    assert page.swarm(scenario="smoke", rate="20")["success"] is True, page.log()
    with chromium() as browser:
        browser.get(page.base)
        wait(browser, lambda d: text(d, "[role=tab]") == "Statistics", "the test runs")
        press(browser, "Streaming")
        wait(browser, lambda d: "100.0%" in text(d, "table"), "the tab fills")
        assert "hello" in text(browser, "table")
        browser.save_screenshot(str(tmp_path / "tab.png"))
        browser.get(f"{page.base}/loadgen")
        wait(browser, lambda d: drawn(d) >= 6, "charts are drawn")
        wait(browser, lambda d: "running" in text(d, "#state"), "it runs")
        browser.save_screenshot(str(tmp_path / "charts.png"))
        assert complaints(browser) == []
    page.stop()
