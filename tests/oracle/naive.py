"""How other tools choose a level, in the same world: each returns the level that it would report.
Legs of 30 s, as most of them advise; ours have the same warm-up and drain."""

import math
from collections.abc import Callable

from loadgen import metrics, pace, ramp, sequential
from loadgen.judge import Criteria
from tests.oracle.world import Bench, Found, World

LEG_S = 30.0
STEPS = 5  # of a bisection: from a factor of two to 2 %

Passes = Callable[[Bench, float], bool]


def _point(bench: Bench, load: float) -> bool:
    good, n = bench.point(load, LEG_S)
    return n > 0 and good / n >= bench.world.target


def _survivors(bench: Bench, load: float) -> bool:
    """p95 of the answers that came, against the limit: failures are left out."""
    good, n = bench.point(load, LEG_S)
    came = n - bench.failed(n - good)
    return came > 0 and good / came >= bench.world.target


def _one_run_bound(bench: Bench, load: float) -> bool:
    """Clopper and Pearson's bound of one run, as if its requests were independent; levels too low
    to finish enough requests pass if nothing refutes them."""
    good, n = bench.point(load, LEG_S)
    enough = n >= (metrics.needed_n(bench.world.target, 0.0) or 0)
    return (metrics.lower_bound(good, n) if enough else metrics.upper_bound(good, n)
            ) >= bench.world.target


def _bisect(bench: Bench, passes: Passes) -> float | None:
    """Doubling until a level fails, then halving what is between; the last that passed."""
    most = bench.ladder[-1]
    low, high = None, None
    for load in bench.ladder:
        if not passes(bench, load):
            high = load
            break
        low = load
    if low is None or high is None:
        return low if high is None else None
    for _ in range(STEPS):
        middle = math.sqrt(low * high) if bench.world.axis == "rate" else float(
            int((low + high) / 2))
        if middle in (low, high) or middle > most:
            break
        low, high = (middle, high) if passes(bench, middle) else (low, middle)
    return low


def linear_sweep(bench: Bench) -> float | None:
    """Ten levels at equal distances, the largest whose share is at the target (guidellm's sweep,
    vLLM's serve_workload)."""
    levels = [max(1.0, bench.ladder[-1] * (i + 1) / 10) for i in range(10)]
    passed = [x for x in levels if _point(bench, x)]
    return max(passed, default=None)


def kneedle(bench: Bench) -> float | None:
    """The point of the throughput curve that is farthest above its chord (Satopää et al., 2011)."""
    rate = bench.world.axis == "rate"
    seen = []
    for load in bench.ladder:
        _, n = bench.point(load, LEG_S)
        seen.append((load, n / LEG_S))
    (x0, y0), (x1, y1) = seen[0], max(seen, key=lambda s: s[1] if rate else s[0])
    if x1 == x0 or y1 == y0:
        return x1
    return max(seen, key=lambda s: (s[1] - y0) / (y1 - y0) - (s[0] - x0) / (x1 - x0))[0]


def fixed_grid(bench: Bench) -> float | None:
    """Each level in turn, in steps of `ramp.FINEST`, for as many runs as its own verdict takes (at
    most eight), up to the first that is not safe: the same confidence and resolution as the default
    sweep's, without a search."""
    criteria, found, load = bench.criteria, None, bench.ladder[0]
    while load <= bench.ladder[-1]:
        legs: list[sequential.Blocks] = []
        seen = sequential.share([], criteria.target, criteria.confidence)
        held_s = max(pace.MIN_LEG_S, pace.LEG_N / bench.world.rps(load))
        while len(legs) < 8 and seen.lower < criteria.target <= seen.upper:
            bench.load_s += 2 * bench.world.answer_s(load)
            legs.append(bench.blocks(load, held_s))
            seen = sequential.share(legs, criteria.target, criteria.confidence,
                                    criteria.runs_differ,
                                    (criteria.refute, criteria.refutes_differ))
        if seen.lower < criteria.target:
            break
        found, load = load, load * ramp.FINEST
    return found


RULES: dict[str, Callable[[Bench], float | None]] = {
    "point-estimate bisection": lambda b: _bisect(b, _point),
    "p95 of survivors, bisection": lambda b: _bisect(b, _survivors),
    "binomial bound of one run, bisection": lambda b: _bisect(b, _one_run_bound),
    "10-point linear sweep": linear_sweep,
    "Kneedle on throughput": kneedle,
    "fixed grid, each level proven": fixed_grid,
}


def answer(rule: str, world: World, seed: int) -> Found:
    bench = Bench(world, seed, Criteria(target=world.target))
    return Found(RULES[rule](bench), bench.load_s, bench.now_s, 0)
