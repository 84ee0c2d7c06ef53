"""Locust's page with ours in it, as a browser shows it: real `locust` processes, on 127.0.0.1."""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest
import requests

from servers.base import free_port
from tests.browser import chromium, complaints, needs_browser, size, wait

pytestmark = pytest.mark.slow
CHAT = Path(__file__).parent.parent / "locustfiles" / "chat.py"
ENV_KEY, COMMAND_KEY, TYPED_KEY = "sk-of-the-environment", "sk-of-the-command", "sk-of-the-form"
HACK = "window.hacked = 1"
MODEL = f'<img src=x onerror="{HACK}"><script>{HACK}</script>'
WORDS = f"</td></script><script>{HACK}</script> your key is "
GUARDED = """
from flask import redirect
from flask_login import UserMixin, login_user
from locust import events
from loadgen.fleet import LLMUser

class Chat(LLMUser):
    scenario = "smoke"

class Person(UserMixin):
    id = "me"

@events.init.add_listener
def login(environment, **_):
    ui = environment.web_ui
    ui.app.secret_key = "of this test"
    ui.login_manager.user_loader(lambda _: Person())
    ui.auth_args["username_password_callback"] = "/enter"
    @ui.app.route("/enter")
    def enter():
        login_user(Person())
        return redirect("/load/")
"""


class Locust:
    """A `locust` process with its page, while in its context; `base`: its address."""

    def __init__(self, place: Path, locustfile: Path, *words: str, path: str = "") -> None:
        self.place, port = place, free_port()
        self.root = f"http://127.0.0.1:{port}"
        self.base = self.root + path
        self.session = requests.Session()
        self.session.trust_env = False
        self._log = (place / "locust.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "locust", "-f", str(locustfile), "--web-host", "127.0.0.1",
             "--web-port", str(port), *words], cwd=place, stdin=subprocess.DEVNULL,
            stdout=self._log, stderr=self._log, process_group=0,
            env={**os.environ, "LOADGEN_API_KEY": ENV_KEY})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def wait_for_page(self) -> Self:
        self.until(self._answers, "Locust's page answers")
        return self

    def _answers(self) -> bool:
        assert self._process.poll() is None, self.log()
        try:
            return self.session.get(f"{self.base}/", timeout=60).status_code == 200
        except requests.ConnectionError:
            return False

    def log(self) -> str:
        return (self.place / "locust.log").read_text(encoding="utf-8")

    def until(self, seen: Callable[[], Any], what: str, limit_s: float = 90.0) -> Any:
        ends = time.monotonic() + limit_s
        while not (found := seen()):
            assert time.monotonic() < ends, f"waited for: {what}\n{self.log()}"
            time.sleep(0.2)
        return found

    def get(self, path: str) -> requests.Response:
        return self.session.get(self.base + path, timeout=60)

    def now(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/loadgen/live.json").json()
        return found

    def swarm(self, **form: str) -> dict[str, Any]:
        said: dict[str, Any] = self.session.post(
            f"{self.base}/swarm", timeout=120,
            data={"user_count": "2", "spawn_rate": "2", **form}).json()
        return said

    def stop(self) -> None:
        self.session.post(f"{self.base}/stop", timeout=60)
        self.until(lambda: self.now()["report"] == "ready", "the report is made")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locust]:
    with Locust(tmp_path_factory.mktemp("page"), CHAT, "--api-key", COMMAND_KEY) as locust:
        yield locust.wait_for_page()


class Hostile(BaseHTTPRequestHandler):
    """A server whose texts are scripts: its model's name, and the errors of every third answer,
    which repeat the key, too."""

    protocol_version = "HTTP/1.1"
    seen: set[str | None]  # what came as Authorization
    asked: Iterator[int]

    def do_GET(self) -> None:
        self._say(json.dumps({"data": [{"id": MODEL}]}).encode(), "application/json")

    def do_POST(self) -> None:
        self.seen.add(key := self.headers.get("Authorization"))
        nth = next(self.asked)
        asks = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "tokenize" in self.path:
            self._say(b'{"count": 30}', "application/json")
            return
        time.sleep(0.05)
        events: list[dict[str, Any]] = [
            {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}
            for _ in range(asks["max_tokens"])]
        if nth % 3 or asks["max_tokens"] < 16:  # what is asked before the test goes well
            events += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]},
                       {"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens":
                                                 asks["max_tokens"]}}]
        else:
            events.append({"error": {"message": f"{WORDS}{key}", "code": 500}})
        self._say(b"".join(b"data: " + x.encode() + b"\n\n" for x in
                           [*map(json.dumps, events), "[DONE]"]), "text/event-stream")

    def _say(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locust]:
    """A test of a hostile server runs, behind a login and below a path."""
    place = tmp_path_factory.mktemp("guarded")
    (place / "guarded.py").write_text(GUARDED, encoding="utf-8")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    Hostile.seen, Hostile.asked = set(), itertools.count(1)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with Locust(place, place / "guarded.py", "--web-login", "--web-base-path", "/load",
                    "--host", f"http://127.0.0.1:{server.server_address[1]}",
                    path="/load") as locust:
            locust.wait_for_page().session.get(f"{locust.root}/enter", timeout=60)
            said = locust.swarm(api_key=TYPED_KEY)
            assert said["success"], said
            locust.until(lambda: locust.now()["failures"], "requests failed")
            yield locust
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# ------------------------------------------------------------------------------------- the form


