"""Each rule of validity fires on a leg made for it, and not just below its threshold."""

from typing import Any

import pytest

from loadgen import validity
from loadgen.leg import Leg, Window
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Closed, Open, PerSecond
from loadgen.validity import Finding

S = 1_000_000_000
MS = 1_000_000
CLOSED = Leg(id="l", axis="concurrency", value=4, phase="ladder", replicate=0, seed=1,
             load=Closed(4), warmup_s=5, measure_s=10)
OPEN = Leg(id="l", axis="rate", value=4, phase="ladder", replicate=0, seed=1,
           load=Open(PerSecond(4)), warmup_s=5, measure_s=10)


def window(**fields: Any) -> Window:
    """From 5 s to 15 s of a host without faults."""
    base: dict[str, Any] = {"leg": "l", "t0_ns": 0, "from_ns": 5 * S, "to_ns": 15 * S,
                            "end_ns": 17 * S, "ending": "done", "lag_p99_s": 0.001,
                            "cpu_frac": 0.2}
    return Window(**(base | fields))


def record(late_ns: int = 0, ttft_ns: int = 100 * MS, outcome: Outcome = Outcome.OK,
           **fields: Any) -> RequestRecord:
    """A good answer: sent when it was due, first token 100 ms later, counted by usage."""
    base: dict[str, Any] = {
        "leg": "l", "shard": 0, "seq": 0, "session": 0, "turn": 0, "cls": "a", "due_ns": 6 * S,
        "sent_ns": 6 * S + late_ns, "first_ns": 6 * S + ttft_ns, "gaps_us": [1000],
        "end_ns": 7 * S, "outcome": outcome, "prompt_tok": 300, "want_prompt_tok": 300,
        "output_tok": 2, "tok_source": "usage"}
    return RequestRecord(**(base | fields))


def found(leg: Leg = CLOSED, records: list[RequestRecord] | None = None,
          lag_frac: float | None = None, **fields: Any) -> dict[str, Finding]:
    """Findings by rule."""
    if records is None:
        records = [record()] * 200
    findings = validity.check(leg, window(**fields), records, len(records), lag_frac)
    assert len({f.rule for f in findings}) == len(findings)
    return {f.rule: f for f in findings}


def verdicts(*args: Any, **fields: Any) -> dict[str, str]:
    return {rule: f.verdict for rule, f in found(*args, **fields).items()}


@pytest.mark.parametrize("leg", [CLOSED, OPEN])
def test_a_good_leg_has_no_findings(leg: Any) -> None:
    assert found(leg) == {}
    assert found(leg, []) == {}
    assert found(leg, lag_p99_s=None, cpu_frac=None) == {}


def test_the_worst_finding_is_the_verdict() -> None:
    suspect = Finding("a", "SUSPECT", "", "")
    invalid = Finding("b", "INVALID", "", "")
    assert validity.verdict([]) == "VALID"
    assert validity.verdict([suspect]) == "SUSPECT"
    assert validity.verdict([suspect, invalid]) == validity.verdict([invalid]) == "INVALID"


# --------------------------------------------------------------------------------------- starts


def test_one_dropped_request_makes_a_leg_invalid() -> None:
    dropped = record(outcome=Outcome.DROPPED, error="max_inflight of 9 reached", sent_ns=None,
                     first_ns=None, gaps_us=[])
    said = found(OPEN, [record()] * 199 + [dropped])["dropped"]
    assert said.verdict == "INVALID"
    assert "max_inflight of 9 reached" in said.says
    assert "1 request" in said.says


LATE = [
    # (ms late, TTFT in ms, verdict): more than 5 ms and than a twentieth of the median TTFT
    (5, 100, None), (5.001, 100, "SUSPECT"), (5, 10, None), (5.001, 10, "SUSPECT"),
    (50, 1000, None), (50.001, 1000, "SUSPECT"), (999, 1000, "SUSPECT")]


@pytest.mark.parametrize(("late_ms", "ttft_ms", "verdict"), LATE)
@pytest.mark.parametrize("leg", [CLOSED, OPEN])
def test_late_starts_are_held_against_the_ttft(
        leg: Any, late_ms: Any, ttft_ms: Any, verdict: Any) -> None:
    records = [record(round(late_ms * MS), ttft_ms * MS)] * 200
    assert verdicts(leg, records).get("late-starts") == verdict


@pytest.mark.parametrize(("late_ms", "verdict"), [(100, "SUSPECT"), (100.001, "INVALID")])
def test_starts_later_than_a_median_ttft_are_no_measurement(late_ms: Any, verdict: Any) -> None:
    late = record(round(late_ms * MS), 300 * MS)
    assert verdicts(OPEN, [record()] * 190 + [late] * 10) == {"late-starts": verdict}


def test_the_latest_of_a_hundred_starts_may_be_late() -> None:
    late = record(90 * MS)
    assert verdicts(OPEN, [record()] * 198 + [late] * 2) == {}
    assert verdicts(OPEN, [record()] * 197 + [late] * 3) == {"late-starts": "SUSPECT"}


def test_a_request_that_never_started_is_not_late() -> None:
    gone = record(outcome=Outcome.CANCELLED, sent_ns=None, first_ns=None, gaps_us=[])
    assert verdicts(OPEN, [record()] * 20 + [gone] * 180) == {}


def test_the_remedy_of_late_starts_in_a_closed_loop_names_slow_accepting() -> None:
    records = [record(60 * MS)] * 200
    assert "accept" in found(CLOSED, records)["late-starts"].remedy
    assert "accept" not in found(OPEN, records)["late-starts"].remedy


# ----------------------------------------------------------------------------------------- host


