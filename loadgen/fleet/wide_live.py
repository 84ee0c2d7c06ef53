"""What the web page shows while a fleet runs: as `live`, but of what workers count, since a master
that looked at every record of a large fleet could do nothing else."""

import time
from collections import deque
from collections.abc import Iterable

from loadgen.fleet.live import KEEP, TOTAL, Failures, Live, Now, Sample
from loadgen.fleet.master import FleetTest
from loadgen.fleet.run import RECENT_S
from loadgen.hosts import tallies
from loadgen.hosts.messages import Delta
from loadgen.record import Outcome

now_ns = time.monotonic_ns


class WideLive(Live):
    """Samples of the fleet's test that runs, or of the last one. Times are of requests that ended,
    and off by up to 2 %: see `tallies`."""

    def __init__(self) -> None:
        super().__init__()
        self.test: FleetTest | None = None
        self._recent: deque[tuple[int, Delta]] = deque()

    def begin_test(self, test: FleetTest) -> None:
        self.samples = deque(maxlen=KEEP)
        self.failures, self._recent = {}, deque()
        self.test, self.running, self._t0_ns = test, True, now_ns()
        self._rows = self._wide_rows(test, self._t0_ns)

    @property
    def shown(self) -> FleetTest | None:
        return self.test

    def stop(self) -> None:
        if self.running and self.test is not None:
            self.look(self.test)
        self.running = False

    def look(self, test: FleetTest) -> None:
        """To be called once a second."""
        now = now_ns()
        fresh = [d for m in test.members for d in _taken(m.deltas)]
        self._recent += [(now, d) for d in fresh]
        while self._recent and now - self._recent[0][0] > RECENT_S * 1e9:
            self._recent.popleft()
        for outcome, n, words in ((o, *x) for d in fresh for o, x in d.errors.items()):
            known = self.failures.setdefault(Outcome(outcome), Failures(outcome, 0, None))
            known.n += n
            known.last = words or known.last
        self._rows = self._wide_rows(test, now)
        row = self._rows[-1]
        errors = [(o, n) for _, d in self._recent for o, (n, _) in d.errors.items()]
        both = tallies.total(d for _, d in self._recent)
        self.samples.append(Sample(
            t_s=round((now - self._t0_ns) / 1e9, 2), users=row.inflight or 0,
            inflight=row.inflight or 0, tok_rate=row.tok_rate, good_rps=row.good_rps,
            attainment=row.good_frac,
            errors=sum(n for o, n in errors if o != Outcome.THROTTLED.value),
            throttled=sum(n for o, n in errors if o == Outcome.THROTTLED.value),
            ttft_p50_s=row.ttft_p50_s, ttft_p90_s=row.ttft_p90_s,
            tpot_p50_s=tallies.quantile_s(both.tpot, 0.5), itl_p90_s=row.itl_p90_s))

    def _wide_rows(self, test: FleetTest, now: int) -> list[Now]:
        recent = [d for _, d in self._recent]
        over_s = max(1.0, min(RECENT_S, (now - self._t0_ns) / 1e9))
        found = []
        for name in (*(c.name for c in test.prepared.scenario.classes), TOTAL):
            c = tallies.total(recent, None if name == TOTAL else name)
            found.append(Now(
                name=name, n=c.n,
                inflight=sum(f.inflight for f in test.frames) if name == TOTAL else None,
                ttft_p50_s=tallies.quantile_s(c.ttft, 0.5),
                ttft_p90_s=tallies.quantile_s(c.ttft, 0.9),
                itl_p90_s=tallies.quantile_s(c.itl, 0.9),
                tok_rate=round(c.output_tok / over_s, 1), good_rps=round(c.good / over_s, 3),
                good_frac=round(c.good / c.n, 4) if c.n else None))
        return found


def _taken(deltas: deque[Delta]) -> Iterable[Delta]:
    while deltas:
        yield deltas.popleft()
