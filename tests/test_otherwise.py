"""Coordinated omission: a server stands still for ten seconds. Users feel it; tools that wait for
their answers, or look at survivors from the send, say that all was well."""

import os
import re
import signal
import time
from html import unescape
from pathlib import Path

import pytest

from analysis import frame, otherwise, report
from analysis.frame import Run
from analysis.otherwise import Told
from loadgen import cli
from loadgen.leg import Window
from loadgen.record import Outcome, RequestRecord
from tests import synthetic
from tests.real import kept, over, pid_of, running, start, summary, wait
from tests.synthetic import Plain, S

FELT, SURVIVED, WAITED = range(3)


def stalled(path: Path, lost: int = 0) -> Run:
    """20 requests a second for a minute; each takes 50 ms, but from the 20th to the 30th second
    nothing comes. The first `lost` of those that were due then are disconnected after it."""
    leg = synthetic.leg(20, "run", 60.0, 0.0, axis="rate")
    records: list[RequestRecord] = []
    for k in range(1200):
        due_s = k / 20
        waits_s = 30 - due_s if 20 <= due_s < 30 else 0.0
        r = synthetic.answer_of(leg, 100 * S + k * S // 20, 0.05, seq=k)
        assert r.first_ns is not None
        r.first_ns += round(waits_s * S)
        r.end_ns += round(waits_s * S)
        if waits_s and lost:
            lost -= 1
            r.outcome, r.first_ns, r.gaps_us, r.output_tok = Outcome.DISCONNECTED, None, [], None
        records.append(r)
    window = Window(leg.id, 100 * S, 100 * S, 160 * S, 170 * S, "done")
    return frame.load(synthetic.write_plain(path, Plain([(leg, window)], records)))


def test_a_stall_that_users_feel_is_hidden_from_who_waits_for_each_answer(tmp_path: Path) -> None:
    rows = otherwise.of(stalled(tmp_path / "run"))
    felt, survived, waited = rows
    assert felt.n == survived.n == 1200
    assert felt.ttft_p50_s == pytest.approx(0.005)
    assert felt.ttft_p90_s == pytest.approx(4.005, abs=0.1)  # a sixth of all waited 0 … 10 s
    assert felt.ttft_p99_s == pytest.approx(9.4, abs=0.1)
    assert felt.met_frac == pytest.approx(1 - 160 / 1200, abs=0.01)  # 8 of the 10 s over 2 s
    assert waited.n == 1000  # 200 of those that were due in the stall were never sent
    assert waited.ttft_p99_s == pytest.approx(0.005)
    assert waited.met_frac is not None
    assert waited.met_frac > 0.99
    assert waited.e2e_mean_s == pytest.approx(0.05 + 10 / 1000, abs=0.001)
    assert survived.ttft_p99_s == felt.ttft_p99_s  # this client sent them all in time


def test_survivors_do_not_tell_of_those_that_were_lost(tmp_path: Path) -> None:
    felt, survived, _ = otherwise.of(stalled(tmp_path / "run", lost=161))
    assert felt.ttft_p99_s == float("inf")
    assert survived.n == 1039
    assert survived.ttft_p99_s is not None
    assert survived.ttft_p99_s < 2.0
    assert survived.met_frac == 1.0
    assert felt.met_frac == pytest.approx(1039 / 1200)


def test_in_a_closed_loop_who_waits_sees_all(tmp_path: Path) -> None:
    run = frame.load(synthetic.write(tmp_path / "run", levels=(8,), confirm=None, phase="run"))
    felt, _, waited = otherwise.of(run)
    assert waited.n >= 0.9 * felt.n
    assert " by 8 that wait " in f" {waited.way}"


def test_of_few_requests_no_tail_is_told(tmp_path: Path) -> None:
    run = frame.load(synthetic.write_plain(tmp_path / "run", synthetic.few(3)))
    for told in otherwise.of(run):
        assert (told.n, told.ttft_p50_s, told.ttft_p90_s, told.ttft_p99_s) == (3, None, None, None)
    assert [x[3:6] for x in otherwise.cells(otherwise.of(run))] == [["–"] * 3] * 3


def test_a_search_tells_of_its_safe_level_and_of_the_next(tmp_path: Path) -> None:
    run = frame.load(synthetic.write(tmp_path / "run"))
    assert [t.level for t in otherwise.of(run)] == [32.0] * 3 + [64.0] * 3


@pytest.mark.parametrize("legs", [(8,), (1, 2, 4)])
def test_the_report_has_the_section_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           legs: tuple[int, ...]) -> None:
    monkeypatch.setattr(report, "_library", str)
    run = frame.load(synthetic.write(tmp_path / "run", levels=legs, confirm=None))
    page = unescape(report.write(run).read_text(encoding="utf-8"))
    assert "What other ways of measuring would have said" in page
    for told in otherwise.of(run):
        assert told.way in page


def test_the_table_says_never_where_so_many_had_none() -> None:
    [row] = otherwise.cells([Told(4, "x", 400, 0.1, 0.2, float("inf"), None, 0.9)])
    assert row == ["4", "x", "400", "100 ms", "200 ms", "never", "–", "90 %"]


@pytest.mark.slow
@pytest.mark.usefixtures("nobody_is_left")
def test_a_simulator_that_is_stopped_for_ten_seconds(tmp_path: Path) -> None:
    """The whole way: an open loop on a real socket, the server's process held by SIGSTOP."""
    with start("run", "smoke", "--rate", "8", "--arrivals", "constant", "--duration", "24s",
               "--warmup", "1s", "--out", "r", cwd=tmp_path) as process:
        wait(running(tmp_path / "r", 30), 40)
        sim = pid_of(tmp_path, "servers.sim")
        os.kill(sim, signal.SIGSTOP)
        time.sleep(10)
        os.kill(sim, signal.SIGCONT)
        said = over(process, 90)
    assert said.code == cli.SLO_MISSED, said.all
    found = summary(tmp_path / "r")["otherwise"]
    assert isinstance(found, list)
    felt, _, waited = found
    assert felt["n"] == 192
    assert felt["ttft_p90_s"] > 3
    assert waited["ttft_p90_s"] < 1
    assert waited["met_frac"] > felt["met_frac"] + 0.1
    assert len(kept(tmp_path / "r")) >= 192
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert re.search(r"from the due time, every request .*?by \d+ that waits? for each", page, re.S)
