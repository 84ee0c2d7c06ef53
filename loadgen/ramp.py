"""The search for the largest safe load, as a pure reducer: what happened → what to do next.

1. Ladder: levels upwards, each held as long as its answers take. Going up stops at a death, at
   errors (lower bound of their share > 5 %), or at a level that is lost; such a one is left early.
   With what time is left in the end, levels past it are shown for the knee, while they bring 5 %
   more throughput.
2. Refine: between the largest level that looks safe and the smallest that does not, where the
   budget allows. Where the next level lies is read off how near the limits came at both (`strain`);
   if they tell nothing, it is halfway.
3. Confirm: the largest level that nothing contradicts is run again and again, with fresh prompts
   and seeds, until its confirmations together prove it or refute it, or it is seen that the budget
   holds no proof: then the next lower one. Only these requests prove; all others only choose.
4. Checks (`checks`), where the budget is larger than the default's: a level of the ladder once more
   (did the server drift?), a soak, Poisson and bursty arrivals at the equivalent rate, 1.3 times
   the load and the way back. Where a soak fails, soaks alone choose the next level and prove it.
A level of the ladder that looks lost after a crowded start is only a direction: it is tried once
more with a whole warm-up, at once where there is time, else with what is left in the end.
An INVALID leg is repeated once, then the search stops: the generator was the limit.

What legs show is in `evidence`, how sure that is in `sequential`, how long things take in `pace`.
"""

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import Struct

from loadgen import checks, evidence, pace, soaks
from loadgen.evidence import Check, Conclusion, Pooled, candidate, conclude, pooled, status
from loadgen.judge import CROWDED, Judgement
from loadgen.leg import Axis, Leg, Phase
from loadgen.pace import SweepPlan
from loadgen.scenario import Load

__all__ = ["Begin", "Check", "Conclusion", "Pooled", "Restart", "RunLeg", "State", "Stop",
           "SweepPlan", "candidate", "conclude", "pooled", "status", "step"]

StopReason = Literal["CONFIRMED", "NO_SAFE_LEVEL", "BUDGET", "GENERATOR_LIMIT", "SERVER_DIED"]

ERROR_STOP = 0.05
GAIN_STOP = 0.05
ENOUGH_N = 20  # requests after which a share under the target is no accident of the start
MAX_BLIND = 3  # legs in turn in which no request was due
MAX_RESTARTS = 2
# Strain of the level to try, in the default budget and in larger ones: what is left is for chance.
AIM: dict[Axis, tuple[float, float]] = {"concurrency": (0.89, 0.965), "rate": (0.74, 0.86)}
BACK_OFF = 0.93  # … and after each level that was tried in vain, while there is little time
FINEST, FINEST_LONG = 1.25, 1.05  # of `SweepPlan`, for the default budget and for larger ones
NEAR = 1.03  # levels closer than this are one
FAR_OFF: dict[Axis, float] = {"concurrency": 0.5, "rate": 0.4}  # of the limits
REPLICATES = 4  # of the answer, where there is time: one lucky run may not be it


class State(Struct, frozen=True):
    """All that the search remembers."""

    plan: SweepPlan
    history: tuple[Judgement, ...] = ()
    restarts: int = 0
    legs: int = 0


class RunLeg(Struct, frozen=True):
    leg: Leg


class Restart(Struct, frozen=True):
    why: str


class Stop(Struct, frozen=True):
    reason: StopReason
    says: str


class Begin(Struct, frozen=True):
    """The server is ready: at the start, and after a restart."""


Event = Begin | Judgement
Action = RunLeg | Restart | Stop


def finest_of(budget_s: float) -> float:
    return FINEST if budget_s < pace.MANY else FINEST_LONG


