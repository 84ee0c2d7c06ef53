"""The master of a fleet: musters its workers, gives each its stripe of one plan, runs legs over all
of them, and merges their journals into one run folder. Rules: see `messages`."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gevent
import msgspec
from locust.env import Environment
from locust.rpc.protocol import Message as Envelope
from msgspec import Struct

from loadgen import scenario
from loadgen.errors import GeneratorError
from loadgen.fleet.run import Prepared
from loadgen.hosts import ledger
from loadgen.hosts.clock import Offset
from loadgen.hosts.delivery import hash_of
from loadgen.hosts.ledger import Entry
from loadgen.hosts.members import Member, Roll
from loadgen.hosts.messages import BEAT_S, LOOK_S, RETURN_S, Do, Order, Plan
from loadgen.hosts.seal import Forged, fingerprint
from loadgen.leg import Ending, Leg, Window
from loadgen.record import RequestRecord
from loadgen.shard import Frame
from loadgen.store import Journal, LegLine, RunFolder, Worker
from loadgen.supervise import Progress, is_lost, together, window_of

NAME = "loadgen"  # of Locust's custom message
HEAD_START_S = 0.8  # all workers hear of a leg, and their shards build bodies, before its clock
PINGS, PING_S = 20, 0.02  # when a worker has come
MUSTER_S = 10.0  # for workers that Locust knows and we do not yet
READY_S = 30.0  # for all shards to be there
END_S = 20.0  # for shards that were told to end a leg
DELIVER_S = 20.0  # without a byte more

log = logging.getLogger("loadgen")
now_ns = time.monotonic_ns


class Spent(Struct, frozen=True):
    """A leg that is over; what was due in it before `until_ns` must have records."""

    leg: Leg
    t0_ns: int
    until_ns: int


class Clocked(Struct, frozen=True):
    """One worker's clock against the master's, over a test."""

    worker: str
    offset_ns: int
    error_ns: int
    drift_ns: int  # beyond its error, at the end
    pings: int


class Outcome(Struct, frozen=True):
    """fleet.json: what came of a test. `exact`: every planned arrival has one record, and each
    journal here is its worker's, byte for byte. `start_s`: from the test's start to the first
    request's."""

    exact: bool
    start_s: float | None
    says: list[str]
    entries: list[Entry]
    clocks: list[Clocked]
    spare: list[str]  # workers that came when the test ran, and had no part in it
    worker_cpu_frac: dict[str, float | None]  # of the workers' own processes, shards left out


