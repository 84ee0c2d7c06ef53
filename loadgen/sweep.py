"""Legs one after the other: asks the ramp what to do, has it done, judges it. Knows neither
processes nor terminals; they are passed in."""

import time
from collections.abc import Callable
from typing import Protocol

from msgspec import Struct

from loadgen import ramp
from loadgen.errors import ServerError
from loadgen.judge import Criteria, Judgement, ServerSigns, judge
from loadgen.leg import Ending, Leg, Window
from loadgen.record import RequestRecord
from loadgen.scenario import Scenario


class Executor(Protocol):
    """Whoever runs a leg: shards, Locust, the simulator's virtual time."""

    async def run_leg(
            self, leg: Leg) -> tuple[Window, list[RequestRecord], ServerSigns]: ...

    async def restart(self, why: str) -> None:
        """Brings the server under test up again. Raises ServerError."""


class SweepResult(Struct, frozen=True):
    """`stop`: the ramp's reason to stop, or how the last leg ended if that ended the search."""

    judgements: list[Judgement]
    stop: ramp.StopReason | Ending
    says: str


async def sweep(plan: ramp.SweepPlan, scenario: Scenario, executor: Executor,
                judged: Callable[[Leg, Judgement], None],
                clock_s: Callable[[], float] = time.monotonic) -> SweepResult:
    """The search, to its stop. `judged` hears of each leg as it is judged; `clock_s` says how
    much of the budget is spent."""
    began = clock_s()
    state, action = ramp.step(ramp.State(plan), ramp.Begin(), 0.0)
    while not isinstance(action, ramp.Stop):
        event: ramp.Event = ramp.Begin()
        if isinstance(action, ramp.Restart):
            try:
                await executor.restart(action.why)
            except ServerError as e:  # what was found before stands
                return SweepResult(list(state.history), "SERVER_DIED",
                                   f"the server could not be restarted: {e}")
        else:
            window, judgement = await run_one(action.leg, scenario, plan.criteria, executor)
            judged(action.leg, judgement)
            if window.ending in ("interrupted", "failed"):
                return SweepResult([*state.history, judgement], window.ending,
                                   window.note or "interrupted")
            event = judgement
        state, action = ramp.step(state, event, clock_s() - began)
    return SweepResult(list(state.history), action.reason, action.says)


async def run_one(leg: Leg, scenario: Scenario, criteria: Criteria,
                  executor: Executor) -> tuple[Window, Judgement]:
    """One leg and its verdicts."""
    window, records, signs = await executor.run_leg(leg)
    return window, judge(leg, window, records, signs, scenario, criteria)


