"""What adds up in a leg, from its records to the run folder, the summary and the report; and that
what does not add up decides nothing."""

from pathlib import Path

import msgspec
import pytest

from analysis import frame, knee, report, steps, summary, words
from analysis.frame import Run
from loadgen import balance, cli, measure
from loadgen.leg import Health, Leg, Window
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Open, PerSecond, Trace
from loadgen.store import Row
from tests import synthetic
from tests.synthetic import Plain, S

MS = 1_000_000
T0 = 100 * S


def record(due_s: float, takes_s: float, **fields: object) -> RequestRecord:
    due = T0 + round(due_s * S)
    made = RequestRecord(leg="run", shard=0, seq=0, session=0, turn=0, cls="code", due_ns=due,
                         sent_ns=due, first_ns=due + 1, end_ns=due + round(takes_s * S),
                         outcome=Outcome.OK, prompt_tok=100, output_tok=2, gaps_us=[1000],
                         tok_source="usage")
    return msgspec.structs.replace(made, **fields)


def window(stalls: list[tuple[int, int]] | None = None) -> Window:
    """From 1 s to 11 s."""
    return Window("run", T0, T0 + S, T0 + 11 * S, T0 + 12 * S, "done", stalls=stalls or [],
                  alone=True)


CLOSED = synthetic.leg(2, "run", 10.0)


# ------------------------------------------------------------------------------------ in flight


def test_requests_in_flight_are_counted_by_their_time_inside_the_window() -> None:
    records = [record(0, 2), record(5, 3), record(10, 9), record(0, 0.5)]  # 1 + 3 + 1 + 0 of 10 s
    books = balance.of(CLOSED, window(), records, records)
    assert books.inflight_mean == pytest.approx(0.5)
    assert books.slots_frac == pytest.approx(0.25)
    assert books.turnaround_s == pytest.approx(15 / 2)  # two starts inside, 15 empty slot-seconds


def test_time_in_which_the_host_stood_still_is_left_out() -> None:
    records = [record(1, 5), record(6, 5)]
    stalled = window([(T0 + 8 * S, T0 + 20 * S)])
    assert balance.of(CLOSED, stalled, records, records).inflight_mean == pytest.approx(1.0)


def test_a_request_is_in_flight_from_when_its_connection_is_asked_for() -> None:
    waited = record(2, 3, sent_ns=T0 + 4 * S, connect_wait_ns=2 * S)
    refused = record(6, 2, sent_ns=None, outcome=Outcome.CONNECT_FAILED)
    for one, seconds in ((waited, 3), (refused, 2)):
        assert balance.of(CLOSED, window(), [one], [one]).inflight_mean == pytest.approx(
            seconds / 10)
    assert balance.own_lateness_s(waited) == 0.0
    assert balance.own_lateness_s(refused) is None


def test_a_request_that_was_sent_again_is_not_the_generators_lateness() -> None:
    again = record(2, 3, sent_ns=T0 + 3 * S, stale_retries=1)
    assert balance.own_lateness_s(again) is None
    assert balance.own_lateness_s(record(2, 3, sent_ns=T0 + 3 * S)) == pytest.approx(1.0)


def test_answers_that_the_server_kept_open_say_nothing_of_slots_and_flights() -> None:
    fine = record(2, 3)
    told = msgspec.structs.replace(window(), shards=[Health(0, inflight_s=3.0, lingered=2)])
    books = balance.of(CLOSED, told, [fine], [fine])
    assert (books.slots_frac, books.little_residual) == (None, None)


def test_of_dropped_requests_nobody_knows_how_long_they_were_in_flight() -> None:
    fine, dropped = record(2, 3), record(4, 1, sent_ns=None, outcome=Outcome.DROPPED)
    told = msgspec.structs.replace(window(), shards=[Health(0, inflight_s=3.0)])
    assert balance.of(CLOSED, told, [fine], [fine]).little_residual == pytest.approx(0.0)
    books = balance.of(CLOSED, told, [fine, dropped], [fine, dropped])
    assert (books.slots_frac, books.little_residual) == (None, None)
    assert books.inflight_mean == pytest.approx(0.3)


