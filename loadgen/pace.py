"""How long things take: answers, legs, proofs. Guesses for planning; nothing is concluded of
them."""

import math
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from loadgen import evidence, sequential
from loadgen.judge import Criteria, Judgement
from loadgen.leg import Axis, Leg, Phase
from loadgen.scenario import Closed, Load, Open, PerSecond

MIN_LEG_S = 7.0
LOW_LEG_S = 4.0  # of a level that is far from the limits
FAR = 0.7  # of the limits; under it a level is held for less, and warmed up for less
FAR_WARMUP = 0.5
KNEE_WARMUP = 0.45  # of an answer: a level past the first lost one is only for the knee
LINE_N = 10  # requests of a level by whose answers those of the next one are foreseen
GROWTH, FULL_GROWTH = 1.25, 1.8  # of an answer's time from one level to the next
LEG_OF_BUDGET = 0.07  # … but no level may eat the confirmation's time
LEG_OF_E2E = 1.5  # a level is measured for this many answers: less would only see its start
BLIND = 3.0  # times a leg in which no request was due: so long may answers be that were not seen
BLIND_OF_BUDGET = 0.3  # what the next level may then take
PROOF_N = 170  # requests that prove 0.95 with one miss, in two legs
LEG_N = 110  # of a confirmation's leg: many short legs tell more than a long one …
LEAST_N = 60  # … but each has its warm-up
REFINE_N = 60
MANY = 600.0  # a budget that holds more than the default sweep, s


class SweepPlan(Struct, frozen=True):
    """What the search may do. `levels` ascend; a rate's arrivals are Poisson. `finest`: levels
    between these may be tried, until safe and unsafe are no further apart than this factor; None:
    only these. `checks`: when it has its answer, it tries it with bursts, a soak, an overload, as
    far as the budget goes."""

    axis: Axis
    levels: tuple[float, ...]
    budget_s: float
    seed: int
    criteria: Criteria
    can_restart: bool
    finest: float | None = None
    checks: bool = False


Tested = Sequence[Judgement]


def answer_s(plan: SweepPlan, tested: Tested, value: float) -> float:
    """What an answer will take at `value`, s. In a closed loop twice the load makes it a little
    longer, and almost twice as long once the server is full."""
    here = [j.answer_s for j in tested if j.value == value and j.answer_s]
    blind_s = max((BLIND * j.window_s for j in blind(tested)), default=0.0)
    if here:
        return max(here[-1], blind_s)
    took = [j for j in tested if j.answer_s]
    if not took:
        return max(1.0, blind_s)
    near = max((j for j in took if j.value < value), key=lambda j: j.value, default=took[-1])
    assert near.answer_s is not None
    if plan.axis == "rate" or near.value >= value:
        return near.answer_s
    doublings = math.log2(value / near.value)
    if _is_lost(plan, near) or any(_is_lost(plan, j) and j.value > value for j in tested):
        return max(blind_s, float(near.answer_s * FULL_GROWTH ** doublings))
    least_s = float(near.answer_s * GROWTH ** doublings)
    most_s = float(near.answer_s * FULL_GROWTH ** doublings)
    return max(blind_s, min(most_s, max(least_s, _on_a_line(took, near, value) or 0.0)))


def _on_a_line(took: Tested, near: Judgement, value: float) -> float | None:
    """A batch's step takes a fixed time and some for each request in it, so answers do, too. None:
    no two levels below rest on enough answers."""
    before = max((j for j in took if j.value < near.value and j.n >= LINE_N),
                 key=lambda j: j.value, default=None)
    if before is None or near.n < LINE_N or not before.answer_s or not near.answer_s:
        return None
    slope_s = (near.answer_s - before.answer_s) / (near.value - before.value)
    return near.answer_s + slope_s * (value - near.value)


def _is_lost(plan: SweepPlan, j: Judgement) -> bool:
    """Its requests missed the target, whatever the reason."""
    return j.load == "UNSAFE" or j.upper < plan.criteria.target