class Fleet:
    """All workers, over all tests of this master."""

    def __init__(self, environment: Environment, token: str) -> None:
        runner = environment.runner
        assert runner is not None
        self.roll = Roll(token, lambda node, data: runner.send_message(NAME, data, node))
        self._token, self._environment = token, environment
        self._order, self._run = Order(), ""
        self._strangers: set[str] = set()
        runner.register_message(NAME, self._hear)
        self._living = [gevent.spawn(self._beats), gevent.spawn(self._watch)]

    def end(self) -> None:
        gevent.killall(self._living)

    # ------------------------------------------------------------------------------- a test's own

    def muster(self, expected: int) -> list[Member]:
        """Waits for so many workers with known clocks. Raises GeneratorError."""
        until_s = time.monotonic() + MUSTER_S
        while True:
            there = [m for m in self.roll.members.values()
                     if not m.is_silent and (o := m.clock.offset()) and o.pings >= PINGS // 2]
            self.roll.forget_gone(self._environment.runner.clients)  # type: ignore[union-attr]
            if self.roll.refused:
                raise GeneratorError("; ".join(self.roll.refused.values()))
            if len(there) >= max(1, expected):
                return there
            if time.monotonic() > until_s:
                raise GeneratorError(
                    f"{len(there)} of {max(1, expected)} workers answer; those with another token "
                    "are passed over: see their logs, and compare $LOADGEN_FLEET_TOKEN")
            gevent.sleep(0.02)

    def stripes(self, members: Sequence[Member]) -> list[tuple[Member, int, Offset]]:
        """Each worker's first shard, and its clock as this test has it."""
        found, first = [], 0
        for m in members:
            m.clock.forget()
            offset = m.clock.offset()
            assert offset is not None
            found.append((m, first, offset))
            first += m.hello.shards
        return found

    def begin(self, stripes: Sequence[tuple[Member, int, Offset]], folder: RunFolder,
              prepared: Prepared, key: str) -> "FleetTest":
        """Sends the plan; returns when all shards are there. Raises LoadgenError."""
        of = sum(m.hello.shards for m, _, _ in stripes)
        digest = ledger.digest(prepared.scenario, prepared.seed, prepared.ratios)
        self.roll.failed = None
        self._run, self._order = folder.path.name, Order()
        for m, first, offset in stripes:
            m.join(Plan(
                run=self._run, scenario=scenario.to_plain(prepared.scenario), seed=prepared.seed,
                base_url=prepared.target.base_url, model=prepared.target.model,
                key=fingerprint(self._token, key), ratios=prepared.ratios, first=first,
                n=m.hello.shards, of=of, digest=digest), folder.path, offset)
        test = FleetTest(self, [m for m, _, _ in stripes], folder, prepared)
        self._until_ready(test)
        return test

    def _until_ready(self, test: "FleetTest") -> None:
        began_s, sent_s = time.monotonic(), 0.0
        while not all(m.report is not None and m.is_in(m.report.run) and m.report.state == "ready"
                      for m in test.members):
            if (why := test.broken()) is not None:
                raise GeneratorError(why)
            if time.monotonic() > began_s + READY_S:
                raise GeneratorError(f"not all workers' processes were there in {READY_S:g} s")
            if time.monotonic() > sent_s + 1:
                sent_s = time.monotonic()
                for m in test.members:
                    if m.plan is not None and not (m.report and m.is_in(m.report.run)):
                        m.send(m.plan)
            gevent.sleep(0.02)

    def order(self, do: Do, leg: Leg | None = None, t0_ns: int = 0) -> None:
        """From now on, for all; those who are silent hear of it when they come back."""
        self._order = Order(do, leg, t0_ns)
        self.beat()

    def over(self) -> None:
        """No test runs any more."""
        self._run, self._order = "", Order()

    # ------------------------------------------------------------------------------------ messages

    def _hear(self, msg: Envelope, **_: Any) -> None:
        got_ns = now_ns()
        try:
            came = self.roll.hear(msg.node_id, msg.data, got_ns)
        except Forged as e:
            if msg.node_id not in self._strangers:
                log.warning("messages of %s are passed over: %s", msg.node_id, e)
            self._strangers.add(msg.node_id)
            return
        if came is not None:
            late = " while a test runs: it takes part from the next one on" if self._run else ""
            log.info("%s has come, with %d shards%s", came.name, came.hello.shards, late)
            gevent.spawn(self._ping, came)

    def _ping(self, member: Member) -> None:
        for _ in range(PINGS):
            member.beat(self._run, self._order)
            gevent.sleep(PING_S)

    def _beats(self) -> None:
        while True:
            gevent.sleep(BEAT_S)
            self.beat()

    def beat(self) -> None:
        for m in list(self.roll.members.values()):
            m.beat(self._run, self._order)

    def _watch(self) -> None:
        while True:
            gevent.sleep(LOOK_S)
            for m in self.roll.members.values():
                m.look()


class FleetTest:
    """One test over a fleet: its legs, and what comes in."""

    def __init__(self, fleet: Fleet, members: list[Member], folder: RunFolder,
                 prepared: Prepared) -> None:
        self.fleet, self.members, self.folder, self.prepared = fleet, members, folder, prepared
        self.on: OnWideLeg | None = None
        self.spent: list[Spent] = []
        self.stopping: Do | None = None  # what the operator wants: stop or cancel
        self.began_ns = now_ns()  # or before: see WideLifecycle
        self._offsets: dict[Path, int] = {}
        self._legs: Journal = folder.legs_journal()
        self._owners = [""] * sum(len(m.incoming) for m in members)
        for m in members:
            for shard in m.incoming:
                self._owners[shard] = m.hello.name

    def broken(self) -> str | None:
        """Why no leg can be kept any more."""
        return self.fleet.roll.failed or next((m.lost for m in self.members if m.lost), None)

    @property
    def frames(self) -> list[Frame]:
        return [f for m in self.members for f in m.frames.values()]

    def run_leg(self, leg: Leg, died: Callable[[], str | None],
                show: Callable[[Progress], None]) -> tuple[Window, list[RequestRecord]]:
        """As `Shards.run`, over all workers: to the end of the last request, with every record
        that can be had on this disk."""
        self._legs.append(LegLine(leg=leg))
        slowest_ns = max(m.offset.error_ns for m in self.members)
        t0_ns = now_ns() + round(HEAD_START_S * 1e9) + 4 * slowest_ns
        self.on = OnWideLeg(leg, t0_ns)
        self.fleet.order("leg", leg, t0_ns)
        ending, note = self._watch(leg, t0_ns, died, show)
        self._collect(lambda m: m.has_ended(leg.id))
        window = window_of(leg, t0_ns, now_ns(), self.frames, ending, None)
        records = [r for r in self.folder.records(self._offsets) if r.leg == leg.id]
        until_ns = ledger.until_ns(
            leg, t0_ns, [f.stopped_ns for f in self.frames if f.stopped_ns is not None])
        found = ledger.entries(leg, t0_ns, until_ns, records, self._owners)
        if (why := self.broken()) is not None:
            ending, note = "failed", why
        missing = ledger.says(found)
        if missing is not None and ending != "server_died":
            ending, note = "failed", f"{note}; {missing}" if note else missing
        window = msgspec.structs.replace(window, ending=ending, note=note)
        self._legs.append(LegLine(window=window))
        self.on = None
        self.spent.append(Spent(leg, t0_ns, until_ns))
        return window, records

    def close(self) -> Outcome:
        """Ends the shards, and has every journal to its last byte; what is missing is said."""
        self.fleet.order("close")
        self._collect(lambda m: m.is_closed or (m.lost is not None and m.is_silent))
        for m in self.members:
            m.delivered = m.is_closed and self._same(m)
        outcome = self._outcome()
        self.folder.write("fleet.json", msgspec.json.format(msgspec.json.encode(outcome)))
        self.fleet.beat()
        self.leave()
        return outcome

    def leave(self) -> None:
        """Without anything more from anybody."""
        self._legs.close()
        for m in self.members:
            m.leave()
        self.fleet.over()

    # ------------------------------------------------------------------------------------- inside

    def _watch(self, leg: Leg, t0_ns: int, died: Callable[[], str | None],
               show: Callable[[Progress], None]) -> tuple[Ending, str | None]:
        while True:
            gevent.sleep(0.1)
            elapsed_s = max(0.0, (now_ns() - t0_ns) / 1e9)
            progress = together(leg, elapsed_s, self.frames, self.stopping is not None)
            show(progress)
            ending, note = self._verdict(leg, progress, died)
            if ending is not None:
                self.fleet.order("cancel")
                return ending, note

    def _verdict(self, leg: Leg, progress: Progress,
                 died: Callable[[], str | None]) -> tuple[Ending | None, str | None]:
        if (why := self.broken()) is not None:
            return "failed", why
        if (why := died()) is not None:
            return "server_died", why
        if is_lost(leg, progress.done, progress.done_good, progress.elapsed_s):
            return "cut", None
        if self.stopping is not None:
            return self._stopped()
        return ("done" if all(m.is_complete(leg.id) for m in self.members) else None), None

    def _stopped(self) -> tuple[Ending | None, str | None]:
        """The operator's stop: no new requests; those in flight are awaited, or cancelled."""
        on = self.on
        assert on is not None
        over: Ending = "done" if on.leg.measure_s is None else "interrupted"
        if self.stopping == "cancel":
            return over, None
        if not on.told_stop:
            on.told_stop = True
            self.fleet.order("stop")
        done = all(m.report is not None and m.report.leg == on.leg.id and m.report.state != "leg"
                   for m in self.members)
        return (over if done else None), None

    def _collect(self, has: Callable[[Member], bool]) -> None:
        """Until each worker has given what it has. One that is lost has some seconds to come back;
        one that goes on giving is waited for."""
        began_s = moved_s = time.monotonic()
        kept = -1
        while waited := [m for m in self.members if not has(m)]:
            gevent.sleep(0.02)
            now_s, here = time.monotonic(), sum(x.kept for m in waited for x in m.incoming.values())
            if here != kept:
                kept, moved_s = here, now_s
            if self.fleet.roll.failed is not None:
                return
            if all(m.lost for m in waited) and now_s > max(began_s, moved_s) + RETURN_S:
                return
            if now_s > max(began_s + END_S, moved_s + DELIVER_S):
                for m in waited:
                    m.lost = m.lost or f"{m.name} did not deliver its records"
                return

    def _same(self, m: Member) -> bool:
        """Its journals here are its journals there."""
        assert m.report is not None
        same = all(m.report.hashes.get(i) == hash_of(x.path, lambda: gevent.sleep(0))
                   for i, x in m.incoming.items())
        if not same:
            m.lost = m.lost or f"{m.name}: its journal here is not the one that it wrote"
        return same

    def _outcome(self) -> Outcome:
        records = list(self.folder.records())
        found = [e for x in self.spent
                 for e in ledger.entries(x.leg, x.t0_ns, x.until_ns, records, self._owners)]
        twice = [f"{len(e.twice)} arrivals of {e.worker} have two records"
                 for e in found if e.twice]
        lost = [m.lost for m in self.members if m.lost]
        if self.fleet.roll.failed:
            lost.append(self.fleet.roll.failed)
        missing = ledger.says(found)
        says = [*lost, *([missing] if missing else []), *twice]
        first_ns = min((r.sent_ns for r in records if r.sent_ns is not None), default=None)
        return Outcome(
            exact=bool(self.spent) and not says and all(e.is_exact for e in found),
            says=says, entries=found,
            start_s=None if first_ns is None else round((first_ns - self.began_ns) / 1e9, 3),
            clocks=[Clocked(m.hello.name, m.offset.ahead_ns, m.offset.error_ns,
                            m.clock.drift_ns(m.offset.ahead_ns), m.offset.pings)
                    for m in self.members],
            spare=[m.hello.name for m in self.fleet.roll.members.values()
                   if m not in self.members],
            worker_cpu_frac={m.hello.name: m.cpu_frac for m in self.members})


class OnWideLeg:
    """The leg that runs."""

    def __init__(self, leg: Leg, t0_ns: int) -> None:
        self.leg, self.t0_ns = leg, t0_ns
        self.told_stop = False


def workers_of(stripes: Sequence[tuple[Member, int, Offset]]) -> list[Worker]:
    return [m.of_manifest(first, offset) for m, first, offset in stripes]
