"""The search for the largest safe load, as a pure reducer: what happened → what to do next.

1. Ladder: levels upwards, each held as long as its answers take. Going up stops at a death, at
   errors (lower bound of their share > 5 %), or at a level that is UNSAFE and brought < 5 % more
   throughput than the one before. A level that is surely lost is left early.
2. Confirm: the largest level that nothing contradicts is run again, with fresh prompts and seed,
   for as many requests as a proof takes. Only these requests prove; the ladder only chooses.
   Lost: the next lower level is confirmed, while the budget lasts.
An INVALID leg is repeated once, then the search stops: the generator was the limit.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import Struct

from loadgen import metrics
from loadgen.judge import Criteria, Judgement, LoadVerdict
from loadgen.leg import Axis, Leg, Phase
from loadgen.scenario import Closed, Load, Open, PerSecond

StopReason = Literal["CONFIRMED", "NO_SAFE_LEVEL", "BUDGET", "GENERATOR_LIMIT", "SERVER_DIED"]

ERROR_STOP = 0.05
GAIN_STOP = 0.05
MAX_RESTARTS = 2
MAX_CONFIRMS = 2  # of one level without a result
LUCK = 0.1  # a level further under the target than this is not confirmed, however few it rests on
PROOF_N = 300  # requests that prove 0.95 at 95 % with up to 8 misses (2.7 %)
PROOF_MARGIN = 1.1  # over the fewest that can prove: throughput is an estimate
MIN_LEG_S = 7.0
KNEE_WARMUP = 0.45  # of an answer: a level past the first lost one is only for the knee
GROWTH, FULL_GROWTH = 1.25, 1.8  # of an answer's time from one level to the next
LEG_OF_BUDGET = 0.07  # … but no level may eat the confirmation's time
LEG_OF_E2E = 1.5  # a level is measured for this many answers: less would only see its start


class SweepPlan(Struct, frozen=True):
    """What the search may do. `levels` ascend; a rate's arrivals are Poisson."""

    axis: Axis
    levels: tuple[float, ...]
    budget_s: float
    seed: int
    criteria: Criteria
    can_restart: bool


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
    tested = [j for j in history if j.measurement != "INVALID" or j.died]
    above = [x for x in plan.levels if not tested or x > max(j.value for j in tested)]
    level = candidate(tested, plan.criteria)
    if tested and level is None:
        return Stop("NO_SAFE_LEVEL", f"even {plan.levels[0]:g} is not safe")
    if above and not any(j.phase == "confirm" for j in tested) and _goes_up(
            plan, tested, above[0], spent_s):
        return RunLeg(_leg(state, above[0], "ladder", _ladder_s(plan, tested, above[0]), tested))
    assert level is not None
    if status(tested, level, plan.criteria) == "SAFE":
        return Stop("CONFIRMED", f"{level:g} is confirmed")
    proof_s = _proof_s(plan, tested, level, plan.budget_s - spent_s)
    if proof_s is None:
        return Stop("BUDGET", f"what is left of {plan.budget_s:.0f} s is too short to confirm "
                    f"{level:g}; give more with --budget")
    return RunLeg(_leg(state, level, "confirm", proof_s, tested))


def _again(state: State) -> Action:
    """An INVALID leg is repeated once."""
    last = state.history[-1]
    tries = sum(j.value == last.value and j.phase == last.phase and j.measurement == "INVALID"
                for j in state.history)
    if tries > 1:
        why = next(f for f in last.findings if f.verdict == "INVALID")
        return Stop("GENERATOR_LIMIT",
                    f"{last.value:g} could not be measured: {why.says}; {why.remedy}")
    valid = [j for j in state.history if j.measurement != "INVALID"]
    phase: Phase = "confirm" if last.phase == "confirm" else "ladder"
    return RunLeg(_leg(state, last.value, phase, last.window_s, valid))


