"""Walks a leg's plan on the clock: starts each request when it is due, counts what came of it.

Open loop: absolute instants; a start that is late is late (and counts into the latency), one that
cannot be made is DROPPED. Closed loop: a slot sends its next request when the last one has ended.
Bodies are built ahead of time, in idle moments.
"""

import asyncio
import functools
import math
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import msgspec
from msgspec import Struct

from loadgen import metrics, plan
from loadgen.client import Client
from loadgen.flight import Flight
from loadgen.leg import Leg
from loadgen.net import now_ns
from loadgen.prompts import Ratio
from loadgen.record import Outcome, RequestRecord, Shot
from loadgen.scenario import Closed, Open, Scenario, Slo, Trace
from loadgen.store import Journal
from loadgen.talk import Talk

LOOKAHEAD = 64  # bodies built ahead
ARM_NS = 50_000_000  # an open loop's start is set so long before it is due …
WAKE_UP_NS = 30_000_000  # before the clock starts
BEHIND_NS = 2_000_000_000  # a plan that is further behind at the window's end is given up
DROP_PAUSE_NS = 100_000_000  # before a slot tries again what this host has no room for
OPEN_AHEAD_S = 0.25  # an open loop begins with connections for answers of this length
ARM_TOGETHER_NS = 10_000_000  # … or a little sooner, with those before it: waking up costs


class Work(Struct, frozen=True):
    """What all legs of one generator process share. `seq` numbers its requests."""

    scenario: Scenario
    slos: dict[str, Slo]
    ratios: dict[str, Ratio]
    client: Client
    journal: Journal
    shard: int
    of: int
    seq: Iterator[int]


