"""What a Prometheus sees of a running test: counts and histograms of requests as they end, gauges
of the leg that runs. Pure but for the library's types: records and reports in, samples out.

Buckets of TTFT and E2E are vLLM's own, so that both sides of the wire lie over each other in one
graph; those of TPOT and gaps are finer below 10 ms, where vLLM has none.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

from loadgen import metrics
from loadgen.record import RequestRecord
from loadgen.scenario import Scenario

TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20,
          40, 80, 160, 640, 2560)
GAP_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
         0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
E2E_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
         7680)
LATE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5,
          10)

HISTOGRAMS = {  # name: buckets, what it is
    "ttft": (TTFT_S, "Time to first token, from when the request was due"),
    "ttft_service": (TTFT_S, "Time to first token, from the send"),
    "tpot": (GAP_S, "Mean time per output token after the first, per request"),
    "itl": (GAP_S, "Gaps between token events"),
    "e2e": (E2E_S, "Whole answers, from when the request was due"),
    "lateness": (LATE_S, "Sent after it was due: the generator's own fault"),
}
VALUES = {"ttft": metrics.ttft_s, "ttft_service": metrics.ttft_service_s, "tpot": metrics.tpot_s,
          "e2e": metrics.e2e_s, "lateness": metrics.lateness_s}


class Running(Struct, frozen=True, tag=True, omit_defaults=True):
    """The leg that runs, as its processes report it twice a second. Counts are of the leg so far;
    those of the sample without its warm-up."""

    leg: str
    phase: str
    axis: str
    level: float
    elapsed_s: float
    inflight: int
    done: int
    sampled: int
    good: int
    lag_s: float = 0.0
    cpu_frac: float | None = None


class Judged(Struct, frozen=True, tag=True):
    """A leg that is over."""

    leg: str
    phase: str
    level: float
    good: int
    n: int
    load: str
    measurement: str


class _Histogram:
    def __init__(self, bounds_s: Sequence[float]) -> None:
        self._bounds_us = np.array(bounds_s) * 1e6
        self._names = [floatToGoString(x)  # type: ignore[no-untyped-call]
                       for x in (*bounds_s, math.inf)]
        self._counts = np.zeros(len(self._names), np.int64)
        self._sum_us = 0.0

    def add(self, values_us: Any) -> None:
        values = np.asarray(values_us, np.float64)
        at = np.searchsorted(self._bounds_us, values)  # a bucket holds its upper bound
        self._counts += np.bincount(at, minlength=len(self._counts))
        self._sum_us += float(values.sum())

    def told(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulated, as the exposition wants it; and the sum, s."""
        many = np.cumsum(self._counts).tolist()
        return list(zip(self._names, many, strict=True)), self._sum_us / 1e6