def _goes_up(plan: SweepPlan, tested: Sequence[Judgement], above: float, spent_s: float) -> bool:
    """The next level is worth its time, and what it leaves still pays for a confirmation."""
    if not tested:
        return True
    last = tested[-1]
    if last.died or last.error_lower > ERROR_STOP:
        return False
    before = tested[-2].achieved_rps if len(tested) > 1 else 0.0
    if last.load == "UNSAFE" and last.achieved_rps < (1 + GAIN_STOP) * before:
        return False
    answer_s = _answer_s(plan, tested, above)
    cost_s = answer_s + MIN_LEG_S  # a lost level takes its warm-up and a little more
    if last.load != "UNSAFE":
        cost_s = 2 * answer_s + _ladder_s(plan, tested, above)
    known_rps = before if last.load == "UNSAFE" else last.achieved_rps
    left_s = plan.budget_s - spent_s
    if left_s * known_rps < (metrics.needed_n(plan.criteria.target, 0.0) or 0):
        return left_s > cost_s  # nothing can be proven here; higher up answers come faster
    proof_s = min(PROOF_N / max(known_rps, 0.1), plan.budget_s / 3) + answer_s
    return left_s > cost_s + proof_s


def _ladder_s(plan: SweepPlan, tested: Sequence[Judgement], value: float) -> float:
    """How long a level of the ladder is measured, s."""
    return max(MIN_LEG_S, min(LEG_OF_E2E * _answer_s(plan, tested, value),
                              LEG_OF_BUDGET * plan.budget_s))


def _answer_s(plan: SweepPlan, tested: Sequence[Judgement], value: float) -> float:
    """What an answer will take at `value`, s; for pacing, so a guess will do. In a closed loop
    twice the load makes it a little longer, and almost twice as long once the server is full."""
    took = [j for j in tested if j.answer_s]
    if not took or took[-1].answer_s is None:
        return 1.0
    if plan.axis == "rate" or value <= took[-1].value:
        return took[-1].answer_s
    return took[-1].answer_s * (FULL_GROWTH if took[-1].load == "UNSAFE" else GROWTH)


def _proof_s(plan: SweepPlan, tested: Sequence[Judgement], level: float,
             left_s: float) -> float | None:
    """How long to confirm `level`, s; None if the rest of the budget cannot hold a proof, not even
    one without misses. A room that just holds one is used: it proves or it does not, and nothing
    else could be done with it."""
    here = [j for j in tested if j.value == level]
    answer_s = max((j.answer_s or 1.0 for j in here), default=1.0)
    least_s = max(MIN_LEG_S, LEG_OF_E2E * answer_s)
    rps = max(0.01, *(j.achieved_rps for j in here))
    if _looks_good(tested, level, plan.criteria):  # to refute takes few, to prove takes many
        least_n = metrics.needed_n(plan.criteria.target, 0.0, plan.criteria.confidence) or 0
        least_s = max(least_s, PROOF_MARGIN * least_n / rps)
    wanted_s = max(least_s, PROOF_N / rps)
    room_s = left_s - max(1.0, answer_s) - 1.5 * answer_s  # warm-up, and the last answers
    return min(wanted_s, room_s) if room_s >= least_s else None


def _leg(state: State, value: float, phase: Phase, measure_s: float,
         tested: Sequence[Judgement]) -> Leg:
    """Warm-up: over it a closed loop's slots start one by one, for as long as an answer takes;
    in a shorter one their prompts crowd each other, which the measured requests would feel."""
    plan = state.plan
    replicate = sum(j.value == value and j.phase == phase for j in state.history)
    here = [j.answer_s for j in tested if j.value == value and j.answer_s]
    answer_s = here[-1] if here else _answer_s(plan, tested, value)
    lost = any(j.load == "UNSAFE" for j in tested)
    share = KNEE_WARMUP if lost and phase == "ladder" else 1.0
    warmup_s = max(1.0, min(share * answer_s, 1.2 * LEG_OF_BUDGET * plan.budget_s))
    load: Load = (Closed(concurrency=int(value)) if plan.axis == "concurrency"
                  else Open(rate_rps=PerSecond(value)))
    return Leg(id=f"{phase}-{value:g}-r{replicate}", axis=plan.axis, value=value, phase=phase,
               replicate=replicate, seed=plan.seed * 10_000 + state.legs, load=load,
               warmup_s=round(warmup_s, 3), measure_s=round(measure_s, 3),
               cut_below=plan.criteria.target)


# ------------------------------------------------------------------------------------- conclusion


class Pooled(Struct, frozen=True):
    """What the confirmations of one level show together."""

    value: float
    good: int
    n: int
    lower: float
    upper: float
    load: LoadVerdict