def step(state: State, event: Event, spent_s: float) -> tuple[State, Action]:
    """The new state and what to do. `spent_s`: time since the sweep began. An Event of a leg
    during which the server died carries `died`."""
    if isinstance(event, Judgement):
        state = msgspec.structs.replace(state, history=(*state.history, event))
        if event.died:
            nothing_left = candidate(state.history, state.plan.criteria) is None
            if not state.plan.can_restart or state.restarts == MAX_RESTARTS or nothing_left:
                return state, Stop("SERVER_DIED", f"{event.leg}: {event.reasons[0]}")
            state = msgspec.structs.replace(state, restarts=state.restarts + 1)
            return state, Restart(event.reasons[0])
    action = _decide(state, spent_s)
    if isinstance(action, RunLeg):
        state = msgspec.structs.replace(state, legs=state.legs + 1)
    return state, action


def _decide(state: State, spent_s: float) -> Action:
    plan, history = state.plan, state.history
    if history and history[-1].measurement == "INVALID" and not history[-1].died:
        return _again(state)
    tested = evidence.usable(history)
    if tested and candidate(tested, plan.criteria) is None:
        return Stop("NO_SAFE_LEVEL", f"even {min(j.value for j in tested):g} is not safe")
    left_s = plan.budget_s - spent_s
    again = _crowded(plan, tested, left_s)
    if again is not None and plan.budget_s >= pace.MANY:
        return _run(state, tested, again, "ladder", pace.ladder_s(plan, tested, again))
    above = _above(plan, tested)
    if above is not None and _goes_up(plan, tested, above, spent_s):
        return _run(state, tested, above, "ladder", pace.ladder_s(plan, tested, above))
    action = _near_the_edge(state, tested, left_s)
    if again is not None and isinstance(action, Stop):
        return _run(state, tested, again, "ladder", pace.ladder_s(plan, tested, again))
    if above is not None and isinstance(action, Stop) and _shows_the_knee(
            plan, tested, above, left_s):
        return _run(state, tested, above, "ladder", pace.ladder_s(plan, tested, above))
    return action


def _above(plan: SweepPlan, tested: Sequence[Judgement]) -> float | None:
    """The ladder's next level; the last one again, if two in turn were too short for their answers.
    Far under the limits each second one is passed over while time is short; and of rates always:
    few requests come there, and no knee is drawn of them."""
    if len(unseen := pace.blind(tested)) > 1:
        return tested[-1].value if len(unseen) <= MAX_BLIND else None
    higher = [x for x in plan.levels if not tested or x > max(j.value for j in tested)]
    hurries = plan.finest is not None and (plan.axis == "rate" or plan.budget_s < pace.MANY)
    skips = hurries and len(higher) > 1 and bool(tested) and (
        tested[-1].strain or 1.0) < FAR_OFF[plan.axis]
    return higher[skips] if higher else None


def _again(state: State) -> Action:
    """An INVALID leg is repeated once."""
    last = state.history[-1]
    tries = sum(j.value == last.value and j.phase == last.phase and j.measurement == "INVALID"
                for j in state.history)
    if tries > 1:
        why = next(f for f in last.findings if f.verdict == "INVALID")
        return Stop("GENERATOR_LIMIT",
                    f"{last.value:g} could not be measured: {why.says}; {why.remedy}")
    tested = evidence.usable(state.history)
    return _run(state, tested, last.value, last.phase, last.window_s,
                checks.arrivals(
                    state.plan, tested, last.phase,
                    evidence.proven(tested, state.plan.criteria)))


def _run(state: State, tested: Sequence[Judgement], value: float, phase: Phase,
         measure_s: float, load: Load | None = None) -> RunLeg:
    return RunLeg(pace.leg(state.plan, tested, state.legs, value, phase, measure_s, state.history,
                           load))


def _goes_up(plan: SweepPlan, tested: Sequence[Judgement], above: float, spent_s: float) -> bool:
    """The next level is worth its time, and what it leaves still pays for a confirmation."""
    if not tested:
        return True
    last = tested[-1]
    if last.phase != "ladder" or last.died or last.error_lower > ERROR_STOP or _is_lost(
            plan, tested, last):
        return False
    answer_s = pace.answer_s(plan, tested, above)
    cost_s = 2 * answer_s + pace.ladder_s(plan, tested, above)
    known_rps = last.achieved_rps
    left_s = plan.budget_s - spent_s
    hopeless = (left_s * known_rps < pace.least_proof_n(plan.criteria) if plan.axis == "rate"
                else pace.proof_s(plan, tested, last.value, left_s) is None)
    if hopeless:
        return left_s > cost_s  # nothing can be proven here; higher up answers come faster
    proof_s = min(1.5 * pace.PROOF_N / max(known_rps, 0.1), plan.budget_s / 3) + 3 * answer_s
    return left_s > cost_s + proof_s


