"""What the web page shows while a test runs: per class, and once a second over time."""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import Struct

from loadgen import metrics
from loadgen.fleet.run import RECENT_S, FleetRun
from loadgen.record import RequestRecord

KEEP = 3600  # samples, one a second
TOTAL = "all"

now_ns = time.monotonic_ns


class Sample(Struct, frozen=True):
    """One instant of the test; quantiles are of the requests that ended in the last 30 s. Absent
    is None."""

    t_s: float  # since the test's start
    users: int
    inflight: int
    tok_rate: float  # output tokens per second, of the last second or so
    good_rps: float
    attainment: float | None
    errors: int  # of the last 30 s
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    tpot_p50_s: float | None
    itl_p90_s: float | None


class Now(Struct, frozen=True):
    """One row of the Streaming tab: a class, or all of them, over the last 30 s."""

    name: str
    inflight: int
    n: int  # requests that ended
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    itl_p90_s: float | None
    tok_rate: float
    good_rps: float
    good_frac: float | None


class Live:
    """The samples of the test that runs, or of the last one."""

    def __init__(self) -> None:
        self.samples: deque[Sample] = deque(maxlen=KEEP)
        self.run: FleetRun | None = None
        self.running = False

    def begin(self, run: FleetRun) -> None:
        self.samples.clear()
        self.run, self.running = run, True
        self._t0_ns = now_ns()
        self._before = self._t0_ns, 0

    def stop(self) -> None:
        self.running = False

    def sample(self, run: FleetRun, users: int) -> None:
        """To be called once a second."""
        now = now_ns()
        written = run.ended_tok + sum(r.n_events for _, r in run.flights.values())
        since_ns, before = self._before
        self._before = now, written
        row = self._row(run, TOTAL, list(run.recent), now)
        recent = self._recent(run.recent, now)
        self.samples.append(Sample(
            t_s=(now - self._t0_ns) / 1e9, users=users, inflight=row.inflight,
            tok_rate=max(0, written - before) / max(1e-9, (now - since_ns) / 1e9),
            good_rps=row.good_rps, attainment=row.good_frac,
            errors=sum(metrics.e2e_s(r) is None for r in recent), ttft_p50_s=row.ttft_p50_s,
            ttft_p90_s=row.ttft_p90_s, itl_p90_s=row.itl_p90_s,
            tpot_p50_s=_q((metrics.tpot_s(r) for r in recent), 0.5)))

    def rows(self) -> list[Now]:
        """One per class, then all together; [] when there was no test yet."""
        run = self.run
        if run is None:
            return []
        now, recent = now_ns(), list(run.recent)
        classes = [c.name for c in run.prepared.scenario.classes]
        return [*(self._row(run, c, [r for r in recent if r.cls == c], now) for c in classes),
                self._row(run, TOTAL, recent, now)]

    def _row(self, run: FleetRun, name: str, records: Sequence[RequestRecord], now: int) -> Now:
        recent = self._recent(records, now)
        over_s = max(1.0, min(RECENT_S, (now - self._t0_ns) / 1e9))
        good = sum(not metrics.misses(r, run.prepared.slo(r.cls)) for r in recent)
        from_ns = now - round(over_s * 1e9)
        tokens = sum((r.output_tok or 0) * metrics.share_inside(r, from_ns, now) for r in recent)
        flights = [r for _, r in run.flights.values() if name in (TOTAL, r.shot.cls)]
        tokens += sum(r.n_events * (over_s * 1e9 > now - r.shot.due_ns) for r in flights)
        return Now(
            name=name, inflight=len(flights), n=len(recent),
            ttft_p50_s=_q(map(metrics.ttft_s, recent), 0.5),
            ttft_p90_s=_q(map(metrics.ttft_s, recent), 0.9),
            itl_p90_s=_q((gap / 1e6 for r in recent for gap in r.gaps_us), 0.9),
            tok_rate=tokens / over_s, good_rps=good / over_s,
            good_frac=good / len(recent) if recent else None)

    @staticmethod
    def _recent(records: Iterable[RequestRecord], now: int) -> list[RequestRecord]:
        return [r for r in records if now - r.end_ns < RECENT_S * 1e9]


def _q(values: Iterable[float | None], q: float) -> float | None:
    """Absent values are left out; None where too few are left to have this quantile."""
    found = [v for v in values if v is not None]
    quantile = metrics.quantile(found, q) if found and len(found) >= 1 / (1 - q) else None
    return quantile.value if quantile else None


def plain(value: Any) -> Any:
    return None if value is None else round(float(value), 6)