@pytest.mark.parametrize(("cpu", "verdict"), [
    (None, None), (0.80, None), (0.801, "SUSPECT"), (0.97, "SUSPECT"), (0.971, "INVALID")])
def test_a_busy_generator_is_suspect_and_a_full_one_invalid(cpu: Any, verdict: Any) -> None:
    assert verdicts(cpu_frac=cpu).get("generator-cpu") == verdict


@pytest.mark.parametrize(("lag_s", "verdict"), [(None, None), (0.020, None), (0.0201, "SUSPECT")])
def test_a_loop_that_lags_is_suspect(lag_s: Any, verdict: Any) -> None:
    assert verdicts(lag_p99_s=lag_s).get("loop-lag") == verdict


@pytest.mark.parametrize("ending", ["done", "cut", "server_died"])
def test_other_endings_are_no_fault_of_the_generator(ending: Any) -> None:
    assert found(ending=ending) == {}


def test_a_generator_that_failed_measured_nothing() -> None:
    said = found(ending="failed", note="generator process 1 was killed by signal 9")
    assert said["generator-failed"].verdict == "INVALID"
    assert "killed by signal 9" in said["generator-failed"].says
    assert found(ending="failed")["generator-failed"].says


@pytest.mark.parametrize(("stalls", "verdict"), [
    ([], None), ([(6 * S, 6 * S + 1)], "SUSPECT"), ([(6 * S, 11 * S)], "SUSPECT"),
    ([(6 * S, 11 * S + 1)], "INVALID"), ([(6 * S, 9 * S), (10 * S, 12 * S + 1)], "INVALID")])
def test_a_host_that_stood_still_for_half_of_the_window_measured_nothing(
        stalls: Any, verdict: Any) -> None:
    assert verdicts(stalls=stalls).get("host-stall") == verdict


def test_a_stall_that_every_process_saw_is_one_stall() -> None:
    said = found(stalls=[(6 * S + i, 7 * S + i) for i in range(8)])["host-stall"]
    assert said.verdict == "SUSPECT"
    assert "1.0 s" in said.says


def test_a_stall_before_the_window_takes_nothing_from_the_sample() -> None:
    assert verdicts(stalls=[(0, 5 * S)], from_ns=5 * S, to_ns=10 * S).get("host-stall") != (
        "INVALID")


@pytest.mark.parametrize(("frac", "verdict"), [
    (None, None), (0.0, None), (0.05, None), (0.0501, "SUSPECT")])
def test_a_simulator_that_cannot_keep_up_is_suspect(frac: Any, verdict: Any) -> None:
    assert verdicts(lag_frac=frac).get("simulator-late") == verdict


# --------------------------------------------------------------------------------------- tokens


def test_one_answer_without_usage_is_suspect() -> None:
    said = found(records=[record()] * 199 + [record(tok_source="events")])["no-usage"]
    assert said.verdict == "SUSPECT"
    assert said.says.startswith("1 of 200")


def test_only_complete_answers_need_usage() -> None:
    broken = record(outcome=Outcome.DISCONNECTED, tok_source="events")
    assert found(records=[record()] * 100 + [broken] * 100) == {}


PROMPTS = [
    # (wanted, got, whether it is told): more than 15 % and than 32 tokens off, in the mean
    (1000, 1150, False), (1000, 1151, True), (1000, 851, False), (1000, 849, True),
    (100, 132, False), (100, 133, True), (100, 68, False), (100, 67, True), (20, 52, False)]


@pytest.mark.parametrize(("want", "got", "told"), PROMPTS)
def test_prompts_of_another_length_are_another_load(want: Any, got: Any, told: Any) -> None:
    records = [record(prompt_tok=got, want_prompt_tok=want)] * 10
    assert verdicts(records=records) == ({"prompt-length": "SUSPECT"} if told else {})


def test_lengths_are_compared_in_sum() -> None:
    records = [record(prompt_tok=got, want_prompt_tok=1000) for got in (500, 1500)] * 10
    assert found(records=records) == {}


def test_prompts_that_nobody_counted_are_not_compared() -> None:
    records = [record(prompt_tok=None), record(want_prompt_tok=None, prompt_tok=9000)]
    assert found(records=records) == {}


def test_every_finding_says_what_and_what_to_do() -> None:
    dropped = record(outcome=Outcome.DROPPED, first_ns=None, gaps_us=[])
    late = record(900 * MS, 950 * MS, tok_source="events", prompt_tok=900)
    said = found(OPEN, [late] * 10 + [dropped], 0.5, cpu_frac=1.0, lag_p99_s=1.0,
                 ending="failed", stalls=[(6 * S, 7 * S)])
    assert set(said) == {"dropped", "late-starts", "generator-failed", "generator-cpu",
                         "loop-lag", "host-stall", "no-usage", "prompt-length", "simulator-late"}
    assert all(len(f.says) > 10 and len(f.remedy) > 10 for f in said.values())


# ------------------------------------------------------------- what broke off, and what was lost


def test_records_that_cannot_be_read_make_the_leg_invalid() -> None:
    lost = validity.check(CLOSED, window(records=201), [record()] * 200, 200)
    assert [(f.rule, f.verdict) for f in lost] == [("records-lost", "INVALID")]
    assert "1 of 201" in lost[0].says
    assert validity.check(CLOSED, window(records=200), [record()] * 200, 200) == []


def test_a_leg_that_broke_off_is_suspect() -> None:
    assert {r: f.verdict for r, f in found(ending="interrupted").items()} == {
        "interrupted": "SUSPECT"}


def test_a_window_whose_telemetry_was_lost_is_suspect() -> None:
    blind = validity.check(CLOSED, window(), [record()] * 200, 200, None, True)
    assert [(f.rule, f.verdict) for f in blind] == [("no-telemetry", "SUSPECT")]
