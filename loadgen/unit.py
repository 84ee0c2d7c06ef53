"""The largest concurrency that the server survives, to the unit: after the search for the safe
level, levels further up until one is fatal, then bisection between the last that it survived and
the first that killed it, with a restart after each death. A reducer as `ramp` is."""

from collections.abc import Callable, Sequence

import msgspec
from msgspec import Struct

from loadgen.errors import ServerError
from loadgen.judge import Judgement
from loadgen.leg import Leg
from loadgen.pace import LEG_OF_E2E, MIN_LEG_S
from loadgen.ramp import Begin, Event, Restart, RunLeg, SweepPlan
from loadgen.scenario import Closed, Scenario
from loadgen.sweep import Executor, SweepResult, run_one

MAX_RESTARTS = 20  # 2^20 levels: more than that is no search, but a server that dies of anything


class Boundary(Struct, frozen=True):
    """`survived`: the largest concurrency that was held below all fatal ones; None: not even the
    first. `fatal`: the smallest that killed the server; None: none did."""

    survived: float | None
    fatal: float | None

    @property
    def exact(self) -> bool:
        return self.fatal is not None and self.fatal - (self.survived or 0) <= 1


class Done(Struct, frozen=True):
    says: str


class State(Struct, frozen=True):
    """`judged`: all legs so far, the sweep's too. `dead`: the server is, at the moment."""

    plan: SweepPlan
    judged: tuple[Judgement, ...]
    dead: bool = False
    restarts: int = 0
    legs: int = 0


Action = RunLeg | Restart | Done


def boundary(judged: Sequence[Judgement]) -> Boundary:
    """A leg that was left early, or that the generator could not make, is no survival: the load
    may not have been there."""
    fatal = min((j.value for j in judged if j.died), default=None)
    held = [j.value for j in judged if not j.died and not j.cut and j.measurement != "INVALID"
            and (fatal is None or j.value < fatal)]
    return Boundary(max(held, default=None), fatal)


def step(state: State, event: Event) -> tuple[State, Action]:
    """The new state and what to do."""
    change = msgspec.structs.replace
    if isinstance(event, Begin):
        return act(change(state, dead=False))
    return act(change(state, judged=(*state.judged, event), dead=event.died))


def act(state: State) -> tuple[State, Action]:
    change = msgspec.structs.replace
    value = _next(state)
    if isinstance(value, Done):
        return state, value
    if state.dead:
        if not state.plan.can_restart:
            return state, Done("the server is dead and is not to be restarted: "
                               + says(boundary(state.judged)))
        if state.restarts == MAX_RESTARTS:
            return state, Done(f"the server died {MAX_RESTARTS} times: "
                               + says(boundary(state.judged)))
        return change(state, restarts=state.restarts + 1), Restart(
            f"to try {value:g} concurrent requests")
    return change(state, legs=state.legs + 1), RunLeg(_leg(state, value))


def _next(state: State) -> float | Done:
    b = boundary(state.judged)
    own = [j for j in state.judged if j.phase == "unit"]
    if own and own[-1].measurement == "INVALID" and not own[-1].died:
        value = own[-1].value
        tries = sum(j.value == value and j.measurement == "INVALID" for j in own)
        why = next(f for f in own[-1].findings if f.verdict == "INVALID")
        return value if tries < 2 else Done(f"{value:g} could not be made: {why.says}; {says(b)}")
    if b.fatal is None:
        above = [x for x in state.plan.levels if b.survived is None or x > b.survived]
        return above[0] if above else Done(says(b))
    if b.exact:
        return Done(says(b))
    return float((int(b.survived or 0) + int(b.fatal)) // 2)


def says(b: Boundary) -> str:
    if b.fatal is None:
        return "nothing killed it" if b.survived is None else (
            f"it survived {b.survived:g} concurrent requests, and more were not tried")
    if b.survived is None:
        return f"{b.fatal:g} concurrent requests kill it, and no smaller load was held"
    if b.exact:
        return f"it survives {b.survived:g} concurrent requests, and {b.fatal:g} kill it"
    return (f"it survives {b.survived:g} concurrent requests, {b.fatal:g} kill it, and between "
            "them nothing was tried")


def _leg(state: State, value: float) -> Leg:
    """Held to its end, however many answers are late: memory is fullest when all are long."""
    plan = state.plan
    known = [j for j in state.judged if j.answer_s]
    near = min(known, key=lambda j: abs(j.value - value), default=None)
    answer_s = (near.answer_s if near else None) or 1.0
    again = sum(j.value == value and j.phase == "unit" for j in state.judged)
    return Leg(
        id=f"unit-{value:g}-r{again}", axis="concurrency", value=value, phase="unit",
        replicate=again, seed=plan.seed * 10_000 + 5_000 + state.legs,
        load=Closed(concurrency=int(value)), warmup_s=round(max(1.0, answer_s), 3),
        measure_s=round(max(MIN_LEG_S, LEG_OF_E2E * answer_s), 3))


async def search(plan: SweepPlan, found: SweepResult, scenario: Scenario, executor: Executor,
                 judged: Callable[[Leg, Judgement], None]) -> SweepResult:
    """Goes on where a sweep ended; its answer stands, whatever comes of this."""
    before = found.judgements
    state = State(plan, tuple(before), dead=bool(before) and before[-1].died)
    state, action = act(state)
    while not isinstance(action, Done):
        event: Event = Begin()
        if isinstance(action, Restart):
            try:
                await executor.restart(action.why)
            except ServerError as e:
                return _with(found, state, f"the server could not be restarted: {e}")
        else:
            window, judgement = await run_one(action.leg, scenario, plan.criteria, executor)
            judged(action.leg, judgement)
            if window.ending in ("interrupted", "failed"):
                return SweepResult([*state.judged, judgement], window.ending,
                                   window.note or "interrupted")
            event = judgement
        state, action = step(state, event)
    return _with(found, state, action.says)


def _with(found: SweepResult, state: State, says_so: str) -> SweepResult:
    return SweepResult(list(state.judged), found.stop, f"{found.says}; {says_so}")
