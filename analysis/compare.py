"""Two runs of the same thing: what got better, what worse, what is noise.

Refuses runs that are not alike. Each figure's difference has a bootstrap interval; the intervals
share one error rate of 5 % (Bonferroni), so that a comparison of many levels does not cry wolf.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from analysis.frame import Floats, Run, load

ALPHA = 0.05
RESAMPLES = 2000
MIN_N = 6  # fewer values have no median to compare

Change = Literal["better", "worse", "no evidence"]


class Difference(Struct, frozen=True):
    """NEW over BASE for one figure at one level, as a ratio with its interval."""

    level: float
    name: str
    base: float
    new: float
    n: tuple[int, int]
    ratio: float
    lo: float
    hi: float
    change: Change


def unlike(base: Run, new: Run) -> list[str]:
    """Why the two cannot be compared; empty if they can. Server, flags and seed may differ: they
    are what one compares."""
    a, b = base.manifest, new.manifest
    found = []
    for name, x, y in (("model", a.model, b.model), ("target", a.target_frac, b.target_frac),
                       ("axis", base.axis, new.axis),
                       ("simulated", base.simulated, new.simulated)):
        if x != y:
            found.append(f"{name}: {x} against {y}")
    keys = sorted({*a.scenario, *b.scenario} - {"load", "duration", "description"})
    found += [f"scenario.{k} differs" for k in keys if a.scenario.get(k) != b.scenario.get(k)]
    if not shared_levels(base, new):
        found.append("no level was run in both")
    return found


def shared_levels(base: Run, new: Run) -> list[float]:
    return sorted({leg.value for leg, _ in base.legs} & {leg.value for leg, _ in new.legs})


def differences(base: Run, new: Run) -> list[Difference]:
    """All figures at all levels that both runs have."""
    pairs = [(level, name, a, b, of, up) for level in shared_levels(base, new)
             for name, a, b, of, up in _figures(_at(base, level), _at(new, level))]
    rng = np.random.default_rng(0)  # the same two runs give the same answer
    return [_difference(level, name, (a, b), of, up, ALPHA / len(pairs), rng)
            for level, name, a, b, of, up in pairs]


Statistic = Callable[[Floats], Floats]


def _figures(base: pd.DataFrame, new: pd.DataFrame) -> Iterator[
        tuple[str, Floats, Floats, Statistic, bool]]:
    """(name, values, values, statistic along the last axis, more is better)."""
    for column, name in (("ttft_s", "TTFT p50"), ("tpot_s", "TPOT p50"), ("e2e_s", "E2E p50")):
        a, b = (f[column].dropna().to_numpy(float) for f in (base, new))
        if min(len(a), len(b)) >= MIN_N:
            yield name, a, b, _median, False
    a, b = (f["good"].to_numpy(float) for f in (base, new))
    if min(len(a), len(b)) >= MIN_N:
        yield "attainment", a, b, _mean, True


def _median(x: Floats) -> Floats:
    return np.median(x, axis=-1)


def _mean(x: Floats) -> Floats:
    return x.mean(axis=-1)  # type: ignore[no-any-return]


def _at(run: Run, level: float) -> pd.DataFrame:
    return run.sample(*(leg.id for leg, _ in run.legs if leg.value == level))


def _difference(level: float, name: str, values: tuple[Floats, Floats], of: Statistic,
                more_is_better: bool, alpha: float, rng: np.random.Generator) -> Difference:
    a, b = values
    drawn = [of(rng.choice(x, size=(RESAMPLES, len(x)))) for x in (a, b)]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.nan_to_num(drawn[1] / drawn[0], nan=1.0, posinf=1e9)
    lo, hi = (float(x) for x in np.quantile(ratios, [alpha / 2, 1 - alpha / 2]))
    change: Change = "no evidence"
    if lo > 1 or hi < 1:
        change = "better" if (lo > 1) == more_is_better else "worse"
    base, new = float(of(a)), float(of(b))
    return Difference(level, name, base, new, (len(a), len(b)), new / base if base else 1.0, lo,
                      hi, change)


def show(console: Console, base: Path, new: Path) -> int:
    """Prints the comparison. Exit code 0: no regression, 1: something is worse, 2: not alike.
    Raises StoreError."""
    a, b = load(base), load(new)
    if reasons := unlike(a, b):
        console.print("These runs are not alike: " + "; ".join(reasons), highlight=False)
        return 2
    found = differences(a, b)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("level", "figure", "base", "new", "ratio", "interval", "n", "change"):
        table.add_column(column, justify="left" if column in ("figure", "change") else "right")
    colours = {"better": "green", "worse": "red", "no evidence": "dim"}
    for d in found:
        table.add_row(f"{d.level:g}", d.name, f"{d.base:.4g}", f"{d.new:.4g}", f"{d.ratio:.2f}",
                      f"{d.lo:.2f}–{d.hi:.2f}", f"{d.n[0]}, {d.n[1]}",
                      f"[{colours[d.change]}]{d.change}[/]")
    console.print(table)
    x, y = a.conclusion.safe, b.conclusion.safe
    if x is not None and y is not None:
        console.print(f"Largest safe {a.axis}: {x:g} → {y:g}", highlight=False)
    worse = [d for d in found if d.change == "worse"]
    console.print(f"{len(worse)} of {len(found)} figures are worse beyond noise "
                  f"({1 - ALPHA:.0%} for all of them together).", highlight=False)
    return 1 if worse else 0
