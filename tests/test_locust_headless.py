"""`locust -f … --headless` as users and build servers start it: real processes on 127.0.0.1,
against the simulator, or a server that answers what a test wants."""

import asyncio
import contextlib
import csv
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadgen import cli, openai, plan, scenario
from loadgen.leg import Leg, Window
from loadgen.prompts import Ratio
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Scenario
from loadgen.store import RunFolder
from servers.base import free_port
from tests.raw_server import (
    DONE,
    FIN,
    HEAD,
    LAST,
    ONE_MODEL,
    RST,
    RawServer,
    Script,
    event,
    finish,
    role,
    token,
    usage,
    whole,
)
from tests.real import (
    Popen,
    Said,
    endings,
    kept,
    loadgen,
    over,
    pid_of,
    processes_in,
    running,
    started,
    summary,
    wait,
)
from tests.test_client import DEAD
from tests.test_end_to_end import DERIVED, JOURNALS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nobody_is_left")]

ROOT = Path(__file__).resolve().parent.parent
CHAT = ROOT / "locustfiles" / "chat.py"
KEY = "sk-secret-4711"
FAST = ("--server-options", "--speed 3")
LIMIT_S = 90.0  # of one test's Locust; a shared host may stall


def start(*options: str, cwd: Path, file: Path = CHAT, scenario: str | None = "smoke",
          env: dict[str, str] | None = None) -> contextlib.AbstractContextManager[Popen]:
    """A headless Locust with its run folder `r` in `cwd`."""
    asked = [] if scenario is None else ["--scenario", scenario]
    return started(
        [sys.executable, "-m", "locust", "-f", str(file), "--headless", "--only-summary",
         "--run-folder", "r", *asked, *options], cwd,
        {"PYTHONPATH": str(ROOT), "COLUMNS": "300", **(env or {})})


def locust(*options: str, cwd: Path, **how: Any) -> Said:
    """… to its end, which has to come by itself."""
    with start(*options, cwd=cwd, **how) as process:
        return over(process, LIMIT_S)


def measured(*options: str, cwd: Path, **how: Any) -> Said:
    """… as often as it takes for the measurement to be valid: this host is shared."""
    for _ in range(3):
        shutil.rmtree(cwd / "r", ignore_errors=True)
        said = locust(*options, cwd=cwd, **how)
        if said.code != cli.INVALID:
            break
    return said


def legs(folder: Path) -> list[tuple[Leg, Window]]:
    return [(leg, window) for leg, window in RunFolder(folder).legs() if window is not None]


