"""One request on its way: a Shot out, its answer's reads to a Recorder, failures to outcomes.

While the answer streams in, bytes are kept with the stamp of the read that brought them; nothing
is parsed but HTTP's framing, and nobody is woken, until the stream ends, a deadline is due, or
much has piled up.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from loadgen import net, stamps
from loadgen.connection import DONE, Connection, Tally
from loadgen.deadline import LINGER_S, OUR_LIMITS, STALE_NS, Deadline
from loadgen.dial import why_not
from loadgen.net import now_ns
from loadgen.outputs import Outputs
from loadgen.record import Outcome, Recorder, RequestRecord, Shot
from loadgen.scenario import Scenario
from loadgen.target import Target


class Home(Protocol):
    """What a flight needs of its client."""

    target: Target
    tally: Tally
    outputs: Outputs | None
    loop: asyncio.AbstractEventLoop
    direct: net.Selector | net.Plain
    clock: stamps.Clock

    def request(self, body: bytes) -> bytes:
        """Head and body. Raises ValueError if a header cannot be sent."""

    def take(self) -> Connection | None:
        """A kept-alive connection."""

    async def connection(self) -> Connection:
        """A new one. Raises OSError, ValueError."""

    def give(self, connection: Connection) -> None:
        """To be kept alive."""

    def enter(self, flight: "Flight") -> int:
        """How many are in flight, with this one."""

    def forget(self, flight: "Flight") -> None:
        """It has landed."""

    def later(self, chore: Callable[[], None]) -> None:
        """Does it soon, when nothing is more pressing."""


class Flight:
    """One request under way: a Sink for its connection. `record` is there when it has landed."""

    def __init__(self, client: Home, shot: Shot, scenario: Scenario) -> None:
        outputs = client.outputs
        self._outputs = outputs if outputs is not None and outputs.wants(shot.cls) else None
        self.recorder = Recorder(shot, scenario.throttle_status,
                                 shot.keeps or self._outputs is not None)
        self.recorder.stamp_kind = "kernel"  # unless a read says otherwise
        self.record: RequestRecord | None = None
        self._landed: Callable[[], object] | None = None
        self._client = client
        self._limits = scenario.timeouts_of(shot.cls)
        self._timer: asyncio.TimerHandle | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._ended_ns: int | None = None
        self._lingers = False
        self.bug: Exception | None = None
        self.parts: list[bytes] = []  # of the body, not parsed yet …
        self.stamps = bytearray()  # … and when each was received
        try:
            self._request, self._unfit = client.request(shot.body), ""
        except ValueError as e:
            self._request, self._unfit = b"", str(e)

    def start(self, landed: Callable[[], object]) -> None:
        """Sends it, and does everything else after that. `landed` is called when it has ended."""
        client, self._landed = self._client, landed
        connection = None if self._unfit else client.take()
        if connection is not None:
            self._send(connection)
        self.recorder.inflight = client.enter(self)
        if self._unfit:
            client.loop.call_soon(self._land, Outcome.CONNECT_FAILED, self._unfit)
            return
        self._deadline = Deadline(self._limits, self.recorder.shot.abandon_after_s,
                                  client.loop.time())
        client.later(self._watch)
        if connection is None:
            self._connecting = client.loop.create_task(self._connect_and_send())

    def result(self) -> RequestRecord:
        """Of a flight that has landed. Raises what is a bug of ours."""
        if self.bug is not None:
            raise self.bug
        assert self.record is not None
        return self.record

    @property
    def came(self) -> int:
        """Grows with each read of the answer's body."""
        kept = 0 if self._connection is None else self._connection.kept
        return kept + len(self.stamps) + self.recorder.n_events

    def cancel(self) -> None:
        """Its record is there when this returns."""
        self._land(Outcome.CANCELLED, None)
        self._record()

    # ------------------------------------------------------------------------------------- out

    async def _connect_and_send(self) -> None:
        began_ns = now_ns()
        try:
            connection = await self._client.connection()
        except OSError as e:
            ours = e.errno in OUR_LIMITS
            self._land(Outcome.DROPPED if ours else Outcome.CONNECT_FAILED, self._where(e))
            return
        except ValueError as e:
            self._land(Outcome.CONNECT_FAILED, str(e))
            return
        self.recorder.connect_wait_ns = now_ns() - began_ns
        self._send(connection)

    def _where(self, error: OSError) -> str:
        return f"cannot connect to {self._client.target.base_url}: {why_not(error)}"

    def _send(self, connection: Connection) -> None:
        self._connection = connection
        try:
            self.recorder.sent(connection.exchange(self._request, self))
        except OSError as e:
            connection.close()
            self._client.loop.call_soon(self.broke, e, False)

    # ------------------------------------------------------------------------------ its answer

    def head(self, stamp: bytes, status: int, headers: dict[bytes, bytes]) -> None:
        packed = headers.get(b"content-encoding", b"identity")
        if packed.lower() != b"identity":
            raise ValueError(f"the answer is packed ({packed.decode('latin-1')}), and was asked "
                             "for as it is")
        [stamp_ns] = self._client.clock.mono_ns(stamp, self.recorder.sent_ns or 0)
        self.recorder.response(
            stamp_ns, status, headers.get(b"content-type", b"").decode("latin-1"),
            b"retry-after" in headers)

    def more(self) -> None:
        if self._says_done():
            self._linger()
        else:
            self._client.later(self._look)

    def _look(self) -> None:
        self._fold()
        if self.recorder.fatal is Outcome.BAD_STREAM:
            self._land(None, None)

    def by_user(self) -> None:
        self.recorder.stamp_kind = "user"

    def end(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._client.give(connection)
        self._land(None, None)

    def broke(self, error: Exception | None, began: bool) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and connection.used > 1 and not began and self._just_sent():
            self.recorder.stale_retries += 1  # the server had closed it while it was idle
            if self.recorder.stale_retries == 1:
                self._connecting = self._client.loop.create_task(self._connect_and_send())
                return
        what = "the server closed the connection" if error is None else (
            f"{type(error).__name__}: {error}")
        ours = isinstance(error, OSError) and error.errno in OUR_LIMITS
        self._land(Outcome.DROPPED if ours else Outcome.DISCONNECTED, what)

    def garbage(self, why: str) -> None:
        self._connection = None
        self._land(Outcome.BAD_STREAM, why)

    def _just_sent(self) -> bool:
        sent_ns = self.recorder.sent_ns
        return sent_ns is None or now_ns() - sent_ns < STALE_NS

    # ------------------------------------------------------------------------------- deadlines

    def _watch(self) -> None:
        if self._ended_ns is None:
            self._wait()
            if self._says_done():
                self._linger()

    def _says_done(self) -> bool:
        return bool(self.parts) and self.parts[-1].endswith(DONE)

    def _wait(self) -> None:
        """Until the deadline; looked at in between, as a first token brings one that is nearer."""
        loop = self._client.loop
        self._timer = loop.call_at(
            min(self._deadline.when_s, loop.time() + self._deadline.stall_s), self._due)

    def _due(self) -> None:
        """The deadline as it was known is here; what has come since may have moved it."""
        self._fold()
        if self._ended_ns is not None:
            return
        last_ns = self.recorder.last_ns
        if last_ns is not None:
            self._deadline.progress(self.recorder, last_ns / 1e9)
        if self._deadline.when_s > self._client.loop.time():
            self._wait()
        else:
            self._client.tally.lingered += self.recorder.ended
            self._land(*self._deadline.passed(self.recorder))

    def _linger(self) -> None:
        """Once: a server that says it again and again must not hold up the other limits."""
        if self._timer is None or self._lingers:
            return
        self._lingers = True
        when_s = min(self._timer.when(), self._client.loop.time() + LINGER_S)
        self._timer.cancel()
        self._timer = self._client.loop.call_at(when_s, self._due)

    # -------------------------------------------------------------------------------- the end

    def _fold(self) -> None:
        if self._connection is not None:
            self._connection.catch_up()
        when = self._client.clock.mono_ns(self.stamps, self.recorder.sent_ns or 0)
        parts = self.parts[:]
        self.parts.clear()
        self.stamps.clear()
        try:
            self.recorder.feed_reads(when, parts)
        except Exception as e:  # noqa: BLE001  (a bug of ours: the leg must fail, not wait for ever)
            self.bug = e
            self._land(None, None)

    def _land(self, failure: Outcome | None, error: str | None) -> None:
        """Ends it, once; its record follows."""
        if self._ended_ns is not None:
            return
        self._ended_ns, self._failure, self._error = now_ns(), failure, error
        if self._timer is not None:
            self._timer.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.catch_up()
            connection.close()
        self._client.forget(self)
        self._client.later(self._record)

    def _record(self) -> None:
        if self.record is not None or self._landed is None:
            return
        assert self._ended_ns is not None
        self._fold()
        if self.bug is None:
            self._client.direct.ring()  # a start may be due meanwhile
            try:
                self.record = self._made(self._ended_ns)
            except Exception as e:  # noqa: BLE001  (a bug of ours, as in `_fold`)
                self.bug = e
            self._client.direct.ring()
        landed, self._landed = self._landed, None
        landed()

    def _made(self, ended_ns: int) -> RequestRecord:
        record = self.recorder.end(ended_ns, self._failure, self._error)
        if record.error is not None:
            record.error = self._client.target.scrub(record.error)
        if self._outputs is not None:
            record.output_ref = self._outputs.keep(record, self.recorder.answer())
        return record
