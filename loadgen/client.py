"""The only request I/O: sends a Shot, tells a Recorder what came and when, maps failures to
outcomes. Never raises for a request.

A request is no task. While its answer streams in, bytes are kept with the stamp of the read that
brought them; nothing is parsed but HTTP's framing, and nobody is woken, until the stream ends, a
deadline is due, or much has piled up.
"""

import asyncio
import contextlib
import functools
import ssl
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self
from urllib.parse import SplitResult, urlsplit

from loadgen import __version__, net, openai, stamps
from loadgen.connection import Connection, Tally
from loadgen.deadline import LINGER_S, OUR_LIMITS, STALE_NS, Deadline
from loadgen.dial import connect, proxy_header
from loadgen.net import now_ns
from loadgen.record import Outcome, Recorder, RequestRecord, Shot
from loadgen.scenario import Scenario
from loadgen.target import Target

_KEEPALIVE_NS = 4_000_000_000  # uvicorn closes an idle connection after 5 s: be first
_CONNECT_S = 5.0
_SLICE_NS = 300_000


class Client:
    """One pool of connections to one target. Use as `async with Client(…) as client`."""

    def __init__(self, target: Target, scenario: Scenario) -> None:
        self.target = target
        self.inflight = 0
        self._flown_ns, self._counted_ns = 0, now_ns()
        self.tally = Tally()
        self._scenario = scenario
        self._idle: deque[Connection] = deque()  # the last used at the right
        self._flights: set[Flight] = set()
        self._chores: deque[Callable[[], None]] = deque()
        self._at_work = False

    async def __aenter__(self) -> Self:
        self.loop = asyncio.get_running_loop()
        self.direct = net.direct_of(self.loop)
        self.clock = stamps.Clock()
        self._keeper = stamps.keeper()
        self._syncing = self.loop.create_task(self._sync())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None,
                        tb: TracebackType | None) -> None:
        self.cancel()
        self._syncing.cancel()
        self._keeper.close()
        while self._idle:
            self._idle.pop().close()

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep((net.next_tick_ns(stamps.SYNC_S) - now_ns()) / 1e9)
            self.clock.sync()

    async def open_connections(self, n: int) -> None:
        """Opens connections until n are idle, so that no request pays for its handshake. Whatever
        goes wrong here shows in the requests themselves."""
        async def one() -> None:
            try:
                async with asyncio.timeout(_CONNECT_S):
                    self._idle.append(await self.connection())
            except (OSError, ValueError, TimeoutError):
                pass
        await asyncio.gather(*(one() for _ in range(n - len(self._idle))))

    def prepare(self, shot: Shot) -> "Flight":
        """A request that needs but its `start`."""
        return Flight(self, shot, self._scenario)

    async def send(self, shot: Shot) -> RequestRecord:
        """The record of a request, when it has ended. To give it up, cancel the task: the record
        is then CANCELLED, with what had come."""
        self.direct.glance()  # many slots may send in one turn of the loop
        flight = self.prepare(shot)
        landed = self.loop.create_future()
        flight.start(lambda: None if landed.done() else landed.set_result(None))
        try:
            await landed
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None:  # the request is what was cancelled; its task lives on
                task.uncancel()
            flight.cancel()
        return flight.result()

    def cancel(self) -> None:
        """Gives up all that is in flight."""
        for flight in list(self._flights):
            flight.cancel()

    def flown_ns(self) -> int:
        """Requests in flight, integrated over all the time so far."""
        now = now_ns()
        self._flown_ns += self.inflight * (now - self._counted_ns)
        self._counted_ns = now
        return self._flown_ns

    # ------------------------------------------------------------------------- for its flights

    def take(self) -> Connection | None:
        """A kept-alive connection."""
        while self._idle:
            connection = self._idle.pop()
            if connection.open and now_ns() - connection.idle_since_ns < _KEEPALIVE_NS:
                return connection
            connection.close()
        return None

    def give(self, connection: Connection) -> None:
        if connection.open:
            self._idle.append(connection)

    def enter(self, flight: "Flight") -> int:
        """How many are in flight, with this one."""
        self._flights.add(flight)
        self.flown_ns()
        self.inflight += 1
        return self.inflight

    def forget(self, flight: "Flight") -> None:
        self._flights.discard(flight)
        self.flown_ns()
        self.inflight -= 1

    def later(self, chore: Callable[[], None]) -> None:
        """Does it soon, but a little at a time: sockets are read in between, or what many answers
        that end at once leave to do would hold up the stamps of all others."""
        self._chores.append(chore)
        if not self._at_work:
            self._at_work = True
            self.loop.call_soon(self._work)

    def _work(self) -> None:
        until_ns = now_ns() + _SLICE_NS
        try:
            while self._chores and now_ns() < until_ns:
                self._chores.popleft()()
                self.direct.ring()
        finally:
            self._at_work = bool(self._chores)
            if self._chores:
                self.loop.call_soon(self._work)

    async def connection(self) -> Connection:
        """A new one. Raises OSError, ValueError."""
        sock, tls = await connect(self._url, self._proxy, self._context)
        connection = Connection(sock, tls, self.direct, self.tally, self._forget)
        connection.idle_since_ns = now_ns()
        return connection

    def request(self, body: bytes) -> bytes:
        """Head and body. Raises ValueError if a header cannot be sent."""
        return b"%b%d\r\n\r\n%b" % (self._head, len(body), body)

    @functools.cached_property
    def _head(self) -> bytes:
        url, headers = self._url, {
            "Host": self._url.netloc.rpartition("@")[2], "Content-Type": "application/json",
            "Accept": "text/event-stream", "Accept-Encoding": "identity",
            "User-Agent": f"loadgen/{__version__}", **self.target.headers}
        lines = [f"{name}: {value}" for name, value in headers.items()]
        if any("\r" in x or "\n" in x or "\0" in x for x in lines):
            raise ValueError("a header holds a line break")
        where, extra = url.path + openai.PATHS[self._scenario.endpoint], ""
        if self._proxy is not None and url.scheme == "http":
            where, extra = f"http://{headers['Host']}{where}", proxy_header(self._proxy)
        return (f"POST {where} HTTP/1.1\r\n" + "".join(f"{x}\r\n" for x in lines) + extra
                + "Content-Length: ").encode("latin-1")

    @functools.cached_property
    def _url(self) -> SplitResult:
        url = urlsplit(self.target.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"{self.target.base_url!r} is no http:// or https:// address")
        _ = url.port  # a bad one raises
        return url

    @functools.cached_property
    def _proxy(self) -> SplitResult | None:
        return urlsplit(self.target.proxy) if self.target.proxy else None

    @functools.cached_property
    def _context(self) -> ssl.SSLContext | None:
        return ssl.create_default_context() if self._url.scheme == "https" else None

    def _forget(self, connection: Connection) -> None:
        """An idle connection was closed by the server."""
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)


class Flight:
    """One request under way: a Sink for its connection. `record` is there when it has landed."""

    def __init__(self, client: Client, shot: Shot, scenario: Scenario) -> None:
        self.recorder = Recorder(shot, scenario.throttle_status)
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
        return f"cannot connect to {self._client.target.base_url}: {error}"

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
        return bool(self.parts) and self.parts[-1].endswith(b"[DONE]\n\n")

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
            record = self.recorder.end(self._ended_ns, self._failure, self._error)
            if record.error is not None:
                record.error = self._client.target.scrub(record.error)
            self.record = record
            self._client.direct.ring()
        landed, self._landed = self._landed, None
        landed()