def table(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Locust's CSV of statistics, by type and name."""
    with path.open(encoding="utf-8", newline="") as lines:
        return {(row["Type"], row["Name"]): row for row in csv.DictReader(lines)}


def shown(records: list[RequestRecord]) -> list[RequestRecord]:
    """What Locust's tables count: what it killed in the middle, its users never told it."""
    return [r for r in records if r.outcome is not Outcome.CANCELLED]


def assert_is_for_the_operator(said: Said, *words: str) -> None:
    """What was wrong is said, and no traceback."""
    assert "Traceback" not in said.all, said.all
    for word in words:
        assert word in said.all, said.all


# --------------------------------------------------------------------------------- to the verdict


def test_a_test_writes_a_whole_run_folder_and_passes(tmp_path: Path) -> None:
    said = measured("-u", "2", "-r", "2", "-t", "8s", "--plan-seed", "5", "--api-key", KEY,
                    "--csv", "c", *FAST, cwd=tmp_path)
    assert said.code == cli.PASS, said.all
    assert "SAFE, " in said.out
    assert "(simulated)" in said.out
    folder = tmp_path / "r"
    assert {p.name for p in folder.iterdir()} >= {*JOURNALS, *DERIVED, "junit.xml", "summary.md"}
    assert not list(folder.glob(".*"))  # no temporary file is left
    manifest = RunFolder(folder).manifest()
    assert (manifest.run, manifest.seed) == ("r", 5)
    assert manifest.server["simulated"] is True
    assert manifest.command[0] == "locust"
    assert endings(folder) == ["done"]
    records = kept(folder)
    assert {r.outcome for r in records} <= {Outcome.OK, Outcome.CANCELLED}
    assert sorted(r.seq for r in records) == list(range(len(records)))
    assert summary(folder)["torn_lines"] == 0
    for path in [p for p in tmp_path.rglob("*") if p.is_file()]:
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in said.all
    again = loadgen("report", "r", "--no-html", cwd=tmp_path)
    assert again.code == cli.PASS, again.all


def test_locusts_own_table_counts_each_request_once(tmp_path: Path) -> None:
    """The rows of TTFT, TPOT and ITL stand beside the requests and are none."""
    said = locust("-u", "3", "-r", "3", "-t", "7s", "--scenario", "mixed", "--csv", "c",
                  "--server-options", "--speed 20", "--no-report", scenario=None, cwd=tmp_path)
    assert "Traceback" not in said.all, said.all
    rows, records = table(tmp_path / "c_stats.csv"), shown(kept(tmp_path / "r"))
    count = {at: int(row["Request Count"]) for at, row in rows.items()}
    by_class = Counter(r.cls for r in records)
    assert len(by_class) > 1
    assert {at[1]: n for at, n in count.items() if at[0] == "POST"} == by_class
    assert count["", "Aggregated"] == len(records)
    for cls, n in by_class.items():
        assert count["TTFT", cls] == count["TPOT", cls] == n
        assert count["ITL", cls] == sum(len(r.gaps_us) for r in records if r.cls == cls)
        ttft = sorted((r.first_ns or 0) - r.due_ns for r in records if r.cls == cls)
        assert float(rows["TTFT", cls]["Max Response Time"]) == pytest.approx(ttft[-1] / 1e6)
        assert float(rows["TTFT", cls]["Min Response Time"]) == pytest.approx(ttft[0] / 1e6)
        e2e = [r.end_ns - r.due_ns for r in records if r.cls == cls]
        assert float(rows["POST", cls]["Average Response Time"]) == pytest.approx(
            sum(e2e) / n / 1e6)


def test_an_slo_that_cannot_be_met_is_exit_1(tmp_path: Path) -> None:
    said = measured("-u", "2", "-r", "2", "-t", "8s", "--slo", "ttft=0.1ms", "--no-report", *FAST,
                  cwd=tmp_path)
    assert said.code == cli.SLO_MISSED, said.all
    assert "UNSAFE" in said.out


def test_users_send_what_the_plan_says_each_request_once(tmp_path: Path) -> None:
    """The texts too: same seed, same prompts, however many users ask for them."""
    async def test() -> list[bytes]:
        async with RawServer(lambda _: answer(16), get=ONE_MODEL) as server:
            said = await asyncio.to_thread(
                locust, "-u", "3", "-r", "3", "-t", "5s", "--plan-seed", "7", "--no-report",
                "--host", server.url, cwd=tmp_path)
            assert "Traceback" not in said.all, said.all
            return [got.body for got in server.requests]

    bodies = Counter(asyncio.run(test()))
    folder = RunFolder(tmp_path / "r")
    manifest, records = folder.manifest(), kept(tmp_path / "r")
    mix = scenario.parse(manifest.scenario, "manifest")
    assert len(records) > 20
    for leg, _ in legs(tmp_path / "r"):
        of_leg = sorted((r for r in records if r.leg == leg.id), key=lambda r: r.session)
        assert [r.session for r in of_leg] == list(range(len(of_leg)))
        for r, session in zip(of_leg, plan.sessions(mix, leg), strict=False):
            assert (r.cls, r.want_prompt_tok, r.max_tokens) == (
                session.cls, session.turns[0].prompt_tok, session.turns[0].output_tok)
            if r.sent_ns is not None and r.outcome is Outcome.OK:
                assert bodies[body_of(mix, manifest.ratios, session, leg.seed)] == 1


def body_of(mix: Scenario, ratios: dict[str, Any], session: plan.Session, seed: int) -> bytes:
    of = mix.of(session.cls)
    text = plan.prompt(of, session, 0, seed, msgspec.convert(ratios[of.name], Ratio))
    return openai.body(mix.endpoint, "m", text, session.turns[0].output_tok, of)


def answer(tokens: int, pause_s: float = 0.02) -> Script:
    return [HEAD + role() + token(), pause_s, token() * (tokens - 1),
            finish("length") + usage(tokens, 32) + DONE + LAST]


def test_failures_are_shown_under_our_names_for_them(tmp_path: Path) -> None:
    """A full queue, a 400, a stream that breaks, one without an end, one with an error, a page."""
    bad: dict[Outcome, Script] = {
        Outcome.THROTTLED: [whole("429 Too Many Requests", b"{}", retry_after="1")],
        Outcome.HTTP_ERROR: [whole("400 Bad Request", b'{"error":{"message":"too long"}}')],
        Outcome.DISCONNECTED: [HEAD + token(), 0.02, RST],
        Outcome.TRUNCATED: [HEAD + token() + DONE + LAST, FIN],
        Outcome.SERVER_ERROR_EVENT: [HEAD + event({"error": DEAD}) + DONE + LAST],
        Outcome.BAD_STREAM: [whole("200 OK", b"<h1>Hi</h1>", content_type="text/html")],
        Outcome.EMPTY: [HEAD + LAST]}
    scripts = list(bad.values())

    def script(k: int) -> Script:
        return answer(16) if k < 40 or k % 2 else scripts[k // 2 % len(scripts)]

    async def test() -> Said:
        async with RawServer(script, get=ONE_MODEL) as server:
            return await asyncio.to_thread(
                locust, "-u", "2", "-r", "2", "-t", "8s", "--no-report", "--host", server.url,
                cwd=tmp_path)

    said = asyncio.run(test())
    assert said.code in (cli.SLO_MISSED, cli.INVALID), said.all  # the server lives
    records = shown(kept(tmp_path / "r"))
    outcomes = Counter(r.outcome for r in records)
    assert set(outcomes) == {Outcome.OK, *bad}
    # of its last tables: its CSV files are a second old at the end
    rows = re.findall(r"^(\d+) +POST hello: (\w+)", said.all, re.MULTILINE)
    assert {k: int(n) for n, k in rows} == {
        k.value: n for k, n in outcomes.items() if k is not Outcome.OK}
    assert len(rows) == len(bad)  # equal failures are one row
    [*_, last] = re.findall(r"^ *Aggregated +\d+ +(\d+)\(", said.all, re.MULTILINE)
    assert int(last) == len(records) - outcomes[Outcome.OK]


# ----------------------------------------------------------------------------- ends before its time


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_all_records_and_is_exit_130(
        tmp_path: Path, number: signal.Signals) -> None:
    with start("-u", "4", "-r", "4", cwd=tmp_path) as process:
        wait(running(tmp_path / "r", 12), LIMIT_S)
        process.send_signal(number)
        said = over(process, LIMIT_S)
    assert said.code == cli.INTERRUPTED, said.all
    records = kept(tmp_path / "r")
    assert sorted(r.seq for r in records) == list(range(len(records)))  # none is lost
    assert Counter(r.outcome for r in records)[Outcome.CANCELLED] <= 4
    assert endings(tmp_path / "r") == ["interrupted"]
    assert {p.name for p in (tmp_path / "r").iterdir()} >= {*JOURNALS, "summary.json"}
    again = loadgen("report", "r", "--no-html", cwd=tmp_path)
    assert "Traceback" not in again.all


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_before_the_server_is_ready_leaves_nobody(
        tmp_path: Path, number: signal.Signals) -> None:
    with start("-u", "1", "--host", f"http://127.0.0.1:{free_port()}", cwd=tmp_path) as process:
        wait(lambda: any("loadgen.attend" in x for x in processes_in(tmp_path).values()), LIMIT_S)
        process.send_signal(number)
        said = over(process, 20)
    assert said.code == cli.INTERRUPTED, said.all
    assert "Traceback" not in said.all


def test_a_killed_locust_takes_its_simulator_and_attendant_along(tmp_path: Path) -> None:
    with start("-u", "4", "-r", "4", cwd=tmp_path) as process:
        wait(running(tmp_path / "r", 30), LIMIT_S)
        simulator, attendant = pid_of(tmp_path, "servers.sim"), pid_of(tmp_path, "loadgen.attend")
        process.kill()
        process.communicate()
    wait(lambda: not {simulator, attendant} & set(processes_in(tmp_path)), 15)
    assert not (tmp_path / "r" / "summary.json").exists()
    again = loadgen("report", "r", "--no-html", cwd=tmp_path)
    assert "Traceback" not in again.all
    assert len(kept(tmp_path / "r")) >= 30
    assert (tmp_path / "r" / "summary.json").exists()


def test_a_server_that_dies_in_the_middle_ends_the_test(tmp_path: Path) -> None:
    """No -t: nothing but the death ends it."""
    said = locust("-u", "4", "-r", "1", "--server-options", "--fault die@3", cwd=tmp_path)
    assert said.code == cli.DIED, said.all
    assert_is_for_the_operator(said, "died")
    assert endings(tmp_path / "r")[-1] == "server_died"
    assert {p.name for p in (tmp_path / "r").iterdir()} >= {*JOURNALS, *DERIVED}
    failed = [r for r in kept(tmp_path / "r") if r.outcome is not Outcome.OK]
    assert 0 < len(failed) < 2000  # users against a dead server do not fill the disk


IMPATIENT = """
from functools import partialmethod

from loadgen.fleet import LLMUser
from loadgen.fleet.lifecycle import Lifecycle

Lifecycle.prepare = partialmethod(Lifecycle.prepare, patience_s=3.0)  # it is a minute


class Chat(LLMUser):
    pass
"""


def test_a_host_that_cannot_be_reached_is_exit_4(tmp_path: Path) -> None:
    file = tmp_path / "impatient.py"
    file.write_text(IMPATIENT, encoding="utf-8")
    mix = tmp_path / "mine.toml"
    mix.write_text((ROOT / "scenarios" / "smoke.toml").read_text(encoding="utf-8"),
                   encoding="utf-8")
    said = locust("-u", "1", "-t", "5s", "--host", f"http://127.0.0.1:{free_port()}", "--model",
                  "m", "--scenario", str(mix), cwd=tmp_path, scenario=None, file=file)
    assert said.code == cli.DIED, said.all
    assert_is_for_the_operator(said, "127.0.0.1", "within 3 s", "Connection refused")
    assert not (tmp_path / "r").exists()


# ------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(("options", "words"), [
    (["--scenario", "./nope.toml"], ["nope.toml"]),
    (["--scenario", "smoke", "--slo", "ttft=fast"], ["ttft"]),
    (["--scenario", "smoke", "--slo", "speed=1s"], ["speed"]),
    (["--scenario", "smoke", "--server-options", "--gpu nope"], ["nope", "4090d"]),
    (["--scenario", "smoke", "--server-options", "--speed 'x"], ["--server-options"]),
    (["--scenario", "smoke", "--server-options", "--fault oom"], ["oom@N"]),
    (["--scenario", "smoke", "--rate", "-1"], ["--rate"]),
    (["--scenario", "smoke", "--rate", "nan"], ["--rate"]),
    (["--scenario", "smoke", "--slo-target", "95"], ["--slo-target"]),
    (["--scenario", "smoke", "--host", "127.0.0.1:1"], ["http://"]),
    (["--scenario", "smoke", "--host", "http://127.0.0.1:1", "--server-options", "--speed 2"],
     ["--server-options"]),
    (["--scenario", "smoke", "--api-key", "a\nb"], ["--api-key"]),
    (["--scenario", "smok"], ["smok", "smoke"]),
    (["--scenario", "smoke", "--master"], ["LOADGEN_FLEET_TOKEN"]),
])
def test_what_is_wrong_is_said_and_is_exit_2(
        tmp_path: Path, options: list[str], words: list[str]) -> None:
    said = locust("-u", "1", "-t", "3s", *options, cwd=tmp_path, scenario=None)
    assert said.code == cli.USAGE, said.all
    assert_is_for_the_operator(said, *words)
    assert not (tmp_path / "r" / "records-0.jsonl").exists()


