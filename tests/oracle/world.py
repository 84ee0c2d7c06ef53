"""A server whose true attainment is known: the Bernoulli oracle. Legs take simulated time and give
judgements; no request is made.

At load c a request is good with probability A(c) in the mean over runs. In one run it is
Φ(z(c) + u + v(t)): `u` is drawn for each leg (runs differ), `v` is an autoregressive process in
time (requests of one moment share their fate), both normal on the probit scale, so that the mean is
exactly A(c) = Φ(z(c) / √(1 + σᵤ² + σᵥ²)). A falls through the target at c*, at a stated slope.
A request is good where its own normal Z with that mean is above 0, and e^(−STRAIN·Z) is how near it
came to its limits; a world that does not tell this is one whose SLO is but a complete answer.
"""

import math
import random
from dataclasses import dataclass
from statistics import NormalDist

from loadgen import metrics, ramp, worth
from loadgen.judge import Criteria, Judgement, LoadVerdict
from loadgen.leg import Axis, Leg
from loadgen.ramp import SweepPlan
from loadgen.supervise import is_lost

N = NormalDist()
SLOPES = (1.8, 4.0, 8.0)  # of A's probit per e-fold of load; the simulator's is 6 to 8
STRAIN = {"concurrency": 0.12, "rate": 0.25}  # by how much a unit of Z is nearer: the simulator's
FIRST_S = 3.0  # an answer of an idle server
START_S = 3.0  # before the first leg
FAILED = 0.5  # of the misses: errors and timeouts, which a percentile of survivors leaves out
MOST = 128.0


@dataclass(frozen=True)
class World:
    """`safe`: c*, the largest load with A ≥ target. `run_sd`, `clump_sd`: σᵤ and σᵥ on the probit
    scale (0.1 is a point of attainment at 95 %); `clump_s`: how long clumps last."""

    axis: Axis
    safe: float
    slope: float
    run_sd: float
    clump_sd: float
    clump_s: float = 10.0
    target: float = 0.95
    tells: bool = True  # how near requests came to their limits
    first_s: float = FIRST_S

    def attainment(self, load: float) -> float:
        """A(c)."""
        return N.cdf(self._z(load))

    def _z(self, load: float) -> float:
        return N.inv_cdf(self.target) - self.slope * math.log(load / self.safe)

    def rps(self, load: float) -> float:
        if self.axis == "rate":
            return min(load, 2 * self.safe)
        return load / self.answer_s(load)

    def answer_s(self, load: float) -> float:
        """Twice as long at c* as on the idle server."""
        return self.first_s * (1 + load / self.safe)

    def requests(self, load: float, u: float, v: float, n: int,
                 rng: random.Random) -> list[float]:
        """Z of n requests: those above 0 are good."""
        mean = self._z(load) * math.sqrt(1 + self.run_sd**2 + self.clump_sd**2) + u + v
        return [rng.gauss(mean, 1) for _ in range(n)]


def draw(rng: random.Random, axis: Axis, run_sd: float, clump_sd: float,
         target: float = 0.95, first_s: float = FIRST_S) -> World:
    """A world at random: where the edge lies (3 to 16 answers per second in the closed loop, 2 to
    12 in the open one) and how steep it is."""
    safe = math.exp(rng.uniform(math.log(16), math.log(96)))
    return World(axis, safe if axis == "concurrency" else safe / 8, rng.choice(SLOPES), run_sd,
                 clump_sd, target=target, first_s=first_s)


