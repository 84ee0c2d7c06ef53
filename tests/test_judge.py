"""Records of a leg → verdicts: bounds, denominators, windows, voids, classes, distress."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec import structs
from scipy import stats

from loadgen import worth
from loadgen.judge import Criteria, Judgement, ServerSigns, judge
from loadgen.leg import Leg, Phase, Window
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Closed, Open, PerSecond, RequestClass, Scenario, Seconds, Slo

S = 1_000_000_000
SCENARIO = Scenario(
    name="two", slo=Slo(ttft_s=Seconds(2), tpot_s=Seconds(0.05)),
    classes=(RequestClass(name="a", kind="chat", prompt_tok=9, output_tok=9),
             RequestClass(name="b", kind="code", prompt_tok=9, output_tok=9,
                          slo=Slo(ttft_s=Seconds(4)))))
WINDOW = Window(leg="l", t0_ns=0, from_ns=10 * S, to_ns=20 * S, end_ns=25 * S, ending="done")
NOT_GOOD = [o for o in Outcome if o not in (Outcome.OK, Outcome.ABANDONED)]
OURS = {Outcome.THROTTLED, Outcome.CANCELLED, Outcome.DROPPED}  # no errors of the server


@pytest.fixture(autouse=True)
def _no_verdict_takes_long() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError("a verdict took more than 5 s")
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def leg(phase: Phase = "run") -> Leg:
    return Leg(id=f"{phase}-4-r0", axis="concurrency", value=4, phase=phase, replicate=0, seed=1,
               load=Closed(4), warmup_s=10, measure_s=10)


def record(due_s: float = 15, ttft_s: float = 1, took_s: float = 2,
           outcome: Outcome = Outcome.OK, cls: str = "a", **fields: Any) -> RequestRecord:
    """By default a good one, due in the middle of the window."""
    due = round(due_s * S)
    first = due + round(ttft_s * S)
    base: dict[str, Any] = {
        "leg": "l", "shard": 0, "seq": 0, "session": 0, "turn": 0, "cls": cls, "due_ns": due,
        "sent_ns": due, "first_ns": first, "gaps_us": [1000] * 9, "output_tok": 10,
        "tok_source": "usage", "end_ns": due + round(took_s * S), "outcome": outcome}
    return RequestRecord(**(base | fields))


GOOD = record()
SLOW = record(ttft_s=2.1, took_s=3)


def verdict(records: list[RequestRecord], signs: ServerSigns | None = None,
            window: Window = WINDOW, phase: Phase = "run", **criteria: Any) -> Judgement:
    return judge(leg(phase), window, records, signs or ServerSigns(), SCENARIO,
                 Criteria(**criteria))


def of(good: int, n: int, **how: Any) -> Judgement:
    """The verdict on n requests of which so many were good."""
    return verdict([GOOD] * good + [SLOW] * (n - good), **how)


# --------------------------------------------------------------------------------------- bounds

TABLE = [
    # (good, n, verdict) for 0.95 at 95 %
    (59, 59, "SAFE"), (58, 58, "UNRESOLVED"), (92, 93, "SAFE"), (91, 92, "UNRESOLVED"),
    (292, 300, "SAFE"), (291, 300, "UNRESOLVED"), (0, 0, "UNRESOLVED"),
    (1, 1, "UNRESOLVED"), (0, 1, "UNRESOLVED"), (0, 2, "UNSAFE"), (18, 20, "UNRESOLVED"),
    (16, 20, "UNRESOLVED"), (15, 20, "UNSAFE"), (260, 300, "UNRESOLVED"), (250, 300, "UNSAFE"),
    (0, 300, "UNSAFE")]


def worth_in_a_run(good: int, n: int) -> float:
    """Of requests that would refute it, all due at one moment of 10 s: answers take 2 s, slow ones
    3 s, so that 5 follow one another, at most; legs of 4 have the ρ of a search."""
    if not n:
        return 1.0
    answers = 10 / ((2 * good + 3 * (n - good)) / n)
    return 1 / (1 + (n - 1) * Criteria().refutes_differ * min(1.0, 4 / answers))


@pytest.mark.parametrize(("good", "n", "load"), TABLE)
def test_a_level_is_safe_or_unsafe_only_where_a_bound_says_so(good: Any, n: Any, load: Any) -> None:
    j = of(good, n)
    assert (j.load, j.good, j.n) == (load, good, n)
    assert j.lower == pytest.approx(stats.beta.ppf(0.05, good, n - good + 1) if good else 0.0,
                                    abs=1e-7)
    each = worth_in_a_run(good, n)
    assert j.upper == pytest.approx(stats.beta.ppf(
        0.95, good * each + 1, (n - good) * each) if good < n else 1.0, abs=1e-7)


@pytest.mark.parametrize(("good", "n"), [(g, n) for n in (10, 100, 300)
                                         for g in range(n // 2, n + 1, 1 + n // 40)])
def test_confirmed_verdicts_are_those_of_the_beta_distribution(good: Any, n: Any) -> None:
    low = stats.beta.ppf(0.05, good, n - good + 1)
    each = worth_in_a_run(good, n)
    high = stats.beta.ppf(0.95, good * each + 1, (n - good) * each) if good < n else 1.0
    wanted = "SAFE" if low >= 0.95 else "UNSAFE" if high < 0.95 else "UNRESOLVED"
    assert of(good, n).load == wanted


def test_a_leg_of_a_search_refutes_only_at_more_confidence() -> None:
    """It is one of many, and others of its level may be better: its 300 requests are worth 23."""
    assert of(240, 300).load == "UNSAFE"
    assert of(240, 300, phase="ladder").load == "UNRESOLVED"
    assert of(200, 300, phase="ladder").load == "UNSAFE"
    each = 1 / (1 + 299 * Criteria().runs_differ)
    assert of(277, 300, phase="confirm").lower == pytest.approx(
        stats.beta.ppf(0.05, 277 * each, 23 * each + 1), abs=1e-7)


def test_a_run_that_came_near_its_limits_is_not_safe() -> None:
    """Of a minute with answers of 8 s, 0.91 of a limit in a closed loop and 0.72 in an open one."""
    load, none = (leg().load, Open(PerSecond(4.0)))
    assert worth.kept_within(load, 60 / 8) == pytest.approx(0.906, abs=1e-3)
    assert worth.kept_within(none, 60 / 8) == pytest.approx(0.722, abs=1e-3)
    far, near = (verdict([record(ttft_s=x)] * 100) for x in (1.7, 1.8))
    assert (far.load, far.near) == ("SAFE", False)
    assert (near.load, near.near, near.good) == ("UNRESOLVED", True, 100)
    assert near.reasons == ["100 of 100 requests met the SLO, but 5 % came to 90 % of a limit or "
                            "more: another run may well miss it"]
    open_ = structs.replace(leg(), axis="rate", load=none)
    assert judge(open_, WINDOW, [record(ttft_s=1.7)] * 100, ServerSigns(), SCENARIO,
                 Criteria()).near
    assert verdict([record(ttft_s=1.8)] * 100, phase="confirm").load == "SAFE"  # several prove


def test_few_that_came_near_are_few_and_not_near() -> None:
    j = verdict([record(ttft_s=1.9)] * 50)
    assert (j.load, j.near) == ("UNRESOLVED", False)
    assert "too few" in j.reasons[0]
    assert not of(0, 100).near


def test_a_longer_run_may_come_nearer_and_refutes_by_less() -> None:
    closed, none = leg(), structs.replace(leg(), load=Open(PerSecond(4.0)))
    for one in (closed, none):
        kept = [worth.kept_within(one.load, x) for x in (1, 4, 16, 400)]
        assert kept == sorted(kept)
        each = [worth.of(one, x, [(900, 1000)], (0.005, 0.04))[1] for x in (1, 4, 16, 400)]
        assert each[0] == each[1] < each[2] < each[3]
    search = leg("ladder")
    assert worth.of(search, 1, [(9, 10)], (0.005, 0.04)) == worth.of(
        search, 400, [(9, 10)], (0.005, 0.04)) == (1 / (1 + 9 * 0.005), 1 / (1 + 9 * 0.04))


def test_requests_that_clump_are_worth_less() -> None:
    """Each tenth second all are slow, and else none."""
    clumped = [record(due_s=10 + i / 20, ttft_s=2.1 if i // 20 == 5 else 1) for i in range(200)]
    spread = [record(due_s=10 + i / 20, ttft_s=2.1 if i % 10 == 5 else 1) for i in range(200)]
    one, other = verdict(clumped), verdict(spread)
    assert (one.good, one.n) == (other.good, other.n) == (180, 200)
    assert sum(n for _, n in one.blocks) == 200
    assert one.lower < other.lower - 0.02
    assert one.upper > other.upper + 0.01


def test_a_level_that_gets_worse_and_worse_is_not_safe() -> None:
    backlog = [record(due_s=10 + i / 20, ttft_s=0.3 + i / 150) for i in range(200)]
    j = verdict(backlog)
    assert (j.good, j.load) == (200, "UNRESOLVED")
    assert "does not hold" in j.reasons[0]
    assert verdict([record(due_s=10 + i / 20) for i in range(200)]).load == "SAFE"


def test_strain_is_how_near_the_limits_came() -> None:
    j = verdict([record(ttft_s=1 + i / 100) for i in range(100)])
    assert j.strain == pytest.approx(1.94 / 2)
    assert verdict([GOOD] * 9 + [record(outcome=Outcome.STALLED)]).strain == float("inf")
    assert verdict([]).strain is None


def test_target_and_confidence_are_the_operator_s() -> None:
    assert of(59, 59, confidence=0.99).load == "UNRESOLVED"
    assert of(90, 90, confidence=0.99).load == "SAFE"
    assert of(90, 100, target=0.8).load == "SAFE"
    assert of(299, 300, target=0.999).load == "UNRESOLVED"


def test_reasons_say_how_many_of_how_many() -> None:
    assert of(59, 59).reasons == ["59 of 59 requests met the SLO"]
    assert of(0, 2).reasons == ["0 of 2 requests met the SLO: surely less than 95 %"]
    assert of(0, 0).reasons == ["no request was due in the window"]
    assert of(50, 50).reasons == [
        "50 of 50 requests met the SLO: too few to show 95 %; 9 more at this share would"]
    assert of(18, 20).reasons == ["18 of 20 requests met the SLO: too few to show 95 %"]


# ---------------------------------------------------------------------------------- denominators


@pytest.mark.parametrize("outcome", NOT_GOOD)
def test_whatever_did_not_end_well_is_in_the_denominator(outcome: Any) -> None:
    j = verdict([GOOD] * 90 + [record(outcome=outcome)] * 10)
    assert (j.n, j.good, j.attainment) == (100, 90, 0.9)
    assert j.outcomes == {"OK": 90, outcome.value: 10}
    assert j.misses == {outcome.value: 10}


@pytest.mark.parametrize("outcome", NOT_GOOD)
def test_errors_are_the_server_s_only(outcome: Any) -> None:
    j = verdict([GOOD] * 90 + [record(outcome=outcome)] * 10)
    assert j.errors == (0 if outcome in OURS else 10)
    assert j.error_lower == pytest.approx(
        0.0 if outcome in OURS else stats.beta.ppf(0.05, 10, 91), abs=1e-7)


def test_a_slow_answer_is_a_miss_and_no_error() -> None:
    j = of(90, 100)
    assert (j.errors, j.misses) == (0, {"ttft": 10})


def test_a_request_may_break_several_limits() -> None:
    both = record(ttft_s=3, took_s=9, gaps_us=[60_000] * 9)
    assert verdict([GOOD] * 9 + [both]).misses == {"ttft": 1, "tpot": 1}


def test_who_left_as_planned_is_judged_on_what_was_seen() -> None:
    early = record(outcome=Outcome.ABANDONED, first_ns=None, gaps_us=[], took_s=1)
    late = record(outcome=Outcome.ABANDONED, first_ns=None, gaps_us=[], took_s=3)
    j = verdict([early] * 3 + [late])
    assert (j.good, j.n, j.errors, j.misses) == (3, 4, 0, {"ttft": 1})


def test_each_class_has_its_own_limits() -> None:
    j = verdict([record(ttft_s=3, took_s=5, cls=cls) for cls in ("a", "b") for _ in range(5)])
    assert j.classes == {"a": (0, 5), "b": (5, 5)}


# --------------------------------------------------------------------------------------- window


@pytest.mark.parametrize(("due_ns", "counts"), [
    (10 * S - 1, 0), (10 * S, 1), (20 * S - 1, 1), (20 * S, 0), (0, 0)])
def test_a_request_belongs_to_the_window_it_was_due_in(due_ns: Any, counts: Any) -> None:
    j = verdict([record(due_ns=due_ns, sent_ns=due_ns, first_ns=due_ns + S, end_ns=30 * S)])
    assert (j.n, j.void) == (counts, 0)


def test_when_it_was_sent_or_ended_does_not_matter() -> None:
    waited = record(due_s=19, sent_ns=21 * S, first_ns=22 * S, end_ns=60 * S)
    before = record(due_s=9, sent_ns=11 * S, first_ns=12 * S, end_ns=15 * S)
    j = verdict([waited, before])
    assert (j.n, j.good, j.misses) == (1, 0, {"ttft": 1})


@pytest.mark.parametrize(("due_ns", "counts"), [(-1, 0), (0, 1), (5 * S, 1), (20 * S, 0)])
def test_of_a_leg_that_was_cut_the_warm_up_counts(due_ns: Any, counts: Any) -> None:
    cut = Window(leg="l", t0_ns=0, from_ns=10 * S, to_ns=20 * S, end_ns=25 * S, ending="cut")
    j = verdict([record(due_ns=due_ns)], window=cut)
    assert (j.n, j.cut) == (counts, True)
    assert not verdict([GOOD]).cut


def test_throughput_is_of_what_came_in_the_window() -> None:
    whole = record(due_s=12, gaps_us=[1000] * 9)
    late = record(due_s=19, ttft_s=0.5, took_s=9, gaps_us=[100_000] * 9)  # 1 of its 9 s inside
    outside = record(due_s=30)
    slow = record(due_s=12, ttft_s=3, took_s=4)
    failed = record(due_s=12, outcome=Outcome.DISCONNECTED)
    j = verdict([whole, late, outside, slow, failed])
    assert j.window_s == 10.0
    assert j.achieved_rps == pytest.approx((1 + 1 / 9 + 1) / 10)
    assert j.goodput_rps == pytest.approx(1 / 10)


def test_medians_are_of_the_sample() -> None:
    j = verdict([record(ttft_s=t, took_s=3 * t) for t in (1.0, 1.2, 1.9)] + [
        record(due_s=2, ttft_s=9, took_s=90)])
    assert j.ttft_p50_s == 1.2
    assert j.e2e_p50_s == pytest.approx(3.6)
    assert j.tpot_p50_s == pytest.approx(0.001)
    assert (of(0, 0).ttft_p50_s, of(0, 0).tpot_p50_s, of(0, 0).e2e_p50_s) == (None, None, None)


# ---------------------------------------------------------------------------------------- voids

STALLED = Window(leg="l", t0_ns=0, from_ns=10 * S, to_ns=20 * S, end_ns=25 * S, ending="done",
                 stalls=[(14 * S, 15 * S)])


@pytest.mark.parametrize(("due_s", "end_s", "void"), [
    (12, 14, 0), (12, 14.1, 1), (12, 18, 1), (14.2, 14.8, 1), (14, 15, 1), (14.9, 18, 1),
    (15, 18, 0), (10, 11, 0)])
def test_a_request_that_lived_through_a_stall_is_void(due_s: Any, end_s: Any, void: Any) -> None:
    j = verdict([record(due_s=due_s, took_s=end_s - due_s)], window=STALLED)
    assert (j.void, j.n) == (void, 1 - void)


def test_a_void_request_neither_helps_nor_hurts() -> None:
    through = record(due_s=13, took_s=9, outcome=Outcome.STALLED)
    clear = record(due_s=16)
    j = verdict([clear] * 59 + [through] * 100, window=STALLED)
    assert (j.load, j.n, j.good, j.void, j.errors, j.measurement) == (
        "SAFE", 59, 59, 100, 0, "SUSPECT")


def test_void_counts_only_what_was_due() -> None:
    assert verdict([record(due_s=8, took_s=9)], window=STALLED).void == 0


# -------------------------------------------------------------------------------------- classes


def test_a_class_that_is_surely_missed_blocks_safe() -> None:
    j = verdict([GOOD] * 600 + [record(ttft_s=5, took_s=6, cls="b")] * 10)
    assert j.lower >= 0.95
    assert (j.load, j.refuted_classes) == ("UNSAFE", ["b"])
    assert j.reasons == [
        "600 of 610 requests met the SLO, but of class b surely less than 95 %"]


def test_a_class_that_may_be_good_does_not() -> None:
    j = verdict([GOOD] * 600 + [record(ttft_s=5, took_s=6, cls="b")] + [record(cls="b")] * 5)
    assert (j.load, j.refuted_classes) == ("SAFE", [])


def test_a_class_without_requests_is_not_refuted() -> None:
    j = of(59, 59)
    assert (j.refuted_classes, j.classes["b"]) == ([], (0, 0))


# ------------------------------------------------------------------------------------- distress

DISTRESS = [
    # (signs, whether 100 good requests are unsafe)
    (ServerSigns(), False), (ServerSigns(died="exit code -9"), True),
    (ServerSigns(preemptions=0), False), (ServerSigns(preemptions=1), False),
    (ServerSigns(preemptions=1.5), True), (ServerSigns(kv_full_frac=0.0), False),
    (ServerSigns(kv_full_frac=0.05), False), (ServerSigns(kv_full_frac=0.051), True),
    (ServerSigns(kv_max=1.0, waiting_mean=90, prefix_hit_frac=0.0), False)]


@pytest.mark.parametrize(("signs", "unsafe"), DISTRESS)
def test_a_server_in_distress_is_unsafe_however_good_its_answers(signs: Any, unsafe: Any) -> None:
    j = of(100, 100, signs=signs)
    assert j.load == ("UNSAFE" if unsafe else "SAFE")
    assert len(j.reasons) == 1 + unsafe
    assert j.died == (signs.died is not None)


def test_distress_stands_first_among_the_reasons() -> None:
    j = of(0, 100, signs=ServerSigns(died="killed by signal 9", preemptions=50))
    assert j.reasons[0] == "the server died: killed by signal 9"
    assert j.reasons[1].startswith("50 preemptions for 100 requests")
    assert j.reasons[2].startswith("0 of 100 requests")


def test_preemptions_without_a_finished_request_are_distress() -> None:
    assert of(0, 0, signs=ServerSigns(preemptions=3)).load == "UNSAFE"


# ---------------------------------------------------------------------------------- measurement


def test_the_two_verdicts_stand_side_by_side() -> None:
    busy = Window(leg="l", t0_ns=0, from_ns=10 * S, to_ns=20 * S, end_ns=25 * S, ending="done",
                  cpu_frac=0.99)
    j = of(59, 59, window=busy)
    assert (j.load, j.measurement, [f.rule for f in j.findings]) == (
        "SAFE", "INVALID", ["generator-cpu"])


def test_a_late_simulator_makes_the_measurement_suspect() -> None:
    assert of(59, 59, signs=ServerSigns(late_step_frac=0.2)).measurement == "SUSPECT"


def test_rules_see_the_sample_only() -> None:
    dropped = record(due_s=5, outcome=Outcome.DROPPED)
    assert verdict([GOOD] * 59 + [dropped]).measurement == "VALID"


# ---------------------------------------------------------------------------- crowded starts


@pytest.mark.parametrize(("warmup_s", "slow", "load", "excused"), [
    (1.0, {"ttft_s": 2.1, "took_s": 4}, "UNRESOLVED", True),
    (4.0, {"ttft_s": 2.1, "took_s": 4}, "UNSAFE", False),
    (1.0, {"ttft_s": 1.0, "took_s": 4, "gaps_us": [60_000] * 9}, "UNSAFE", False)])
def test_first_tokens_that_a_crowded_start_made_late_refute_nothing(
        warmup_s: float, slow: dict[str, Any], load: str, excused: bool) -> None:
    """Answers take 4 s: in a warm-up of 1 s the slots start four times as fast as ever after."""
    one = structs.replace(leg("ladder"), warmup_s=warmup_s)
    j = judge(one, WINDOW, [record(**slow, seq=i) for i in range(200)], ServerSigns(), SCENARIO,
              Criteria())
    assert (j.load, j.excused, j.good) == (load, excused, 0)
    assert j.crowded == (warmup_s < 3)


def test_a_run_that_was_asked_for_is_judged_with_the_warm_up_that_was_asked_for() -> None:
    one = structs.replace(leg("run"), warmup_s=0.5)
    j = judge(one, WINDOW, [SLOW] * 200, ServerSigns(), SCENARIO, Criteria())
    assert (j.crowded, j.load) == (False, "UNSAFE")
