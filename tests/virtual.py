"""Executes closed-loop legs on the simulator's engine in virtual time: the same plan, judge and
ramp as with sockets, thousands of times faster, and the same for a seed on every host."""

import asyncio
import heapq
import itertools
from dataclasses import dataclass, field

from loadgen import metrics, plan
from loadgen.judge import Criteria, Judgement, ServerSigns
from loadgen.leg import Ending, Leg, Window
from loadgen.ramp import SweepPlan
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Closed, Scenario
from loadgen.supervise import HEAD_START_S, is_lost
from loadgen.sweep import SweepResult, sweep
from servers.sim.costs import FRONT_REQUEST_S, GPUS, MODELS, Machine
from servers.sim.engine import Engine, EngineConfig, Request

START_S = 3.0  # what comes before the first leg: server, calibration, shards


@dataclass
class _Flight:
    record: RequestRecord
    stamps: list[float] = field(default_factory=list)


@dataclass
class VirtualExecutor:
    scenario: Scenario
    now_s: float = START_S
    template_tok: int = 25

    def __post_init__(self) -> None:
        machine = Machine(GPUS["4090d"], MODELS["qwen2.5-7b"], 1)
        self.engine = Engine(EngineConfig(machine, 7274, 32768))
        self.next_id = 0

    async def restart(self, why: str) -> None:
        raise AssertionError(why)

    async def run_leg(self, leg: Leg) -> tuple[Window, list[RequestRecord], ServerSigns]:
        assert isinstance(leg.load, Closed)
        assert leg.measure_s is not None
        slots = leg.load.concurrency
        t0 = self.now_s + HEAD_START_S
        begin, end = t0 + leg.warmup_s, t0 + leg.warmup_s + leg.measure_s
        due = [t0 + leg.warmup_s * i / slots for i in range(slots)]
        sessions = plan.sessions(self.scenario, leg)
        flying: dict[int, _Flight] = {}
        done: list[RequestRecord] = []
        good = 0
        ending: Ending = "done"
        now = t0
        while now < end or any(begin <= f.record.due_ns / 1e9 < end for f in flying.values()):
            while due and due[0] + FRONT_REQUEST_S <= now:
                self._start(leg, next(sessions), heapq.heappop(due), flying)
            step = self.engine.step(now)
            if step is None:
                now = due[0] + FRONT_REQUEST_S
                continue
            now = step.end_s
            for i in step.tokens:
                flying[i].stamps.append(now)
            for i in step.finished:
                record = _finished(flying.pop(i), now, Outcome.OK)
                done.append(record)
                good += not metrics.misses(record, self.scenario.slo_of(record.cls))
                heapq.heappush(due, now)
            if is_lost(leg, len(done), good, now - t0):
                ending = "cut"
                break
        to = min(now, end)
        for i, flight in flying.items():
            self.engine.abort(i)
            done.append(_finished(flight, now, Outcome.CANCELLED))
        while self.engine.step(now) is not None:
            pass
        self.now_s = now + 0.1
        return Window(leg.id, round(t0 * 1e9), round(begin * 1e9), round(to * 1e9),
                      round(now * 1e9), ending), done, ServerSigns()

    def _start(self, leg: Leg, session: plan.Session, due_s: float,
               flying: dict[int, _Flight]) -> None:
        turn = session.turns[0]
        self.engine.submit(Request(self.next_id, turn.prompt_tok + self.template_tok,
                                   turn.output_tok, ignore_eos=True))
        flying[self.next_id] = _Flight(RequestRecord(
            leg=leg.id, shard=0, seq=self.next_id, session=session.k, turn=0, cls=session.cls,
            due_ns=round(due_s * 1e9), sent_ns=round(due_s * 1e9), end_ns=0, outcome=Outcome.OK,
            prompt_tok=turn.prompt_tok, want_prompt_tok=turn.prompt_tok,
            max_tokens=turn.output_tok))
        self.next_id += 1


def _finished(flight: _Flight, now_s: float, outcome: Outcome) -> RequestRecord:
    r, us = flight.record, [round(s * 1e6) for s in flight.stamps]
    r.outcome, r.end_ns = outcome, round(now_s * 1e9)
    if us:
        r.first_ns, r.output_tok, r.tok_source = us[0] * 1000, len(us), "usage"
        r.gaps_us = [b - a for a, b in itertools.pairwise(us)]
    return r


def virtual_sweep(scenario: Scenario, seed: int, budget_s: float = 230.0,
                  most: int = 128) -> tuple[SweepResult, float]:
    """The default sweep, and the virtual seconds it took."""
    executor = VirtualExecutor(scenario)
    levels = tuple(float(2**k) for k in range(most.bit_length()))
    seen: list[Judgement] = []
    result = asyncio.run(sweep(
        SweepPlan("concurrency", levels, budget_s, seed, Criteria(), can_restart=False),
        scenario, executor, lambda _, j: seen.append(j), lambda: executor.now_s))
    return result, executor.now_s