def blind(tested: Tested) -> list[Judgement]:
    """The last legs of a closed loop's ladder, as far as no request was due in them: answers take
    longer."""
    seen = [i for i, j in enumerate(tested)
            if j.n or j.died or j.phase != "ladder" or j.open_loop]
    return list(tested[seen[-1] + 1 if seen else 0:])


def rps(plan: SweepPlan, tested: Tested, value: float) -> float:
    """Answers per second at `value`."""
    here = [j.achieved_rps for j in tested if j.value == value]
    if any(here):
        return max(0.01, *here)
    return max(0.01, value if plan.axis == "rate" else value / answer_s(plan, tested, value))


def rps_near(plan: SweepPlan, tested: Tested, value: float) -> float:
    """Answers per second at `value`, read off the levels around it where it was not tried."""
    seen = {j.value: rps(plan, tested, j.value) for j in tested
            if j.phase in evidence.OF_LEVEL and j.achieved_rps > 0}
    low, high = (max((x for x in seen if x < value), default=None),
                 min((x for x in seen if x > value), default=None))
    if value in seen or low is None or high is None:
        return rps(plan, tested, value)
    return seen[low] + (seen[high] - seen[low]) * (value - low) / (high - low)


def ladder_s(plan: SweepPlan, tested: Tested, value: float) -> float:
    """How long a level of the ladder is measured, s."""
    least_s = LOW_LEG_S if not tested or is_far(tested, value) else MIN_LEG_S
    share = BLIND_OF_BUDGET if blind(tested) else LEG_OF_BUDGET
    return max(least_s, min(LEG_OF_E2E * answer_s(plan, tested, value), share * plan.budget_s))


def is_far(tested: Tested, value: float) -> bool:
    """The level before was so far from the limits that this one will not be near them, as the two
    before it show."""
    told = [(j.value, j.strain) for j in tested[-2:] if j.strain]
    if not told or told[-1][1] >= FAR or tested[-1].strain is None:
        return False
    (a, low), (b, high) = told[0], told[-1]
    if not a < b < value or high <= low:
        return True
    return bool(high * (high / low) ** (math.log(value / b) / math.log(b / a)) < FAR)


def refine_s(plan: SweepPlan, tested: Tested, value: float) -> float:
    """How long a level between two others is looked at, s."""
    n = REFINE_N if plan.budget_s < MANY else 2 * REFINE_N
    return max(MIN_LEG_S, LEG_OF_E2E * answer_s(plan, tested, value),
               n / rps(plan, tested, value))


def cost_s(plan: SweepPlan, tested: Tested, value: float, measure_s: float) -> float:
    """Of a leg with its warm-up and its last answers."""
    each_s = answer_s(plan, tested, value)
    return max(1.0, each_s) + measure_s + 1.3 * each_s


def proof_n(plan: SweepPlan, tested: Tested, level: float) -> int | None:
    """How many more requests a proof of `level` takes, as it looks; None: no number would do."""
    seen = evidence.pooled(tested, level, plan.criteria)
    if seen is None:
        scale = (1 - 0.95) / (1 - plan.criteria.target)
        return math.ceil(PROOF_N * scale)
    return seen.more_n


