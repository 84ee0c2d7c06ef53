"""Two runs of the same thing: what got better, what worse, what is noise.

Refuses runs that are not alike. A figure's difference has an interval: the legs of a level are cut
into blocks of time as long as an answer takes (at least 8), whole blocks are drawn anew with
replacement in both runs (a block bootstrap: requests that were in a batch together are not
independent), and the spread of what comes out is widened by Student's t for that many blocks. The
intervals of a comparison share one error rate of 5 % (Bonferroni), so that many levels do not cry
wolf.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from msgspec import Struct

from analysis.frame import Floats, Run
from loadgen import metrics
from loadgen.errors import INCONCLUSIVE, PASS, SLO_MISSED, ScenarioError
from loadgen.record import Outcome
from loadgen.scenario import placeless

ALPHA = 0.05
RESAMPLES = 1000
BLOCKS = 8  # of a level: fewer say little about their spread
MIN_N = 6  # fewer values have no median to compare
LATENCIES = ("ttft", "tpot", "e2e")
SHARES = ("attainment",)  # compared by their difference, all else by the ratio
MORE_IS_BETTER = ("attainment", "goodput")
FIGURES = (*(f"{x}_p{q}" for x in LATENCIES for q in (50, 90, 99)), *MORE_IS_BETTER)

Change = Literal["better", "worse", "no evidence"]
Held = Literal["held", "regressed", "open"]
Statistic = Callable[[Floats], float]


class Difference(Struct, frozen=True):
    """NEW against BASE for one figure at one level: `change_frac` is NEW / BASE − 1, of a share NEW
    − BASE, with its interval. `n`: requests of either. `blocks`: the fewer of either."""

    level: float
    name: str
    base: float
    new: float
    n: tuple[int, int]
    blocks: int
    change_frac: float
    lo: float
    hi: float
    change: Change


class Regression(Struct, frozen=True):
    """A limit that was asked for, at one level: `regressed` if the figure surely got worse by more,
    `held` if it surely did not, `open` if these runs cannot tell."""

    level: float | None
    name: str
    limit_frac: float
    lo: float | None
    hi: float | None
    held: Held


class Comparison(Struct, frozen=True):
    """All of it. `unlike` fields were found and allowed."""

    schema: int
    base: str
    new: str
    axis: str
    unlike: list[str]
    safe: tuple[float | None, float | None]
    differences: list[Difference]
    regressions: list[Regression]
    exit_code: int


# ------------------------------------------------------------------------------------------- alike


def unlike(base: Run, new: Run) -> dict[str, str]:
    """Why the two cannot be compared, by field; empty if they can. Server, flags and seed may
    differ: they are what one compares."""
    a, b = base.manifest, new.manifest
    found = {}
    for name, x, y in (("model", a.model, b.model), ("target", a.target_frac, b.target_frac),
                       ("confidence", a.confidence, b.confidence), ("axis", base.axis, new.axis),
                       ("simulated", base.simulated, new.simulated)):
        if x != y:
            found[name] = f"{x} against {y}"
    for k in sorted({*a.scenario, *b.scenario} - {"load", "duration", "description"}):
        if placeless(a.scenario.get(k)) != placeless(b.scenario.get(k)):
            found[f"scenario.{k}"] = f"{a.scenario.get(k)} against {b.scenario.get(k)}"
    return found


def shared_levels(base: Run, new: Run) -> list[float]:
    return sorted({leg.value for leg, _ in base.legs} & {leg.value for leg, _ in new.legs})


# ------------------------------------------------------------------------------------- differences


def compare(base: Run, new: Run, limits: Sequence[tuple[str, float]] = (),
            levels: Sequence[float] = (), allowed: Sequence[str] = ()) -> Comparison:
    """`limits`: (figure, largest regression); `levels`: only these, if any are given."""
    shared = [x for x in shared_levels(base, new) if not levels or x in levels]
    pairs = [(level, *x) for level in shared for x in _figures(base, new, level)]
    rng = np.random.default_rng(0)  # the same two runs give the same answer
    drawn = [(level, name, _spread(name, blocks, of, rng)) for level, name, blocks, of in pairs]
    found = [_difference(level, name, s, ALPHA / len(pairs)) for level, name, s in drawn]
    regressions = [r for name, most in limits for r in _held(name, most, drawn)]
    if limits:
        held = {r.held for r in regressions}
        code = SLO_MISSED if "regressed" in held else INCONCLUSIVE if "open" in held else PASS
    else:
        code = SLO_MISSED if any(d.change == "worse" for d in found) else (
            PASS if found else INCONCLUSIVE)
    return Comparison(
        1, base.manifest.run, new.manifest.run, base.axis,
        [f"{k}: {v}" for k, v in unlike(base, new).items() if k in allowed],
        (base.conclusion.safe, new.conclusion.safe), found, regressions, code)


class Spread(Struct, frozen=True):
    """A difference (of logarithms, where it is a ratio) and its standard error."""

    base: float
    new: float
    n: tuple[int, int]
    blocks: int
    difference: float
    error: float
    ratio: bool

    def at(self, alpha: float) -> tuple[float, float]:
        """The two-sided interval of the change."""
        from scipy.special import stdtrit  # noqa: PLC0415  (0.2 s)

        reach = float(stdtrit(max(self.blocks - 1, 1), 1 - alpha / 2)) * self.error
        lo, hi = self.difference - reach, self.difference + reach
        return (math.expm1(min(lo, 50)), math.expm1(min(hi, 50))) if self.ratio else (lo, hi)


def _figures(base: Run, new: Run, level: float) -> Iterator[
        tuple[str, tuple[list[Floats], list[Floats]], Statistic]]:
    """(name, blocks of values, statistic) of what both runs have enough of."""
    frames = [_blocks(run, level) for run in (base, new)]
    for latency in LATENCIES:
        a, b = ([_latencies(f, latency) for f in own] for own, _ in frames)
        n = min(sum(map(len, x)) for x in (a, b))
        for q in (50, 90, 99):
            of = _quantile(q / 100)
            enough = n >= (MIN_N if q == 50 else metrics.min_n(q / 100))
            if enough and all(math.isfinite(of(np.concatenate(x))) for x in (a, b)):
                yield f"{latency}_p{q}", (a, b), of
    goods = [[f["good"].to_numpy(float) for f in own] for own, _ in frames]
    if min(sum(map(len, x)) for x in goods) >= MIN_N:
        yield "attainment", (goods[0], goods[1]), _mean
        rates = [[np.array([f["good"].sum() / s]) for f in own] for own, s in frames]
        if all(sum(float(x[0]) for x in own) > 0 for own in rates):
            yield "goodput", (rates[0], rates[1]), _mean


def _blocks(run: Run, level: float) -> tuple[list[pd.DataFrame], float]:
    """The level's sample, block by block in the order of due times; and a block's length, s."""
    spans = [(leg.id, w) for (leg, w), j in zip(run.legs, run.judgements, strict=True)
             if leg.value == level and j.measurement != "INVALID"]
    total_s = sum((w.to_ns - w.from_ns) / 1e9 for _, w in spans)
    if total_s <= 0:
        return [], 1.0
    answer_s = float(run.sample(*(x for x, _ in spans))["e2e_s"].mean())
    each_s = min(total_s / BLOCKS, total_s if math.isnan(answer_s) else answer_s)
    found, length_s = [], []
    for leg, w in spans:
        f = run.sample(leg)
        from_s, span_s = (w.from_ns - run.t0_ns) / 1e9, (w.to_ns - w.from_ns) / 1e9
        k = max(1, round(span_s / each_s))
        at = np.clip(((f["due_s"] - from_s) / span_s * k).astype(int), 0, k - 1)
        found += [f[at == i] for i in range(k)]
        length_s += [span_s / k] * k
    return found, float(np.mean(length_s))


def _latencies(f: pd.DataFrame, name: str) -> Floats:
    """What was seen; an answer that we cut off before would have taken longer than any."""
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


def _spread(name: str, blocks: tuple[list[Floats], list[Floats]], of: Statistic,
            rng: np.random.Generator) -> Spread:
    base, new = (of(np.concatenate(x)) for x in blocks)
    ratio = name not in SHARES
    drawn = []
    for own in blocks:
        some = [x for x in own if len(x)]
        picks = rng.integers(0, len(some), (RESAMPLES, len(some)))
        drawn.append(np.array([of(np.concatenate([some[i] for i in row])) for row in picks]))
    with np.errstate(divide="ignore", invalid="ignore"):
        each = np.log(drawn[1]) - np.log(drawn[0]) if ratio else drawn[1] - drawn[0]
    each = each[np.isfinite(each)]
    error = float(each.std()) if len(each) > RESAMPLES // 2 else math.inf
    n = tuple(sum(len(x) for x in own) for own in blocks)
    if not ratio:  # a share of 1 in every block is no proof that it is 1
        error = max(error, math.sqrt(sum(_variance(x, k) for x, k in zip(
            (base, new), n, strict=True))))
    difference = math.log(new / base) if ratio else new - base
    return Spread(base, new, (n[0], n[1]), min(sum(len(x) > 0 for x in own) for own in blocks),
                  difference, error, ratio)


def _variance(share: float, n: int) -> float:
    p = (share * n + 1) / (n + 2)
    return p * (1 - p) / n


def _difference(level: float, name: str, s: Spread, alpha: float) -> Difference:
    lo, hi = s.at(alpha)
    change: Change = "no evidence"
    if lo > 0 or hi < 0:
        change = "better" if (lo > 0) == (name in MORE_IS_BETTER) else "worse"
    found = math.expm1(s.difference) if s.ratio else s.difference
    return Difference(level, name, s.base, s.new, s.n, s.blocks, found, lo, hi, change)


# ---------------------------------------------------------------------------------------- the gate


def limit_of(text: str) -> tuple[str, float]:
    """ "ttft_p99=10%" → ("ttft_p99", 0.1). Raises ScenarioError."""
    name, _, value = text.partition("=")
    try:
        limit = float(value.strip().removesuffix("%")) / (100 if "%" in value else 1)
    except ValueError:
        limit = math.nan
    if name.strip() not in FIGURES or not 0 <= limit < 100:
        raise ScenarioError(f"--max-regression {text!r}: write FIGURE=SHARE, as ttft_p99=10%; "
                            f"figures are {', '.join(FIGURES)}")
    return name.strip(), limit


def _held(name: str, most: float,
          drawn: Sequence[tuple[float, str, Spread]]) -> list[Regression]:
    """At each level that has the figure; one-sided, all levels together at 5 %."""
    own = [(level, s) for level, found, s in drawn if found == name]
    if not own:
        return [Regression(None, name, most, None, None, "open")]
    result = []
    for level, s in own:
        lo, hi = s.at(2 * ALPHA / len(own))
        worse_lo, worse_hi = (-hi, -lo) if name in MORE_IS_BETTER else (lo, hi)
        held: Held = "regressed" if worse_lo > most else "held" if worse_hi <= most else "open"
        result.append(Regression(level, name, most, lo, hi, held))
    return result
