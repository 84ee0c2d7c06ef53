"""The knee: where more concurrency stops bringing its share of throughput. A label on the plot;
what is safe decides.

The model is Gunther's Universal Scalability Law (Guerrilla Capacity Planning, 2007, ch. 4):
X(c) = λc / (1 + σ(c−1) + κc(c−1)), λ the throughput of one slot, σ the share that is serial, κ
the cost of every pair. Its knee is where the line λc meets the ceiling: X_max/λ, and 1/σ if κ = 0.
"""

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from analysis import frame
from analysis.frame import Floats, Run

MIN_LEVELS = 6  # three parameters, and as many levels again to contradict them
PAST = 2  # levels beyond the bend: one could be an accident
WIDEST = 4.0  # an interval wider than this factor names no place
RESAMPLES = 400


class Level(Struct, frozen=True):
    """What one level finished, all its legs together."""

    value: float
    done: float
    window_s: float

    @property
    def rps(self) -> float:
        return self.done / self.window_s


class Fit(Struct, frozen=True):
    """Parameters of the law: λ in requests per second of one slot, σ and κ without unit."""

    lam: float
    sigma: float
    kappa: float

    def rps(self, c: float) -> float:
        return self.lam * c / (1 + self.sigma * (c - 1) + self.kappa * c * (c - 1))

    @property
    def knee(self) -> float:
        """In concurrent requests; infinite if the law is a straight line."""
        if self.kappa > 0:
            top = max(1.0, math.sqrt((1 - self.sigma) / self.kappa))
            return self.rps(top) / self.lam
        return 1 / self.sigma if self.sigma > 0 else math.inf


class Knee(Struct, frozen=True):
    """`value` with its 95 % interval, or None and the reason. `peak_rps` is seen, not fitted."""

    value: float | None
    lo: float | None
    hi: float | None
    reason: str
    fit: Fit | None
    peak_rps: float | None
    peak_at: float | None


def of(run: Run) -> Knee:
    """The knee of a run's ladder, with the confirmations of the same levels."""
    usable = [j for j in run.judgements if j.measurement != "INVALID" and not j.died and j.n
              and j.phase in ("ladder", "refine", "confirm")]
    found = []
    for value in sorted({j.value for j in usable}):
        here = [j for j in usable if j.value == value]
        found.append(Level(value, sum(j.achieved_rps * j.window_s for j in here),
                           sum(j.window_s for j in here)))
    peak = max(found, key=lambda x: x.rps, default=None)
    if any(leg.axis == "rate" for leg, _ in run.legs):
        due = {x.value: sum(j.n + j.void for j in usable if j.value == x.value) for x in found}
        kept = [x.value for x in found if x.done >= 0.95 * due[x.value]]
        reason = "a knee is one of concurrency and is not defined over a rate" + (
            f"; the largest rate of which 95 % was achieved is {max(kept):g}/s" if kept else
            "; at no rate 95 % was achieved")
        knee = Knee(None, None, None, reason, None, None, None)
    else:
        knee = find(found, run.manifest.seed)
    return Knee(knee.value, knee.lo, knee.hi, knee.reason, knee.fit,
                peak.rps if peak else None, peak.value if peak else None)


def find(levels: Sequence[Level], seed: int) -> Knee:
    """The knee of these levels (ascending), with an interval by parametric bootstrap."""
    fitted = fit(levels) if len(levels) >= 3 and any(x.done for x in levels) else None

    def unknown(reason: str) -> Knee:
        return Knee(None, None, None, reason, fitted, None, None)

    if len(levels) < MIN_LEVELS or fitted is None:
        return unknown(f"{len(levels)} level{'s' if len(levels) != 1 else ''} measured; it takes "
                       f"{MIN_LEVELS}")
    past = sum(x.value > fitted.knee for x in levels)
    if past == 0:
        return unknown(f"throughput still grows with the load at {levels[-1].value:g}: "
                       "try higher levels")
    if past < PAST:
        return unknown(f"only {past} level past the bend near {fitted.knee:.3g}; it takes {PAST}")
    lo, hi = _interval(levels, fitted, np.random.default_rng(seed))
    if not hi <= WIDEST * lo:
        said = f"{lo:.3g} to {hi:.3g}" if math.isfinite(hi) else f"{lo:.3g} or more"
        return unknown(f"it could be anything from {said}: try longer levels, --budget")
    return Knee(fitted.knee, lo, hi, "", fitted, None, None)


def fit(levels: Sequence[Level]) -> Fit:
    """Least squares of X weighted by 1/se², with se² = X/T of a Poisson count: a closed loop's
    counts vary less, so the interval is on the wide side.

    D(c) = c/X(c) = a + b·c + d·c(c−1) is linear in its parameters, and so is the residual
    (X·D − c)/(D·se) where D and se in the denominator are those of the round before (Sanathanan
    and Koerner, 1963): non-negative least squares keep λ > 0, 0 ≤ σ ≤ 1 and κ ≥ 0 exactly."""
    c = np.array([x.value for x in levels])
    window_s = np.array([x.window_s for x in levels])
    x = np.array([x.done for x in levels]) / window_s
    return _fit(c, x, window_s)


def _fit(c: Floats, x: Floats, window_s: Floats) -> Fit:
    from scipy.optimize import nnls  # noqa: PLC0415  (0.5 s, and only here)

    basis = np.column_stack([np.ones_like(c), c, c * (c - 1)])  # D = a + b·c + d·c(c−1)
    model = np.maximum(x, 0.5 / window_s)
    a = b = d = 0.0
    for _ in range(8):
        denominator = c / model
        weight = 1 / (denominator * np.sqrt(model / window_s))
        rows = basis * (x * weight)[:, None]
        size = np.linalg.norm(rows, axis=0) + 1e-300  # columns of one size: c² is up to 10⁵
        a, b, d = nnls(rows / size, c * weight)[0] / size
        if a + b <= 0:
            break
        before, model = model, c / (basis @ np.array([a, b, d]))
        if np.allclose(before, model, rtol=1e-5):
            break
    one = max(float(a + b), 1e-12)  # D(1) = 1/λ
    return Fit(lam=1 / one, sigma=float(b) / one, kappa=float(d) / one)


def _interval(levels: Sequence[Level], fitted: Fit,
              rng: np.random.Generator) -> tuple[float, float]:
    c = np.array([x.value for x in levels])
    window_s = np.array([x.window_s for x in levels])
    expected = np.array([fitted.rps(x.value) for x in levels]) * window_s
    knees = [_fit(c, rng.poisson(expected) / window_s, window_s).knee for _ in range(RESAMPLES)]
    lo, hi = np.sort(knees)[[round(0.025 * RESAMPLES), round(0.975 * RESAMPLES) - 1]]
    return float(lo), float(hi)


def says(knee: Knee) -> str:
    """One or two sentences."""
    peak = (f" Peak throughput {knee.peak_rps:.3g} requests/s at {knee.peak_at:g}."
            if knee.peak_rps is not None else "")
    if knee.value is None or knee.lo is None or knee.hi is None:
        return f"Knee not identified: {knee.reason}.{peak}"
    return (f"Knee near {knee.value:.0f} ({knee.lo:.0f}–{knee.hi:.0f}, 95 %): beyond it, more "
            f"requests at once mostly wait for each other.{peak}")


def main() -> None:
    print(says(of(frame.open_run(frame.parser("The knee of a run, in words.").parse_args()))))


if __name__ == "__main__":
    frame.as_a_filter()
    main()