@pytest.mark.parametrize(("form", "why"), [
    ({"slo": "ttft=banana"}, "'banana' is not a duration"),
    ({"rate": "many"}, "rate: 'many' is no number"),
    ({"rate": "-1"}, "give requests per second"),
    ({"scenario": "/etc/passwd"}, "no scenario '/etc/passwd' is offered"),
    ({"host": "127.0.0.1:8000"}, "write it with its scheme"),
    ({"host": "http://127.0.0.1:9"}, "cannot be reached"),
    ({"model": "other"}, "other"),
    ({"slo": "ttft=9s", "user_count": "few"}, "Invalid user_count"),
    ({"slo": "ttft=9s", "run_time": "long"}, "Valid run_time formats")])
def test_a_wrong_form_says_why_and_leaves_nothing_behind(page: Locust, form: dict[str, str],
                                                         why: str) -> None:
    before = fields(page), page.now()["test"]
    said = page.swarm(**form)
    assert not said["success"]
    assert why in said["message"]
    assert (fields(page), page.now()["test"]) == before


def fields(page: Locust) -> Any:
    """The form, as Locust's page gets it."""
    found = re.search(r"templateArgs = (.*)", page.get("/").text)
    assert found is not None
    return json.loads(found[1])["extra_options"]


def test_there_are_words_where_there_is_nothing_yet(page: Locust) -> None:
    for path in ("/loadgen/report", "/loadgen/run.zip"):
        answer = page.get(path)
        assert answer.status_code == 404
        assert "No test has run yet." in answer.text
    assert page.get("/stats/requests").json()["extended_stats"] == [{"key": "loadgen", "data": []}]


# -------------------------------------------------------------------------- the way of a user


def put(driver: Any, name: str, value: str) -> None:
    """Into a field, once it has unfolded."""
    def typed(d: Any) -> bool:
        field = d.find_element("name", name)
        d.execute_script("arguments[0].select()", field)
        field.send_keys(value)
        return bool(field.get_attribute("value") == value)

    wait(driver, typed, f"{name}={value}")


