"""The master's view of its workers: who they are, what they said last, and how far their journals
have come. Messages in, messages out; what is to be done is decided in `master`."""

import logging
import time
from collections import deque
from collections.abc import Callable, Container
from pathlib import Path

import msgspec

import loadgen
from loadgen.errors import StoreError
from loadgen.hosts import identity
from loadgen.hosts.clock import Clock, Offset, Ping
from loadgen.hosts.delivery import Incoming
from loadgen.hosts.messages import (
    LOOKS,
    PROTOCOL,
    SILENT_S,
    Ack,
    Beat,
    Delta,
    FromMaster,
    Hello,
    Message,
    Order,
    Piece,
    Plan,
    Refused,
    Report,
    Welcome,
)
from loadgen.hosts.seal import Seal, nonce
from loadgen.shard import Frame
from loadgen.store import Worker

KEEP_BEATS = 64  # whose answers may still come

log = logging.getLogger("loadgen")
now_ns = time.monotonic_ns
Send = Callable[[str, bytes], None]  # to a node of Locust's


class Member:
    """One worker that was welcomed."""

    def __init__(self, node: str, hello: Hello, welcome: Welcome, seal: Seal,
                 send: Send) -> None:
        self.node, self.hello, self.welcome, self.seal = node, hello, welcome, seal
        self.clock = Clock()
        self.report: Report | None = None
        self.heard_ns = now_ns()
        self.plan: Plan | None = None  # its part of the test that runs
        self.offset = Offset(0, 0, 0)  # as the manifest has it
        self.lost: str | None = None  # in this test: why it does not count any more
        self.incoming: dict[int, Incoming] = {}
        self.deltas: deque[Delta] = deque(maxlen=120)
        self.cpu_frac: float | None = None
        self.delivered = False
        self._send_to = send
        self._quiet = self._beats = 0
        self._sent_ns: dict[int, int] = {}

    @property
    def name(self) -> str:
        return f"worker {self.hello.name}"

    @property
    def frames(self) -> dict[int, Frame]:
        """On the master's clock, which the worker's may have drifted from since."""
        said = self.report.frames if self.report is not None else {}
        error_ns = self.offset.error_ns + self.clock.drift_ns(self.offset.ahead_ns)
        at = Offset(self.offset.ahead_ns, error_ns, self.offset.pings)
        return {i: back(f, at) for i, f in said.items() if i in self.incoming}

    def send(self, message: FromMaster) -> None:
        self._send_to(self.node, self.seal.close(message))

    def beat(self, run: str, order: Order) -> None:
        self._beats += 1
        now = now_ns()
        self._sent_ns[self._beats] = now
        self._sent_ns.pop(self._beats - KEEP_BEATS, None)
        mine = run if self.plan is not None else ""
        if order.leg is not None:  # in its own clock
            order = Order(order.do, order.leg, order.t0_ns + self.offset.ahead_ns)
        self.send(Beat(self._beats, now, mine, order if mine else Order(),
                       {i: x.kept for i, x in self.incoming.items()}, self.delivered))

    def look(self) -> None:
        """At how long it has been silent; to be called again and again."""
        silent_s = (now_ns() - self.heard_ns) / 1e9
        self._quiet = self._quiet + 1 if silent_s > SILENT_S else 0
        if self._quiet >= LOOKS and self.lost is None and self.plan is not None:
            self.lost = f"{self.name} has been silent for {silent_s:.1f} s"
            log.error("%s", self.lost)

    @property
    def is_silent(self) -> bool:
        return self._quiet > 0

    def join(self, plan: Plan, folder: Path, offset: Offset) -> None:
        """Its part of a test. Raises StoreError."""
        self.plan, self.offset, self.lost, self.delivered = plan, offset, None, False
        self.deltas.clear()
        self.incoming = {i: Incoming(folder / f"records-{i}.jsonl")
                         for i in range(plan.first, plan.first + plan.n)}

    def leave(self) -> None:
        """The test is over."""
        for x in self.incoming.values():
            x.close()
        self.plan, self.incoming = None, {}

    # ------------------------------------------------------------------------------ what it says

    def said(self, report: Report, got_ns: int) -> None:
        self.report, self.heard_ns = report, got_ns
        sent_ns = self._sent_ns.pop(report.beat, None)
        if sent_ns is not None:
            self.clock.add(Ping(sent_ns, report.heard_ns, report.said_ns, got_ns))
        if report.delta is not None and self.is_in(report.run):
            self.deltas.append(report.delta)
        if report.cpu_frac is not None:
            self.cpu_frac = report.cpu_frac
        if self.is_in(report.run) and report.failed and self.lost is None:
            self.lost = f"{self.name}: {report.failed}"
            log.error("%s", self.lost)

    def is_in(self, run: str) -> bool:
        return self.plan is not None and self.plan.run == run

    def take(self, piece: Piece) -> None:
        """Raises StoreError."""
        if not self.is_in(piece.run) or piece.shard not in self.incoming:
            return
        incoming = self.incoming[piece.shard]
        try:
            incoming.take(piece)
        finally:
            self.send(Ack(piece.run, piece.shard, incoming.kept))

    def has_ended(self, leg: str) -> bool:
        """All of its shards have ended the leg, and all that they wrote of it is here."""
        report = self.report
        return (report is not None and report.leg == leg and len(report.frames) ==
                len(self.incoming) and report.state != "leg" and self._has_all(report))

    def is_complete(self, leg: str) -> bool:
        """All that was due in the leg's window has ended, in each of its shards."""
        report = self.report
        return report is not None and report.leg == leg and len(report.frames) == len(
            self.incoming) and all(f.kind == "ended" or f.complete for f in report.frames.values())

    @property
    def is_closed(self) -> bool:
        return (self.report is not None and self.report.state == "closed"
                and self._has_all(self.report))

    def _has_all(self, report: Report) -> bool:
        return all(report.written.get(i) == x.kept for i, x in self.incoming.items())

    def of_manifest(self, first: int, offset: Offset) -> Worker:
        return Worker(
            name=self.hello.name, shards=list(range(first, first + self.hello.shards)),
            offset_ns=offset.ahead_ns, error_ns=offset.error_ns, host=dict(self.hello.host))


