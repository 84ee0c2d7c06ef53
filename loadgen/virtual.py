"""Executes legs on the simulator's engine in virtual time: plan → engine → records, as with sockets
but thousands of times faster, and the same for a seed on every host. Nothing of the wire, of a
generator's limits or of the host is in its figures: they are simulated ones."""

import gc
import heapq
import itertools
import math
import random
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import sub

from loadgen import metrics, plan
from loadgen.judge import ServerSigns
from loadgen.leg import Ending, Leg, Window
from loadgen.record import Outcome, RequestRecord
from loadgen.scenario import Closed, Scenario, Slo
from loadgen.sources import BLOCK_TOK as BLOCK_TOK_OF_TRACE
from loadgen.store import Row
from loadgen.supervise import HEAD_START_S, is_lost
from loadgen.talk import HEARD, OVER
from loadgen.telemetry.signs import series, signs_of
from servers.sim.costs import BLOCK_TOK, GIB
from servers.sim.engine import Engine, EngineConfig, Request, Step
from servers.sim.errors import ENGINE_DEAD
from servers.sim.faults import Fault, Faults
from servers.sim.front import Front, Turn
from servers.sim.turns import engine_of

DEATHS = {"oom": "CUDA out of memory", "die": "a worker was killed"}
START_S = 3.0  # what comes before the first leg: server, calibration, shards
PAUSE_S = 0.1  # between legs
DROP_PAUSE_S = 0.1  # before a slot goes on after a request that was refused at once
LOOK_S = 0.5  # between samples of the server's counters, and looks at a leg that may be lost
RECORDED = BLOCK_TOK_OF_TRACE // BLOCK_TOK  # the engine's blocks in one of a trace's
NS = 1e9


@dataclass(slots=True)
class _Course:
    """A session under way: which turn is next, and what was said before: how many tokens, and the
    hashes of their blocks."""

    planned: plan.Session
    turn: int = 0
    history_tok: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def prompt_tok(self) -> int:
        """Of the next turn, with all that is said again; a given one holds that already."""
        return self.what.prompt_tok + (self.history_tok if self.what.text is None else 0)

    @property
    def what(self) -> plan.Turn:
        return self.planned.turns[self.turn]

    @property
    def goes_on(self) -> bool:
        return self.turn + 1 < len(self.planned.turns)


@dataclass(slots=True)
class _Flight:
    """A request on its way. `spans`: from which step to which (of all that were delivered) it had
    a token each; the last span is open. `blocks`: of its prompt and answer."""

    id: int
    record: RequestRecord
    course: _Course
    blocks: list[int]
    spans: list[list[int]]
    stall_at: int | None = None  # the token after which it hears no more …
    silent: bool = False  # … and has come to


def _tokens(flight: _Flight) -> int:
    return sum(b - a for a, b in flight.spans)


