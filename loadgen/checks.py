"""What is tried once a level seems to be the answer, and what a soak that fails means for the
search. Pure; each gives the next leg that is wanted, or None where there is none or no time."""

import math
from collections.abc import Sequence

from msgspec import Struct

from loadgen import evidence, pace, soaks
from loadgen.judge import Judgement
from loadgen.leg import Phase
from loadgen.pace import SweepPlan
from loadgen.scenario import Load

SHARE = 0.42  # of a larger budget
OVERLOAD = 1.3
HELD: dict[Phase, float] = {  # share of the budget for which a check is held
    "reference": 0.02, "soak": 0.20, "poisson": 0.05, "burst": 0.05, "overload": 0.03,
    "recover": 0.03}
NEXT_SOAK = 0.5  # of the first one: there may have to be several
SOAK_OF_E2E = 8.0  # answers that a soak lasts at least: it is to see what comes later
SOAKS_APART = 1.1  # the highest level whose soak held and the lowest whose did not: near enough
SLOWER = 0.8  # of the level whose throughput was too much for open arrivals …
SLOWER_TRIES = 4  # … so often


class Wanted(Struct, frozen=True):
    value: float
    phase: Phase
    held_s: float
    load: Load | None = None  # None: the level's


def wants(plan: SweepPlan) -> bool:
    return plan.checks and plan.budget_s >= pace.MANY


def reserve_s(plan: SweepPlan) -> float:
    return SHARE * plan.budget_s if wants(plan) else 0.0


def next_check(plan: SweepPlan, tested: Sequence[Judgement], safe: float,
               left_s: float) -> Wanted | None:
    """In this order, each if it still fits."""
    if not wants(plan):
        return None
    anywhere = {j.phase for j in tested}
    done = {j.phase for j in tested if j.value == safe} | (anywhere & {*evidence.ELSEWHERE,
                                                                       "recover"})
    for kind in evidence.CHECKS:
        if kind == "burst" and (found := _slower(plan, tested, safe, left_s)) is not None:
            return found
        if kind in done or (kind == "poisson" and plan.axis == "rate") or (
                kind == "recover" and "overload" not in done):
            continue
        value = {"overload": _over(plan, safe), "reference": _reference(tested, safe)}.get(
            kind, safe)
        held_s = (_soak_s(plan, tested, safe, left_s) if kind == "soak"
                  else _held_s(plan, tested, value, kind))
        wanted = Wanted(value, kind, held_s, arrivals(plan, tested, kind, safe))
        if _fits(plan, tested, wanted, left_s):
            return wanted
    return None


def _held_s(plan: SweepPlan, tested: Sequence[Judgement], value: float, kind: Phase) -> float:
    return max(HELD[kind] * plan.budget_s, pace.LEG_OF_E2E * pace.answer_s(plan, tested, value))


def _soak_s(plan: SweepPlan, tested: Sequence[Judgement], value: float, left_s: float) -> float:
    """The first soak has its share of the budget; later ones half of it, or what is left, as
    long as that is many answers."""
    again = any(j.phase == "soak" for j in tested)
    wanted_s = max(HELD["soak"] * plan.budget_s * (NEXT_SOAK if again else 1.0),
                   _least_soak_s(plan, tested, value))
    room_s = left_s - pace.cost_s(plan, tested, value, 0.0)
    return max(_least_soak_s(plan, tested, value), min(wanted_s, room_s))


def _least_soak_s(plan: SweepPlan, tested: Sequence[Judgement], value: float) -> float:
    return max(pace.MIN_LEG_S, SOAK_OF_E2E * pace.answer_s(plan, tested, value),
               pace.least_proof_n(plan.criteria) / pace.rps(plan, tested, value))


def _fits(plan: SweepPlan, tested: Sequence[Judgement], wanted: Wanted, left_s: float) -> bool:
    return pace.cost_s(plan, tested, wanted.value, wanted.held_s) <= left_s


def _over(plan: SweepPlan, safe: float) -> float:
    return float(math.ceil(OVERLOAD * safe)) if plan.axis == "concurrency" else OVERLOAD * safe


def _reference(tested: Sequence[Judgement], safe: float) -> float:
    """The largest level of the ladder that is not above the safe one: it was seen at the start."""
    return max((j.value for j in tested if j.phase == "ladder" and j.value <= safe), default=safe)


def arrivals(plan: SweepPlan, tested: Sequence[Judgement], kind: Phase,
             level: float | None) -> Load | None:
    """Of the checks with arrivals of their own: as many per second as the level has answers. None:
    the level's own load."""
    if kind not in ("poisson", "burst") or level is None:
        return None
    if plan.axis == "rate":
        per_s = level
    else:  # sessions per second that make as many requests as the level did
        per_s = pace.rps_near(plan, tested, level) / _each_session(tested, level)
    return pace.open_load(per_s, "poisson" if kind == "poisson" else "gamma")


def _each_session(tested: Sequence[Judgement], level: float) -> float:
    """Requests of a session, in the mean of a level's legs, or of the nearest level's."""
    near = min((abs(j.value - level) for j in tested), default=0.0)
    each = [j.each_session for j in tested if abs(j.value - level) == near]
    return sum(each) / len(each) if each else 1.0


def _slower(plan: SweepPlan, tested: Sequence[Judgement], safe: float,
            left_s: float) -> Wanted | None:
    """Open arrivals at the safe level's throughput missed the target: at that of a lower level, so
    that it is known what they may come at."""
    tried = [j for j in tested if j.phase == "poisson" and j.value <= safe]
    if plan.axis == "rate" or not tried or len(tried) > SLOWER_TRIES or any(
            evidence.keeps(j, plan.criteria) for j in tried):
        return None
    value = float(math.floor(SLOWER * min(j.value for j in tried)))
    if value < 1:
        return None
    wanted = Wanted(value, "poisson", _held_s(plan, tested, value, "poisson"),
                    arrivals(plan, tested, "poisson", value))
    return wanted if _fits(plan, tested, wanted, left_s) else None


# ------------------------------------------------------------------------------------- by soaks


def next_soak(plan: SweepPlan, tested: Sequence[Judgement], left_s: float) -> Wanted | None:
    """Where short runs were shown to mislead, only soaks choose: halfway between the largest level
    that may be safe and the lowest whose soak did not hold, until they are near each other."""
    safe = evidence.proven(tested, plan.criteria)
    value = _to_soak(plan, tested, safe)
    if value is None:
        return None
    kept_s = 0.0 if safe is None else 2 * HELD["poisson"] * plan.budget_s
    wanted = Wanted(value, "soak", _soak_s(plan, tested, value, left_s - kept_s))
    return wanted if _fits(plan, tested, wanted, left_s - kept_s) else None


def _to_soak(plan: SweepPlan, tested: Sequence[Judgement], safe: float | None) -> float | None:
    above = 0.0 if safe is None else safe
    soaked = {j.value for j in tested if j.phase == "soak" and j.value > above}
    high = min(soaked | {*soaks.failed(tested, plan.criteria)} - {safe}, default=None)
    hopes = [x for x in evidence.promising(tested, plan.criteria)
             if above < x and (high is None or x < high)]
    if high is None or high <= SOAKS_APART * above or (safe is None and not hopes):
        return None
    low = safe if safe is not None else hopes[-1]
    if plan.finest is None or high <= SOAKS_APART**2 * low:  # nothing worth a soak lies between
        return hopes[-1] if hopes else None
    middle = math.sqrt(low * high)
    return float(math.floor(middle)) if plan.axis == "concurrency" else float(f"{middle:.3g}")
