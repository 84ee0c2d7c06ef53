"""Each rule of validity fires on a leg made for it, and not just below its threshold."""

from typing import Any

import pytest

from loadgen import balance, validity
from loadgen.balance import Counted
from loadgen.leg import Health, Leg, Window
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Closed, Open, PerSecond
from loadgen.validity import Finding

S = 1_000_000_000
MS = 1_000_000
CLOSED = Leg(id="l", axis="concurrency", value=4, phase="ladder", replicate=0, seed=1,
             load=Closed(4), warmup_s=5, measure_s=10)
OPEN = Leg(id="l", axis="rate", value=4, phase="ladder", replicate=0, seed=1,
           load=Open(PerSecond(4)), warmup_s=5, measure_s=10)
KERNEL: dict[str, Any] = {"stamp_kind": "kernel"}


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
          lag_frac: float | None = None, counted: Counted | None = None,
          **fields: Any) -> dict[str, Finding]:
    """Findings by rule."""
    if records is None:
        records = [record()] * 200
    held = window(**fields)
    books = balance.of(leg, held, records, records, counted)
    findings = validity.check(leg, held, records, len(records), lag_frac, False, books)
    assert len({f.rule for f in findings}) == len(findings)
    return {f.rule: f for f in findings}


def verdicts(*args: Any, **fields: Any) -> dict[str, str]:
    return {rule: f.verdict for rule, f in found(*args, **fields).items()}


@pytest.mark.parametrize("leg", [CLOSED, OPEN])
def test_a_good_leg_has_no_findings(leg: Any) -> None:
    assert found(leg) == {}
    assert found(leg, lag_p99_s=None, cpu_frac=None) == {}
    assert found(leg, alone=True, counted=Counted(200, 200 * 300, 400), shards=[
        Health(0, 0.001, 0.2, 0.02, 0.002, 0.0, 0.0, 40, 1024, 0, 131072, 200.0)]) == {}


def test_a_leg_without_a_request_has_none_but_that_an_open_loop_sent_nothing() -> None:
    assert found(CLOSED, []) == {}
    assert verdicts(OPEN, []) == {"achieved-rate": "INVALID"}


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


@pytest.mark.parametrize("leg", [CLOSED, OPEN])
def test_the_wait_for_a_connection_is_no_lateness_of_the_generator(leg: Any) -> None:
    waited = record(60 * MS, connect_wait_ns=58 * MS)
    assert "late-starts" not in verdicts(leg, [waited] * 200)
    assert verdicts(leg, [record(60 * MS, connect_wait_ns=MS)] * 200)["late-starts"] == "SUSPECT"


# ----------------------------------------------------------------------------------------- host


@pytest.mark.parametrize(("cpu", "verdict"), [
    (None, None), (0.80, None), (0.801, "SUSPECT"), (0.97, "SUSPECT"), (0.971, "INVALID")])
def test_a_busy_generator_is_suspect_and_a_full_one_invalid(cpu: Any, verdict: Any) -> None:
    assert verdicts(cpu_frac=cpu).get("generator-cpu") == verdict


@pytest.mark.parametrize(("lag_s", "verdict"), [(None, None), (0.020, None), (0.0201, "SUSPECT")])
def test_a_loop_that_lags_is_suspect(lag_s: Any, verdict: Any) -> None:
    assert verdicts(lag_p99_s=lag_s).get("loop-lag") == verdict


@pytest.mark.parametrize(("lag_s", "verdict"), [(0.05, None), (0.0501, "SUSPECT")])
def test_the_lag_of_a_loop_whose_kernel_stamps_only_delays_a_slots_next_request(
        lag_s: Any, verdict: Any) -> None:
    records = [record(**KERNEL)] * 200  # of 1 s each: of that the twentieth
    said = found(CLOSED, records, lag_p99_s=lag_s).get("loop-lag")
    assert (said.verdict if said else None) == verdict
    assert said is None or ("next request" in said.says and "carry that error" not in said.says)
    assert found(OPEN, records, lag_p99_s=9.0) == {}  # an open loop's is in its lateness


def test_one_stamp_of_the_clients_own_carries_its_lag() -> None:
    said = found(OPEN, [record(**KERNEL)] * 199 + [record()], lag_p99_s=0.03)
    assert "stamps carry that error" in said["loop-lag"].says


@pytest.mark.parametrize(("frac", "verdict"), [
    (None, None), (0.1, None), (0.101, "SUSPECT"), (0.5, "SUSPECT"), (0.501, "INVALID")])
def test_a_process_that_waits_for_a_core_is_named(frac: Any, verdict: Any) -> None:
    shards = [Health(0, run_queue_frac=0.01, run_queue_each_s=0.002),
              Health(1, run_queue_frac=frac, run_queue_each_s=0.00051)]
    said = found(shards=shards).get("run-queue")
    assert (said.verdict if said else None) == verdict
    assert said is None or "generator process 1" in said.says


