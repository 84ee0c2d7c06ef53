"""What a run has of a figure at a level, and how far that of another run may be from it.

The legs of a level are cut into blocks of time as long as an answer takes (at least 8), whole
blocks are drawn anew with replacement in both runs (a block bootstrap: requests that were in a
batch together are not independent), and the spread of what comes out is widened by Student's t for
that many blocks.

Two runs of one server differ by more than their blocks show: it starts anew, its clocks and its
neighbours are others. Two runs cannot show by how much, so it is assumed (`differs`), and legs of
one run do not average it away, as they share its start. Where a run holds several legs of a level
that differ by more than their blocks say, what they show counts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist

import numpy as np
import pandas as pd
from msgspec import Struct

from analysis.frame import Floats, Run
from loadgen import metrics, sequential
from loadgen.record import Outcome
from loadgen.scenario import Closed

RESAMPLES = 1000
BLOCKS = 8  # of a level: fewer say little about their spread
MIN_N = 6  # fewer values have no median to compare
# Standard deviation of a latency from run to run, assumed; on the simulator a change of its speed
# changes latencies by as much in a closed loop, by up to twice as much in an open one.
RUNS_DIFFER, RUNS_DIFFER_OPEN = 0.02, 0.04
LATENCIES = ("ttft", "tpot", "e2e")
SHARES = ("attainment",)  # compared by their difference, all else by the ratio

Statistic = Callable[[Floats], float]


class Part(Struct, frozen=True):
    """What one run has of a figure at a level: values, block by block; the leg that each block is
    of; how many of how many requests were good, and whether they came in an open loop."""

    blocks: list[Floats]
    legs: list[int]
    good: tuple[int, int]
    open_loop: bool

    @property
    def n(self) -> int:
        return sum(map(len, self.blocks))


class Spread(Struct, frozen=True):
    """A difference (of logarithms, where it is a ratio), its standard error as the two runs show
    it, and the standard deviation of what is assumed between runs."""

    base: float
    new: float
    n: tuple[int, int]
    blocks: int
    difference: float
    error: float
    between: float
    ratio: bool

    def at(self, alpha: float) -> tuple[float, float]:
        """The two-sided interval of the change."""
        from scipy.special import stdtrit  # noqa: PLC0415  (0.2 s)

        reach = math.hypot(float(stdtrit(max(self.blocks - 1, 1), 1 - alpha / 2)) * self.error,
                           NormalDist().inv_cdf(1 - alpha / 2) * self.between)
        lo, hi = self.difference - reach, self.difference + reach
        return (math.expm1(min(lo, 50)), math.expm1(min(hi, 50))) if self.ratio else (lo, hi)


def figures(base: Run, new: Run, level: float) -> Iterator[
        tuple[str, tuple[Part, Part], Statistic]]:
    """(name, what either has, statistic) of what both runs have enough of."""
    held = [_blocks(run, level) for run in (base, new)]
    for latency in LATENCIES:
        a, b = (_part(*own, latency) for own in held)
        for q in (50, 90, 99):
            of = _quantile(q / 100)
            enough = min(a.n, b.n) >= (MIN_N if q == 50 else metrics.min_n(q / 100))
            if enough and all(math.isfinite(of(np.concatenate(x.blocks))) for x in (a, b)):
                yield f"{latency}_p{q}", (a, b), of
    a, b = (_part(*own, "attainment") for own in held)
    if min(a.n, b.n) >= MIN_N:
        yield "attainment", (a, b), _mean
        if a.good[0] and b.good[0]:
            a, b = (_part(*own, "goodput") for own in held)
            yield "goodput", (a, b), _mean


def _part(blocks: Sequence[tuple[pd.DataFrame, int]], each_s: float, open_loop: bool,
          name: str) -> Part:
    good, n = sum(int(f["good"].sum()) for f, _ in blocks), sum(len(f) for f, _ in blocks)
    return Part([_values(f, each_s, name) for f, _ in blocks], [leg for _, leg in blocks],
                (good, n), open_loop)


def _blocks(run: Run, level: float) -> tuple[list[tuple[pd.DataFrame, int]], float, bool]:
    """The level's sample, block by block in the order of due times, each with the number of its
    leg; a block's length, s; whether a leg was an open loop."""
    legs = [(leg, w) for (leg, w), j in zip(run.legs, run.judgements, strict=True)
            if leg.value == level and j.measurement != "INVALID"]
    total_s = sum((w.to_ns - w.from_ns) / 1e9 for _, w in legs)
    if total_s <= 0:
        return [], 1.0, False
    answer_s = float(run.sample(*(leg.id for leg, _ in legs))["e2e_s"].mean())
    each_s = min(total_s / BLOCKS, total_s if math.isnan(answer_s) else answer_s)
    found, length_s = [], []
    for number, (leg, w) in enumerate(legs):
        f = run.sample(leg.id)
        from_s, span_s = (w.from_ns - run.t0_ns) / 1e9, (w.to_ns - w.from_ns) / 1e9
        k = max(1, round(span_s / each_s))
        at = np.clip(((f["due_s"] - from_s) / span_s * k).astype(int), 0, k - 1)
        found += [(f[at == i], number) for i in range(k)]
        length_s += [span_s / k] * k
    return (found, float(np.mean(length_s)),
            any(not isinstance(leg.load, Closed) for leg, _ in legs))


