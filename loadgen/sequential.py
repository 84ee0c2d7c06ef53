"""How sure a share is, when its requests come in clumps and one may stop at any moment.

**Looking at any time.** Bounds are those of a confidence sequence: Robbins's mixture (1970; Howard
et al., Ann. Statist. 49, 2021, §3). For a share p of n requests of which k were good,

    M(p) = ∫ Lₓ(k, n) dBeta(x; a, b) / L_p(k, n)

is a martingale under p that starts at 1, so it ever exceeds 1/α with probability at most α,
whenever one looks (Ville). The bounds are where M(p) = 1/α. The mixture is laid where an answer is
sought, a little above the target for the lower bound and below it for the upper one; there it costs
a third more requests than a bound for one look at a fixed number (128 against 93 with one miss;
0.95 at 95 %).

**Clumps.** Requests of one moment share their fate, and runs of a server differ from one another,
so n requests tell less than n independent ones: k and n are divided by a design effect. It has
three parts, of which none is a test that data must pass:
- within a leg: the variance of blocks, each longer than an answer, over the binomial one;
- between legs: 1 + (m − 1)·ρ for legs of m requests, where ρ is assumed to be at least RUNS_DIFFER
  (runs then differ by a standard deviation of √(ρ·p·q): 1.5 points at 95 %). One leg, or three,
  cannot show that runs are all alike; so this is assumed and not estimated away;
- what replicates show beyond it, weighed against the assumption as PRIOR_LEGS legs.
Many short legs with fresh seeds therefore prove more than a long one.
"""

import math
from collections.abc import Callable, Sequence

from msgspec import Struct

RUNS_DIFFER = 0.005  # ρ: 1.5 points at 95 %
REFUTES_DIFFER = 0.04  # … and what legs of half a minute show on the simulator near its edge, where
# UNSAFE is said of one leg of a level: a batch that fell badly is no property of the level
PRIOR_LEGS = 2.0
PRIOR_BLOCKS = 8.0
# Where the mixtures lie: mean misses as a multiple of what the target allows, and the weight b of a
# Beta(a, b) with that mean. By trial: fewest requests for 0 to 12 misses, and to see 0.7 to 0.9.
ABOVE = (0.2, 0.7)
BELOW = (3.0, 2.0)

Blocks = Sequence[tuple[int, int]]  # (good, n) of stretches of time, one after the other


class Share(Struct, frozen=True):
    """k good of n, worth `n / design` independent requests; one-sided bounds at any time."""

    good: int
    n: int
    design: float
    lower: float
    upper: float


def share(legs: Sequence[Blocks], target: float, confidence: float,
          runs_differ: float = RUNS_DIFFER,
          refute: tuple[float, float] | None = None) -> Share:
    """What legs of one level show together; each by its blocks. `refute`: confidence and ρ of the
    upper bound, if they are others."""
    good = sum(g for leg in legs for g, _ in leg)
    n = sum(m for leg in legs for _, m in leg)
    design = design_effect(legs, runs_differ)
    lower, upper = bounds(good / design, n / design, target, confidence)
    if refute is not None:
        wide = design_effect(legs, refute[1])
        _, upper = bounds(good / wide, n / wide, target, refute[0])
    return Share(good, n, design, lower, upper)


def bounds(good: float, n: float, target: float, confidence: float) -> tuple[float, float]:
    """(lower, upper) of a share of which `good` of `n` were seen, each at one-sided `confidence`,
    whenever one looks. Counts need not be whole."""
    if n <= 0:
        return 0.0, 1.0
    miss, limit, seen = n - good, -math.log1p(-confidence), good / n

    def outside(p: float, times: float, b: float) -> bool:
        a = b * (1 / (times * (1 - target)) - 1)
        mixed = _log_beta(a + good, b + miss) - _log_beta(a, b)
        log_l = (good * math.log(p) if good else 0.0) + (miss * math.log1p(-p) if miss else 0.0)
        return mixed - log_l >= limit

    lower = _edge(lambda p: outside(p, *ABOVE), 0.0, seen) if good else 0.0
    upper = _edge(lambda p: outside(p, *BELOW), 1.0, seen) if miss else 1.0
    return lower, upper


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _edge(outside: Callable[[float], bool], far: float, near: float) -> float:
    """Between `far`, which is outside, and `near`: where the inside begins, seen from outside."""
    for _ in range(40):
        middle = (far + near) / 2
        if middle in (0.0, 1.0):
            return middle
        far, near = (middle, near) if outside(middle) else (far, middle)
    return far


def design_effect(legs: Sequence[Blocks], runs_differ: float = RUNS_DIFFER) -> float:
    """By how much the variance of the share is larger than that of independent requests."""
    sizes = [sum(m for _, m in leg) for leg in legs]
    n = sum(sizes)
    if n == 0:
        return 1.0
    within = clumping(legs)
    each = sum(m * m for m in sizes) / n
    assumed = within + max(0.0, each - 1) * runs_differ
    totals = [(sum(g for g, _ in leg), m) for leg, m in zip(legs, sizes, strict=True) if m]
    excess, degrees = _spread(totals)
    seen = (PRIOR_LEGS * assumed + excess) / (PRIOR_LEGS + degrees)
    return max(assumed, seen)


def clumping(legs: Sequence[Blocks]) -> float:
    """Variance of blocks around their own leg, over the binomial one; at least 1. Few blocks say
    little: they are weighed against PRIOR_BLOCKS that show none."""
    excess = degrees = 0.0
    for leg in legs:
        more, df = _spread([b for b in leg if b[1]])
        excess, degrees = excess + more, degrees + df
    return max(1.0, (PRIOR_BLOCKS + excess) / (PRIOR_BLOCKS + degrees))


def _spread(parts: Blocks) -> tuple[float, int]:
    """Pearson's χ² of parts against one share for all of them, and its degrees of freedom."""
    good, n = sum(g for g, _ in parts), sum(m for _, m in parts)
    if len(parts) < 2 or good in (0, n):
        return float(max(0, len(parts) - 1)), max(0, len(parts) - 1)
    p = good / n
    return sum((g - m * p) ** 2 / (m * p * (1 - p)) for g, m in parts), len(parts) - 1


def more_n(seen: Share, target: float, confidence: float) -> int | None:
    """How many more requests at this share would show the target. None: no number would, as the
    share seen is not above it."""
    p = (seen.good + 0.5) / (seen.n + 1) if seen.n else 1.0
    if seen.n >= 20 and p <= target:
        return None
    p = max(p, (1 + target) / 2) if seen.n < 20 else p
    low, n = seen.n, max(seen.n, 16)
    while bounds(p * n / seen.design, n / seen.design, target, confidence)[0] < target:
        low, n = n, 2 * n
        if n > 10_000_000:
            return None
    while n - low > max(1, n // 100):
        middle = (low + n) // 2
        enough = bounds(p * middle / seen.design, middle / seen.design,
                        target, confidence)[0] >= target
        low, n = (low, middle) if enough else (middle, n)
    return max(1, n - seen.n)
