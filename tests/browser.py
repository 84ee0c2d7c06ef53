"""A headless Chromium for tests."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NEEDED = "browser" in os.environ.get("LOADGEN_TESTS_NEED", "")
needs_browser = pytest.mark.skipif(
    not NEEDED and not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs a browser: apt-get install chromium chromium-driver")


@contextmanager
def chromium() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                 "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    driver.set_page_load_timeout(120)
    try:
        yield driver
    finally:
        driver.quit()


def size(driver: Any, width: int) -> None:
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600})


def wait(driver: Any, seen: Callable[[Any], Any], what: str, limit_s: float = 90.0) -> Any:
    """What `seen` returns once it is true. React draws anew at any time: an element may be gone
    again, or not be there yet for a click."""
    from selenium.common.exceptions import (
        ElementClickInterceptedException,
        ElementNotInteractableException,
        StaleElementReferenceException,
    )
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, limit_s, ignored_exceptions=(
        StaleElementReferenceException, ElementNotInteractableException,
        ElementClickInterceptedException)).until(seen, what)


def complaints(driver: Any) -> list[dict[str, Any]]:
    """Errors in the console since the last call."""
    return [x for x in driver.get_log("browser") if x["level"] == "SEVERE"]
