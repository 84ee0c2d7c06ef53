"""What a generator process can do: the rules on made-up rungs, a real short calibration against
the null server and its log, the file that keeps it, and what a run says of its share."""

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from rich.console import Console

from analysis import generator, summary, words
from loadgen import (
    calibration,
    cli,
    doctor,
    facts,
    headroom,
    rungs,
    runner,
    selftest,
)
from loadgen.errors import GeneratorError, StoreError
from loadgen.headroom import Calibration, Peak
from loadgen.record import Outcome, RequestRecord
from loadgen.rungs import Found, Rung
from loadgen.runner import Session
from loadgen.selftest import Ladder, Measured
from loadgen.target import Target
from servers.null.launch import NullServer
from servers.null.log import Truth
from tests import synthetic

S = 1_000_000_000
HOST = Calibration("2026-11-20", 820, 41_000.0, "core", 1900.0, "core", 19.5)
SMALL = Ladder(streams=(2, 4), starts_per_s=(20,), tokens=40, spread_s=0.3, open_s=1.2)


def rung(asked: int, core: float | None = 0.1, **fields: Any) -> Rung:
    """50 events/s in each stream, and nothing wrong with it."""
    kept: dict[str, Any] = {"kind": "streams", "rate_per_s": 50.0 * asked, "us_per_event": 10.0,
                            "error_p99_ms": 0.02, "server_late_p99_ms": 0.5}
    return Rung(asked=asked, core_frac=core, **(kept | fields))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(("fields", "limit"), [
    ({}, None),
    ({"core": 0.80}, None),
    ({"core": 0.81}, "core"),
    ({"core": None}, None),
    ({"error_p99_ms": 1.0}, None),
    ({"error_p99_ms": 1.1}, "error"),
    ({"error_p99_ms": None, "server_late_p99_ms": None}, None),
    ({"kind": "starts", "error_p99_ms": 1.9}, None),
    ({"kind": "starts", "error_p99_ms": 2.1}, "error"),
    ({"failed": 1}, "error"),
    ({"server_late_p99_ms": 5.1}, "null server"),
    ({"dropped": 1, "failed": 1, "core": 0.9}, "file descriptors"),
    ({"core": 0.9, "server_late_p99_ms": 9.0, "error_p99_ms": 9.0}, "core"),
    ({"server_late_p99_ms": 9.0, "error_p99_ms": 9.0}, "null server")])
def test_each_limit_has_its_name_and_what_a_late_server_spoils_is_not_the_generators(
        fields: Any, limit: Any) -> None:
    assert rungs.limit_of(rung(64, **fields)) == limit


@pytest.mark.parametrize(("fields", "spoiled"), [
    ({}, False),
    ({"stalled_s": 1.0}, False),
    ({"error_p99_ms": 9.0, "core": 0.6, "stalled_s": 0.02}, True),
    ({"error_p99_ms": 9.0, "core": 0.6}, False),
    ({"error_p99_ms": 9.0, "core": 0.3}, True),
    ({"server_late_p99_ms": 9.0, "core": 0.3}, False),
    ({"server_late_p99_ms": 9.0, "core": 0.3, "stalled_s": 0.1}, True),
    ({"core": 0.9, "stalled_s": 1.0}, False)])
def test_only_what_the_host_may_have_done_is_tried_again(fields: Any, spoiled: Any) -> None:
    assert rungs.is_spoiled(rung(64, **fields)) is spoiled


def test_of_two_tries_the_better_one_counts() -> None:
    good, bad, worse = rung(64), rung(64, error_p99_ms=2.0), rung(64, error_p99_ms=3.0)
    assert rungs.better(bad, good) is good
    assert rungs.better(good, bad) is good
    assert rungs.better(bad, worse) is worse


def test_steps_are_left_out_only_far_from_the_core_s_limit() -> None:
    steps = (64, 128, 256, 1024)
    assert rungs.next_step(steps, rung(64, 0.19)) == 256
    assert rungs.next_step(steps, rung(64, 0.2)) == 128
    assert rungs.next_step(steps, rung(64, None)) == 128
    assert rungs.next_step(steps, rung(128, 0.01)) == 256  # 1024 would be eight times as much
    assert rungs.next_step(steps, rung(256, 0.01)) == 1024
    assert rungs.next_step(steps, rung(1024, 0.01)) is None


def test_a_ladder_ends_with_a_step_between_good_and_too_much() -> None:
    assert rungs.between([rung(1024, 0.6), rung(2048, 1.1)]) == 1448
    assert rungs.between([rung(1024, 0.6), rung(1100, 0.9)]) is None
    assert rungs.between([rung(1024, 0.6)]) is None
    assert rungs.between([rung(1024, 0.9)]) is None