def test_the_tolerance_of_littles_law_shrinks_with_the_root_of_n() -> None:
    def tolerance(n: int) -> float:
        records = [record(1 + 9.8 * k / n, 0.1) for k in range(n)]
        told = msgspec.structs.replace(window(), shards=[Health(0, inflight_s=1.0)])
        found = balance.of(CLOSED, told, records, records).little_tolerance
        assert found is not None
        return found - balance.LITTLE_OFF - balance.NOTICE_S / 0.1

    assert tolerance(400) == pytest.approx(tolerance(100) / 2, rel=1e-6)
    assert tolerance(100) == pytest.approx(3 * balance.EDGE_S / 6**0.5 / 0.1 / 10, rel=1e-6)


# --------------------------------------------------------------------------------------- starts


def test_starts_are_those_of_the_window() -> None:
    leg = Leg(id="run", axis="rate", value=1, phase="run", replicate=0, seed=1,
              load=Open(PerSecond(0.3)), warmup_s=1, measure_s=10)
    records = [record(0.9, 1, sent_ns=T0 + 2 * S), record(5, 1), record(6, 1),
               record(10.9, 1, sent_ns=T0 + 11 * S),
               record(7, 1, sent_ns=None, outcome=Outcome.DROPPED)]
    books = balance.of(leg, window(), records, records)
    assert (books.asked, books.begun) == (4, 3)
    assert books.begun_frac == 0.75


def test_a_trace_asks_for_its_instants_whether_the_generator_came_to_them_or_not() -> None:
    leg = Leg(id="run", axis="rate", value=1, phase="run", replicate=0, seed=1,
              load=Trace((0.0, 1.0, 2.0, 3.0, 10.9, 11.0)), warmup_s=1, measure_s=10)
    records = [record(0, 1), record(1, 1)]
    books = balance.of(leg, window(), records, records)
    assert (books.asked, books.begun) == (4, 1)
    assert balance.of(CLOSED, window(), records, records).asked is None


def test_few_starts_of_a_constant_rate_are_not_by_chance() -> None:
    """40 are due; of Poisson's starts 4 σ, 25, may be missing."""
    def asked(arrivals: str, n: int) -> float | None:
        load = msgspec.structs.replace(Open(PerSecond(4)), arrivals=arrivals)
        leg = Leg(id="run", axis="rate", value=1, phase="run", replicate=0, seed=1, load=load,
                  warmup_s=1, measure_s=10)
        records = [record(1 + 10 * k / n, 0.1) for k in range(n)]
        return balance.of(leg, window(), records, records).asked

    assert asked("constant", 39) == 39
    assert asked("constant", 38) == 40
    assert asked("poisson", 15) == 15
    assert asked("poisson", 13) == 40


# ------------------------------------------------------------------------------ the run folder


def counted(t_s: float, finished: float, prompt: float, output: float) -> list[Row]:
    t = T0 + round(t_s * S)
    return [Row("server", t, "finished", finished), Row("server", t, "prompt_tok", prompt),
            Row("server", t, "output_tok", output)]


def held(path: Path, finished: float = 180, **shard: float) -> Run:
    """80 good answers, one after the other, on a server that had counted 100 before."""
    records = [record(1 + k / 8, 0.125, seq=k) for k in range(80)]
    own = Health(0, 0.002, 0.3, 0.04, 0.0001, 0.0, 0.0, 21, 1024, 0, 131072, 10.0)
    told = msgspec.structs.replace(window(), lag_p99_s=0.002, cpu_frac=0.3,
                                   shards=[msgspec.structs.replace(own, **shard)])
    leg = msgspec.structs.replace(synthetic.leg(1, "run", 10.0), id="run")
    rows = [*counted(-0.2, 100, 500, 50), *counted(6, 140, 4500, 130),
            *counted(12.1, finished, 500 + 8000, 50 + 160)]
    return frame.load(synthetic.write_plain(path, Plain([(leg, told)], records, rows)))