class Conclusion(Struct, frozen=True):
    """The sweep's answer. `safe`: largest safe level; `unsafe`: smallest unsafe one;
    `at_least`: nothing above was shown to be unsafe."""

    axis: Axis
    load: LoadVerdict
    safe: float | None
    unsafe: float | None
    at_least: bool
    proof: Pooled | None
    suspect: bool
    reasons: list[str]
    target: float
    confidence: float


def pooled(judged: Sequence[Judgement], level: float, criteria: Criteria) -> Pooled | None:
    """Confirmations of `level` taken together; the ladder's requests chose it, so they do not
    count. None: it was not confirmed yet."""
    legs = [j for j in judged if j.value == level and j.phase == "confirm"
            and j.measurement != "INVALID"]
    if not legs:
        return None
    good, n = sum(j.good for j in legs), sum(j.n for j in legs)
    lower = metrics.lower_bound(good, n, criteria.confidence)
    upper = metrics.upper_bound(good, n, criteria.confidence)
    load: LoadVerdict = "UNRESOLVED"
    if upper < criteria.target or any(j.load == "UNSAFE" for j in legs):
        load = "UNSAFE"
    elif lower >= criteria.target:
        load = "SAFE"
    return Pooled(level, good, n, lower, upper, load)


def status(judged: Sequence[Judgement], level: float, criteria: Criteria) -> LoadVerdict:
    """What all legs of a level say: UNSAFE if one of them does, or the server died at it, or its
    confirmations taken together refute it; SAFE only by its confirmations."""
    if any(j.load == "UNSAFE" or j.died for j in judged if j.value == level):
        return "UNSAFE"
    proof = pooled(judged, level, criteria)
    return proof.load if proof is not None else "UNRESOLVED"


def candidate(judged: Sequence[Judgement], criteria: Criteria) -> float | None:
    """The level to confirm next: the largest that neither it nor a lower one contradicts and that
    looks good; if none does, the lowest that is not contradicted."""
    open_levels = []
    for level in sorted({j.value for j in judged}):
        if status(judged, level, criteria) == "UNSAFE":
            break
        open_levels.append(level)
    good = [x for x in open_levels if _looks_good(judged, x, criteria)]
    return max(good, default=min(open_levels, default=None))


def _looks_good(judged: Sequence[Judgement], level: float, criteria: Criteria) -> bool:
    """Its share of good requests is at the target, or one miss under it, which with so few is
    luck. Confirmations, where there are any, speak alone; after two that settled nothing a lower
    level is the better use of the time."""
    legs = [j for j in judged if j.value == level and j.measurement != "INVALID"]
    confirmed = [j for j in legs if j.phase == "confirm"]
    if len(confirmed) >= MAX_CONFIRMS and status(judged, level, criteria) != "SAFE":
        return False
    good, n = (sum(j.good for j in confirmed or legs), sum(j.n for j in confirmed or legs))
    return n > 0 and good / n >= criteria.target - LUCK and good + 1 >= criteria.target * n


def conclude(judged: Sequence[Judgement], axis: Axis, criteria: Criteria) -> Conclusion:
    """The answer that these legs give. The same from a running sweep and from a run folder."""
    usable = [j for j in judged if j.measurement != "INVALID" or j.died]
    levels = sorted({j.value for j in usable})
    unsafe = next((x for x in levels if status(usable, x, criteria) == "UNSAFE"), None)
    proofs = [p for x in levels if (unsafe is None or x < unsafe)
              and (p := pooled(usable, x, criteria)) is not None]
    best = max((p for p in proofs if p.load == "SAFE"), key=lambda p: p.value, default=None)
    load: LoadVerdict = "UNRESOLVED"
    if best is not None:
        load = "SAFE"
    elif unsafe is not None and unsafe == levels[0]:
        load = "UNSAFE"
    shown = best or max(proofs, key=lambda p: p.value, default=None)
    return Conclusion(
        axis=axis, load=load, safe=best.value if best else None, unsafe=unsafe,
        at_least=best is not None and unsafe is None, proof=shown,
        suspect=any(j.measurement == "SUSPECT" for j in usable
                    if best is not None and j.value == best.value and j.phase == "confirm"),
        reasons=_why(usable, unsafe), target=criteria.target, confidence=criteria.confidence)


def _why(usable: Sequence[Judgement], unsafe: float | None) -> list[str]:
    first = [j for j in usable if j.value == unsafe and j.load == "UNSAFE"]
    return [f"at {j.value:g}: {reason}" for j in first[:1] for reason in j.reasons]