def test_the_core_s_limit_lies_on_the_line_between_two_rungs() -> None:
    found = rungs.found_on([rung(512, 0.3), rung(1000, 0.6), rung(2000, 1.0, us_per_event=9.0)])
    assert found is not None
    assert (found.limited_by, found.us_per_event) == ("core", 10.0)
    assert found.rate_per_s == pytest.approx(75_000)
    first = rungs.found_on([rung(1000, 1.6)])
    assert first is not None
    assert first.rate_per_s == pytest.approx(25_000)
    collapsed = rungs.found_on([rung(1000, 0.6), rung(2000, 1.0, rate_per_s=40_000.0)])
    assert collapsed == Found(50_000.0, "core", 10.0)


@pytest.mark.parametrize(("last", "limit"), [
    (rung(128, 0.6, error_p99_ms=3.0), "error"),
    (rung(128, 0.6, server_late_p99_ms=8.0), "null server"),
    (rung(128, 0.6, dropped=3), "file descriptors"),
    (rung(128, 0.1, error_p99_ms=3.0), "not reached")])
def test_of_other_limits_the_last_good_rung_is_what_is_known(last: Any, limit: Any) -> None:
    assert rungs.found_on([rung(64), last]) == Found(3200.0, limit, 10.0)
    assert rungs.found_on([last]) is None


def test_a_rung_that_failed_below_a_good_one_had_a_bad_host() -> None:
    tried = [rung(64), rung(128, error_p99_ms=3.0), rung(256), rung(512, 0.7, error_p99_ms=3.0)]
    assert rungs.found_on(tried) == Found(12_800.0, "error", 10.0)


def test_a_ladder_that_met_no_limit_says_why_it_ended() -> None:
    assert rungs.found_on([rung(64), rung(128)]) == Found(6400.0, "not reached", 10.0)
    assert rungs.found_on([rung(64)], True) == Found(3200.0, "file descriptors", 10.0)


def test_the_result_names_its_limits_and_says_at_least_where_it_met_none() -> None:
    assert rungs.sentence(HOST) == (
        "One generator process of this host: 41,000 events/s (820 streams at 20 ms/token) before "
        "its core is 80 % busy; 1,900 starts/s before its core is 80 % busy.")
    other = msgspec.structs.replace(HOST, events_limited_by="null server",
                                    starts_limited_by="error")
    assert rungs.sentence(other) == (
        "One generator process of this host: at least 41,000 events/s (820 streams at 20 "
        "ms/token): the null server was the limit; 1,900 starts/s before 1 % of them are more "
        "than 2 ms late.")


# ---------------------------------------------------------------------------- what a rung has seen


def test_the_rate_is_that_of_the_time_in_which_all_streams_run() -> None:
    ms = 1_000_000
    writes = [[row, k, 1, 0, (1000 + 400 * row + 20 * k) * ms, 0]
              for row in range(3) for k in range(1, 101)]
    writes += [[0, 101, 1, 0, 9000 * ms, 0]]  # usage is no token
    truth = Truth(np.array([[7 + k, 0, 0, 100, 1] for k in range(3)]), np.array(writes),
                  np.empty((0, 2), np.int64))
    assert selftest.rate_of(truth) == pytest.approx(150, rel=0.01)


def test_lateness_is_the_median_of_half_seconds_so_that_a_stall_spoils_only_its_own() -> None:
    def started(k: int, late_s: float) -> RequestRecord:
        due_ns = k * S // 100
        return RequestRecord(leg="", shard=0, seq=k, session=k, turn=0, cls="c", due_ns=due_ns,
                             end_ns=due_ns + S, outcome=Outcome.OK,
                             sent_ns=due_ns + round(late_s * S))
    stalled = [started(k, 0.3 if 100 <= k < 130 else 0.001) for k in range(300)]
    assert selftest.lateness_p99_ms(stalled) == pytest.approx(1.0)
    assert selftest.lateness_p99_ms([started(k, 0.02) for k in range(300)]) == pytest.approx(20.0)
    assert selftest.lateness_p99_ms([]) is None