def test_many_short_waits_for_a_core_delay_nothing() -> None:
    assert found(shards=[Health(0, run_queue_frac=0.9, run_queue_each_s=0.0005)]) == {}


@pytest.mark.parametrize(("pause_s", "longest_s", "verdict"), [
    (0.17, 0.1, None), (0.171, 0.1, "SUSPECT"), (3.0, 0.005, None), (3.0, 0.0051, "SUSPECT")])
def test_pauses_of_the_collector_are_told_where_they_are_felt(
        pause_s: Any, longest_s: Any, verdict: Any) -> None:
    """Of a leg of 17 s."""
    shards = [Health(0), Health(1, gc_pause_s=pause_s, gc_pause_max_s=longest_s)]
    assert verdicts(shards=shards).get("gc-pauses") == verdict


@pytest.mark.parametrize(("fds", "limit", "verdict"), [
    (90, 100, None), (91, 100, "SUSPECT"), (64, 64, "SUSPECT"), (None, 64, None), (9, None, None)])
def test_descriptors_near_their_limit_are_told(fds: Any, limit: Any, verdict: Any) -> None:
    assert verdicts(shards=[Health(0, fds=fds, fd_limit=limit)]).get("fd-limit") == verdict


@pytest.mark.parametrize(("full", "verdict"), [
    (0, None), (2, None), (3, "SUSPECT"), (200, "SUSPECT"), (201, "INVALID")])
def test_reads_that_fill_the_buffer_are_those_of_a_client_that_is_behind(
        full: Any, verdict: Any) -> None:
    """Of 2000 reads: 200 answers of 10."""
    records = [record(gaps_us=[1000] * 9)] * 200
    half = full // 2
    shards = [Health(0, full_reads=half), Health(1, full_reads=full - half)]
    assert verdicts(records=records, shards=shards).get("read-behind") == verdict


def test_events_that_came_in_one_read_are_one_read() -> None:
    records = [record(gaps_us=[0] * 9, reads=[10])] * 200
    assert verdicts(records=records, shards=[Health(0, full_reads=1)]) == {
        "read-behind": "SUSPECT"}


@pytest.mark.parametrize(("size", "verdict"), [
    (None, None), (65536, None), (65535, "SUSPECT"), (4608, "SUSPECT")])
def test_a_small_receive_buffer_is_told(size: Any, verdict: Any) -> None:
    shards = [Health(0, rcvbuf_bytes=131072), Health(1, rcvbuf_bytes=size)]
    assert verdicts(shards=shards).get("receive-buffer") == verdict


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


# ------------------------------------------------------------------------------- what adds up


