"""What the web page shows while a test runs: per class, and once a second over time.

It is computed once a second, in the loop that stamps answers: each record is looked at once, and
of the gaps at most some thousands are sorted, however many there are.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import gevent
from msgspec import Struct

from loadgen import metrics
from loadgen.fleet.run import RECENT_S, FleetRun
from loadgen.record import Outcome, RequestRecord

if TYPE_CHECKING:
    from loadgen.fleet.master import FleetTest

KEEP = 3600  # samples, one a second
GAPS = 4000  # of all gaps so many stand for them
TOTAL = "all"
NO_ERROR = (Outcome.OK, Outcome.ABANDONED, Outcome.CANCELLED, Outcome.THROTTLED)

now_ns = time.monotonic_ns


class Sample(Struct, frozen=True, array_like=True):
    """One instant of the test; all but the first four are of the requests that ended in the last
    30 s, without those that Locust cut off. Absent is None."""

    t_s: float  # since the test's start
    users: int
    inflight: int
    tok_rate: float  # output tokens per second, of the last second or so
    good_rps: float
    attainment: float | None
    errors: int
    throttled: int
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    tpot_p50_s: float | None
    itl_p90_s: float | None


class Now(Struct, frozen=True):
    """One row of the Streaming tab: a class, or all of them, over the last 30 s."""

    name: str
    inflight: int | None  # None: nobody counts it by class
    n: int  # requests that ended
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    itl_p90_s: float | None
    tok_rate: float
    good_rps: float
    good_frac: float | None


class Failures(Struct):
    """All of one outcome since the test's start; the server's words are of the last."""

    outcome: str
    n: int
    last: str | None


class _Seen(Struct, frozen=True):
    """What is needed of a record again and again."""

    record: RequestRecord
    good: bool
    ttft_s: float | None
    tpot_s: float | None


class Live:
    """The samples of the test that runs, or of the last one."""

    def __init__(self) -> None:
        self.samples: deque[Sample] = deque(maxlen=KEEP)
        self.run: FleetRun | None = None
        self.running = False
        self.failures: dict[Outcome, Failures] = {}
        self._seen: deque[_Seen] = deque()
        self._newest: RequestRecord | None = None
        self._rows: list[Now] = []

    @property
    def shown(self) -> "FleetRun | FleetTest | None":
        """The test that the samples are of."""
        return self.run

    def begin(self, run: FleetRun) -> None:
        self.samples.clear()
        self._seen.clear()
        self.failures = {}
        self.run, self.running = run, True
        self._t0_ns = now_ns()
        self._before = self._t0_ns, 0
        self._rows = self._all_rows(run, self._t0_ns)

    def stop(self) -> None:
        """Once no user is left: rows and samples stay as they are then."""
        if self.running and self.run is not None:
            self.sample(self.run, 0)
        self.running = False

    def sample(self, run: FleetRun, users: int) -> None:
        """To be called once a second."""
        self._take(run)
        now = now_ns()
        while self._seen and now - self._seen[0].record.end_ns > RECENT_S * 1e9:
            self._seen.popleft()
        self._rows = self._all_rows(run, now)
        row, outcomes = self._rows[-1], [s.record.outcome for s in self._seen]
        self.samples.append(Sample(
            t_s=round((now - self._t0_ns) / 1e9, 2), users=users, inflight=row.inflight or 0,
            tok_rate=self._tok_rate(run, now), good_rps=row.good_rps, attainment=row.good_frac,
            errors=sum(o not in NO_ERROR for o in outcomes),
            throttled=outcomes.count(Outcome.THROTTLED), ttft_p50_s=row.ttft_p50_s,
            ttft_p90_s=row.ttft_p90_s, itl_p90_s=row.itl_p90_s,
            tpot_p50_s=_q((s.tpot_s for s in self._seen), 0.5)))

    def rows(self) -> list[Now]:
        """One per class, then all together, at most a second old; after a stop, as they were
        then. [] when there was no test yet."""
        return self._rows

    def _take(self, run: FleetRun) -> None:
        """Looks at the records that came since."""
        fresh = itertools.takewhile(lambda r: r is not self._newest, reversed(run.recent))
        for r in reversed(list(fresh)):
            self._newest = r
            good = not metrics.misses(r, run.prepared.slo(r.cls))
            self._seen.append(_Seen(r, good, metrics.ttft_s(r), metrics.tpot_s(r)))
            if r.outcome not in NO_ERROR or r.outcome is Outcome.THROTTLED:
                failures = self.failures.setdefault(r.outcome, Failures(r.outcome.value, 0, None))
                failures.n += 1
                failures.last = r.error or failures.last

    def _tok_rate(self, run: FleetRun, now: int) -> float:
        written = run.ended_tok + sum(r.n_events for _, r in run.flights.values())
        (since_ns, before), self._before = self._before, (now, written)
        return round(max(0, written - before) / max(0.1, (now - since_ns) / 1e9), 1)

    def _all_rows(self, run: FleetRun, now: int) -> list[Now]:
        rows = []
        for name in (*(c.name for c in run.prepared.scenario.classes), TOTAL):
            rows.append(self._row(run, name, [
                s for s in self._seen if name in (TOTAL, s.record.cls)], now))
            gevent.sleep(0)  # an answer may be waiting to be stamped
        return rows

    def _row(self, run: FleetRun, name: str, seen: Sequence[_Seen], now: int) -> Now:
        over_s = max(1.0, min(RECENT_S, (now - self._t0_ns) / 1e9))
        from_ns = now - round(over_s * 1e9)
        tokens = sum((s.record.output_tok or 0) * (s.record.due_ns >= from_ns or
                     metrics.share_inside(s.record, from_ns, now)) for s in seen)
        flights = [r for _, r in run.flights.values() if name in (TOTAL, r.shot.cls)]
        tokens += sum(r.n_events for r in flights if r.shot.due_ns >= from_ns)
        ended = [s for s in seen if s.record.outcome is not Outcome.CANCELLED]
        good = sum(s.good for s in ended)
        return Now(
            name=name, inflight=len(flights), n=len(ended),
            ttft_p50_s=_q((s.ttft_s for s in ended), 0.5),
            ttft_p90_s=_q((s.ttft_s for s in ended), 0.9),
            itl_p90_s=_q(_gaps_s([s.record for s in ended]), 0.9),
            tok_rate=round(tokens / over_s, 1), good_rps=round(good / over_s, 3),
            good_frac=round(good / len(ended), 4) if ended else None)


def _gaps_s(records: Sequence[RequestRecord]) -> list[float]:
    """Gaps of all records alike, thinned out evenly where there are many."""
    every = max(1, sum(len(r.gaps_us) for r in records) // GAPS)
    return [gap / 1e6 for i, r in enumerate(records) for gap in r.gaps_us[i % every::every]]


def _q(values: Iterable[float | None], q: float) -> float | None:
    """Absent values are left out; None where too few are left to have this quantile."""
    found = [v for v in values if v is not None]
    quantile = metrics.quantile(found, q) if found and len(found) >= 1 / (1 - q) else None
    return round(quantile.value, 5) if quantile else None