def test_a_calibration_is_what_the_null_servers_log_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of real processes. How fast they are is not looked at: this host may stand still."""
    logs: list[Truth] = []
    before = set(psutil.Process().children(recursive=True))  # other tests' pools
    real = NullServer.log

    async def log(self: NullServer) -> Truth:
        logs.append(await real(self))
        return logs[-1]

    monkeypatch.setattr(NullServer, "log", log)
    found = _measured(logs)
    streams = [r for r in found.rungs if r.kind == "streams"]
    assert [r.asked for r in streams] == sorted({r.asked for r in streams})
    assert {r.asked for r in streams} <= {2, 4}
    for r in streams:
        of_it = [x for x in logs if len(x.requests) == r.asked and set(x.requests[:, 3]) == {40}]
        assert r.rate_per_s in [selftest.rate_of(x) for x in of_it]
        assert r.failed or 0 < r.gap_n <= 39 * r.asked
        assert r.us_per_event is None or r.core_frac == pytest.approx(
            r.us_per_event * r.rate_per_s / 1e6)
    [starts] = [r for r in found.rungs if r.kind == "starts"]
    arrived = [x.requests[:, 1] for x in logs if set(x.requests[:, 3]) == {4}]
    assert starts.rate_per_s in [(len(x) - 1) / (float(np.ptp(x)) / 1e9) for x in arrived]
    c = found.calibration
    assert c.streams == round(c.events_per_s / 50)
    assert c.events_per_s <= max(r.rate_per_s for r in streams)
    assert set(psutil.Process().children(recursive=True)) <= before


def _measured(logs: list[Truth]) -> Measured:
    """At the third try at the latest: even two streams are too much for a host that stands
    still."""
    for last in (False, False, True):
        logs.clear()
        try:
            return asyncio.run(selftest.measure(SMALL, lambda what: None))
        except GeneratorError as e:
            if last or "were too much" not in str(e):
                raise
    raise AssertionError


def test_a_host_without_file_descriptors_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (64, 210))
    with pytest.raises(GeneratorError, match=r"10 connections .* `ulimit -Hn`"):
        asyncio.run(selftest.measure(Ladder(), lambda what: None))


# --------------------------------------------------------------------------------- what is kept


def test_what_is_kept_is_read_again() -> None:
    assert calibration.load() == calibration.Found()
    kept = calibration.save(HOST)
    assert kept.name == "calibration.json"
    assert [p.name for p in kept.parent.iterdir()] == [kept.name]
    assert calibration.load() == calibration.Found(HOST)


@pytest.mark.parametrize(("field", "value", "says"), [
    ("hostname", "elsewhere", "another host (elsewhere; here: "),
    ("cores", 512, "another number of cores (512; here: "),
    ("python", "2.7.18", "another Python (2.7.18; here: "),
    ("loadgen", "0.0.0", "another loadgen (0.0.0; here: ")])
def test_a_calibration_of_something_else_is_ignored_and_that_is_said(
        field: str, value: object, says: str) -> None:
    kept = calibration.save(HOST)
    data = json.loads(kept.read_text())
    data["host"][field] = value
    kept.write_text(json.dumps(data))
    found = calibration.load()
    assert found.calibration is None
    assert found.ignored is not None
    assert says in found.ignored
    check = doctor.calibration_check()
    assert (check.state, check.remedy) == ("fair", "loadgen doctor --calibrate")
    assert says in check.saw


@pytest.mark.parametrize("data", [
    b"", b"{", b"\xff\xfe", b"[]", b'{"schema": 1}', b'{"schema": 2, "figures": {}}',
    b'{"schema": 1, "host": {}, "calibration": null}'])
def test_a_file_that_is_no_calibration_is_said_and_no_crash(data: bytes) -> None:
    kept = calibration.path()
    kept.parent.mkdir(parents=True)
    kept.write_bytes(data)
    found = calibration.load()
    assert found.calibration is None
    assert str(kept) in (found.ignored or "")
    assert "doctor --calibrate" in (found.ignored or "")


def test_a_folder_in_its_place_is_said_and_no_crash(tmp_path: Path) -> None:
    calibration.path().mkdir(parents=True)
    assert "cannot be read" in (calibration.load().ignored or "")
    with pytest.raises(StoreError, match="XDG_CACHE_HOME"):
        calibration.save(HOST)


# ------------------------------------------------------------------------------- what a run asked


def answer(shard: int, sent_s: float, n: int, gap_s: float) -> RequestRecord:
    sent_ns = round(sent_s * S)
    gaps = [round(gap_s * 1e6)] * (n - 1)
    return RequestRecord(leg="a", shard=shard, seq=0, session=0, turn=0, cls="c", due_ns=sent_ns,
                         sent_ns=sent_ns, first_ns=sent_ns, gaps_us=gaps,
                         end_ns=sent_ns + 1000 * sum(gaps), outcome=Outcome.OK)


def test_the_peak_is_the_busiest_second_of_the_busiest_process() -> None:
    records = [answer(0, 10.0, 100, 0.01), answer(0, 10.5, 50, 0.01), answer(1, 10.0, 120, 0.005),
               answer(1, 11.0, 10, 0.01), answer(1, 11.2, 10, 0.01), answer(1, 11.3, 10, 0.01)]
    assert headroom.peak_of(records) == Peak(150, 3)
    never = msgspec.structs.replace(records[0], sent_ns=None, first_ns=None, gaps_us=[])
    assert headroom.peak_of([never]) == Peak(0, 0)
    assert headroom.peak_of([]) == Peak(0, 0)


@pytest.mark.parametrize(("peak", "kept", "says"), [
    (Peak(3200, 20), HOST, "Generator: at most 3,200 events/s in a process, 8 % of what this host "
                           "was calibrated for (41,000/s)."),
    (Peak(3201, 950), HOST, "Generator: at most 950 starts/s in a process, 50 % of what this host "
                            "was calibrated for (1,900/s)."),
    (Peak(120, 1), HOST, "Generator: at most 120 events/s in a process, less than 1 % of what this "
                        "host was calibrated for (41,000/s)."),
    (Peak(3200, 20), msgspec.structs.replace(HOST, events_limited_by="null server"),
     "Generator: at most 3,200 events/s in a process, 8 % of what this host was calibrated for "
     "(at least 41,000/s)."),
    (Peak(3200, 20), None, "Generator: its busiest process used 12 % of a core (limit 80 %); "
                           "`loadgen doctor --calibrate` shows what this host can do.")])
def test_a_run_says_its_share_in_one_sentence(peak: Any, kept: Any, says: str) -> None:
    assert headroom.says(peak, kept, 0.12, 0.8) == says


def test_without_cpu_and_calibration_the_peak_stands_alone() -> None:
    assert headroom.says(Peak(3201, 20), None, None, 0.8).startswith(
        "Generator: at most 3,300 events/s in a process; `loadgen doctor")


def test_verdict_summary_and_report_hold_the_manifests_calibration(tmp_path: Path) -> None:
    """Wherever they are made again: this host's own is another."""
    calibration.save(msgspec.structs.replace(HOST, events_per_s=1.0, starts_per_s=1.0))
    path = synthetic.write(tmp_path / "run", levels=(8,), confirm=None, phase="run",
                           calibration=HOST)
    run = summary.finish(path)
    said = words.verdict(run)[-1]
    used = generator.peak(run).events_per_s / 41_000
    assert said.startswith("Generator: at most ")
    assert said.endswith("of what this host was calibrated for (41,000/s).")
    figures = json.loads((path / "summary.json").read_text())["generator"]
    assert figures == {
        "peak_events_per_s": generator.peak(run).events_per_s,
        "peak_starts_per_s": generator.peak(run).starts_per_s, "cpu_frac": 0.2,
        "calibrated_on": "2026-11-20", "calibrated_events_per_s": 41_000.0,
        "calibrated_starts_per_s": 1900.0, "used_frac": used, "headroom_frac": 1 - used}
    assert "of what this host was calibrated for" in (path / "report.html").read_text().replace(
        "\u00a0", " ")