def _blocks_of(text: str, n: int) -> list[int]:
    """Hashes of a given prompt's n blocks, each of all the text up to it."""
    found, known, each = [], 0, max(1, len(text) // max(1, n))
    for i in range(n):
        known = zlib.crc32(text[i * each:(i + 1) * each].encode(), known)
        found.append(-(1 << 79) - (known << 20) - i)
    return found


class VirtualExecutor:
    """Whoever `loadgen.sweep` asks for legs. `rows` and `records` of the leg that ran last are
    left for whoever keeps them. `front`: another one than the constants give. `faults`: of the
    kinds in `servers.sim.faults.IN_VIRTUAL_TIME`."""

    def __init__(self, scenario: Scenario, config: EngineConfig, utilization: float = 0.92,
                 front: Front | None = None, faults: Sequence[Fault] = ()) -> None:
        self.now_s = START_S
        self.rows: list[Row] = []
        self._scenario, self._config, self._utilization = scenario, config, utilization
        self._slos = {c.name: scenario.slo_of(c.name) for c in scenario.classes}
        self._engine, self._front = engine_of(config), front or Front(config.machine.constants)
        self._sampled_s = self._worked_s = 0.0  # when the last sample was, and the front's CPU then
        self._ids = itertools.count(1)
        self._faults = Faults(faults, random.Random(config.seed), lambda: 0.0)

    async def restart(self, why: str) -> None:
        """A new engine, START_S later; the faults are those of before."""
        self._engine = engine_of(self._config)
        self._front = Front(self._config.machine.constants)
        self._worked_s = 0.0
        self.now_s += START_S

    async def run_leg(self, leg: Leg) -> tuple[Window, list[RequestRecord], ServerSigns]:
        collects = gc.isenabled()
        gc.disable()  # nothing here makes cycles, and looking for them takes a tenth of the time
        try:
            return self._run(leg)
        finally:
            if collects:
                gc.enable()

    def _run(self, leg: Leg) -> tuple[Window, list[RequestRecord], ServerSigns]:
        self.rows = []
        run = _LegRun(leg, self._scenario, self._slos, self._engine, self._front, self._ids,
                      self.now_s + HEAD_START_S, self._faults)
        self._sample(self.now_s + PAUSE_S / 2, 0.0)  # no instant of the leg before has two samples
        ran_s = 0.0  # of the engine's steps, since the last sample
        look_s = run.t0_s
        while not run.is_over():
            ran_s += run.advance(look_s + LOOK_S)
            if run.now_s >= look_s + LOOK_S:
                self._sample(run.now_s, ran_s / (run.now_s - look_s))
                ran_s, look_s = 0.0, run.now_s
                run.look()
        window = run.close()
        while self._engine.step(run.now_s) is not None:  # what was aborted leaves
            pass
        self.now_s = run.now_s + PAUSE_S
        self._sample(self.now_s, 0.0)
        return window, run.done, signs_of(window, series(self.rows, "server"))

    def _sample(self, t_s: float, busy_frac: float) -> None:
        """Rows as of the server's /metrics, of a card and of the API server's process."""
        engine, stats, t_ns = self._engine, self._engine.stats, round(t_s * NS)
        machine = self._config.machine
        said = {"running": engine.running, "waiting": engine.waiting, "kv_frac": engine.kv_usage,
                "preemptions": stats.preemptions, "prompt_tok": stats.prompt_tok,
                "output_tok": stats.generation_tok, "finished": sum(stats.finished.values()),
                "prefix_queries": stats.prefix_queries, "prefix_hits": stats.prefix_hits}
        if self._config.backend == "vllm":  # the small web app has no /metrics
            self.rows += [Row("server", t_ns, name, float(value)) for name, value in said.items()]
        worked_s = self._front.worked_s(t_s)
        cores = (worked_s - self._worked_s) / (t_s - self._sampled_s)
        self._sampled_s, self._worked_s = t_s, worked_s
        self.rows.append(Row("process", t_ns, "front_cores", cores))
        card = {"memory_used_bytes": engine.used_gib(self._utilization) * GIB,
                "memory_total_bytes": machine.gpu.memory_gib * GIB,
                "util_frac": min(1.0, busy_frac)}
        self.rows += [Row("gpu", t_ns, name, value, {"index": str(i)})
                      for i in range(machine.tp) for name, value in card.items()]


class _LegRun:
    """One leg. Events are the arrivals (a heap of due instants) and the engine's steps."""

    def __init__(self, leg: Leg, scenario: Scenario, slos: dict[str, Slo], engine: Engine,
                 front: Front, ids: Iterator[int], t0_s: float, faults: Faults) -> None:
        self.leg, self.t0_s, self.now_s = leg, t0_s, t0_s
        self.done: list[RequestRecord] = []
        self._scenario, self._slos, self._engine, self._front = scenario, slos, engine, front
        self._ids, self._faults = ids, faults
        self._alarms: list[tuple[float, int, Outcome]] = []  # (when, whom, what its client says)
        self._note: str | None = None
        self._classes = {c.name: c for c in scenario.classes}
        self._patience_s = min(min(t.first_token_s, t.total_s) for t in (
            scenario.timeouts_of(name) for name in self._classes))
        self._from_ns = round((t0_s + leg.warmup_s) * NS)
        self._to_ns = (None if leg.measure_s is None or leg.num_sessions is not None
                       else self._from_ns + round(leg.measure_s * NS))
        self._sessions = plan.sessions(scenario, leg)
        self._max_inflight = 0 if isinstance(leg.load, Closed) else leg.load.max_inflight
        self._heads: list[plan.Session] = []
        # (due, order, session) of what is to be sent; None: a slot is free
        self._due: list[tuple[float, int, _Course | None]] = []
        self._order = itertools.count()
        self._ready: deque[tuple[float, Request]] = deque()  # that the front end has taken in
        self._flying: dict[int, _Flight] = {}
        self._landing: deque[tuple[int, _Flight]] = deque()  # (last step, whose turn is to come)
        self._given: list[int] = []  # when each step's tokens were written, in µs …
        self._gaps: list[int] = []  # … and how long after those of the step before
        self._good = self._awaited = self._seq = 0
        self._steps = 0
        self._more = True  # the plan has more sessions
        self._ending: Ending = "done"
        if isinstance(leg.load, Closed):
            slots = leg.load.concurrency
            for i in range(slots):
                self._push(t0_s + leg.warmup_s * i / slots, None)
        else:
            self._next_arrival()

    def is_over(self) -> bool:
        """The window is over and all that was due in it has ended; or the plan has."""
        if self._ending != "done":
            return True
        if self._to_ns is None or not self._more:
            return not (self._flying or self._due or self._landing)
        return self.now_s * NS >= self._to_ns and not self._awaited

    def advance(self, until_s: float) -> float:
        """Steps until then, or until the leg is over; the seconds that the GPU was busy."""
        busy_s = 0.0
        engine, due, ready = self._engine, self._due, self._ready
        while self.now_s < until_s and self._ending == "done":
            while self._alarms and self._alarms[0][0] <= self.now_s:
                self._ring()
            while due and due[0][0] <= self.now_s:
                self._send()
            while ready and ready[0][0] <= self.now_s:
                engine.submit(ready.popleft()[1])
            turn_s = self._front.next_s if self._landing else None
            if turn_s is not None and turn_s <= self.now_s:
                self._write(self._front.begin(self.now_s))
                continue
            comes_s = min(due[0][0] if due else until_s, ready[0][0] if ready else until_s,
                          until_s if turn_s is None else turn_s,
                          self._alarms[0][0] if self._alarms else until_s, until_s)
            if ends := engine.coast(self.now_s, comes_s):
                busy_s += ends[-1] - self.now_s
                self._coasted(ends, engine.running)
                continue
            step = engine.step(self.now_s)
            if step is None:
                if not self._idle(until_s):
                    break
                continue
            if self._faults.all and (kind := self._faults.due(engine)) is not None:
                self._die(kind)
                break
            busy_s += step.duration_s * step.busy_frac
            self.now_s = step.end_s
            while due and due[0][0] <= self.now_s:  # these reach the front end before its tokens
                self._send()
            self._give(step)
            if step.finished and self._to_ns is not None and not self._awaited and self.is_over():
                break
        return busy_s

    def look(self) -> None:
        """Twice a second: requests that were waited for too long; a leg that is lost."""
        oldest = next(iter(self._flying.values()), None)  # they are in the order of sending
        if oldest is not None and self.now_s - oldest.record.due_ns / NS > self._patience_s:
            self._give_up()
        for flight in self._flying.values() if self._faults.all else ():
            if flight.stall_at is not None and flight.spans and not flight.silent and (
                    len(self._given) - flight.spans[0][0] >= flight.stall_at):
                self._fall_silent(flight, flight.stall_at)
        if is_lost(self.leg, len(self.done), self._good, self.now_s - self.t0_s):
            self._ending = "cut"

    def _give_up(self) -> None:
        for request_id, flight in list(self._flying.items()):
            limits = self._scenario.timeouts_of(flight.record.cls)
            age_s = self.now_s - (flight.record.due_ns / NS)
            if not flight.spans and age_s > limits.first_token_s:
                self._drop(request_id, Outcome.TIMEOUT_FIRST_TOKEN)
            elif age_s > limits.total_s:
                self._drop(request_id, Outcome.TIMEOUT_TOTAL)

    def _fall_silent(self, flight: _Flight, tokens: int) -> None:
        """It hears no more than so many tokens; its client waits for a while."""
        first = flight.spans[0][0]
        flight.spans, flight.silent = [[first, first + tokens]], True
        silent_s = self._given[first + tokens - 1] / 1e6
        limit_s = self._scenario.timeouts_of(flight.record.cls).stall_s
        heapq.heappush(self._alarms, (silent_s + limit_s, flight.id, Outcome.STALLED))

    def _ring(self) -> None:
        """A client leaves, by plan or as it heard nothing."""
        due_s, request_id, outcome = heapq.heappop(self._alarms)
        if (flight := self._flying.get(request_id)) is not None:
            seen = bisect_right(self._given, due_s * 1e6)  # what comes later, it does not see
            flight.spans = [[a, min(seen, b if b >= 0 else seen)] for a, b in flight.spans
                            if a < seen]
            self._drop(request_id, outcome, at_s=due_s)

    def _die(self, kind: str) -> None:
        """The engine is gone, and tells all."""
        self._ending, self._note = "server_died", DEATHS[kind]
        for request_id in list(self._flying):
            self._flying[request_id].record.error = ENGINE_DEAD
            self._drop(request_id, Outcome.SERVER_ERROR_EVENT, again=False)

    def close(self) -> Window:
        """Ends what is in flight. Arrivals went as far as now, and what the front end still had to
        write may come later: that is no part of the window, of a leg that was left early."""
        stopped_ns = round(self.now_s * NS) + 1000  # with what is due at this very instant
        self._write(self._front.begin(math.inf))
        if self._given:  # what was made is seen, too
            self.now_s = max(self.now_s, self._given[-1] / 1e6 + 1e-6)
        end_ns = round(self.now_s * NS)
        for request_id in list(self._flying):
            self._drop(request_id, Outcome.CANCELLED, again=False)
        to_ns = end_ns if self._to_ns is None else min(self._to_ns, end_ns, stopped_ns)
        return Window(self.leg.id, round(self.t0_s * NS), self._from_ns, max(self._from_ns, to_ns),
                      end_ns, self._ending, records=len(self.done), note=self._note, alone=True)

    # ---------------------------------------------------------------------------------- inside

    def _push(self, due_s: float, course: _Course | None) -> None:
        heapq.heappush(self._due, (due_s, next(self._order), course))

    def _next_arrival(self) -> None:
        session = next(self._sessions, None)
        if session is None:
            self._more = False
        else:
            self._push(self.t0_s + (session.due_s or 0.0), _Course(session))

    def _idle(self, until_s: float) -> bool:
        """Nothing to compute: on to what comes next. False: nothing will."""
        comes = [q[0][0] for q in (self._due, self._ready, self._alarms) if q]
        if self._front.next_s is not None:
            comes.append(self._front.next_s)
            self._write(self._front.begin(self.now_s))
        if not comes and not self._flying:
            return False
        self.now_s = max(self.now_s, min([*comes, until_s]))
        return True

    def _send(self) -> None:
        due_s, _, course = heapq.heappop(self._due)
        if course is None:  # a slot is free
            session = next(self._sessions, None)
            if session is None:
                self._more = False
                return
            course = _Course(session)
        elif course.turn == 0:
            self._next_arrival()
        what, due_ns = course.what, round(due_s * NS)
        record = RequestRecord(
            leg=self.leg.id, shard=0, seq=self._seq, session=course.planned.k, turn=course.turn,
            cls=course.planned.cls, due_ns=due_ns, end_ns=due_ns, outcome=Outcome.DROPPED,
            want_prompt_tok=course.prompt_tok, max_tokens=what.output_tok)
        self._seq += 1
        if course.prompt_tok >= self._engine.config.max_model_len or self._is_uncut(course):
            record.outcome, record.status = Outcome.HTTP_ERROR, 400
            record.error = "HTTP 400: the prompt is longer than the model's context"
            record.sent_ns = due_ns
        elif self._max_inflight and len(self._flying) >= self._max_inflight:
            record.error = f"max_inflight of {self._max_inflight} reached"
        else:
            record.outcome = Outcome.OK
            self._submit(record, course, due_s)
            return
        self._count(record)
        self._go_on(course, record.outcome, due_s + DROP_PAUSE_S)

    def _is_uncut(self, course: _Course) -> bool:
        """Longer than there is room for, with a server that does not cut answers to that."""
        config = self._engine.config
        return config.backend == "transformers" and (
            course.prompt_tok + course.what.output_tok > config.max_model_len)

    def _go_on(self, course: _Course, outcome: Outcome, free_s: float) -> None:
        """What a session or its slot does after a request; as `talk` says."""
        if course.goes_on and outcome not in OVER:
            course.turn += 1
            self._push(free_s + course.what.think_s, course)
        elif isinstance(self.leg.load, Closed):
            self._push(free_s + course.planned.turns[0].think_s, None)

    def _submit(self, record: RequestRecord, course: _Course, due_s: float) -> None:
        what, prompt_tok = course.what, record.want_prompt_tok or 0
        request_id = next(self._ids)
        blocks = self._blocks(course, request_id, prompt_tok)
        self._flying[request_id] = _Flight(request_id, record, course, blocks, [])
        self._awaited += self._measures(record.due_ns)
        record.sent_ns, record.inflight = record.due_ns, len(self._flying)
        if what.abandon_after_s is not None:
            heapq.heappush(self._alarms, (due_s + what.abandon_after_s, request_id,
                                          Outcome.ABANDONED))
        if (fault := self._faults.draw()) is not None:
            self._flying[request_id].stall_at = int(fault.at)
        sampling = self._classes[course.planned.cls].sampling
        self._ready.append((self._front.take_in(due_s), Request(
            request_id, prompt_tok, what.output_tok, bool(sampling.ignore_eos),
            sampling.min_tokens or 0, blocks)))

    def _blocks(self, course: _Course, request_id: int, prompt_tok: int) -> list[int]:
        """Hashes of the prompt's blocks: a chat template's first, those of a shared prefix, and
        what nobody else has. A later turn begins with all that was said; where one is to come,
        the answer's blocks follow."""
        session = course.planned
        n = (prompt_tok + (course.what.output_tok if course.goes_on else 0)) // BLOCK_TOK
        own = request_id << 20
        if course.blocks and course.what.text is None:
            return [*course.blocks, *range(own, own + n - len(course.blocks))]
        shared = self._classes[session.cls].shared_prefix
        common = 1 if self._scenario.endpoint == "chat" else 0
        blocks = [-1] * common
        for ident in session.blocks:  # of a trace; other seeds have other texts
            first = -((self.leg.seed + 1) << 80) - ident * RECORDED
            blocks += range(first, first - RECORDED, -1)
        if shared is not None and session.prefix:
            first = zlib.crc32(f"{session.cls}/{session.prefix[0]}".encode()) << 20
            blocks += range(-2 - first - shared.tokens // BLOCK_TOK, -2 - first)
        if (given := course.what.text) is not None:  # equal texts are equal blocks
            said = "\n".join([*(text for _, text in course.what.before), given])
            blocks += _blocks_of(said, n - len(blocks))
        blocks += range(own, own + max(0, n - len(blocks)))
        return blocks[:n]

    def _coasted(self, ends: list[float], events: int) -> None:
        """Steps in which nobody came and nobody went; but who comes in the last one is at the
        front end before its tokens."""
        front, given = self._front, self._given
        self.now_s = last_s = ends.pop()
        self._steps += len(ends) + 1
        if written := front.steady(ends, events):
            known_us = [round(written_s * 1e6) for written_s in written]
            before_us = given[-1] if given else 0
            self._gaps += map(sub, known_us, [before_us, *known_us])
            given += known_us
        else:
            for end_s in ends:
                self._write(front.give_out(end_s, events, 0))
        while self._due and self._due[0][0] <= last_s:
            self._send()
        self._write(front.give_out(last_s, events, 0))

    def _write(self, turns: list[Turn]) -> None:
        """The front end's turns; who had its last token in one has ended."""
        given, gaps, landing = self._given, self._gaps, self._landing
        for written_s, steps in turns:
            written_us = round(written_s * 1e6)
            gaps.append(written_us - (given[-1] if given else 0))
            given.append(written_us)
            if steps > 1:
                given += [written_us] * (steps - 1)
                gaps += [0] * (steps - 1)
            while landing and landing[0][0] < len(given):
                flight = landing.popleft()[1]
                if flight.stall_at is None or flight.stall_at > _tokens(flight):
                    self._land(flight, written_s, Outcome.OK)
                else:
                    self._flying[flight.id] = flight
                    self._fall_silent(flight, flight.stall_at)

    def _give(self, step: Step) -> None:
        """The front end writes a step's tokens; whoever has ended, ends then."""
        number, flying = self._steps, self._flying
        self._steps += 1
        for request_id in step.begun:
            if request_id in flying and not flying[request_id].silent:
                flying[request_id].spans.append([number, -1])
        for request_id in step.preempted:
            if request_id in flying and flying[request_id].spans and (
                    not flying[request_id].silent):
                flying[request_id].spans[-1][1] = number
        for request_id, reason in step.finished.items():
            flight = flying.get(request_id)
            if flight is not None and not flight.silent:
                del flying[request_id]
                flight.record.finish_reason = reason
                flight.spans[-1][1] = number + 1
                self._landing.append((number, flight))
        for request_id, words in step.failed.items():
            self._fail(request_id, words)
        self._write(self._front.give_out(self.now_s, step.events, step.fresh))

    def _fail(self, request_id: int, words: str) -> None:
        """A status where the answer has not begun, else an event of the stream."""
        flight = self._flying.get(request_id)
        if flight is None:
            return
        told = bool(flight.spans) and flight.spans[0][0] < len(self._given)
        flight.record.error = words if told else f"HTTP 500: {words}"
        flight.record.status = 200 if told else 500
        self._drop(request_id, Outcome.SERVER_ERROR_EVENT if told else Outcome.HTTP_ERROR)

    def _land(self, flight: _Flight, end_s: float, outcome: Outcome, again: bool = True) -> None:
        """The record; and what its session or slot does next."""
        record = flight.record
        record.outcome, record.end_ns = outcome, round(end_s * NS)
        if flight.spans:
            self._stamp(record, flight.spans)
        self._awaited -= self._measures(record.due_ns)
        self._count(record)
        course = flight.course
        if course.goes_on and outcome in HEARD and record.output_tok:
            course.history_tok = (record.want_prompt_tok or 0) + record.output_tok
            course.blocks = flight.blocks[:course.history_tok // BLOCK_TOK]
        if again:
            self._go_on(course, outcome, end_s)

    def _stamp(self, record: RequestRecord, spans: list[list[int]]) -> None:
        """Tokens and their times, of the steps that it took part in."""
        given, interval = self._given, self._engine.config.stream_interval
        (a, b), more = spans[0], spans[1:]
        if b < 0:
            b = len(given)
        gaps = self._gaps[a + 1:b]
        if interval == 1 and not more and 0 not in gaps:
            first_us, tokens, record.gaps_us = given[a], b - a, gaps
        else:
            stamps = [t for a, b in spans for t in given[a:b if b >= 0 else len(given)]]
            tokens = len(stamps)
            told = sorted({*range(0, tokens, interval), tokens - 1})
            # of those that are written at one time, the last one tells of all
            at = [i for i, then in itertools.pairwise(told) if stamps[then] > stamps[i]]
            at.append(tokens - 1)
            record.event_tok = [b - a for a, b in itertools.pairwise([-1, *at])]
            stamps = [stamps[i] for i in at]
            first_us, record.gaps_us = stamps[0], [y - x for x, y in itertools.pairwise(stamps)]
        record.first_ns = record.first_visible_ns = record.headers_ns = first_us * 1000
        record.output_tok, record.tok_source = tokens, "usage"
        record.prompt_tok, record.status = record.want_prompt_tok, 200
        record.end_ns = max(record.end_ns, first_us * 1000 + 1000 * sum(record.gaps_us))

    def _drop(self, request_id: int, outcome: Outcome, again: bool = True,
              at_s: float | None = None) -> None:
        flight = self._flying.pop(request_id)
        if flight.spans and flight.spans[0][0] >= len(self._given):
            flight.spans.clear()  # its tokens were made, but not told
        self._engine.abort(request_id)
        if any(r.id == request_id for _, r in self._ready):
            self._ready = deque((t, r) for t, r in self._ready if r.id != request_id)
        self._land(flight, self.now_s if at_s is None else at_s, outcome, again)

    def _measures(self, due_ns: int) -> bool:
        return due_ns >= self._from_ns and (self._to_ns is None or due_ns < self._to_ns)

    def _count(self, record: RequestRecord) -> None:
        self.done.append(record)
        if self.leg.cut_below is not None:
            self._good += not metrics.misses(record, self._slos[record.cls])
