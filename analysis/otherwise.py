"""What other ways of measuring would have said of the same requests: from the send instead of the
due time, of survivors alone, by a closed loop that waits for each answer. Who waits while the
server stands still sends nothing, and sees one slow answer where users felt hundreds (coordinated
omission)."""

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from msgspec import Struct

from analysis.frame import Run
from analysis.steps import duration, number, percent
from loadgen import metrics
from loadgen.record import Outcome

HEADS = ("level", "measured", "n", "TTFT p50", "TTFT p90", "TTFT p99", "E2E mean", "met the SLO")


class Told(Struct, frozen=True):
    """One way of measuring at one level. Infinite: so many requests never had it. `met_frac`: of
    those that the way counts."""

    level: float
    way: str
    n: int
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    e2e_mean_s: float | None
    met_frac: float | None


def of(run: Run) -> list[Told]:
    """Of a run each load; of a search the safe level and the first unsafe one."""
    c = run.conclusion
    levels = sorted({leg.value for leg, _ in run.legs})
    if not run.is_run:
        wanted = {x for x in (c.safe, c.unsafe) if x is not None} or set(levels[:1])
        levels = [x for x in levels if x in wanted]
    return [told for level in levels for told in _of_level(run, level)]


def _of_level(run: Run, level: float) -> Iterator[Told]:
    f = run.sample(*(leg.id for leg, _ in run.legs if leg.value == level))
    if f.empty:
        return
    came = f[f["outcome"] == Outcome.OK.value]
    # None as inf: a quantile of all, of whom some never had it
    yield _told(level, "from the due time, every request (what users felt)",
                f["ttft_s"].fillna(np.inf), None, f["good"])
    since = came["end_s"] - came["sent_s"]
    yield _told(level, "from the send, complete answers only", came["ttft_service_s"], since,
                came["good"])
    k = in_flight(f)
    seen = f.iloc[waits_for_each(f, k)]
    seen = seen[seen["outcome"] == Outcome.OK.value]
    yield _told(level, f"by {k} that wait{'s' if k == 1 else ''} for each answer, from the send",
                seen["ttft_service_s"], seen["end_s"] - seen["sent_s"], seen["good"])


def _told(level: float, way: str, ttft_s: "pd.Series[float]", e2e_s: "pd.Series[float] | None",
          good: "pd.Series[bool]") -> Told:
    values = ttft_s.dropna().to_numpy(float)
    n = len(values)
    p50, p90, p99 = (found.value if n >= metrics.min_n(q) and (
        found := metrics.quantile(values, q)) else None for q in (0.5, 0.9, 0.99))
    return Told(level, way, len(good), p50, p90, p99,
                float(e2e_s.mean()) if e2e_s is not None and len(e2e_s) else None,
                float(good.mean()) if len(good) else None)


def in_flight(f: pd.DataFrame) -> int:
    """How many were in flight at a typical instant: the workers that a closed loop would have
    for this load."""
    due, ends = np.sort(f["due_s"].to_numpy()), np.sort(f["end_s"].to_numpy())
    there = np.arange(1, len(due) + 1) - np.searchsorted(ends, due, "right")
    return max(1, round(float(np.median(there))))


def waits_for_each(f: pd.DataFrame, workers: int) -> list[int]:
    """Positions of the requests that so many workers would have sent, each after its last answer:
    what is due while all of them wait is never sent, and so never measured."""
    due = f["due_s"].to_numpy()
    took = (f["end_s"] - f["sent_s"].fillna(f["due_s"])).to_numpy()
    free: list[float] = [-np.inf] * workers
    heapq.heapify(free)
    sent = []
    for i in np.argsort(due, kind="stable"):
        if free[0] <= due[i] + 1e-9:
            heapq.heapreplace(free, float(due[i] + took[i]))
            sent.append(int(i))
    return sent


def cells(rows: Sequence[Told]) -> Iterator[list[str]]:
    for r in rows:
        yield [f"{r.level:g}", r.way, number(r.n, ".0f"), _time(r.ttft_p50_s), _time(r.ttft_p90_s),
               _time(r.ttft_p99_s), _time(r.e2e_mean_s), percent(r.met_frac)]


def _time(value_s: float | None) -> str:
    return "never" if value_s is not None and np.isinf(value_s) else duration(value_s)