def test_a_run_without_a_calibration_has_none_in_its_summary(tmp_path: Path) -> None:
    path = synthetic.write(tmp_path / "run", levels=(8,), confirm=None, phase="run")
    run = summary.finish(path, report=False)
    assert words.verdict(run)[-1].startswith("Generator: its busiest process used 20 % of a core")
    figures = json.loads((path / "summary.json").read_text())["generator"]
    assert figures["peak_events_per_s"] > 0
    assert figures["calibrated_events_per_s"] is figures["headroom_frac"] is None


def test_of_locust_s_users_nothing_is_said(tmp_path: Path) -> None:
    path = synthetic.write(tmp_path / "run", levels=(8,), confirm=None, phase="run",
                           command=["locust", "-f", "x.py"])
    assert not [x for x in words.verdict(summary.finish(path, report=False)) if "Generator" in x]


@pytest.mark.parametrize(("kept", "found"), [
    (HOST, []),
    (msgspec.structs.replace(HOST, events_per_s=100.0), ["beyond-calibration"]),
    (msgspec.structs.replace(HOST, starts_per_s=1.0), ["beyond-calibration"]),
    (msgspec.structs.replace(HOST, events_per_s=100.0, events_limited_by="null server"), []),
    (None, [])])
def test_a_run_beyond_a_limit_that_was_met_is_suspect(
        tmp_path: Path, kept: Calibration | None, found: list[str]) -> None:
    """Where the calibration only says "at least", more is no fault."""
    path = synthetic.write(tmp_path / "run", levels=(8,), confirm=None, phase="run",
                           calibration=kept)
    [judged] = summary.finish(path, report=False).judgements
    assert [f.rule for f in judged.findings] == found
    assert judged.measurement == ("SUSPECT" if found else "VALID")
    assert all("was calibrated for 1" in f.says for f in judged.findings)