class Roll:
    """All workers that are there, by their node; greets those who come."""

    def __init__(self, token: str, send: Send) -> None:
        self.members: dict[str, Member] = {}
        self.refused: dict[str, str] = {}  # node → why
        self.failed: str | None = None  # the master's own disk is full
        self._token, self._send = token, send
        self.scenario: Callable[[], str] = lambda: ""  # the hash of what is to be asked

    def hear(self, node: str, data: object, got_ns: int) -> Member | None:
        """Returns a member that has just come. Raises Forged."""
        member = self.members.get(node)
        seal = member.seal if member is not None else Seal(self._token, "master")
        message = seal.open(data)
        if isinstance(message, Hello):
            return self._greet(node, message)
        assert member is not None, "outside of a session there are greetings only"
        self._heed(member, message, got_ns)
        return None

    def forget_gone(self, there: Container[str]) -> None:
        """Those whose connections are gone; one in a test stays, as what it sent is in it."""
        self.refused = {node: why for node, why in self.refused.items() if node in there}
        self.members = {node: m for node, m in self.members.items()
                        if node in there or m.plan is not None}

    def _heed(self, member: Member, message: Message, got_ns: int) -> None:
        if isinstance(message, Report):
            member.said(message, got_ns)
        elif isinstance(message, Piece):
            try:
                member.take(message)
            except StoreError as e:
                self.failed = self.failed or str(e)

    def _greet(self, node: str, hello: Hello) -> Member | None:
        known = self.members.get(node)
        if known is not None:  # it has not heard yet, or the greeting was on its way
            if hello.nonce == known.hello.nonce:
                self._send(node, known.seal.close(known.welcome))
            return None
        seal = Seal(self._token, "master")
        if (why := self._wrong(hello)) is not None:
            if node not in self.refused:
                log.error("worker %s is refused: %s", hello.name, why)
            self.refused[node] = f"worker {hello.name} is refused: {why}"
            self._send(node, seal.close(Refused(hello.nonce, why)))
            return None
        welcome = Welcome(hello.nonce, nonce())
        seal.agree(hello.nonce, welcome.nonce)
        self.members[node] = Member(node, hello, welcome, seal, self._send)
        self._send(node, seal.close(welcome))
        return self.members[node]

    def _wrong(self, hello: Hello) -> str | None:
        if hello.protocol != PROTOCOL or hello.version != loadgen.__version__:
            return (f"it runs loadgen {hello.version}, this is {loadgen.__version__}; install the "
                    "same on all hosts")
        if hello.code != identity.code():
            return (f"its loadgen {hello.version} has other sources than this one ({hello.code}, "
                    f"{identity.code()}); install the same on all hosts")
        if hello.scenario is not None and hello.scenario != self.scenario():
            return ("its --scenario is not the master's; leave it out, workers are told what to "
                    "ask, or give both the same file")
        return None


def back(frame: Frame, offset: Offset) -> Frame:
    """A frame on the master's clock."""
    ahead = offset.ahead_ns
    health = frame.health
    if health is not None:
        health = msgspec.structs.replace(health, clock_error_s=offset.error_ns / 1e9)
    return msgspec.structs.replace(
        frame, t_ns=frame.t_ns - ahead, health=health,
        stalls=[(a - ahead, b - ahead) for a, b in frame.stalls],
        stopped_ns=None if frame.stopped_ns is None else frame.stopped_ns - ahead)