def _is_lost(plan: SweepPlan, tested: Sequence[Judgement], j: Judgement) -> bool:
    return j.load == "UNSAFE" or (j.n >= ENOUGH_N and not evidence.looks_good(
        tested, j.value, plan.criteria))


def _crowded(plan: SweepPlan, tested: Sequence[Judgement], left_s: float) -> float | None:
    """The lowest level that missed the target, if only a leg that crowded its own start says so,
    and a whole warm-up can be had."""
    missed = [x for x in evidence.levels_of(tested)
              if evidence.has_missed(tested, x, plan.criteria)]
    here = [j for j in tested if missed and j.value == missed[0] and j.phase in evidence.OF_LEVEL]
    if not here or not all(j.crowded and j.phase == "ladder" for j in here):
        return None
    answer_s = pace.answer_s(plan, tested, missed[0])
    if len(here) > 1 or pace.most_warmup_s(plan) < CROWDED * answer_s:
        return None
    cost_s = pace.cost_s(plan, tested, missed[0], pace.ladder_s(plan, tested, missed[0]))
    return missed[0] if cost_s <= left_s else None


def _shows_the_knee(plan: SweepPlan, tested: Sequence[Judgement], above: float,
                    left_s: float) -> bool:
    """With the time that is left: a level past the lost ones, while throughput grows."""
    ladder = [j for j in tested if j.phase == "ladder"]
    if len(ladder) < 2 or any(j.died or j.error_lower > ERROR_STOP for j in tested):
        return False
    last, before = ladder[-1], ladder[-2]
    if not _is_lost(plan, tested, last) or (
            last.achieved_rps < (1 + GAIN_STOP) * before.achieved_rps):
        return False
    answer_s = pace.answer_s(plan, tested, above)  # a lost level is left early
    return left_s > 2 * answer_s + pace.MIN_LEG_S


# ------------------------------------------------------------------------------------- the edge


def _near_the_edge(state: State, tested: Sequence[Judgement], left_s: float) -> Action:
    """Between what looks safe and what does not. What is being confirmed is confirmed to its end;
    then a level between; then those of the ladder, from the top."""
    plan = state.plan
    safe = evidence.proven(tested, plan.criteria)
    if soaks.failed(tested, plan.criteria):
        return _by_soaks(state, tested, safe, left_s)
    spare_s = left_s - checks.reserve_s(plan)
    room_s = spare_s if safe is not None else max(spare_s, left_s)
    hopes = [x for x in evidence.promising(tested, plan.criteria) if safe is None or x > safe]
    if not hopes and safe is None:  # nothing looks good: what is not contradicted is looked at
        hopes = [x for x in [candidate(tested, plan.criteria)] if x is not None]
    begun = [x for x in hopes if any(j.value == x and j.phase == "confirm" for j in tested)]
    if (found := _confirm(state, tested, begun[::-1], room_s)) is not None:
        return found
    if safe is not None and plan.budget_s >= pace.MANY and sum(
            j.value == safe and j.phase == "confirm" for j in tested) < REPLICATES:
        measure_s = pace.leg_s(plan, tested, safe)
        if pace.cost_s(plan, tested, safe, measure_s) <= room_s:
            return _run(state, tested, safe, "confirm", measure_s)
    if (found := _between_or_below(state, tested, hopes, begun, room_s)) is not None:
        return found
    if plan.budget_s >= pace.MANY:  # those given up get what nobody else wants
        for level in reversed(begun):
            measure_s = pace.leg_s(plan, tested, level)
            if pace.cost_s(plan, tested, level, measure_s) <= room_s:
                return _run(state, tested, level, "confirm", measure_s)
    if safe is None:
        level = candidate(tested, plan.criteria) or 0.0
        return Stop("BUDGET", f"what is left of {plan.budget_s:.0f} s is too short to confirm "
                    f"{level:g}; give more with --budget")
    return _check(state, tested, safe, left_s)