def test_a_worker_without_a_token_is_refused_before_it_connects(tmp_path: Path) -> None:
    said = locust("--worker", "--master-port", str(free_port()), cwd=tmp_path)
    assert said.code == cli.USAGE, said.all


def test_a_run_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "manifest.json").write_text("{}")
    said = locust("-u", "1", "-t", "3s", *FAST, cwd=tmp_path)
    assert said.code == cli.USAGE, said.all
    assert_is_for_the_operator(said, "r")


# ---------------------------------------------------------------------------------------- open loop


def test_requests_are_due_exactly_at_the_plans_arrivals(tmp_path: Path) -> None:
    said = locust("-u", "32", "-r", "32", "-t", "8s", "--rate", "12", "--no-report", *FAST,
                  cwd=tmp_path)
    assert said.code in (cli.PASS, cli.INVALID, cli.INCONCLUSIVE), said.all  # late on a busy host
    assert_due_by_plan(tmp_path / "r", at_least=20)


def assert_due_by_plan(folder: Path, at_least: int) -> list[RequestRecord]:
    """One leg; each of its plan's arrivals up to the last one sent was sent once, due then."""
    (leg, window), = legs(folder)
    mix = scenario.parse(RunFolder(folder).manifest().scenario, "manifest")
    records = sorted(kept(folder), key=lambda r: r.session)
    assert len(records) >= at_least
    assert [r.session for r in records] == list(range(len(records)))
    for r, session in zip(records, plan.sessions(mix, leg), strict=False):
        assert r.due_ns == window.t0_ns + round((session.due_s or 0.0) * 1e9)
        assert (r.sent_ns or r.end_ns) >= r.due_ns
    return records