def _values(f: pd.DataFrame, each_s: float, name: str) -> Floats:
    """Of a block of `each_s`. Of latencies what was seen; an answer that we cut off before would
    have taken longer than any."""
    if name == "attainment":
        return f["good"].to_numpy(float)
    if name == "goodput":
        return np.array([f["good"].sum() / each_s])
    values = f[f"{name}_s"]
    if name == "tpot":
        return values.dropna().to_numpy(float)
    cut = (f["outcome"] == Outcome.CANCELLED.value) & values.isna()
    return values.mask(cut, np.inf).dropna().to_numpy(float)


def _quantile(q: float) -> Statistic:
    def of(x: Floats) -> float:
        k = min(len(x) - 1, math.ceil(q * len(x)) - 1)
        return float(np.partition(x, k)[k])  # an order statistic, as everywhere
    return of


def _mean(x: Floats) -> float:
    return float(x.mean())


def spread(name: str, parts: tuple[Part, Part], of: Statistic,
            rng: np.random.Generator) -> Spread:
    base, new = (of(np.concatenate(x.blocks)) for x in parts)
    ratio = name not in SHARES
    error = math.hypot(*(max(_within(x, of, ratio, rng), _between_legs(x, of, ratio))
                         for x in parts))
    if not ratio:  # a share of 1 in every block is no proof that it is 1
        error = max(error, math.sqrt(sum(_variance(*x.good) / x.good[1] for x in parts)))
    return Spread(base, new, (parts[0].n, parts[1].n),
                  min(sum(len(x) > 0 for x in own.blocks) for own in parts),
                  math.log(new / base) if ratio else new - base, error,
                  math.hypot(*(differs(name, x) for x in parts)), ratio)


def _within(part: Part, of: Statistic, ratio: bool, rng: np.random.Generator) -> float:
    """The standard error that the blocks show."""
    some = [x for x in part.blocks if len(x)]
    picks = rng.integers(0, len(some), (RESAMPLES, len(some)))
    drawn = _told([of(np.concatenate([some[i] for i in row])) for row in picks], ratio)
    return float(drawn.std()) if len(drawn) > RESAMPLES // 2 else math.inf


def _between_legs(part: Part, of: Statistic, ratio: bool) -> float:
    """The standard error that the legs show, each as heavy as its values are many; 0 where there
    is one, or one had nothing good."""
    legs = [x for leg in sorted(set(part.legs)) if len(x := np.concatenate(
        [x for x, i in zip(part.blocks, part.legs, strict=True) if i == leg]))]
    size = np.array([len(x) for x in legs], float)
    values = _told([of(x) for x in legs], ratio)
    if len(legs) < 2 or len(values) < len(legs):
        return 0.0
    around = values - np.average(values, weights=size)
    return math.sqrt(((size * around) ** 2).sum() / size.sum() ** 2 * len(legs) / (len(legs) - 1))


def _told(values: Sequence[float], ratio: bool) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.log(np.array(values)) if ratio else np.array(values)
    finite: Floats = x[np.isfinite(x)]
    return finite


def differs(name: str, part: Part) -> float:
    """The standard deviation of a figure (of its logarithm, where its ratio is compared) from run
    to run of one server, as it is assumed: of shares as a search assumes it."""
    k, n = part.good
    if name == "attainment":
        return math.sqrt(sequential.RUNS_DIFFER * _variance(k, n))
    if name == "goodput":  # fewer answers, and fewer of them good
        return RUNS_DIFFER + math.sqrt(sequential.RUNS_DIFFER * _variance(k, n)) * n / k
    return RUNS_DIFFER_OPEN if part.open_loop else RUNS_DIFFER


def _variance(good: int, n: int) -> float:
    """Of one request; a share of 1 is not known to be 1."""
    p = (good + 1) / (n + 2)
    return p * (1 - p)
