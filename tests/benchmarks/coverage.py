"""How often what a report prints of its sureness holds, on the simulator's engine.

    python -m tests.benchmarks.coverage --n 400 --processes 16
    python -m tests.benchmarks.coverage --n 40 --only run      kinds whose name holds this

A leg's requests come in clumps, as the engine makes them. A run's truth is the mean of TRUTHS legs
of the same length on the same server. In a search, and "over runs", its speed differs by 2 % from
leg to leg, and the truth is the mean over legs of such speeds. Bounds are one-sided: only the wrong
side counts. A verdict is wrong that is SAFE under the target, or UNSAFE at it or above; it is
counted where it can be wrong. In brackets: bounds that no report prints.
Prints a Markdown table; `held` with its own 95 % interval (Wilson), to be told from `nominal` − 3.
"""

import argparse
import asyncio
import functools
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import NormalDist

from analysis import compare, frame, knee
from analysis.frame import Run
from loadgen import evidence, metrics, sequential
from loadgen.judge import Criteria, Judgement, ServerSigns, judge
from loadgen.leg import Axis, Leg, Phase, Window
from loadgen.pace import load_of
from loadgen.record import RequestRecord
from loadgen.scenario import to_plain
from loadgen.virtual import VirtualExecutor
from servers.sim.__main__ import engine_config, parse
from tests import synthetic
from tests.oracle.engine import RUN_SD, mix_of, scaled
from tests.synthetic import Plain

EDGE, AWAY = "near the edge", "away from it"
Points = tuple[tuple[Axis, float, str], ...]
FAR: Points = (("concurrency", 24.0, AWAY), ("concurrency", 64.0, AWAY), ("rate", 2.0, AWAY),
               ("rate", 5.0, AWAY))
POINTS: Points = (  # of a search: attainment is 0.95 at 42, and at 3.97/s
    ("concurrency", 38.0, EDGE), ("concurrency", 44.0, EDGE), ("rate", 3.4, EDGE),
    ("rate", 4.2, EDGE), *FAR)
RUN_POINTS: Points = (  # of a run: it is 0.96 at 42 and at 3.97/s, 0.93 at 44 and at 4.2/s
    ("concurrency", 42.0, EDGE), ("concurrency", 44.0, EDGE), ("rate", 3.97, EDGE),
    ("rate", 4.2, EDGE), *FAR)
SHORT_S, RUN_S, LEG_S = 20.0, 60.0, 25.0
LADDER = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
TRUTH_SEEDS, TRUTHS = 900_000, 64
ATTAINED: dict[tuple[Axis, float, float, str], float] = {}  # (axis, load, length s, class or "")
Held = tuple[str, bool]  # (interval, whether it held)


def ran(axis: Axis, value: float, seed: int, phase: Phase, seconds: float, speed: float,
        warmup_s: float = 10.0) -> tuple[Leg, Window, list[RequestRecord], ServerSigns]:
    """A leg on a server of its own."""
    leg = Leg(id=f"{phase}-{value:g}-{seed}", axis=axis, value=value, phase=phase, replicate=seed,
              seed=seed, load=load_of(axis, value), warmup_s=warmup_s, measure_s=seconds)
    executor = VirtualExecutor(mix_of(None), scaled(engine_config(parse([])), speed))
    return leg, *asyncio.run(executor.run_leg(leg))


def judged(axis: Axis, value: float, seed: int, phase: Phase, seconds: float,
           speed: float) -> Judgement:
    leg, window, records, signs = ran(axis, value, seed, phase, seconds, speed)
    return judge(leg, window, records, signs, mix_of(None), Criteria())


def speed_of(seed: int) -> float:
    return math.exp(RUN_SD * random.Random(seed).gauss(0, 1))


# ------------------------------------------------------------------------------------ attainment


def one_truth(task: tuple[Axis, float, float, int]) -> dict[str, tuple[int, int]]:
    """(good, n) by class, and of all as "", of one of the legs that make a truth; a search's are at
    quantiles of the speed."""
    axis, value, seconds, i = task
    speed = math.exp(RUN_SD * NormalDist().inv_cdf((i + 0.5) / TRUTHS))
    j = judged(axis, value, TRUTH_SEEDS + i, "run", seconds, speed if seconds == LEG_S else 1.0)
    return {"": (j.good, j.n), **j.classes}


def learn(seconds: float, points: Points,
          play: Callable[..., Iterable[dict[str, tuple[int, int]]]]) -> None:
    """The truths of all points, before processes are forked that share them. Near the edge they
    are known to a point."""
    tasks = [(axis, value, seconds, i) for axis, value, _ in points for i in range(TRUTHS)]
    found = list(play(one_truth, tasks))
    for k, (axis, value, _) in enumerate(points):
        own = found[k * TRUTHS:(k + 1) * TRUTHS]
        for c in own[0]:
            ATTAINED[axis, value, seconds, c] = (
                sum(x[c][0] for x in own) / max(1, sum(x[c][1] for x in own)))