def choose(driver: Any, name: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    def chosen(d: Any) -> bool:
        Select(d.find_element("name", name)).select_by_visible_text(value)
        return True

    wait(driver, chosen, f"{name}={value}")


def press(driver: Any, words: str) -> None:
    wait(driver, lambda d: d.find_element("xpath", f"//*[text()='{words}']").click() or True, words)


def text(driver: Any, selector: str) -> str:
    return str(driver.execute_script(
        "return document.querySelector(arguments[0])?.textContent ?? ''", selector))


@needs_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_from_the_form_to_the_report(browser: Any, page: Locust, width: int) -> None:
    size(browser, width)
    browser.get(f"{page.base}/")
    if page.now()["state"] == "stopped":  # by the test before
        press(browser, "New")
    press(browser, "Custom parameters")
    put(browser, "userCount", "3")
    put(browser, "spawnRate", "3")
    put(browser, "slo", "ttft=banana")
    choose(browser, "scenario", "smoke")
    press(browser, "Start")
    wait(browser, lambda d: "'banana' is not a duration" in text(d, "[role=alert]"), "why")
    put(browser, "slo", "ttft=5s")
    press(browser, "Start")
    wait(browser, lambda d: text(d, "[role=tab]") == "Statistics", "the test starts")
    press(browser, "Streaming")
    wait(browser, lambda d: "100.0%" in text(d, "table"), "the tab fills")
    assert "hello" in text(browser, "table")

    browser.get(f"{page.base}/loadgen")
    wait(browser, lambda d: drawn(d) >= 6, "charts are drawn")
    wait(browser, lambda d: "running" in text(d, "#state"), "it runs")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert "simulated" in text(browser, "#about")
    assert "qwen2.5-7b" in text(browser, "#about")
    assert text(browser, "#title") == "smoke"
    assert "TTFT ≤ 5 s" in text(browser, "#foot")
    page.stop()
    wait(browser, lambda d: "stopped" in text(d, "#state"), "it stopped")
    wait(browser, lambda d: d.find_element("id", "report").click() or True, "a link to the report")
    wait(browser, lambda d: text(d, "h1"), "the report opens")
    assert browser.current_url == f"{page.base}/loadgen/report"
    wait(browser, lambda d: d.execute_script("return document.querySelector('figure svg')"),
         "its charts are drawn")

    browser.get(f"{page.base}/?tab=loadgen")
    wait(browser, lambda d: "100.0%" in text(d, "table"), "the tab says what was last")
    assert text(browser, "a[href='./loadgen']") == "Live charts"
    assert complaints(browser) == []


def drawn(driver: Any) -> int:
    """How many charts have a line."""
    return int(driver.execute_script("""return [...document.querySelectorAll("figure svg")]
        .filter(s => s.querySelector("path[fill=none]")).length"""))


def test_a_running_test_takes_more_users_but_no_other_scenario(page: Locust) -> None:
    assert page.swarm(scenario="smoke", api_key=TYPED_KEY)["success"]
    page.until(lambda: page.now()["rows"], "it runs")
    said = page.swarm(scenario="chat")
    assert not said["success"]
    assert said["message"] == "scenario: stop the test to change that"
    assert page.swarm(user_count="3", scenario="smoke")["success"]
    page.until(lambda: (page.now()["leg"] or {}).get("value") == 3, "three users are a leg")
    assert fields(page)["scenario"]["default_value"] == "smoke"
    assert fields(page)["api_key"]["default_value"] == "********"


def test_no_key_is_in_a_page_a_file_or_the_zip(page: Locust) -> None:
    """Of a running test (of the one before); then of one that has ended."""
    for of in ("runs", "has ended"):
        zipped = zipfile.ZipFile(io.BytesIO(page.get("/loadgen/run.zip").content))
        texts = {name: zipped.read(name) for name in zipped.namelist()}
        assert any(name.endswith("manifest.json") for name in texts)
        texts |= {path: page.get(path).content for path in (
            "/", "/stats/requests", "/logs", "/exceptions", "/loadgen", "/loadgen/live.json",
            "/stats/report")}
        texts |= {str(p): p.read_bytes() for p in page.place.rglob("*") if p.is_file()}
        for key in (ENV_KEY, COMMAND_KEY, TYPED_KEY):
            assert [name for name, said in texts.items() if key.encode() in said] == [], of
        if of == "runs":
            page.stop()


# ---------------------------------------------------------------- behind a login, below a path


def test_without_a_login_nothing_of_ours_answers(guarded: Locust) -> None:
    for path in ("/loadgen", "/loadgen/live.json", "/loadgen/report", "/loadgen/run.zip",
                 "/stats/requests", "/"):
        answer = requests.get(guarded.base + path, timeout=60, allow_redirects=False)
        assert (answer.status_code, answer.headers["Location"].split("?")[0]) == (
            302, "/load/login"), path
        assert "hello" not in answer.text
        assert "Live charts" not in answer.text
    answer = requests.post(f"{guarded.base}/swarm", data={"slo": "ttft=banana"}, timeout=60,
                           allow_redirects=False)
    assert answer.status_code == 302
    assert "banana" not in answer.text.partition("login")[0]


def test_with_a_login_all_of_it_lies_below_the_path(guarded: Locust) -> None:
    assert guarded.now()["scenario"] == "smoke"
    assert "hello" in guarded.get("/stats/requests").text
    assert "Live charts" in guarded.get("/").text
    answer = guarded.get("/loadgen")
    assert answer.headers["Access-Control-Allow-Origin"] == guarded.root  # Locust's: everybody
    assert guarded.session.get(f"{guarded.root}/loadgen", timeout=60).status_code == 404


def test_only_new_samples_are_sent_and_all_of_another_test(guarded: Locust) -> None:
    guarded.until(lambda: len(guarded.now()["samples"]) > 2, "samples")
    now = guarded.now()
    name, at = now["test"], now["samples"][1][0]
    later = guarded.get(f"/loadgen/live.json?test={name}&since={at}").json()["samples"]
    assert later[0] == now["samples"][2]
    other = guarded.get(f"/loadgen/live.json?test=other&since={at}").json()["samples"]
    assert other[0] == now["samples"][0]


def test_a_typed_key_is_sent_and_not_shown_again(guarded: Locust) -> None:
    assert f"Bearer {TYPED_KEY}" in Hostile.seen
    failures = guarded.now()["failures"]
    assert f"{WORDS}***" in failures[0]["last"].replace("Bearer ***", "***")
    for path in ("/", "/stats/requests", "/loadgen/live.json"):
        assert TYPED_KEY not in guarded.get(path).text


@needs_browser
def test_texts_of_a_hostile_server_are_shown_and_do_not_run(browser: Any, guarded: Locust) -> None:
    size(browser, 1280)
    browser.get(f"{guarded.root}/enter")
    browser.get(f"{guarded.base}/loadgen")
    wait(browser, lambda d: WORDS in text(d, "#failures"), "the server's words")
    assert MODEL in text(browser, "#about")
    assert browser.execute_script("return window.hacked") is None
    browser.get(f"{guarded.base}/?tab=failures")
    wait(browser, lambda d: WORDS[:80] in text(d, "table"), "the server's words, in Locust's page")
    assert browser.execute_script("return window.hacked") is None
    guarded.stop()
    browser.get(f"{guarded.base}/loadgen/report")
    wait(browser, lambda d: text(d, "h1"), "the report opens")
    assert MODEL in text(browser, "main")
    assert browser.execute_script("return window.hacked") is None
    assert complaints(browser) == []
