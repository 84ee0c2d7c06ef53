"""The frame and the table against a leg that is worked out by hand.

    window [1 s, 11 s); a request holds 5 tokens in 5 events; limits TTFT ≤ 2 s, TPOT ≤ 50 ms
         due   first  gaps      events in window   TTFT   TPOT    E2E
    A    1.0    1.5   100 ms    5                  0.5    100 ms  0.9   misses tpot
    B    2.0    2.4    25 ms    5                  0.4     25 ms  0.5   good
    C    3.0    6.0    25 ms    5                  3.0     25 ms  3.1   misses ttft
    D    4.0    –               0                  –       –      –     HTTP 500 after 0.1 s
    E   10.5   10.9    50 ms    2 (10.9, 10.95)    0.4     50 ms  0.6   good: at the limit
    F    0.5    0.9    50 ms    3 (1.0 … 1.1)      warm-up, good, not in the sample
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from analysis import frame, steps
from analysis.frame import Run
from loadgen.leg import Window
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import parse_slo
from loadgen.store import Row
from tests import synthetic
from tests.synthetic import Plain, S

T0 = 100 * S  # run start; s below count from here


def record(seq: int, due_s: float, first_s: float, gap_ms: int, cls: str = "code",
           leg: str = "ladder-4-r0") -> RequestRecord:
    due, first = T0 + round(due_s * S), T0 + round(first_s * S)
    return RequestRecord(
        leg=leg, shard=0, seq=seq, session=seq, turn=0, cls=cls, due_ns=due, sent_ns=due + S // 100,
        first_ns=first, gaps_us=[gap_ms * 1000] * 4, end_ns=first + gap_ms * 4_000_000,
        outcome=Outcome.OK, prompt_tok=100, output_tok=5, tok_source="usage")


def hand_made() -> Plain:
    failed = RequestRecord(
        leg="ladder-4-r0", shard=0, seq=4, session=4, turn=0, cls="json", due_ns=T0 + 4 * S,
        sent_ns=T0 + 4 * S, end_ns=T0 + 4 * S + S // 10, outcome=Outcome.HTTP_ERROR, status=500,
        error="HTTP 500: boom")
    records = [record(0, 0.5, 0.9, 50), record(1, 1.0, 1.5, 100), record(2, 2.0, 2.4, 25),
               record(3, 3.0, 6.0, 25), failed, record(5, 10.5, 10.9, 50)]
    window = Window("ladder-4-r0", T0, T0 + S, T0 + 11 * S, T0 + 12 * S, "done")
    rows = [Row("server", T0 + 2 * S, "running", 4.0), Row("server", T0 + 5 * S, "running", 8.0),
            Row("server", T0, "preemptions", 1.0), Row("server", T0 + 12 * S, "preemptions", 1.0),
            *(Row("gpu", T0 + 2 * S, "memory_used_bytes", g * 2.0**30, {"index": str(g)})
              for g in (6, 8))]
    return Plain([(synthetic.leg(4, "ladder", 10.0), window)], records, rows)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return frame.load(synthetic.write_plain(tmp_path / "run", hand_made()))


def test_table_holds_the_values_worked_out_by_hand(run: Run) -> None:
    row = steps.table(run).iloc[0].to_dict()
    assert (row["n"], row["good"], row["errors"], row["void"]) == (5, 2, 1, 0)
    assert row["attainment_frac"] == pytest.approx(0.4)
    assert row["error_frac"] == pytest.approx(0.2)
    assert row["offered_rps"] == pytest.approx(0.5)
    assert row["achieved_rps"] == pytest.approx((1 + 1 + 1 + 2 / 5 + 3 / 5) / 10)
    assert row["goodput_rps"] == pytest.approx((1 + 2 / 5 + 3 / 5) / 10)
    assert row["output_tok_s"] == pytest.approx((5 + 5 + 5 + 2 + 3) / 10)
    assert row["prompt_tok_s"] == pytest.approx(4 * 100 / 10)  # F's first token: before the window
    assert (row["ttft_n"], row["ttft_p50_s"], row["ttft_max_s"]) == (4, 0.4, 3.0)
    assert row["ttft_mean_s"] == pytest.approx((0.5 + 0.4 + 3.0 + 0.4) / 4)
    assert row["ttft_service_p50_s"] == pytest.approx(0.39)  # each was sent 10 ms late
    assert row["tpot_p50_s"] == pytest.approx(0.025)
    assert (row["e2e_n"], row["e2e_p50_s"]) == (4, pytest.approx(0.6))
    assert (row["itl_n"], row["itl_p50_s"]) == (16, pytest.approx(0.025))
    assert row["outcomes"] == "HTTP_ERROR 1, OK 4"
    assert row["misses"] == "HTTP_ERROR 1, tpot 1, ttft 1"


def test_server_and_gpu_columns_come_from_the_window(run: Run) -> None:
    row = steps.table(run).iloc[0].to_dict()
    assert (row["running_mean"], row["preemptions"]) == (6.0, 0.0)
    assert row["gpu_memory_peak_gib"] == 8.0  # of two GPUs the fuller one
    assert np.isnan(float(row["kv_max_frac"] or np.nan))  # the server does not say


def test_frame_has_one_row_per_request_with_times_from_the_start(run: Run) -> None:
    f = run.frame.set_index("session")
    assert f["due_s"].tolist() == pytest.approx([0.5, 1, 2, 3, 4, 10.5])
    assert f["in_window"].tolist() == [False, True, True, True, True, True]
    assert f["good"].tolist() == [True, False, True, False, False, True]
    assert f.loc[4, "error"] == "HTTP 500: boom"
    assert np.isnan(f["ttft_s"][4])


def test_another_slo_judges_the_same_run_anew(tmp_path: Path) -> None:
    path = synthetic.write_plain(tmp_path / "run", hand_made())
    loose = frame.load(path, parse_slo("ttft=4s,tpot=200ms"))
    assert loose.judgements[0].good == 4
    assert loose.judgements[0].misses == {"HTTP_ERROR": 1}


@pytest.mark.parametrize(("n", "q", "stands"), [(35, 90, False), (36, 90, True), (367, 99, False),
                                                (368, 99, True), (1, 50, True)])
def test_tail_stands_only_where_n_has_one(n: int, q: int, stands: bool) -> None:
    found = steps.distribution("ttft", np.linspace(0.1, 1.0, n))
    assert (found[f"ttft_p{q}_s"] is not None) is stands
    assert found["ttft_n"] == n


def test_answers_that_were_cut_off_are_not_left_out_of_the_median() -> None:
    # 3 answers in 1 s, 3 still without one after 2 s: the median is not 1 s for sure, p50 is
    # reached only where half of all six are in
    found = steps.distribution("ttft", np.array([1.0, 1.1, 1.2]), np.array([2.0, 2.0, 2.0]))
    assert (found["ttft_n"], found["ttft_p50_s"]) == (6, pytest.approx(1.2))
    found = steps.distribution("ttft", np.array([1.0, 1.1]), np.array([2.0, 2.0, 2.0]))
    assert found["ttft_p50_s"] is None  # more than half never came


def test_requests_that_lived_through_a_stall_are_void(tmp_path: Path) -> None:
    plain = hand_made()
    leg, window = plain.legs[0]
    assert window is not None
    stalled = Window(window.leg, window.t0_ns, window.from_ns, window.to_ns, window.end_ns, "done",
                     stalls=[(T0 + 5 * S, T0 + 5 * S + S // 2)])  # inside C
    run = frame.load(synthetic.write_plain(
        tmp_path / "run", Plain([(leg, stalled)], plain.records)))
    row = steps.table(run).iloc[0].to_dict()
    assert (row["n"], row["void"], row["ttft_n"], row["itl_n"]) == (4, 1, 3, 12)


def test_levels_take_legs_of_one_value_together(tmp_path: Path) -> None:
    run = frame.load(synthetic.write(tmp_path / "run", levels=(32,), confirm=32))
    table, level = steps.table(run), steps.levels(run).iloc[0].to_dict()
    assert level["n"] == table["n"].sum()
    weighted = (table["achieved_rps"] * table["window_s"]).sum() / table["window_s"].sum()
    assert level["achieved_rps"] == pytest.approx(weighted)


# ------------------------------------------------------------------------------- crashed, empty


def test_killed_run_loads_from_its_journals_alone(tmp_path: Path) -> None:
    run = frame.load(synthetic.write(tmp_path / "run", levels=(8, 16), confirm=None, crash=True))
    assert run.torn == 1
    (_, whole), (leg, window) = run.legs
    assert (whole.ending, window.ending) == ("done", "interrupted")
    assert run.judgements[1].measurement == "SUSPECT"
    assert 0 < run.judgements[1].n <= len(run.frame[run.frame["leg"] == leg.id])


def test_broken_off_leg_is_judged_up_to_the_first_lost_request(tmp_path: Path) -> None:
    plain = hand_made()
    known = [r for r in plain.records if r.seq != 3]  # C was in flight when the run was killed
    run = frame.load(synthetic.write_plain(
        tmp_path / "run", Plain([(plain.legs[0][0], None)], known)))
    window = run.legs[0][1]
    assert window.to_ns == T0 + 2 * S + 1  # B's due time: all that was due until then is known
    assert run.judgements[0].n == 1  # B: A came in the first second, a second of warm-up after F


def test_leg_without_any_record_and_empty_run_load(tmp_path: Path) -> None:
    empty = frame.load(synthetic.write(tmp_path / "empty", levels=(), confirm=None))
    assert (len(empty.frame), empty.judgements, empty.torn) == (0, [], 0)
    assert steps.table(empty).empty
    assert steps.levels(empty).empty
    started = frame.load(synthetic.write_plain(
        tmp_path / "started", Plain([(synthetic.leg(4, "ladder", 10.0), None)], [])))
    assert steps.table(started)["n"].tolist() == [0]


# --------------------------------------------------------------------------------- command line


def test_table_is_printed_and_written_as_csv(tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    path = synthetic.write_plain(tmp_path / "run", hand_made())
    steps.main([str(path)])
    assert "400 ms / –" in capsys.readouterr().out
    steps.main([str(path), "--csv", "--slo", "ttft:4000"])
    head, row = capsys.readouterr().out.splitlines()
    assert dict(zip(head.split(","), row.split(","), strict=False))["good"] == "3"


def test_no_run_is_one_line_on_stderr_and_exit_2(tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        steps.main([str(tmp_path / "nothing")])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_frame_and_steps_need_no_heavy_package() -> None:
    code = ("import sys, analysis.steps; print([m for m in ('scipy', 'altair', "
            "'vl_convert', 'rich') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parent.parent)
    assert done.stdout.strip() == "[]"
