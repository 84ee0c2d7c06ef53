"""The only definitions of the numbers that are reported. Stamps in ns, durations in s.

Functions of stamps take scalars or numpy arrays alike; an absent stamp (None) gives None, in
arrays NaN.
"""

import math
from collections.abc import Callable, Iterable
from statistics import NormalDist
from typing import TypeVar

import numpy as np
from msgspec import Struct

from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Slo

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]
N = TypeVar("N", float, Floats)

TERMS = {
    "due": "open loop: the planned instant; closed loop: the instant the slot became free",
    "lateness": "sent − due: the generator's own fault, never the server's, but for a wait for a "
                "connection, which is told apart",
    "TTFT": "first − due; first = first token event, also one whose text is empty",
    "TPOT": "(last − first) / (output tokens − 1), per request of at least 2 tokens",
    "ITL": "gaps between token events, pooled; where an event holds several tokens, an event gap",
    "E2E": "end − due, end = the stream's proper end",
    "goodput": "requests per second that met every SLO of their class, were complete and, where "
               "the class has a validator that counts, valid; failed, "
               "truncated, stalled, dropped, cancelled and censored ones are misses",
    "offered": "starts per second that were due in the window",
    "achieved": "complete answers per second; one under way at an edge of the window counts by the "
                "share of its time inside",
    "attainment": "share of good requests among all that were due in the window",
}


def seconds_between(start_ns: N, end_ns: N) -> N:
    return (end_ns - start_ns) / 1e9


def lateness_s(r: RequestRecord) -> float | None:
    return None if r.sent_ns is None else seconds_between(r.due_ns, r.sent_ns)


def ttft_s(r: RequestRecord) -> float | None:
    """From the instant the request was due: queueing in the client counts."""
    return None if r.first_ns is None else seconds_between(r.due_ns, r.first_ns)


def ttft_service_s(r: RequestRecord) -> float | None:
    """From the instant the request was sent: what tools report that measure from the send."""
    if r.first_ns is None or r.sent_ns is None:
        return None
    return seconds_between(r.sent_ns, r.first_ns)


def tpot_s(r: RequestRecord) -> float | None:
    """Mean time per output token after the first. None below 2 tokens."""
    if r.first_ns is None or r.output_tok is None or r.output_tok < 2 or r.n_events < 2:
        return None
    return r.stream_us / 1e6 / (r.output_tok - 1)


def itl_max_s(r: RequestRecord) -> float | None:
    """The longest silence between two token events."""
    return None if r.gap_max_us is None else r.gap_max_us / 1e6


def e2e_s(r: RequestRecord) -> float | None:
    """None where the answer never became complete."""
    return seconds_between(r.due_ns, r.end_ns) if r.outcome is Outcome.OK else None


def share_inside(r: RequestRecord, from_ns: int, to_ns: int) -> float:
    """Which share of an answer's time lies in from_ns ≤ t < to_ns: what it adds to the window's
    throughput. Counting only whole answers would make 7 s of a level with answers of 4 s read
    0.14 or 0.28 per second, by luck. An answer that we cancelled is taken to go on as it went:
    its tokens so far against all that it was asked for; other failures bring no throughput."""
    if r.first_ns is None or r.outcome not in (Outcome.OK, Outcome.CANCELLED):
        return 0.0
    whole_ns = float(r.end_ns - r.due_ns)
    if r.outcome is Outcome.CANCELLED:
        written = r.n_events / max(r.max_tokens or 0, r.n_events)
        whole_ns = r.first_ns - r.due_ns + (r.end_ns - r.first_ns) / written
    inside_ns = max(0, min(r.end_ns, to_ns) - max(r.due_ns, from_ns))
    return inside_ns / whole_ns if whole_ns > 0 else 0.0


def age_s(r: RequestRecord) -> float | None:
    """How long a request that we cancelled had been under way; None for any other."""
    return seconds_between(r.due_ns, r.end_ns) if r.outcome is Outcome.CANCELLED else None