def test_too_few_users_for_a_rate_make_the_measurement_invalid(tmp_path: Path) -> None:
    """An answer takes a third of a second; one user cannot keep up with twenty in a second."""
    said = locust("-u", "1", "-t", "9s", "--rate", "20", "--no-report", cwd=tmp_path)
    assert said.code == cli.INVALID, said.all
    assert "INVALID" in said.out
    records = assert_due_by_plan(tmp_path / "r", at_least=8)
    late_s = [((r.sent_ns or r.end_ns) - r.due_ns) / 1e9 for r in records]
    assert max(late_s) > 1
    assert "late" in said.out


# ----------------------------------------------------------------------------- locustfiles of users


TWO_CLASSES = """
from locust import task
from loadgen.fleet import LLMUser


class Asks(LLMUser):
    scenario = "mixed"

    @task(3)
    def question(self):
        record = self.ask(cls="code")
        assert record.cls == "code"

    @task
    def own_words(self):
        assert self.ask("Why is the sky blue?", max_tokens=7).max_tokens == 7


class Summarises(LLMUser):
    scenario = "mixed"
    weight = 2

    @task
    def page(self):
        self.ask(cls="summary")
"""


@pytest.mark.parametrize("rate", [[], ["--rate", "20"]])
def test_users_with_tasks_of_their_own_ask_what_these_say(
        tmp_path: Path, rate: list[str]) -> None:
    file = tmp_path / "two.py"
    file.write_text(TWO_CLASSES, encoding="utf-8")
    said = locust("-u", "12", "-r", "12", "-t", "9s", "--csv", "c", "--no-report",
                  "--server-options", "--speed 20", *rate, file=file, scenario=None, cwd=tmp_path)
    assert "Traceback" not in said.all, said.all
    records = kept(tmp_path / "r")
    assert sorted(r.session for r in records) == list(range(len(records)))
    assert sum(r.cls == "code" for r in records) > 3
    assert sum(r.cls == "summary" for r in records) > 3
    own = [r for r in records if r.max_tokens == 7 and r.want_prompt_tok is None]
    assert len(own) > 3
    assert all(r.output_tok == 7 for r in own if r.outcome is Outcome.OK)
    if rate:
        assert_due_by_plan(tmp_path / "r", at_least=60)