class Board:
    """`facts`: of the run, for its info. All requests that end count, those of the warm-up too."""

    def __init__(self, scenario: Scenario, facts: dict[str, str], target_frac: float) -> None:
        self._slos = {c.name: scenario.slo_of(c.name) for c in scenario.classes}
        self._facts, self._target_frac = facts, target_frac
        names = list(self._slos)
        self._ended: Counter[tuple[str, str]] = Counter({(c, "OK"): 0 for c in names})
        self._good: Counter[str] = Counter(dict.fromkeys(names, 0))
        self._output: Counter[str] = Counter(dict.fromkeys(names, 0))
        self._prompt: Counter[str] = Counter(dict.fromkeys(names, 0))
        self._histograms = {(name, c): _Histogram(bounds) for name, (bounds, _) in
                            HISTOGRAMS.items() for c in names}
        self._running: Running | None = None
        self._judged: list[Judged] = []

    def add(self, records: Iterable[RequestRecord]) -> None:
        """Requests that have ended."""
        values: dict[tuple[str, str], list[float]] = {}
        for r in records:
            if r.cls not in self._slos:
                continue  # of a user's own task: it has no class of the scenario
            self._ended[r.cls, r.outcome.value] += 1
            self._good[r.cls] += not metrics.misses(r, self._slos[r.cls])
            self._output[r.cls] += r.output_tok or 0
            self._prompt[r.cls] += r.prompt_tok or 0
            for name, value_of in VALUES.items():
                if (value_s := value_of(r)) is not None:
                    values.setdefault((name, r.cls), []).append(value_s * 1e6)
            if r.gaps_us:
                values.setdefault(("itl", r.cls), []).extend(r.gaps_us)
        for key, own in values.items():
            self._histograms[key].add(own)

    def tell(self, news: Running | Judged) -> None:
        if isinstance(news, Running):
            self._running = news
        else:
            self._judged.append(news)
            self._running = None

    # ------------------------------------------------------------------------------ exposition

    def collect(self) -> Iterator[Metric]:
        """As a collector of prometheus-client."""
        yield InfoMetricFamily("loadgen_run", "The run", self._facts)
        requests = CounterMetricFamily("loadgen_requests", "Requests that have ended",
                                       labels=("class", "outcome"))
        for (cls, outcome), n in self._ended.items():
            requests.add_metric((cls, outcome), n)
        yield requests
        for name, says, by_class in (
                ("good_requests", "Requests that met every limit of their class", self._good),
                ("output_tokens", "Tokens of answers that have ended", self._output),
                ("prompt_tokens", "Tokens of prompts whose answers have ended", self._prompt)):
            counter = CounterMetricFamily(f"loadgen_{name}", says, labels=("class",))
            for cls, n in by_class.items():
                counter.add_metric((cls,), n)
            yield counter
        for name, (_, says) in HISTOGRAMS.items():
            family = HistogramMetricFamily(f"loadgen_{name}_seconds", says, labels=("class",))
            for cls in self._slos:
                buckets, sum_s = self._histograms[name, cls].told()
                family.add_metric((cls,), buckets, sum_s)
            yield family
        yield from self._gauges()

    def _gauges(self) -> Iterator[Metric]:
        now = self._running
        yield GaugeMetricFamily("loadgen_attainment_target_ratio", "Share of requests that must be "
                                "good", self._target_frac)
        yield GaugeMetricFamily("loadgen_requests_in_flight", "Requests in flight",
                                now.inflight if now else 0)
        if now is not None:
            yield from self._of(now)
        verdicts = GaugeMetricFamily(
            "loadgen_leg_verdict", "1: how a leg that is over was judged",
            labels=("leg", "phase", "level", "load", "measurement"))
        shares = GaugeMetricFamily("loadgen_leg_attainment_ratio", "Share of good requests of a "
                                   "leg that is over", labels=("leg", "phase", "level"))
        for j in self._judged:
            which = j.leg, j.phase, f"{j.level:g}"
            verdicts.add_metric((*which, j.load, j.measurement), 1)
            if j.n:
                shares.add_metric(which, j.good / j.n)
        yield verdicts
        yield shares

    def _of(self, now: Running) -> Iterator[Metric]:
        level = GaugeMetricFamily("loadgen_level", "The load that is held: requests in flight or "
                                  "per second, by axis", labels=("axis", "phase"))
        level.add_metric((now.axis, now.phase), now.level)
        yield level
        for name, says, value in (
                ("leg_elapsed_seconds", "Since the leg's clock began", now.elapsed_s),
                ("leg_sampled_requests", "Measured requests that have ended", now.sampled),
                ("generator_lag_seconds", "How late the worst generator process last came round "
                 "to anything", now.lag_s),
                ("generator_cpu_ratio", "Of a core, the busiest generator process, over the leg",
                 now.cpu_frac),
                ("attainment_ratio", "Share of the measured requests of the leg so far that met "
                 "every limit; answers are checked when it is over",
                 now.good / now.sampled if now.sampled else None)):
            if value is not None:
                yield GaugeMetricFamily(f"loadgen_{name}", says, value)