def misses(r: RequestRecord, slo: Slo) -> list[str]:
    """Why a request is not good: its outcome, the limits that it broke, or "answer": its check
    failed. Empty: it is good.

    An ABANDONED request is judged on what it saw: one that left before its first token missed
    only if the TTFT limit had passed.
    """
    if r.outcome not in (Outcome.OK, Outcome.ABANDONED):
        return [r.outcome.value]
    seen = ttft_s(r)
    if seen is None:
        seen = seconds_between(r.due_ns, r.end_ns)
    broke = ["answer"] if r.wrong is not None else []
    for name, limit, value in (("ttft", slo.ttft_s, seen), ("tpot", slo.tpot_s, tpot_s(r)),
                               ("itl", slo.itl_s, itl_max_s(r)), ("e2e", slo.e2e_s, e2e_s(r))):
        if limit is not None and value is not None and value > limit:
            broke.append(name)
    return broke


def strain(r: RequestRecord, slo: Slo) -> float | None:
    """How near a request came to the limits: the largest of value over limit; over 1 it missed.
    Infinite if it failed; None where no limit was measured, or we cancelled it."""
    if r.outcome is Outcome.CANCELLED:
        return None
    if r.outcome not in (Outcome.OK, Outcome.ABANDONED):
        return math.inf
    parts = [value / limit for limit, value in (
        (slo.ttft_s, ttft_s(r)), (slo.tpot_s, tpot_s(r)), (slo.itl_s, itl_max_s(r)),
        (slo.e2e_s, e2e_s(r))) if limit and value is not None]
    return max(parts, default=None)


def is_lost(r: RequestRecord, slo: Slo) -> bool:
    """What came so far of a request that is still under way misses already, however it goes on.
    `end_ns` is now. TPOT: with all tokens that it may write it could not come back under."""
    now_ns, first_ns, last_ns = r.end_ns, r.first_ns, r.last_ns
    seen = [(slo.e2e_s, r.due_ns, 1), (slo.ttft_s, r.due_ns if first_ns is None else None, 1),
            (slo.itl_s, last_ns, 1), (slo.tpot_s, first_ns, (r.max_tokens or 0) - 1)]
    if first_ns is not None and slo.ttft_s and seconds_between(r.due_ns, first_ns) > slo.ttft_s:
        return True
    if slo.itl_s and (itl_max_s(r) or 0.0) > slo.itl_s:
        return True
    return any(limit is not None and since is not None and steps > 0
               and seconds_between(since, now_ns) > limit * steps for limit, since, steps in seen)


# -------------------------------------------------------------------------------------- quantiles


class Quantile(Struct, frozen=True):
    """The q-quantile of a sample of n: an order statistic, with its two-sided 95 % interval of
    order statistics; lo and hi are None where n is too small to have one."""

    q: float
    n: int
    value: float
    lo: float | None
    hi: float | None


def quantile(values: Iterable[float], q: float,
             censored: Iterable[float] = ()) -> Quantile | None:
    """None for an empty sample. Source of the interval: ranks of the binomial distribution
    (David & Nagaraja, Order Statistics, 7.1); it supposes independent values.

    `censored`: values that are only known to be larger than these (answers that we cancelled,
    at the age they had). Leaving them out would be an average of survivors; the quantile is then
    Kaplan and Meier's (1958), without an interval, and None where it was not reached.
    """
    x = np.sort(np.fromiter(values, float))
    left = np.fromiter(censored, float)
    n = len(x)
    if len(left):
        return _km_quantile(x, left, q)
    if n == 0:
        return None
    value = float(x[min(n - 1, math.ceil(q * n) - 1)])
    if n < min_n(q):
        return Quantile(q, n, value, None, None)
    below = np.cumsum(_binomial_pmf(n, q))  # below[k] = P(at most k values under the quantile)
    lo = int(np.searchsorted(below, 0.025, side="right")) - 1
    hi = int(np.searchsorted(below, 0.975, side="left"))
    return Quantile(q, n, value, float(x[max(lo, 0)]), float(x[min(hi, n - 1)]))


