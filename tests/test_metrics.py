"""The definitions, by hand-computed tables; quantiles and bounds, against known ones."""

import itertools
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from scipy import stats

from loadgen import metrics
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Seconds, Slo

S = 1_000_000_000


def record(outcome: Outcome = Outcome.OK, **fields: Any) -> RequestRecord:
    """Due at 10 s, sent at 10.25 s, tokens at 11, 11.1, 11.4, 11.5 s, ended at 12 s."""
    base: dict[str, Any] = {
        "leg": "l", "shard": 0, "seq": 0, "session": 0, "turn": 0, "cls": "a", "due_ns": 10 * S,
        "sent_ns": 10 * S + S // 4, "headers_ns": 10 * S + S // 2, "first_ns": 11 * S,
        "gaps_us": [100_000, 300_000, 100_000], "end_ns": 12 * S, "outcome": outcome,
        "output_tok": 6}
    return RequestRecord(**(base | fields))


NO_TOKEN: dict[str, Any] = {"first_ns": None, "gaps_us": [], "output_tok": None}
UNSENT: dict[str, Any] = {"sent_ns": None, "headers_ns": None, **NO_TOKEN}


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails a body that takes longer, without waiting for its end."""
    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------- definitions

TABLE = {
    # record: lateness, ttft, ttft_service, tpot, itl_max, e2e
    "whole": (record(), 0.25, 1.0, 0.75, 0.1, 0.3, 2.0),
    "one token per event": (record(output_tok=4), 0.25, 1.0, 0.75, 0.5 / 3, 0.3, 2.0),
    "one token": (record(output_tok=1, gaps_us=[]), 0.25, 1.0, 0.75, None, None, 2.0),
    "one event of many tokens": (record(gaps_us=[]), 0.25, 1.0, 0.75, None, None, 2.0),
    "two tokens": (record(output_tok=2, gaps_us=[40_000]), 0.25, 1.0, 0.75, 0.04, 0.04, 2.0),
    "tokens not counted": (record(output_tok=None), 0.25, 1.0, 0.75, None, 0.3, 2.0),
    "on time": (record(sent_ns=10 * S), 0.0, 1.0, 1.0, 0.1, 0.3, 2.0),
    "never sent": (record(Outcome.DROPPED, **UNSENT), None, None, None, None, None, None),
    "no token": (record(Outcome.TIMEOUT_FIRST_TOKEN, **NO_TOKEN), 0.25, None, None, None, None,
                 None),
    "broken off": (record(Outcome.DISCONNECTED), 0.25, 1.0, 0.75, 0.1, 0.3, None),
    "abandoned": (record(Outcome.ABANDONED), 0.25, 1.0, 0.75, 0.1, 0.3, None),
}


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_each_definition_gives_what_a_hand_computes(row: Any) -> None:
    r, *said = row
    assert [metrics.lateness_s(r), metrics.ttft_s(r), metrics.ttft_service_s(r),
            metrics.tpot_s(r), metrics.itl_max_s(r), metrics.e2e_s(r)] == [
        x if x is None else pytest.approx(x, abs=1e-12) for x in said]


def test_late_start_counts_into_ttft() -> None:
    late, prompt = record(sent_ns=10 * S + 900_000_000), record(sent_ns=10 * S)
    assert metrics.ttft_s(late) == metrics.ttft_s(prompt) == 1.0
    assert metrics.ttft_service_s(late) == pytest.approx(0.1)


@pytest.mark.parametrize("outcome", [o for o in Outcome if o is not Outcome.OK])
def test_only_a_complete_answer_has_an_e2e(outcome: Any) -> None:
    assert metrics.e2e_s(record(outcome)) is None


def test_arrays_are_treated_as_scalars_are() -> None:
    gone = metrics.seconds_between(np.array([0.0, np.nan]), np.array([5e8, 1.0]))
    assert gone[0] == 0.5
    assert np.isnan(gone[1])


def test_every_term_has_its_words() -> None:
    assert {"due", "lateness", "TTFT", "TPOT", "ITL", "E2E", "goodput"} <= set(metrics.TERMS)


# ----------------------------------------------------------------------------------- throughput

# due at 10 s, ended at 12 s
INSIDE = [
    (10.0, 12.0, 1.0), (9.0, 30.0, 1.0), (11.0, 11.5, 0.25), (11.0, 12.0, 0.5), (0.0, 11.0, 0.5),
    (0.0, 10.0, 0.0), (12.0, 13.0, 0.0)]


@pytest.mark.parametrize(("begin", "end", "share"), INSIDE)
def test_an_answer_counts_by_the_share_of_its_time_in_the_window(
        begin: Any, end: Any, share: Any) -> None:
    assert metrics.share_inside(record(), round(begin * S), round(end * S)) == share


def test_windows_side_by_side_share_out_an_answer() -> None:
    edges = [10 * S, 11 * S, 11 * S + 100_000_000, 11 * S + 250_000_000, 12 * S]
    shares = [metrics.share_inside(record(), a, b) for a, b in itertools.pairwise(edges)]
    assert sum(shares) == pytest.approx(1.0)


def test_a_cancelled_answer_counts_as_if_it_had_gone_on_as_it_went() -> None:
    """4 of 40 tokens in the second after the first: 1 s + 10 s in all, of which 2 s were."""
    cancelled = record(Outcome.CANCELLED, max_tokens=40)
    assert metrics.share_inside(cancelled, 0, 20 * S) == pytest.approx(2 / 11)
    assert metrics.share_inside(record(Outcome.CANCELLED), 0, 20 * S) == 1.0
    assert metrics.share_inside(record(Outcome.CANCELLED, **NO_TOKEN), 0, 20 * S) == 0.0


@pytest.mark.parametrize("outcome", [o for o in Outcome
                                     if o not in (Outcome.OK, Outcome.CANCELLED)])
def test_other_failures_bring_no_throughput(outcome: Any) -> None:
    assert metrics.share_inside(record(outcome), 0, 20 * S) == 0.0


# --------------------------------------------------------------------------------------- misses


def slo(**limits: float) -> Slo:
    return Slo(**{f"{k}_s": Seconds(v) for k, v in limits.items()})


@pytest.mark.parametrize(("limits", "broke"), [
    ({}, []), ({"ttft": 1.0}, []), ({"ttft": 0.999}, ["ttft"]), ({"tpot": 0.1}, []),
    ({"tpot": 0.0999}, ["tpot"]), ({"itl": 0.3}, []), ({"itl": 0.299}, ["itl"]),
    ({"e2e": 2.0}, []), ({"e2e": 1.999}, ["e2e"]),
    ({"ttft": 0.5, "tpot": 0.05, "itl": 0.05, "e2e": 0.5}, ["ttft", "tpot", "itl", "e2e"])])
def test_a_request_misses_by_the_limits_it_broke(limits: Any, broke: Any) -> None:
    assert metrics.misses(record(), slo(**limits)) == broke


def test_ttft_is_limited_from_the_instant_the_request_was_due() -> None:
    assert metrics.misses(record(sent_ns=10 * S + 950_000_000), slo(ttft=0.9)) == ["ttft"]


def test_a_limit_on_what_an_answer_does_not_have_is_not_broken() -> None:
    assert metrics.misses(record(output_tok=1, gaps_us=[]), slo(tpot=0.001, itl=0.001)) == []


@pytest.mark.parametrize("outcome", [o for o in Outcome
                                     if o not in (Outcome.OK, Outcome.ABANDONED)])
def test_a_request_that_failed_misses_whatever_its_latencies(outcome: Any) -> None:
    assert metrics.misses(record(outcome), slo()) == [outcome.value]
    assert metrics.misses(record(outcome), slo(ttft=0.1)) == [outcome.value]


@pytest.mark.parametrize(("left_s", "broke"), [(1.0, []), (2.0, []), (2.5, ["ttft"])])
def test_who_left_before_the_first_token_missed_only_if_the_limit_had_passed(
        left_s: Any, broke: Any) -> None:
    r = record(Outcome.ABANDONED, end_ns=10 * S + round(left_s * S), **NO_TOKEN)
    assert metrics.misses(r, slo(ttft=2.0)) == broke


def test_who_left_later_is_judged_on_what_was_seen() -> None:
    r = record(Outcome.ABANDONED)
    assert metrics.misses(r, slo(ttft=1.0, tpot=0.1, e2e=0.001)) == []
    assert metrics.misses(r, slo(ttft=0.9, tpot=0.09)) == ["ttft", "tpot"]


# ------------------------------------------------------------------------------------ quantiles


@pytest.mark.parametrize(("q", "n"), [(0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368), (0.1, 36)])
def test_smallest_sample_with_an_interval(q: Any, n: Any) -> None:
    assert metrics.min_n(q) == n
    assert max(q, 1 - q) ** n <= 0.025 < max(q, 1 - q) ** (n - 1)
    below, at = metrics.quantile(range(n - 1), q), metrics.quantile(range(n), q)
    assert below is not None
    assert at is not None
    assert (below.lo, below.hi, below.n) == (None, None, n - 1)
    assert at.lo is not None
    assert at.hi is not None


@pytest.mark.parametrize(("n", "q", "rank"), [
    (1, 0.5, 1), (1, 0.99, 1), (2, 0.5, 1), (3, 0.5, 2), (4, 0.5, 2), (5, 0.5, 3), (10, 0.9, 9),
    (11, 0.9, 10), (20, 0.95, 19), (100, 0.99, 99), (101, 0.99, 100), (100, 0.9, 90), (7, 0.25, 2)])
def test_a_quantile_is_the_smallest_value_that_so_many_do_not_exceed(
        n: Any, q: Any, rank: Any) -> None:
    values = np.random.default_rng(1).permutation(n) + 1.0
    found = metrics.quantile(values, q)
    assert found is not None
    assert (found.value, found.n, found.q) == (rank, n, q)


def test_an_empty_sample_has_no_quantile() -> None:
    assert metrics.quantile([], 0.5) is None


@pytest.mark.parametrize(("n", "q", "lo", "hi"), [
    # ranks of nonparametric 95 % intervals (David & Nagaraja; Conover, table A3)
    (6, 0.5, 1, 6), (10, 0.5, 2, 9), (20, 0.5, 6, 15), (100, 0.5, 40, 61)])
def test_interval_of_the_median_has_the_ranks_of_the_books(
        n: Any, q: Any, lo: Any, hi: Any) -> None:
    found = metrics.quantile(np.arange(1, n + 1), q)
    assert found is not None
    assert (found.lo, found.hi) == (lo, hi)


@pytest.mark.parametrize(("n", "q"), [
    (6, 0.5), (47, 0.5), (400, 0.5), (36, 0.9), (90, 0.9), (400, 0.9), (368, 0.99), (1000, 0.99)])
def test_the_interval_holds_the_true_quantile_in_95_of_100_samples(n: Any, q: Any) -> None:
    rng, runs = np.random.default_rng(20251121), 2000
    held = 0
    for sample in rng.exponential(size=(runs, n)):
        found = metrics.quantile(sample, q)
        assert found is not None
        assert found.lo is not None
        assert found.hi is not None
        held += found.lo <= -math.log(1 - q) <= found.hi
    assert 0.94 <= held / runs <= 0.99


def test_quantiles_hold_for_a_million_values() -> None:
    with within(5):
        found = metrics.quantile(np.arange(1_000_000), 0.99)
    assert found is not None
    assert found.lo is not None
    assert found.hi is not None
    assert found.value == 989_999
    sd = math.sqrt(1e6 * 0.99 * 0.01)
    assert found.lo == pytest.approx(990_000 - 1.96 * sd, abs=3)
    assert found.hi == pytest.approx(990_000 + 1.96 * sd, abs=3)


# --------------------------------------------------------------------------------------- bounds

GRID = [(k, n) for n in (1, 2, 5, 20, 59, 300, 4000)
        for k in sorted({0, 1, n // 2, round(0.95 * n), n - 1, n}) if k <= n]


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
@pytest.mark.parametrize(("k", "n"), GRID)
def test_bounds_are_clopper_and_pearson_s(k: Any, n: Any, confidence: Any) -> None:
    low = stats.beta.ppf(1 - confidence, k, n - k + 1) if k else 0.0
    high = stats.beta.ppf(confidence, k + 1, n - k) if k < n else 1.0
    assert metrics.lower_bound(k, n, confidence) == pytest.approx(low, abs=2e-8)
    assert metrics.upper_bound(k, n, confidence) == pytest.approx(high, abs=2e-8)


def test_nothing_seen_bounds_nothing() -> None:
    assert (metrics.lower_bound(0, 0), metrics.upper_bound(0, 0)) == (0.0, 1.0)


def test_bounds_of_100_000_requests_take_no_time() -> None:
    with within(3):
        assert metrics.lower_bound(95_300, 100_000) == pytest.approx(
            stats.beta.ppf(0.05, 95_300, 4701), abs=1e-7)


@pytest.mark.parametrize(("miss", "n"), [(0.0, 59), (0.01, 93)])
def test_needed_n_of_few_requests_is_the_smallest(miss: Any, n: Any) -> None:
    assert metrics.needed_n(0.95, miss) == n
    assert metrics.lower_bound(n - round(miss * n), n) >= 0.95
    assert metrics.lower_bound(n - 1 - round(miss * (n - 1)), n - 1) < 0.95


@pytest.mark.parametrize("miss", [0.02, 0.03, 0.04])
def test_needed_n_is_enough_and_hardly_more(miss: Any) -> None:
    def shows(n: int) -> bool:
        missed = math.ceil(miss * n)
        return float(stats.beta.ppf(0.05, n - missed, missed + 1)) >= 0.95
    n = metrics.needed_n(0.95, miss)
    assert n is not None
    assert shows(n)
    assert not any(shows(fewer) for fewer in range(1, int(n / 1.1)))


def test_needed_n_goes_by_confidence_and_target() -> None:
    assert metrics.needed_n(0.95, 0.0, 0.99) == 90
    assert metrics.needed_n(0.9, 0.0) == 29


def test_what_can_hardly_be_shown_takes_very_many() -> None:
    with within(5):
        assert (metrics.needed_n(0.95, 0.049) or 0) > 20_000


@pytest.mark.parametrize("miss", [0.05, 0.0501, 0.1, 1.0])
def test_what_cannot_be_shown_is_told_soon(miss: Any) -> None:
    with within(5):
        assert metrics.needed_n(0.95, miss) is None