class Bench:
    """Runs legs in a world and counts the time they take."""

    def __init__(self, world: World, seed: int, criteria: Criteria) -> None:
        self.world, self.criteria = world, criteria
        self.now_s, self.load_s = START_S, 0.0
        self.ladder = ladder_of(world.axis, MOST if world.axis == "concurrency" else MOST / 8)
        self._rng = random.Random(seed)
        self._v = self._rng.gauss(0, world.clump_sd)

    def blocks(self, load: float, seconds: float, leg: Leg | None = None) -> list[tuple[int, int]]:
        """(good, n) of stretches of an answer or 2 s, whichever is longer. With `leg`, it is left
        where the running sweep would leave it."""
        w, rng = self.world, self._rng
        u = rng.gauss(0, w.run_sd)
        answer_s = w.answer_s(load)
        count = max(1, round(seconds / max(2.0, answer_s)))
        each_s = seconds / count
        keeps = math.exp(-each_s / w.clump_s)
        found: list[tuple[int, int]] = []
        self.drawn: list[float] = []
        for _ in range(count):
            self._v = keeps * self._v + rng.gauss(0, w.clump_sd) * math.sqrt(1 - keeps**2)
            mean = w.rps(load) * each_s
            n = max(0, round(rng.gauss(mean, math.sqrt(mean if w.axis == "rate" else mean / 10))))
            drawn = w.requests(load, u, self._v, n, rng)
            self.drawn += drawn
            found.append((sum(z > 0 for z in drawn), n))
            self.now_s += each_s
            good, done = sum(g for g, _ in found), sum(m for _, m in found)
            if leg is not None and is_lost(leg, done, good, leg.warmup_s + len(found) * each_s):
                break
        self.load_s += len(found) * each_s
        return found

    def run(self, leg: Leg) -> Judgement:
        assert leg.measure_s is not None
        answer_s = self.world.answer_s(leg.value)
        self.now_s += leg.warmup_s
        found = self.blocks(leg.value, leg.measure_s, leg)
        self.now_s += answer_s
        self.load_s += leg.warmup_s + answer_s
        return judgement(leg, found, answer_s, self.criteria, self._strain())

    def _strain(self) -> float | None:
        if not self.world.tells or not self.drawn:
            return None
        at = math.floor((1 - self.world.target) * len(self.drawn))
        return math.exp(-STRAIN[self.world.axis] * sorted(self.drawn)[at])

    def point(self, load: float, seconds: float) -> tuple[int, int]:
        """(good, n) of one run, as other tools take it: warm-up and drain as ours."""
        answer_s = self.world.answer_s(load)
        self.load_s += 2 * answer_s
        found = self.blocks(load, seconds)
        return sum(g for g, _ in found), sum(n for _, n in found)

    def failed(self, misses: int) -> int:
        return sum(self._rng.random() < FAILED for _ in range(misses))


def judgement(leg: Leg, blocks: list[tuple[int, int]], answer_s: float,
              criteria: Criteria, strain: float | None = None) -> Judgement:
    """What the judge says of a leg with these blocks."""
    good, n = sum(g for g, _ in blocks), sum(m for _, m in blocks)
    lower_worth, upper_worth = worth.of(leg, 1.0, blocks, (criteria.runs_differ,
                                                           criteria.refutes_differ))
    lower = metrics.lower_bound(good * lower_worth, n * lower_worth, criteria.confidence)
    upper = metrics.upper_bound(good * upper_worth, n * upper_worth, criteria.refute)
    load: LoadVerdict = ("UNSAFE" if upper < criteria.target
                         else "SAFE" if lower >= criteria.target else "UNRESOLVED")
    held_s = leg.measure_s or 1.0
    return Judgement(
        leg=leg.id, value=leg.value, phase=leg.phase, n=n, good=good, void=0, lower=lower,
        upper=upper, measurement="VALID", load=load, reasons=[f"{good} of {n}"], findings=[],
        misses={}, outcomes={}, errors=0, error_lower=0.0, classes={}, refuted_classes=[],
        cut=False, died=False, window_s=held_s, offered_rps=n / held_s, achieved_rps=n / held_s,
        goodput_rps=good / held_s, ttft_p50_s=None, tpot_p50_s=None, e2e_p50_s=answer_s,
        answer_s=answer_s, open_loop=leg.axis == "rate", blocks=blocks, strain=strain)


@dataclass(frozen=True)
class Found:
    """What a search said, and what it cost."""

    safe: float | None
    load_s: float
    took_s: float
    legs: int
    conclusion: ramp.Conclusion | None = None


def ladder_of(axis: Axis, most: float) -> tuple[float, ...]:
    if axis == "rate":
        return tuple(most / 2**k for k in range(6, -1, -1))
    return tuple(float(2**k) for k in range(int(most).bit_length()))


def search(world: World, seed: int, budget_s: float) -> Found:
    """The sweep of `loadgen sweep` in this world."""
    criteria = Criteria(target=world.target)
    bench = Bench(world, seed, criteria)
    plan = SweepPlan(world.axis, bench.ladder, budget_s, seed, criteria,
                     can_restart=False, finest=ramp.finest_of(budget_s), checks=True)
    state, action = ramp.step(ramp.State(plan), ramp.Begin(), bench.now_s)
    judged: list[Judgement] = []
    while isinstance(action, ramp.RunLeg):
        judged.append(bench.run(action.leg))
        state, action = ramp.step(state, judged[-1], bench.now_s)
    end = ramp.conclude(judged, world.axis, criteria)
    return Found(end.safe, bench.load_s, bench.now_s, len(judged), end)
