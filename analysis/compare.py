"""Two runs of the same thing: what got better, what worse, what is noise.

Refuses runs that are not alike. A figure's difference has an interval (`spread`); the intervals of
a comparison share one error rate of 5 % (Bonferroni), so that many levels do not cry wolf.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from msgspec import Struct

from analysis.frame import Run
from analysis.spread import LATENCIES, Spread, figures, spread
from loadgen.errors import INCONCLUSIVE, PASS, SLO_MISSED, ScenarioError
from loadgen.scenario import placeless

ALPHA = 0.05
MORE_IS_BETTER = ("attainment", "goodput")
FIGURES = (*(f"{x}_p{q}" for x in LATENCIES for q in (50, 90, 99)), *MORE_IS_BETTER)

Change = Literal["better", "worse", "no evidence"]
Held = Literal["held", "regressed", "open"]


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
    pairs = [(level, *x) for level in shared for x in figures(base, new, level)]
    rng = np.random.default_rng(0)  # the same two runs give the same answer
    drawn = [(level, name, spread(name, blocks, of, rng)) for level, name, blocks, of in pairs]
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