def test_a_class_that_the_scenario_does_not_have_is_named(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(TWO_CLASSES.replace('cls="summary"', 'cls="sumary"'), encoding="utf-8")
    with start("-u", "3", "-r", "3", "-t", "4s", "--no-report", *FAST, file=file, scenario=None,
               cwd=tmp_path) as process:
        out, err = process.communicate(timeout=LIMIT_S)
    assert "'sumary'" in out + err
    assert "summary" in out + err


STAGES = """
from locust import LoadTestShape
from loadgen.fleet import LLMUser


class Asks(LLMUser):
    scenario = "smoke"


class Two(LoadTestShape):
    def tick(self):
        at = self.get_run_time()
        return None if at > 12 else ({first}, 8) if at < 6 else ({then}, 8)
"""


@pytest.mark.parametrize(("first", "then"), [(2, 5), (5, 2)])
def test_users_that_change_in_the_middle_make_two_legs(
        tmp_path: Path, first: int, then: int) -> None:
    file = tmp_path / "stages.py"
    file.write_text(STAGES.format(first=first, then=then), encoding="utf-8")
    said = locust("--no-report", *FAST, file=file, scenario=None, cwd=tmp_path)
    assert said.code in (cli.PASS, cli.INVALID), said.all
    found = legs(tmp_path / "r")
    assert [leg.value for leg, _ in found] == [first, then]
    records = kept(tmp_path / "r")
    assert len({(r.leg, r.session) for r in records}) == len(records)
    for (_, a), (_, b) in itertools.pairwise(found):
        assert a.t0_ns <= a.from_ns <= a.to_ns <= a.end_ns <= b.t0_ns <= b.from_ns <= b.to_ns
    for leg, window in found:
        due = [r for r in records if r.leg == leg.id and window.from_ns <= r.due_ns < window.to_ns]
        assert len(due) > 10
        # each was awaited (that of a user whom Locust stopped is CANCELLED, and lies outside)
        assert {r.outcome for r in due} == {Outcome.OK}
        if leg.value == max(first, then):  # all users were there when the sample began
            assert max(r.inflight or 0 for r in due) == leg.value


def test_users_that_go_leave_their_arrivals_to_the_others(tmp_path: Path) -> None:
    """Open loop: each waiting user holds an arrival of the plan. Halving the users must not thin
    out the load that comes."""
    file = tmp_path / "stages.py"
    file.write_text(STAGES.format(first=24, then=8), encoding="utf-8")
    said = locust("--no-report", "--rate", "6", *FAST, file=file, scenario=None, cwd=tmp_path)
    assert "Traceback" not in said.all, said.all
    assert_due_by_plan(tmp_path / "r", at_least=40)


THINKS = """
from locust import between, constant, task
from loadgen.fleet import LLMUser


class Thinks(LLMUser):
    scenario = "smoke"
    wait_time = constant(0.5)
"""


def test_the_time_in_which_users_think_is_nobodys_lateness(tmp_path: Path) -> None:
    file = tmp_path / "thinks.py"
    file.write_text(THINKS, encoding="utf-8")
    said = locust("-u", "4", "-r", "4", "-t", "7s", "--no-report", *FAST, file=file,
                  scenario=None, cwd=tmp_path)
    assert "Traceback" not in said.all, said.all
    records = kept(tmp_path / "r")
    late_s = sorted(((r.sent_ns or r.end_ns) - r.due_ns) / 1e9 for r in records)
    assert late_s[len(late_s) // 2] < 0.1
    by_end = sorted(records, key=lambda r: r.due_ns)
    assert len(by_end) <= 4 * 14  # half a second of thought and more for each


def test_a_spawn_rate_below_one_still_begins_and_settles(tmp_path: Path) -> None:
    said = locust("-u", "2", "-r", "0.5", "-t", "10s", "--no-report", *FAST, cwd=tmp_path)
    assert said.code in (cli.PASS, cli.INVALID), said.all
    (leg, window), = legs(tmp_path / "r")
    assert leg.value == 2
    sample = [r for r in kept(tmp_path / "r") if window.from_ns <= r.due_ns < window.to_ns]
    assert max(r.inflight or 0 for r in sample) == 2
    assert min(r.due_ns for r in sample) > window.t0_ns + 1_000_000_000  # not with one user alone


def test_users_without_file_descriptors_are_our_own_failure(tmp_path: Path) -> None:
    """The server is not blamed, the verdict is INVALID, and the disk is not filled."""
    file = tmp_path / "few.py"
    file.write_text(CHAT.read_text(encoding="utf-8") + """
import resource
from locust import events


@events.test_start.add_listener
def few(**_):
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
""", encoding="utf-8")
    said = locust("-u", "100", "-r", "100", "-t", "6s", "--no-report", *FAST, file=file,
                  cwd=tmp_path)
    outcomes = Counter(r.outcome for r in kept(tmp_path / "r"))
    assert outcomes[Outcome.DROPPED] > 0
    assert set(outcomes) <= {Outcome.OK, Outcome.DROPPED, Outcome.CANCELLED}
    assert outcomes[Outcome.DROPPED] < 5000
    assert said.code == cli.INVALID, said.all
    assert "Traceback" not in said.all


# --------------------------------------------------------------------------- two tests, one process


def test_a_second_test_in_one_process_has_a_folder_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "twice.py"
    file.write_text(CHAT.read_text(encoding="utf-8") + """
import gevent
from locust import events

tests = 0


@events.test_stop.add_listener
def again(environment, **_):
    global tests
    tests += 1
    if tests == 1:
        gevent.spawn_later(1, second, environment)


def second(environment):
    environment.runner.start(3, 3)
    while environment.runner.user_count < 3:
        gevent.sleep(0.1)
    gevent.sleep(4)
    environment.runner.stop()
""", encoding="utf-8")
    port = str(free_port())
    process = subprocess.Popen(
        [sys.executable, "-m", "locust", "-f", str(file), "--web-port", port, "--web-host",
         "127.0.0.1", "--autostart", "-u", "2", "-r", "2", "-t", "6s", "--scenario", "smoke",
         "--run-folder", "r", *FAST], cwd=tmp_path, text=True, process_group=0,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        try:
            wait((tmp_path / "r-2" / "report.html").exists, LIMIT_S)
        finally:
            process.terminate()
        over(process, LIMIT_S)
    first, second = tmp_path / "r", tmp_path / "r-2"
    for folder, users in ((first, 2), (second, 3)):
        assert [leg.value for leg, _ in legs(folder)] == [users]
        assert {p.name for p in folder.iterdir()} >= {*JOURNALS, "summary.json"}
        assert len(kept(folder)) > 10
    sessions = {r.session for r in kept(second)}
    assert json.loads((first / "manifest.json").read_bytes())["seed"] != json.loads(
        (second / "manifest.json").read_bytes())["seed"]
    assert min(sessions) == 0