def least_proof_n(criteria: Criteria) -> int:
    """Requests of one leg that prove, if all are good."""
    n = 8
    while sequential.share([[(n, n)]], criteria.target, criteria.confidence,
                           criteria.runs_differ).lower < criteria.target:
        n += max(1, n // 20)
        if n > 100_000:
            break
    return n


def proof_s(plan: SweepPlan, tested: Tested, level: float, left_s: float) -> float | None:
    """How long the next leg of a confirmation is measured, s; None if a proof cannot be had in
    what is left. A room that just holds one without misses is used: it proves or it does not, and
    nothing else could be done with it."""
    need = proof_n(plan, tested, level)
    if need is None:
        return None
    per_s, each_s = rps(plan, tested, level), answer_s(plan, tested, level)
    least_s = max(MIN_LEG_S, LEG_OF_E2E * each_s)
    overhead_s = cost_s(plan, tested, level, 0.0)
    room_s = left_s - overhead_s
    seen = evidence.pooled(tested, level, plan.criteria)
    if seen is None:
        need_s = least_proof_n(plan.criteria) / per_s
        if not evidence.looks_good(tested, level, plan.criteria):  # to refute takes few
            need_s = 0.0
    else:
        need_s = need / per_s
    if room_s < max(least_s, need_s):
        return None
    scale = (1 - 0.95) / (1 - plan.criteria.target)
    wanted_s = max(least_s, min(max(1.15 * need, LEAST_N * scale), LEG_N * scale) / per_s)
    if room_s < wanted_s + overhead_s + least_s:  # it is the last: all that it may need
        return min(room_s, max(wanted_s, 1.15 * need / per_s))
    return wanted_s


def leg_s(plan: SweepPlan, tested: Tested, level: float) -> float:
    """How long one more leg of a confirmation is measured that nobody counts on, s."""
    scale = (1 - 0.95) / (1 - plan.criteria.target)
    return max(MIN_LEG_S, LEG_OF_E2E * answer_s(plan, tested, level),
               LEG_N * scale / rps(plan, tested, level))


def proof_wanted_s(plan: SweepPlan, tested: Tested, level: float) -> float:
    """How long a proof of `level` takes with all its legs, s, as it looks."""
    need = proof_n(plan, tested, level)
    if need is None:
        return math.inf
    legs = max(1, math.ceil(need / (LEG_N * (1 - 0.95) / (1 - plan.criteria.target))))
    measure_s = max(legs * max(MIN_LEG_S, LEG_OF_E2E * answer_s(plan, tested, level)),
                    need / rps(plan, tested, level))
    return measure_s + legs * cost_s(plan, tested, level, 0.0)


def leg(plan: SweepPlan, tested: Tested, number: int, value: float, phase: Phase,
        measure_s: float, history: Tested, load: Load | None = None) -> Leg:
    """Warm-up: over it a closed loop's slots start one by one, for as long as an answer takes, or
    as long as it took to settle there; in a shorter one their prompts crowd each other, which the
    measured requests would feel. `number`: of legs so far; `history`: all legs, INVALID too."""
    replicate = sum(j.value == value and j.phase == phase for j in history)
    each_s = answer_s(plan, tested, value)
    share = 1.0
    if phase == "ladder" and replicate == 0 and any(_is_lost(plan, j) for j in tested):
        share = KNEE_WARMUP
    elif phase == "ladder" and replicate == 0 and is_far(tested, value):
        share = FAR_WARMUP
    settled_s = max((j.settled_s for j in tested if j.value == value and j.settled_s
                     and j.phase in evidence.OF_LEVEL), default=0.0)
    warmup_s = max(1.0, min(max(share * each_s, min(settled_s, 2 * each_s)), most_warmup_s(plan)))
    return Leg(id=f"{phase}-{value:g}-r{replicate}", axis=plan.axis, value=value, phase=phase,
               replicate=replicate, seed=plan.seed * 10_000 + number,
               load=load or load_of(plan.axis, value), warmup_s=round(warmup_s, 3),
               measure_s=round(measure_s, 3),
               cut_below=None if phase in ("overload", "recover") else plan.criteria.target)


def most_warmup_s(plan: SweepPlan) -> float:
    return 1.2 * LEG_OF_BUDGET * plan.budget_s


def load_of(axis: Axis, value: float) -> Load:
    return (Closed(concurrency=int(value)) if axis == "concurrency"
            else Open(rate_rps=PerSecond(value)))


def open_load(per_s: float, arrivals: Literal["poisson", "gamma"]) -> Load:
    return Open(rate_rps=PerSecond(round(per_s, 4)), arrivals=arrivals,
                cv=2.0 if arrivals == "gamma" else 1.0)