def verdicts(name: str, j: Judgement, axis: Axis, seconds: float, where: str) -> Iterator[Held]:
    """Whether SAFE and UNSAFE are right, each where it may be wrong. A class that is under the
    target itself is refuted rightly."""
    target = Criteria().target
    truth = ATTAINED[axis, j.value, seconds, ""]
    if truth < target:
        yield f"{name} called SAFE, {axis} {where}", j.load != "SAFE"
        return
    refuted = [c for c in j.refuted_classes if ATTAINED[axis, j.value, seconds, c] < target]
    yield (f"{name} called UNSAFE, {axis} {where}",
           j.load != "UNSAFE" or (j.upper >= target and bool(refuted)))


def of_a_run(seed: int, seconds: float = RUN_S) -> list[Held]:
    """A run speaks for its server as it is."""
    axis, value, where = RUN_POINTS[seed % len(RUN_POINTS)]
    truth = ATTAINED[axis, value, seconds, ""]
    j = judged(axis, value, seed, "run", seconds, 1.0)
    design = sequential.design_effect([j.blocks], sequential.RUNS_DIFFER)
    differ = metrics.lower_bound(j.good / design, j.n / design)
    name, at = f"run of {seconds:g} s", f"{axis} {where}"
    return [*verdicts(name, j, axis, seconds, where),
            (f"({name}: lower bound by its clumps, {at})", j.lower <= truth),
            (f"({name}: lower bound as of a search's leg, {at})", differ <= truth),
            (f"({name}: upper bound, {at})", j.upper >= truth),
            (f"({name}: lower bound as of independent requests, {at})",
             metrics.lower_bound(j.good, j.n) <= truth)]


def of_a_search(seed: int) -> list[Held]:
    """A leg of a search, and three confirmations together, speak for their level over runs."""
    axis, value, where = POINTS[seed % len(POINTS)]
    truth = ATTAINED[axis, value, LEG_S, ""]
    legs = [judged(axis, value, 3 * seed + i, "confirm", LEG_S, speed_of(3 * seed + i))
            for i in range(3)]
    proof = evidence.pooled(legs, value, Criteria())
    assert proof is not None
    at = f"{axis} {where}"
    found = [(f"(leg of a search: lower bound, {at})", legs[0].lower <= truth),
             (f"(leg of a search: upper bound (99.5 %), {at})", legs[0].upper >= truth),
             (f"(three legs of a search: lower bound, {at})", proof.lower <= truth),
             (f"(three legs of a search: upper bound (99.5 %), {at})", proof.upper >= truth)]
    if truth >= Criteria().target:
        found += verdicts("leg of a search", legs[0], axis, LEG_S, where)
    if proof.load == "SAFE":
        found.append((f"a proof, of three legs: lower bound, {axis}", proof.lower <= truth))
    return found


# ------------------------------------------------------------------------------------- the knee


def ladder(seed: int, seconds: float, speed: Callable[[int], float]) -> list[knee.Level]:
    found = []
    for i, value in enumerate(LADDER):
        j = judged("concurrency", value, 100 * seed + i, "ladder", seconds, speed(100 * seed + i))
        found.append(knee.Level(value, j.achieved_rps * j.window_s, j.window_s))
    return found


@functools.cache
def true_knee() -> float:
    """That of long legs: no server follows the law exactly, and this is what is estimated."""
    legs = [ladder(TRUTH_SEEDS + i, 120.0, lambda _: 1.0) for i in range(4)]
    return knee.fit([knee.Level(x[0].value, sum(y.done for y in x), sum(y.window_s for y in x))
                     for x in zip(*legs, strict=True)]).knee


def of_a_knee(seed: int) -> list[Held]:
    truth = true_knee()
    found = []
    for name, speed in (("this server", lambda _: 1.0), ("over runs", speed_of)):
        got = knee.find(ladder(seed, 20.0, speed), seed)
        if got.lo is not None and got.hi is not None:
            found.append((f"knee: 95 % interval, {name}", got.lo <= truth <= got.hi))
    return found


# --------------------------------------------------------------------------------------- compare

COMPARED: dict[str, tuple[Axis, tuple[float, ...]]] = {
    "concurrency": ("concurrency", (8.0, 32.0)), "rate": ("rate", (2.0, 3.4))}
SLOWER = 0.9