# ------------------------------------------------------------------------------- the command line


def test_doctor_shows_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.calibration_check() == doctor.Check(
        "calibration", "fair", "none yet", "loadgen doctor --calibrate")
    calibration.save(HOST)
    assert doctor.calibration_check() == doctor.Check(
        "calibration", "good",
        "2026-11-20: 41,000 events/s (820 streams at 20 ms/token), 1,900 starts/s")


def test_calibrate_shows_its_rungs_and_keeps_the_result(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def measured(ladder: Ladder, show: Any) -> Measured:
        show("64 streams")
        return Measured(HOST, [rung(64), rung(128, None, error_p99_ms=None, us_per_event=None),
                               rung(250, 0.9, kind="starts", rate_per_s=243.0)])

    monkeypatch.setattr(selftest, "measure", measured)
    doctor.calibrate(Console(width=120))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["64", "streams", "3,200", "10", "%", "10.0", "0.02", "ms", "0.50",
                                "ms"]
    assert lines[2].split() == ["128", "streams", "6,400", "–", "–", "–", "0.50", "ms"]
    assert lines[3].split()[:3] == ["250", "starts/s", "243"]
    assert lines[3].split()[-1] == "core"
    assert rungs.sentence(HOST) in lines
    assert calibration.load().calibration == HOST


@pytest.mark.parametrize(("sig", "code"), [
    (signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_calibration_that_is_broken_off_leaves_nothing_behind(sig: int, code: int) -> None:
    with _doctor("--calibrate") as process:
        try:
            until = time.monotonic() + 60
            while len(below := psutil.Process(process.pid).children(recursive=True)) < 2:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
            process.send_signal(sig)
            assert process.wait(60) == code
        finally:
            process.kill()
        assert psutil.wait_procs(below, 20)[1] == []
    assert not calibration.path().exists()


def test_a_run_goes_by_what_is_kept_and_says_so_in_its_manifest(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration.save(HOST)
    session = _session(tmp_path, monkeypatch)
    assert session.criteria.calibration == HOST
    written = facts.manifest(tmp_path / "run", [], session.scenario, 1, session.criteria,
                             Target("http://127.0.0.1:9", "tiny"), {}, {})
    assert written.calibration == HOST


def test_a_run_says_that_a_calibration_is_of_no_use(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    assert _session(tmp_path, monkeypatch).criteria.calibration is None
    assert "Not used" not in capsys.readouterr().out
    calibration.save(HOST).write_bytes(b"{")
    assert _session(tmp_path, monkeypatch).criteria.calibration is None
    assert "Not used: " in capsys.readouterr().out


def _session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """What `loadgen run` would measure with."""
    sessions: list[Session] = []

    def started(session: Session, *_: object) -> None:
        sessions.append(session)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_leg", started)
    with pytest.raises(SystemExit):
        cli.entry(["run", "chat", "--rate", "1", "--duration", "1s", "--out",
                   str(tmp_path / "run")])
    return sessions[0]


def test_what_was_not_measured_is_exit_code_3() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with _doctor("--calibrate", limit="64") as process:
        _, err = process.communicate(timeout=60)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == hard
    assert process.returncode == 3, err
    assert err == ("loadgen: 0 connections are possible here and 64 are the least that tells "
                   "anything: raise `ulimit -Hn`\n")


def test_calibrate_has_a_server_of_its_own() -> None:
    with _doctor("--calibrate", "--base-url", "http://127.0.0.1:9") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "leave out --base-url" in err


def _doctor(*words_: str, limit: str | None = None) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "loadgen.cli", "doctor", *words_]
    if limit is not None:
        command = ["sh", "-c", f'ulimit -n {limit} && exec "$0" "$@"', *command]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, process_group=0,
                            env={**os.environ, "COLUMNS": "200"})


def test_a_user_without_a_home_has_no_calibration_and_no_traceback(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert calibration.load() == calibration.Found()