class LegRun:
    """One leg in this shard: starts requests when they are due, counts what came of them."""

    def __init__(self, work: Work, leg: Leg, t0_ns: int) -> None:
        self.work, self.leg, self.t0_ns = work, leg, t0_ns
        self.error: BaseException | None = None  # not of a request: the leg cannot go on
        self.flights: set[asyncio.Task[None]] = set()
        self.stopping = asyncio.Event()
        self.stopped_ns: int | None = None
        self.done = self.done_good = self.sampled = self.good = 0
        self._awaited = 0  # measured requests that were started and have not ended
        self._pending: dict[object, int] = {}  # due instants that somebody sleeps to
        self._armed = self._aloft = 0  # starts that are set, sessions that were begun of them …
        self._down = asyncio.Event()  # … all of which are over
        self._sent = 0  # an open loop's requests in flight
        self._walked_ns = math.inf if isinstance(leg.load, Closed) else -math.inf  # by due instants
        self.outcomes: Counter[str] = Counter()
        self._from_ns = t0_ns + round(leg.warmup_s * 1e9)
        self._to_ns = (None if leg.measure_s is None or leg.num_sessions is not None
                       else self._from_ns + round(leg.measure_s * 1e9))
        planned = plan.sessions(work.scenario, leg, work.shard, work.of)
        self._prepared = _Lookahead(planned, self._talk, LOOKAHEAD)

    async def run(self) -> None:
        """To the end of the last request. Cancelled requests end as CANCELLED records."""
        load = self.leg.load
        connections = len(self._slots(load)) if isinstance(load, Closed) else self._in_air(load)
        helpers = [asyncio.create_task(self._prepared.fill()), asyncio.create_task(
            self.work.client.open_connections(min(connections, 512)))]
        helpers[0].add_done_callback(self._landed)
        # connections that will not open must not hold up the load
        await asyncio.wait(helpers[1:], timeout=max(0.0, (self.t0_ns - now_ns()) / 1e9))
        helpers.append(asyncio.create_task(self._wake_up()))
        if isinstance(load, Closed):
            for slot in self._slots(load):
                self._fly(self._slot(slot, load.concurrency))
        else:
            self._fly(self._schedule(max(1, load.max_inflight // self.work.of)))
        while self.flights or self._aloft:
            if self.flights:
                await asyncio.wait(self.flights)
            else:
                self._down.clear()
                await self._down.wait()
        for helper in helpers:
            helper.cancel()

    @property
    def complete(self) -> bool:
        """The measured window is over and all of its requests have ended. Load goes on until
        then: what is measured last must not be served by a server that empties."""
        if self._to_ns is None or now_ns() < self._to_ns or self._awaited:
            return False
        if self._walked_ns < self._to_ns and now_ns() < self._to_ns + BEHIND_NS:
            return False
        return all(due_ns >= self._to_ns for due_ns in self._pending.values())

    def stop(self) -> None:
        """No new requests; those in flight go on."""
        if self.stopped_ns is None:
            self.stopped_ns = now_ns()
            self.stopping.set()

    def cancel(self) -> None:
        """Now: what is in flight lands as CANCELLED; whoever waited for it comes to an end."""
        self.stop()
        self.work.client.cancel()

    # ---------------------------------------------------------------------------------- inside

    async def _wake_up(self) -> None:
        """A process that slept comes round to its first requests late: cold, they take 10 ms. So
        for the last instants before the clock starts it does what it will be doing then."""
        await asyncio.sleep((self.t0_ns - WAKE_UP_NS - now_ns()) / 1e9)
        cls = self.work.scenario.classes[0].name
        while now_ns() < self.t0_ns - WAKE_UP_NS // 10:
            self.work.client.prepare(Shot(leg="", shard=0, seq=-1, session=-1, turn=0, cls=cls,
                                          due_ns=0, body=b"{}"))
            try:
                async with asyncio.timeout(0.0002):
                    await self.stopping.wait()
                    return
            except TimeoutError:
                pass

    def _in_air(self, load: Open | Trace) -> int:
        """Connections to begin an open loop with: handshakes are dear, and the first ones must not
        make the next ones late."""
        rate_rps = load.rate_rps if isinstance(load, Open) else self.leg.value
        return max(16, math.ceil(OPEN_AHEAD_S * rate_rps / self.work.of))

    def _slots(self, load: Closed) -> range:
        return range(self.work.shard, load.concurrency, self.work.of)

    def _fly(self, doing: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        flight = asyncio.create_task(doing)
        self.flights.add(flight)
        flight.add_done_callback(self._landed)
        return flight

    def _landed(self, flight: asyncio.Task[None]) -> None:
        self.flights.discard(flight)
        if not flight.cancelled() and (error := flight.exception()) is not None:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        """Once: what is given up may meet the same error, and hundreds of them one in another."""
        if self.error is None:
            self.error = error
            self.cancel()

    async def _slot(self, slot: int, slots: int) -> None:
        """A closed loop's slot. The first starts are spread over the warm-up: all at once would
        be a burst that no closed loop has later."""
        due_ns = self.t0_ns + round(self.leg.warmup_s * 1e9 * slot / slots)
        while await self._wait_until(due_ns):
            talk = self._prepared.next()
            if talk is None:
                return
            goes_on = True
            while goes_on:
                if not await self._wait_until(due_ns):
                    return
                record, goes_on = await self._send(talk, due_ns)
                free_ns = now_ns() + (DROP_PAUSE_NS if record.outcome is Outcome.DROPPED else 0)
                due_ns = (talk.due_ns(record.end_ns, free_ns) if goes_on
                          else max(free_ns, record.end_ns + talk.rest_ns))

    async def _schedule(self, max_inflight: int) -> None:
        """An open loop: sets each start a little ahead of its instant; it is the loop's alarm that
        sends it, whatever else there is to do."""
        while (talk := self._prepared.next()) is not None:
            self._walked_ns = due_ns = self.t0_ns + round((talk.planned.due_s or 0.0) * 1e9)
            if due_ns - now_ns() < ARM_NS + ARM_TOGETHER_NS:
                await asyncio.sleep(0)  # who is late must not keep sockets and commands waiting
            elif not await self._wait_until(due_ns - ARM_NS, due_ns):
                return
            if self.stopping.is_set():
                return
            shot = self._shot(talk, due_ns, seq=-1)  # it has one when it starts
            self._armed += 1
            self._awaited += self._measures(due_ns)
            self.work.client.direct.alarm(due_ns, functools.partial(
                self._start, talk, self.work.client.prepare(shot), max_inflight))
        self._walked_ns = math.inf
        while self._armed and await self._wait_until(now_ns() + ARM_NS):
            pass  # the plan's last starts are yet to come

    def _start(self, talk: Talk, flight: Flight, max_inflight: int) -> None:
        """The instant has come. One that cannot be started is DROPPED."""
        self._armed -= 1
        shot = flight.recorder.shot
        if self.stopping.is_set():
            self._awaited -= self._measures(shot.due_ns)
            return
        sent = self._sent < max_inflight
        if sent:
            self._aloft += 1
            self._sent += 1
            flight.start(functools.partial(self._back, talk, flight, max_inflight))
        flight.recorder.shot = shot = msgspec.structs.replace(shot, seq=next(self.work.seq))
        if not sent:
            self._awaited -= self._measures(shot.due_ns)
            self._keep(lambda: _not_sent(shot, max_inflight))

    def _back(self, talk: Talk, flight: Flight, max_inflight: int) -> None:
        """A request that was started by its alarm has ended."""
        self._awaited -= self._measures(flight.recorder.shot.due_ns)
        self._sent -= 1
        record = self._keep(flight.result)
        if record is not None and talk.keeps and talk.heard(record, flight.recorder.answer().text):
            self._fly(self._turns(talk, talk.due_ns(record.end_ns, now_ns()), max_inflight))
        else:
            self._ground()

    def _keep(self, result: Callable[[], RequestRecord]) -> RequestRecord | None:
        """Counts a record where no task would end of what goes wrong: a journal that cannot be
        written, a bug of ours. None: it did."""
        try:
            record = result()
            self._count(record)
        except Exception as e:  # noqa: BLE001  (it ends the leg)
            self._give_up(e)
            return None
        return record

    async def _turns(self, talk: Talk, due_ns: int, max_inflight: int) -> None:
        """An open loop's requests after a session's first one, the next of which is due then."""
        try:
            goes_on = True
            while goes_on and await self._wait_until(due_ns):
                if self._sent >= max_inflight:
                    self._count(_not_sent(self._shot(talk, due_ns), max_inflight))
                    return
                self._sent += 1
                record, goes_on = await self._send(talk, due_ns)
                self._sent -= 1
                due_ns = talk.due_ns(record.end_ns, now_ns())
        finally:
            self._ground()

    def _ground(self) -> None:
        self._aloft -= 1
        if not self._aloft:
            self._down.set()

    async def _wait_until(self, instant_ns: int, due_ns: int | None = None) -> bool:
        """False if the leg was stopped before the instant came. `due_ns`: when what is waited for
        is due, if that is not the instant itself."""
        wait_s = (instant_ns - now_ns()) / 1e9
        if wait_s > 0 and not self.stopping.is_set():
            me = object()
            self._pending[me] = instant_ns if due_ns is None else due_ns
            try:
                async with asyncio.timeout(wait_s):
                    await self.stopping.wait()
            except TimeoutError:
                pass
            finally:
                del self._pending[me]
        return not self.stopping.is_set()

    async def _send(self, talk: Talk, due_ns: int) -> tuple[RequestRecord, bool]:
        """The record of a session's next request; and whether another one follows it."""
        shot = self._shot(talk, due_ns)
        measured = self._measures(due_ns)
        self._awaited += measured
        flight = self.work.client.prepare(shot)
        record = await self.work.client.fly(flight)
        self._awaited -= measured
        self._count(record)
        return record, talk.heard(record, flight.recorder.answer().text if talk.keeps else "")

    def _measures(self, due_ns: int) -> bool:
        return due_ns >= self._from_ns and (self._to_ns is None or due_ns < self._to_ns)

    def _shot(self, talk: Talk, due_ns: int, seq: int | None = None) -> Shot:
        planned, what = talk.planned, talk.what
        return Shot(leg=self.leg.id, shard=self.work.shard,
                    seq=next(self.work.seq) if seq is None else seq,
                    session=planned.k, turn=talk.turn, cls=planned.cls, due_ns=due_ns,
                    body=talk.body(), want_prompt_tok=talk.want_prompt_tok,
                    max_tokens=what.output_tok, abandon_after_s=what.abandon_after_s,
                    keeps=talk.keeps)

    def _talk(self, planned: plan.Session) -> Talk:
        work = self.work
        return Talk(work.scenario, work.client.target.model, planned, self.leg.seed,
                    work.ratios[planned.cls])

    def _count(self, record: RequestRecord) -> None:
        self.work.journal.append(record)
        self.done += 1
        self.outcomes[record.outcome.value] += 1
        good = not metrics.misses(record, self.work.slos[record.cls])
        self.done_good += good
        if self._measures(record.due_ns):
            self.sampled += 1
            self.good += good
        self.work.client.direct.ring()  # a start may be due meanwhile


def _not_sent(shot: Shot, max_inflight: int) -> RequestRecord:
    return RequestRecord(
        leg=shot.leg, shard=shot.shard, seq=shot.seq, session=shot.session, turn=shot.turn,
        cls=shot.cls, due_ns=shot.due_ns, end_ns=now_ns(), outcome=Outcome.DROPPED,
        error=f"max_inflight of {max_inflight} reached",
        want_prompt_tok=shot.want_prompt_tok, max_tokens=shot.max_tokens)


class _Lookahead:
    """Sessions whose texts, and first bodies, were made in idle moments before they are due."""

    def __init__(self, planned: Iterator[plan.Session],
                 make: Callable[[plan.Session], Talk], depth: int) -> None:
        self._planned, self._make, self._depth = planned, make, depth
        self._ready: deque[Talk] = deque()
        self._room = asyncio.Event()

    def next(self) -> Talk | None:
        """The next session of the plan, made now if need be; None: the plan is at its end."""
        self._room.set()
        if self._ready:
            return self._ready.popleft()
        session = next(self._planned, None)
        return None if session is None else self._make(session)

    async def fill(self) -> None:
        while True:
            while len(self._ready) < self._depth:
                session = next(self._planned, None)
                if session is None:
                    return
                self._ready.append(self._make(session))
                await asyncio.sleep(0)  # one at a time: a request may be due
            self._room.clear()
            await self._room.wait()
