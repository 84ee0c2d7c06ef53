"""How often the search says a level that is too high, against a truth that is known.

    python -m tests.benchmarks.oracle --n 2000            Bernoulli worlds, beside other rules
    python -m tests.benchmarks.oracle --n 300 --engine    the simulator's engine in virtual time
    python -m tests.benchmarks.oracle --n 2000 --only "230 s"    rows whose name holds this

Worlds are those of `tests/oracle`: the safe load is drawn at random, and so is how steeply
attainment falls there; runs differ and requests clump by stated amounts. Prints a Markdown table:
over = reported level above the true one; none = no level reported; bound wrong = the printed 95 %
bound of attainment is above the truth; unsafe wrong = a level called UNSAFE that is safe.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from loadgen.leg import Axis
from tests.oracle import engine, naive, world
from tests.oracle.world import Found

DEFAULT_S, LONG_S = 230.0, 1800.0
RUN_SD, CLUMP_SD = 0.15, 0.3  # on the probit scale: runs differ by 1.5 points at 95 %, clumps by 3
AXES: tuple[Axis, ...] = ("concurrency", "rate")


class Case(NamedTuple):
    """One search: what it said, and the truth. `attained`: A at the level of its proof."""

    found: Found
    safe: float
    attained: float | None


class Row(NamedTuple):
    n: int
    over: float
    none: float
    median: float
    bound_wrong: float | None
    unsafe_wrong: float | None
    load_s: float


def row_of(cases: Iterable[Case]) -> Row:
    cases = list(cases)
    n = len(cases)
    ends = [(c, c.found.conclusion) for c in cases if c.found.conclusion is not None]
    bounds = [e.proof.lower > c.attained for c, e in ends
              if e.proof is not None and c.attained is not None]
    return Row(
        n, sum((c.found.safe or 0) > c.safe for c in cases) / n,
        sum(c.found.safe is None for c in cases) / n,
        statistics.median((c.found.safe or 0) / c.safe for c in cases),
        sum(bounds) / n if bounds else None,
        sum(e.unsafe is not None and e.unsafe <= c.safe for c, e in ends) / n if ends else None,
        statistics.mean(c.found.load_s for c in cases))


def bernoulli(axis: Axis, seeds: Iterable[int], budget_s: float, run_sd: float = RUN_SD,
              clump_sd: float = CLUMP_SD, target: float = 0.95) -> list[Case]:
    """The search in worlds at random."""
    cases = []
    for seed in seeds:
        w = world.draw(random.Random(seed), axis, run_sd, clump_sd, target)
        found = world.search(w, seed, budget_s)
        proof = found.conclusion.proof if found.conclusion else None
        cases.append(Case(found, w.safe, w.attainment(proof.value) if proof else None))
    return cases


def others(rule: str, axis: Axis, seeds: Iterable[int]) -> list[Case]:
    """Another rule in the same worlds."""
    cases = []
    for seed in seeds:
        w = world.draw(random.Random(seed), axis, RUN_SD, CLUMP_SD)
        cases.append(Case(naive.answer(rule, w, seed), w.safe, None))
    return cases


def on_engine(axis: Axis, seeds: Iterable[int], budget_s: float) -> list[Case]:
    """The search on the simulator; a seed also says which limits."""
    cases = []
    for seed in seeds:
        limits = engine.LIMITS[seed % len(engine.LIMITS)]
        found = engine.search(axis, limits, seed, budget_s)
        cases.append(Case(found, engine.TRUE_SAFE[axis, limits], None))
    return cases


HEAD = ("| rule | axis | n | over | none | median c/c* | bound wrong | unsafe wrong | load |\n"
        "|---|---|---|---|---|---|---|---|---|")


def line(name: str, axis: Axis, cases: list[Case]) -> str:
    r = row_of(cases)

    def share(x: float | None) -> str:
        return "–" if x is None else f"{100 * x:.1f} %"

    return (f"| {name} | {axis} | {r.n} | {share(r.over)} | {share(r.none)} | {r.median:.2f} | "
            f"{share(r.bound_wrong)} | {share(r.unsafe_wrong)} | {r.load_s:.0f} s |")


def rows(n: int, of_engine: bool,
         first: int) -> Iterable[tuple[str, Axis, Callable[[], list[Case]]]]:
    """Name, axis and how to play it. Searches of 30 minutes take long: an eighth as many."""
    seeds, fewer = range(first, first + n), range(first, first + max(1, n // 8))
    play = on_engine if of_engine else bernoulli
    for axis in AXES:
        yield "this search, 230 s", axis, partial(play, axis, seeds, DEFAULT_S)
        yield "this search, 30 min", axis, partial(play, axis, fewer, LONG_S)
    if of_engine:
        return
    for run_sd in (0.0, 0.25, 0.38):
        yield (f"this search, 230 s, runs differ by {10 * run_sd:.2g} points", "concurrency",
               partial(bernoulli, "concurrency", seeds, DEFAULT_S, run_sd))
    yield ("this search, 30 min, runs differ by 3.8 points", "concurrency",
           partial(bernoulli, "concurrency", fewer, LONG_S, 0.38))
    for axis in AXES:
        for rule in naive.RULES:
            yield rule, axis, partial(others, rule, axis, seeds)


def main() -> None:
    args = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    args.add_argument("--n", type=int, default=200, help="searches for each row")
    args.add_argument("--first", type=int, default=0, help="the first seed")
    args.add_argument("--engine", action="store_true", help="on the simulator's engine")
    args.add_argument("--only", default="", help="rows whose name holds this")
    given = args.parse_args()
    began = time.perf_counter()
    print(HEAD)
    for name, axis, play in rows(given.n, given.engine, given.first):
        if given.only in name:
            print(line(name, axis, play()), flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