def _km_quantile(x: Floats, left: Floats, q: float) -> Quantile | None:
    """Smallest value at which the product-limit estimate of survival is at most 1 − q."""
    at_risk = len(x) - np.arange(len(x)) + (left[:, None] >= x[None, :]).sum(axis=0)
    survival = np.cumprod(1 - 1 / np.maximum(at_risk, 1))
    reached = np.nonzero(survival <= 1 - q + 1e-12)[0]
    if not len(reached):
        return None
    return Quantile(q, len(x) + len(left), float(x[reached[0]]), None, None)


def min_n(q: float) -> int:
    """Smallest sample whose q-quantile has a finite two-sided 95 % interval: 6 for the median,
    36 for p90, 72 for p95, 368 for p99. Below it a tail percentile is not printed."""
    return math.ceil(math.log(0.025) / math.log(max(q, 1 - q)))


def _binomial_pmf(n: int, p: float) -> Floats:
    """P(K = 0 … n), through logarithms so that it holds for n in the millions."""
    k = np.arange(n + 1)
    log_fact = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log = log_fact[n] - log_fact - log_fact[::-1] + k * math.log(p) + (n - k) * math.log1p(-p)
    pmf: Floats = np.exp(log)
    return pmf


# ------------------------------------------------------------------------------- bounds of shares


def lower_bound(k: float, n: float, confidence: float = 0.95) -> float:
    """One-sided lower Clopper-Pearson bound of a share of which k of n were seen; 0 for n = 0.
    Counts need not be whole: a clumped sample is worth fewer requests than it has."""
    if k <= 0 or n <= 0:
        return 0.0
    # the smallest p under which seeing k or more has probability 1 − confidence
    return _solve(lambda p: beta_cdf(p, k, n - k + 1) - (1 - confidence))


def upper_bound(k: float, n: float, confidence: float = 0.95) -> float:
    """One-sided upper Clopper-Pearson bound; 1 for n = 0."""
    return 1 - lower_bound(n - k, n, confidence) if n > 0 else 1.0


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (Lentz's
    method; DLMF 8.17.22)."""
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x)
                     + b * math.log1p(-x)) / a
    c, d = 1.0, 1 / _not_zero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 10_000):
        for term in (m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
                     -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))):
            d = 1 / _not_zero(1 + term * d)
            c = _not_zero(1 + term / c)
            value *= c * d
        if abs(c * d - 1) < 1e-13:
            break
    return front * value


def _not_zero(x: float) -> float:
    return x if abs(x) > 1e-300 else 1e-300


def _solve(rising: Callable[[float], float]) -> float:
    """Root in [0, 1] of a rising function, to 1e-9."""
    lo, hi = 0.0, 1.0
    while hi - lo > 1e-9:
        mid = (lo + hi) / 2
        lo, hi = (mid, hi) if rising(mid) < 0 else (lo, mid)
    return lo


def needed_n(target: float, miss_frac: float, confidence: float = 0.95) -> int | None:
    """How many requests it takes to show attainment ≥ target if a share `miss_frac` misses; to
    2 %, beyond some thousands by the normal approximation. None if the target is missed."""
    share = 1 - miss_frac
    if share <= target:
        return None
    least = math.ceil(math.log(1 - confidence) / math.log(target))
    z = NormalDist().inv_cdf(confidence)
    about = math.ceil(z**2 * share * miss_frac / (share - target) ** 2)
    n = max(least, about // 2)
    while n < 5000:
        if lower_bound(n - math.ceil(miss_frac * n), n, confidence) >= target:
            return n
        n += max(1, n // 50)
    return max(n, about)