def _check(state: State, tested: Sequence[Judgement], safe: float, left_s: float) -> Action:
    wanted = checks.next_check(state.plan, tested, safe, left_s)
    if wanted is None:
        return Stop("CONFIRMED", f"{safe:g} is confirmed")
    return _run(state, tested, wanted.value, wanted.phase, wanted.held_s, wanted.load)


def _by_soaks(state: State, tested: Sequence[Judgement], safe: float | None,
              left_s: float) -> Action:
    """A soak failed where short runs had held: nothing counts any more that was not soaked."""
    wanted = checks.next_soak(state.plan, tested, left_s)
    if wanted is not None:
        return _run(state, tested, wanted.value, wanted.phase, wanted.held_s)
    if safe is not None:
        return _check(state, tested, safe, left_s)
    level = candidate(tested, state.plan.criteria) or 0.0
    return Stop("BUDGET", f"short runs held and a soak did not, and what is left of "
                f"{state.plan.budget_s:.0f} s is too short to soak {level:g}; give more with "
                "--budget")


def _confirm(state: State, tested: Sequence[Judgement], levels: Sequence[float],
             room_s: float) -> Action | None:
    """A leg that proves the first of these levels whose proof can be had."""
    for level in levels:
        if (measure_s := pace.proof_s(state.plan, tested, level, room_s)) is not None:
            return _run(state, tested, level, "confirm", measure_s)
    return None


def _between_or_below(state: State, tested: Sequence[Judgement], hopes: Sequence[float],
                      begun: Sequence[float], room_s: float) -> Action | None:
    """What nobody confirmed yet. Levels that were begun are given up by now."""
    plan, fresh = state.plan, [x for x in hopes if x not in begun]
    tries = fresh[::-1]
    if (low := max(fresh, default=evidence.proven(tested, plan.criteria))) is not None:
        middle, guided = _between(plan, tested, low)
        if middle and not guided and _is_worth_a_look(plan, tested, middle, low, room_s):
            return _run(state, tested, middle, "refine", pace.refine_s(plan, tested, middle))
        if middle:
            tries.insert(0 if guided else len(tries), middle)
    return _confirm(state, tested, tries, room_s)


def _is_worth_a_look(plan: SweepPlan, tested: Sequence[Judgement], middle: float, low: float,
                     left_s: float) -> bool:
    """What a short leg there leaves holds a proof, of what is surely there or of what may be."""
    is_safe = low == evidence.proven(tested, plan.criteria)
    look_s = pace.cost_s(plan, tested, middle, pace.refine_s(plan, tested, middle))
    return left_s - look_s >= pace.proof_wanted_s(plan, tested, middle if is_safe else low)


def _between(plan: SweepPlan, tested: Sequence[Judgement],
             low: float) -> tuple[float | None, bool]:
    """A level between the best one and the next that does not look safe, a little under where the
    limits are reached; and whether that was read off the levels, or is but their middle. None: it
    is not worth it."""
    high = min((x for x in evidence.levels_of(tested) if x > low), default=None)
    if plan.finest is None or high is None:
        return None, False
    safe = evidence.proven(tested, plan.criteria)
    tried = {j.value for j in tested if j.phase == "confirm" and j.value > (safe or low)}
    short, long = AIM[plan.axis]
    aim = short * BACK_OFF ** len(tried) if plan.budget_s < pace.MANY else long
    value, guided = evidence.crossing(tested, high, aim), True
    if value is None:
        value, guided = math.sqrt(low * high), False
    value = min(value, low * (high / low) ** 0.9)
    value = float(math.floor(value)) if plan.axis == "concurrency" else float(f"{value:.3g}")
    least = low if safe == low or not guided else 0.0  # what is not proven may be left for less
    if high <= plan.finest * low and (not guided or value >= low / NEAR):
        return None, False
    known = [x for x in evidence.levels_of(tested) if x / NEAR < value < x * NEAR]
    if value <= least * NEAR or value <= (safe or 0.0) or known:
        return None, False
    return value, guided