def spread(n: int, late_ns: int = 0, takes_ns: int = 100 * MS, **fields: Any) -> list[
        RequestRecord]:
    """n requests that are due evenly over the window."""
    due = [5 * S + k * 10 * S // n for k in range(n)]
    return [record(due_ns=at, sent_ns=at + late_ns, first_ns=at + late_ns + 50 * MS,
                   end_ns=at + late_ns + takes_ns, **fields) for at in due]


@pytest.mark.parametrize(("sent", "verdict"), [
    (400, None), (392, None), (391, "SUSPECT"), (360, "SUSPECT"), (359, "INVALID")])
def test_starts_that_were_made_after_the_window_are_missing_in_its_load(
        sent: Any, verdict: Any) -> None:
    leg = Leg(id="l", axis="rate", value=40, phase="run", replicate=0, seed=1,
              load=Open(PerSecond(40)), warmup_s=5, measure_s=10)
    on_time, late = spread(400)[:sent], spread(400, 20 * S)[sent:]
    assert verdicts(leg, on_time + late).get("achieved-rate") == verdict


def test_a_few_starts_may_fall_over_the_edge() -> None:
    assert "achieved-rate" not in verdicts(OPEN, spread(37) + spread(3, 20 * S))
    assert verdicts(OPEN, spread(36) + spread(4, 20 * S))["achieved-rate"] == "SUSPECT"


def test_starts_that_the_generator_never_came_to_are_missing_too() -> None:
    """At 40/s for 10 s there are 400, ± 20 by chance; 4 σ less are not by chance."""
    leg = Leg(id="l", axis="rate", value=40, phase="run", replicate=0, seed=1,
              load=Open(PerSecond(40)), warmup_s=5, measure_s=10)
    assert "achieved-rate" not in verdicts(leg, spread(325))
    assert verdicts(leg, spread(315))["achieved-rate"] == "INVALID"


def test_a_closed_loop_and_a_counted_run_ask_for_no_rate() -> None:
    counted = Leg(id="l", axis="rate", value=40, phase="run", replicate=0, seed=1,
                  load=Open(PerSecond(40)), warmup_s=0, measure_s=None, num_sessions=50)
    assert "achieved-rate" not in verdicts(counted, spread(50))
    assert "achieved-rate" not in verdicts(CLOSED, spread(5))


def slots(full: float, gap_ms: int, n: int = 4) -> list[RequestRecord]:
    """A closed loop of n slots, of which a share `full` of the time has a request, with gaps of
    `gap_ms` in between; over the whole of the window and beyond."""
    period_ns = round(gap_ms * MS / (1 - full))
    return [record(due_ns=at, sent_ns=at, first_ns=at + 1, end_ns=at + period_ns - gap_ms * MS)
            for _ in range(n) for at in range(0, 20 * S, period_ns)]


@pytest.mark.parametrize(("full", "gap_ms", "verdict"), [
    (0.96, 40, None), (0.94, 40, "SUSPECT"), (0.82, 40, "SUSPECT"), (0.78, 40, "INVALID"),
    (0.3, 4, None), (0.3, 6, "INVALID")])
def test_slots_that_a_slow_generator_left_empty_are_another_level(
        full: Any, gap_ms: Any, verdict: Any) -> None:
    assert verdicts(CLOSED, slots(full, gap_ms), alone=True).get("slots-empty") == verdict


def test_slots_are_not_asked_about_where_they_rest_by_plan() -> None:
    empty = slots(0.3, 40)
    assert "slots-empty" not in verdicts(CLOSED, empty, alone=False)  # Locust's users
    assert "slots-empty" not in verdicts(OPEN, empty, alone=True)
    assert "slots-empty" in verdicts(CLOSED, empty, alone=True)
    thinking = balance.of(CLOSED, window(alone=True), empty, empty, rests=True)
    assert thinking.slots_frac is None
    assert thinking.inflight_mean is not None


def test_slots_of_sessions_without_a_pause_must_be_full() -> None:
    talks = [*slots(0.3, 40), record(turn=1)]
    assert "slots-empty" in verdicts(CLOSED, talks, alone=True)


def test_a_rate_is_of_sessions_and_their_later_turns_do_not_hide_a_late_generator() -> None:
    """Of 40 arrivals 10 came; with their later turns there are more records than arrivals."""
    first, later = spread(10), spread(50, turn=1)
    books = balance.of(OPEN, window(alone=True), first, [*first, *later])
    assert (books.asked, books.begun) == (90, 60)
    assert verdicts(OPEN, [*first, *later], alone=True)["achieved-rate"] == "INVALID"


def test_slots_are_not_empty_by_a_stall_that_is_told_already() -> None:
    held = [r for r in slots(0.98, 5) if not 6 * S < r.due_ns < 9 * S]
    assert verdicts(CLOSED, held, alone=True)["slots-empty"] == "INVALID"
    assert "slots-empty" not in verdicts(CLOSED, held, alone=True, stalls=[(6 * S, 9 * S)])


LITTLE = [(1000, 0.0, None), (1000, 0.05, None), (1000, 0.09, "SUSPECT"), (1000, -0.09, "SUSPECT"),
          (10, 0.09, None), (10, 0.4, "SUSPECT")]


@pytest.mark.parametrize(("n", "off", "verdict"), LITTLE)
def test_littles_law_is_held_to_what_chance_allows_which_shrinks_with_the_root_of_n(
        n: Any, off: Any, verdict: Any) -> None:
    """Requests of 100 ms: 2 % + 5 % for an end noticed 5 ms late + 0.24/√n."""
    shards = [Health(0, inflight_s=n * 0.1 * (1 + off) / 2)] * 2
    records = [*spread(n)[:-1], spread(n)[0]]  # none of them lies across an edge
    said = found(OPEN, records, shards=shards)
    assert ("littles-law" in said) == (verdict is not None)
    assert verdict is None or said["littles-law"].verdict == verdict


def test_requests_at_the_edges_of_the_window_count_by_the_share_inside() -> None:
    """In flight from 0 to 20 s; the window sees 10 s of each."""
    across = [record(due_ns=0, sent_ns=0, first_ns=S, end_ns=20 * S)] * 50
    assert "littles-law" not in verdicts(OPEN, across, shards=[Health(0, inflight_s=500.0)])
    assert "littles-law" in verdicts(OPEN, across, shards=[Health(0, inflight_s=550.0)])


def test_nothing_is_said_of_littles_law_where_nobody_counted_or_the_host_stood_still() -> None:
    off = [Health(0, inflight_s=99.0)]
    assert "littles-law" in verdicts(OPEN, spread(100), shards=off)
    assert "littles-law" not in verdicts(OPEN, spread(100), shards=[*off, Health(1)])
    assert "littles-law" not in verdicts(OPEN, spread(100), shards=off, stalls=[(6 * S, 7 * S)])


@pytest.mark.parametrize(("wait_ms", "ttft_ms", "verdict"), [
    (10, 100, None), (10.001, 100, "SUSPECT"), (100, 1000, None), (100.001, 1000, "SUSPECT")])
def test_a_wait_for_connections_that_is_part_of_ttft_is_told(
        wait_ms: Any, ttft_ms: Any, verdict: Any) -> None:
    waited = record(round(wait_ms * MS), ttft_ms * MS, connect_wait_ns=round(wait_ms * MS))
    usual = record(0, ttft_ms * MS)
    assert verdicts(OPEN, [usual] * 197 + [waited] * 3).get("connect-wait") == verdict
    assert "connect-wait" not in verdicts(OPEN, [usual] * 198 + [waited] * 2)


# ------------------------------------------------------------------------ what the server counts


def counts(n: int, **of: float) -> dict[str, str]:
    """Of n good answers with 300 prompt tokens and 2 output tokens each."""
    return verdicts(OPEN, [record()] * n, counted=Counted(**of), alone=True)


@pytest.mark.parametrize(("n", "more", "verdict"), [
    (1000, 20, None), (1000, 21, "SUSPECT"), (1000, 200, "SUSPECT"), (1000, 201, "INVALID"),
    (10, 3, None), (10, 4, "INVALID"), (1000, -1000, None)])
def test_requests_that_are_not_ours_are_somebody_elses_load(
        n: Any, more: Any, verdict: Any) -> None:
    assert counts(n, requests=n + more).get("foreign-load") == verdict


@pytest.mark.parametrize(("share", "verdict"), [
    (1.0, None), (1.0199, None), (1.0201, "SUSPECT"), (0.9801, None), (0.9799, "SUSPECT")])
@pytest.mark.parametrize("what", ["prompt_tok", "output_tok"])
def test_tokens_that_are_counted_otherwise_are_told(
        what: Any, share: Any, verdict: Any) -> None:
    ours = 10_000 * (300 if what == "prompt_tok" else 2)
    assert counts(10_000, **{what: ours * share}).get("token-count") == verdict


def test_tokens_of_somebody_else_are_not_told_twice() -> None:
    assert counts(100, requests=150, output_tok=999) == {"foreign-load": "INVALID"}


@pytest.mark.parametrize(("output", "told"), [(200, False), (290, False), (195, True), (297, True)])
def test_of_a_cancelled_request_the_server_may_have_counted_any_part(
        output: Any, told: Any) -> None:
    """98 answers of 2 tokens; one that was cancelled at 4, and might have come to 95."""
    cut = record(outcome=Outcome.CANCELLED, output_tok=4, prompt_tok=None, max_tokens=95)
    said = verdicts(OPEN, [record()] * 98 + [cut], alone=True,
                    counted=Counted(99, 98 * 300 + 200, output))
    assert ("token-count" in said) == told


def test_a_leg_that_was_not_alone_is_not_held_against_the_servers_counters() -> None:
    assert verdicts(OPEN, counted=Counted(999, 9, 9), alone=False) == {}
    assert verdicts(OPEN, alone=True) == {}


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
    shard = Health(0, run_queue_frac=0.9, run_queue_each_s=0.01, gc_pause_s=9, gc_pause_max_s=1,
                   fds=64, fd_limit=64, full_reads=99, rcvbuf_bytes=4608)
    said = found(OPEN, [late] * 10 + [dropped], 0.5, Counted(10, 1, 1), cpu_frac=1.0,
                 lag_p99_s=1.0, ending="failed", stalls=[(6 * S, 7 * S)], shards=[shard],
                 alone=True)
    said |= found(CLOSED, slots(0.3, 40), None, Counted(99_999), alone=True,
                  shards=[Health(0, inflight_s=1e6)])
    said |= found(OPEN, [record(900 * MS, 950 * MS, connect_wait_ns=899 * MS)])
    assert set(said) == {
        "dropped", "late-starts", "generator-failed", "generator-cpu", "loop-lag", "host-stall",
        "no-usage", "prompt-length", "simulator-late", "run-queue", "gc-pauses", "fd-limit",
        "read-behind", "receive-buffer", "achieved-rate", "slots-empty", "littles-law",
        "connect-wait", "foreign-load", "token-count"}
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


def test_a_server_that_keeps_bodies_open_is_named_and_not_the_generator() -> None:
    shards = [Health(0, inflight_s=30.0, lingered=7), Health(1, inflight_s=30.0)]
    assert verdicts(shards=shards) == {"held-open": "SUSPECT"}


@pytest.mark.parametrize(("late", "verdict"), [(1, "SUSPECT"), (2, "INVALID")])
def test_one_late_start_among_few_is_an_accident(late: int, verdict: str) -> None:
    records = [record()] * 5 + [record(150 * MS)] * late
    assert verdicts(CLOSED, records) == {"late-starts": verdict}
