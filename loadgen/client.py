"""All requests to one target: its connections, kept alive between them, and the flights that are
under way. Never raises for a request. A request is no task: it is a Flight, to which its connection
tells what comes.
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
from loadgen.dial import connect, context_of, proxy_header
from loadgen.flight import Flight
from loadgen.net import now_ns
from loadgen.outputs import Outputs
from loadgen.record import RequestRecord, Shot
from loadgen.scenario import Scenario
from loadgen.target import Target

_KEEPALIVE_NS = 4_000_000_000  # uvicorn closes an idle connection after 5 s: be first
_CONNECT_S = 5.0
_SLICE_NS = 300_000


class Client:
    """One pool of connections to one target. Use as `async with Client(…) as client`."""

    def __init__(self, target: Target, scenario: Scenario,
                 outputs: Outputs | None = None) -> None:
        self.target = target
        self.outputs = outputs  # which answers are kept, and where
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
        """Opens connections until n are idle, so that no request pays for its handshake. Those of
        a leg before would be too old when this one takes them. Whatever goes wrong here shows in
        the requests themselves."""
        while self._idle and now_ns() - self._idle[0].idle_since_ns > _KEEPALIVE_NS // 2:
            self._idle.popleft().close()

        async def one() -> None:
            try:
                async with asyncio.timeout(_CONNECT_S):
                    self._idle.append(await self.connection())
            except (OSError, ValueError, TimeoutError):
                pass
        await asyncio.gather(*(one() for _ in range(n - len(self._idle))))

    def prepare(self, shot: Shot) -> Flight:
        """A request that needs but its `start`."""
        return Flight(self, shot, self._scenario)

    async def send(self, shot: Shot) -> RequestRecord:
        """The record of a request, when it has ended."""
        return await self.fly(self.prepare(shot))

    async def fly(self, flight: Flight) -> RequestRecord:
        """Sends it; its record, when it has ended. To give it up, cancel the task: the record is
        then CANCELLED, with what had come."""
        self.direct.glance()  # many slots may send in one turn of the loop
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

    def came(self) -> tuple[int, int]:
        """Of what is in flight: answers that have begun, and what has come of them, in bytes of
        stamps and in events; for whoever looks whether anything comes."""
        begun = came = 0
        for flight in self._flights:
            n = flight.came
            begun += n > 0
            came += n
        return begun, came

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

    def enter(self, flight: Flight) -> int:
        """How many are in flight, with this one."""
        self._flights.add(flight)
        self.flown_ns()
        self.inflight += 1
        return self.inflight

    def forget(self, flight: Flight) -> None:
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
        return context_of(self.target.trust) if self._url.scheme == "https" else None

    def _forget(self, connection: Connection) -> None:
        """An idle connection was closed by the server."""
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)