def folder(path: Path, what: str, seed: int, speed: float, seconds: float = 60.0) -> Run:
    held: list[tuple[Leg, Window | None]] = []
    records: list[RequestRecord] = []
    axis, levels = COMPARED[what]
    for i, value in enumerate(levels):
        leg, window, some, _ = ran(axis, value, 10 * seed + i, "run", seconds, speed)
        after = i * 10**13  # so that legs follow one another on one clock
        held.append((leg, window.shifted(after)))
        for r in some:
            r.due_ns, r.end_ns = r.due_ns + after, r.end_ns + after
            r.sent_ns = None if r.sent_ns is None else r.sent_ns + after
            r.first_ns = None if r.first_ns is None else r.first_ns + after
        records += some
    return frame.load(synthetic.write_plain(path, Plain(held, records),
                                            scenario=to_plain(mix_of(None))))


@functools.cache
def true_changes(what: str) -> dict[tuple[float, str], float]:
    """What SLOWER does to each figure, by long runs of the same arrivals."""
    with tempfile.TemporaryDirectory() as place:
        base, new = (folder(Path(place) / name, what, TRUTH_SEEDS, speed, 1200.0)
                     for name, speed in (("base", 1.0), ("new", SLOWER)))
        return {(d.level, d.name): d.change_frac for d in compare.compare(base, new).differences}


def of_a_comparison(seed: int) -> list[Held]:
    """All intervals of a comparison hold together; "over runs" both servers differ from what they
    are in the mean."""
    found: list[Held] = []
    what = tuple(COMPARED)[seed % len(COMPARED)]
    with tempfile.TemporaryDirectory() as place:
        def run(name: str, i: int, speed: float) -> Run:
            return folder(Path(place) / name, what, 2 * seed + i, speed)
        same = run("base", 0, 1.0)
        no_change: dict[tuple[float, str], float] = {}
        cases = (("the same server", same, run("new", 1, 1.0), no_change),
                 (f"one of {SLOWER} times its speed", same, run("slower", 1, SLOWER),
                  true_changes(what)),
                 ("the same over runs", run("base2", 0, speed_of(2 * seed)),
                  run("new2", 1, speed_of(2 * seed + 1)), no_change))
        for name, base, new, truth in cases:
            got = compare.compare(base, new).differences
            held = [d.lo <= truth.get((d.level, d.name), 0.0) <= d.hi for d in got]
            found.append((f"compare: all differences at once, {what}, {name}", all(held)))
    return found


# ------------------------------------------------------------------------------------- the table

KINDS: dict[str, tuple[Callable[[int], list[Held]], float]] = {
    "run of a minute": (of_a_run, 0.95),
    "run of 20 s": (functools.partial(of_a_run, seconds=SHORT_S), 0.95),
    "search": (of_a_search, 0.95), "knee": (of_a_knee, 0.95), "compare": (of_a_comparison, 0.95)}


LEARNT = {"run of a minute": (RUN_S, RUN_POINTS), "run of 20 s": (SHORT_S, RUN_POINTS),
          "search": (LEG_S, POINTS)}


def wilson(k: int, n: int) -> tuple[float, float]:
    p, z = k / n, 1.96
    middle, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n)


def counted(cases: Iterable[list[Held]]) -> dict[str, tuple[int, int]]:
    """Interval → (held, n)."""
    found: dict[str, tuple[int, int]] = {}
    for case in cases:
        for name, held in case:
            k, n = found.get(name, (0, 0))
            found[name] = k + held, n + 1
    return found


def rows(found: dict[str, tuple[int, int]], nominal: float) -> Iterator[str]:
    for name, (k, n) in found.items():
        sure = 0.995 if "99.5" in name else nominal
        lo, hi = wilson(k, n)
        yield (f"| {name} | {100 * sure:g} % | {n} | {100 * k / n:.1f} % | {100 * lo:.0f}–"
               f"{100 * hi:.0f} % |")


def main() -> None:
    args = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    args.add_argument("--n", type=int, default=40, help="of each kind")
    args.add_argument("--first", type=int, default=0, help="the first seed")
    args.add_argument("--only", default="", help="kinds whose name holds this: "
                      + ", ".join(KINDS))
    args.add_argument("--processes", type=int, default=1)
    given = args.parse_args()
    began = time.perf_counter()
    print("| interval | nominal | n | held | 95 % |\n|---|---|---|---|---|")
    for name, (play, nominal) in KINDS.items():
        if given.only not in name:
            continue
        seeds = range(given.first, given.first + given.n)
        if name in LEARNT:
            with ProcessPoolExecutor(given.processes) as pool:
                learn(*LEARNT[name], functools.partial(pool.map, chunksize=4))
        with ProcessPoolExecutor(given.processes) as pool:  # forked now, so that it knows them
            found = counted(pool.map(play, seeds, chunksize=4))
        print("\n".join(rows(found, nominal)), flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