def test_the_summary_tells_how_the_generator_was(tmp_path: Path) -> None:
    run = held(tmp_path / "run")
    [row] = summary.summarise(run)["steps"]
    assert run.judgements[0].findings == []
    assert {name: row[name] for name in (
        "late_max_s", "lag_p99_s", "cpu_frac", "run_queue_frac", "dropped", "stalls",
        "gc_pause_s", "fds", "fd_limit", "connect_max_s", "slots_frac", "inflight_mean",
        "server_requests_ratio", "server_prompt_tok_ratio", "server_output_tok_ratio",
        "full_reads_frac", "rcvbuf_bytes")} == {
        "late_max_s": 0.0, "lag_p99_s": 0.002, "cpu_frac": 0.3, "run_queue_frac": 0.04,
        "dropped": 0, "stalls": 0, "gc_pause_s": 0.0, "fds": 21, "fd_limit": 1024,
        "connect_max_s": 0.0, "slots_frac": 1.0, "inflight_mean": 1.0,
        "server_requests_ratio": 1.0, "server_prompt_tok_ratio": 1.0,
        "server_output_tok_ratio": 1.0, "full_reads_frac": 0.0, "rcvbuf_bytes": 131072}
    assert row["little_residual"] == pytest.approx(0.0)
    assert row["late_p99_s"] is None  # of 80 there is none
    assert row["begun_frac"] is None  # a closed loop's


def test_the_report_has_a_table_of_the_generator(tmp_path: Path) -> None:
    page = report.write(held(tmp_path / "run")).read_text(encoding="utf-8")
    table = page.partition("<h2>The generator</h2>")[2].partition("<h2>")[0]
    for cell in ("0 ms", "2 ms", "30 %", "4 %, 0.1 ms each", "21 of 1024", "100 %", "1 / 1 / 1"):
        assert f">{cell}</td>" in table, cell


def test_what_nobody_knows_of_the_generator_is_a_dash(tmp_path: Path) -> None:
    run = frame.load(synthetic.run_of(tmp_path / "run", (4, "SAFE")))
    page = report.write(run).read_text(encoding="utf-8")
    table = page.partition("<h2>The generator</h2>")[2].partition("<h2>")[0]
    assert table.count("<td>–</td>") >= 6
    assert "nan" not in table.lower()
    assert "None" not in table


def test_a_server_that_others_load_as_well_gives_no_verdict_and_says_why(tmp_path: Path) -> None:
    run = held(tmp_path / "run", finished=180 + 17)
    said = words.answer(run).verdict
    assert (said.load, said.measurement) == ("UNRESOLVED", "INVALID")
    assert "somebody else loaded the server" in said.headline
    assert "generator" not in said.headline
    assert measure.exit_code(run, None) == cli.INVALID
    assert summary.summarise(run)["steps"][0]["server_requests_ratio"] == pytest.approx(97 / 80)


# ----------------------------------------------------------------- what INVALID takes no part in


def spoiled(run: Run, phase: str, value: float) -> Run:
    """The run with all legs of a phase and level INVALID, and wonderful."""
    return msgspec.structs.replace(run, judgements=[
        msgspec.structs.replace(j, measurement="INVALID", achieved_rps=999.0, load="SAFE")
        if (j.phase, j.value) == (phase, value) else j for j in run.judgements])


def test_an_invalid_level_takes_no_part_in_the_knee_nor_in_the_table_of_levels(
        tmp_path: Path) -> None:
    run = frame.load(synthetic.write(tmp_path / "run", confirm=None))
    without = msgspec.structs.replace(run, judgements=[j for j in run.judgements if j.value != 16])
    bad = spoiled(run, "ladder", 16)
    assert knee.of(bad) == knee.of(without)
    assert knee.of(bad) != knee.of(run)
    assert 16 not in list(steps.levels(bad)["value"])


def test_an_invalid_confirmation_proves_nothing_and_is_exit_3(tmp_path: Path) -> None:
    run = frame.load(synthetic.write(tmp_path / "run", levels=(16, 32, 64), confirm=32))
    assert run.conclusion.safe == 32
    bad = spoiled(run, "confirm", 32)
    assert bad.conclusion.safe is None
    assert measure.exit_code(bad, None) == cli.INVALID


def test_an_invalid_level_makes_none_unsafe(tmp_path: Path) -> None:
    run = frame.load(synthetic.write(tmp_path / "run", levels=(16, 32, 64), confirm=32))
    assert run.conclusion.unsafe == 64
    assert spoiled(run, "ladder", 64).conclusion.unsafe is None
