"""The only request I/O: sends a Shot with aiohttp, tells a Recorder what came, maps the library's
exceptions to outcomes. Never raises for a request.

Its own deadlines: `sock_read` of aiohttp never fires on a server that drips, so the first token,
silence between events and the whole are watched here, by one timeout that moves.
"""

import asyncio
import errno
import time
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import aiohttp

from loadgen import __version__, openai
from loadgen.record import Outcome, Recorder, RequestRecord, Shot
from loadgen.scenario import Scenario, Timeouts
from loadgen.target import Target

_NO_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=None)
_OURS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM)
_KEEPALIVE_S = 4.0  # uvicorn closes an idle connection after 5 s: be first
_STALE_NS = 1_000_000_000
_LINGER_S = 1.0  # from the stream's proper end to the end of the body

now_ns = time.monotonic_ns


class Client:
    """One pool of connections to one target. Use as `async with Client(…) as client`."""

    def __init__(self, target: Target, scenario: Scenario) -> None:
        self.target = target
        self.inflight = 0
        self._scenario = scenario
        self._url = target.base_url + openai.PATHS[scenario.endpoint]

    async def __aenter__(self) -> Self:
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_start.append(_connecting)
        trace.on_connection_create_end.append(_connected)
        trace.on_connection_reuseconn.append(_reused)
        trace.on_request_headers_sent.append(_sent)
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream",
                   "Accept-Encoding": "identity", "User-Agent": f"loadgen/{__version__}",
                   **self.target.headers}

        def session(**pool: Any) -> aiohttp.ClientSession:
            return aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=None, **pool),
                timeout=_NO_TIMEOUT, trace_configs=[trace], read_bufsize=2**20, headers=headers)

        self._session = session(keepalive_timeout=_KEEPALIVE_S)
        self._fresh = session(force_close=True)  # a retry must not land on the next stale one
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None,
                        tb: TracebackType | None) -> None:
        await self._session.close()
        await self._fresh.close()

    async def open_connections(self, n: int) -> None:
        """Opens n connections into the pool, so that no request pays for its handshake. Whatever
        goes wrong here shows in the requests themselves."""
        async def one() -> None:
            try:
                async with asyncio.timeout(5):
                    async with self._session.get(f"{self.target.base_url}/v1/models",
                                                 trace_request_ctx=None) as answer:
                        await answer.read()
            except (aiohttp.ClientError, TimeoutError, OSError):
                pass
        await asyncio.gather(*(one() for _ in range(n)))

    async def send(self, shot: Shot) -> RequestRecord:
        """Sends one request and reads its stream to the end. To give it up, cancel the task: the
        record is then CANCELLED, with what had come."""
        recorder = Recorder(shot, self._scenario.throttle_status)
        self.inflight += 1
        recorder.inflight = self.inflight
        try:
            failure, error = await self._guarded(recorder)
        finally:
            self.inflight -= 1
        record = recorder.end(now_ns(), failure, error)
        if record.error is not None:
            record.error = self.target.scrub(record.error)
        return record

    async def _guarded(self, recorder: Recorder) -> tuple[Outcome | None, str | None]:
        """Runs the exchange; what ended it early, if anything, as an outcome and in words."""
        watch = _Watch(self._scenario.timeouts_of(recorder.shot.cls),
                       recorder.shot.abandon_after_s)
        try:
            async with asyncio.timeout(None) as watch.timeout:
                watch.start()
                await self._exchange(recorder, watch)
        except TimeoutError:
            if watch.waits_for is Outcome.TIMEOUT_FIRST_TOKEN and recorder.sent_ns is None:
                return Outcome.CONNECT_FAILED, "no connection within the first-token time"
            return watch.waits_for, None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None:  # the request is what was cancelled; its task lives on
                task.uncancel()
            return Outcome.CANCELLED, None
        except aiohttp.ClientConnectorError as e:
            ours = e.errno in _OURS
            return Outcome.DROPPED if ours else Outcome.CONNECT_FAILED, str(e)
        except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError, OSError) as e:
            ours = isinstance(e, OSError) and e.errno in _OURS
            return Outcome.DROPPED if ours else Outcome.DISCONNECTED, f"{type(e).__name__}: {e}"
        except aiohttp.ClientError as e:  # not HTTP, or a broken head
            return Outcome.BAD_STREAM, f"{type(e).__name__}: {e}"
        except ValueError as e:  # a header that cannot be sent
            return Outcome.DROPPED, f"{type(e).__name__}: {e}"
        return None, None

    async def _exchange(self, recorder: Recorder, watch: "_Watch") -> None:
        """One request; sent once more if the kept-alive connection turned out to be closed."""
        try:
            await self._request(self._session, recorder, watch)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as e:
            if isinstance(e, aiohttp.ClientConnectorError) or not _was_stale(recorder):
                raise
            recorder.stale_retries += 1
            await self._request(self._fresh, recorder, watch)

    async def _request(self, session: aiohttp.ClientSession, recorder: Recorder,
                       watch: "_Watch") -> None:
        async with session.post(self._url, data=recorder.shot.body, allow_redirects=False,
                                trace_request_ctx=recorder) as answer:
            recorder.response(now_ns(), answer.status, answer.headers.get("Content-Type", ""),
                              "Retry-After" in answer.headers)
            while data := await answer.content.readany():
                recorder.feed(now_ns(), data)
                if recorder.fatal is Outcome.BAD_STREAM:
                    answer.close()
                    return
                watch.progress(recorder)


def _was_stale(recorder: Recorder) -> bool:
    """The connection was kept alive, and broke right when it was used again: the server had
    closed it while it was idle and has not seen this request."""
    reused = recorder.connect_wait_ns is None and recorder.status is None
    return reused and (recorder.sent_ns is None or now_ns() - recorder.sent_ns < _STALE_NS)


class _Watch:
    """The deadline that is next, and which outcome it means."""

    def __init__(self, limits: Timeouts, abandon_after_s: float | None) -> None:
        self.timeout: asyncio.Timeout
        self.waits_for = Outcome.TIMEOUT_FIRST_TOKEN
        self._limits = limits
        self._abandon_after_s = abandon_after_s
        self._events = 0

    def start(self) -> None:
        self._started = asyncio.get_running_loop().time()
        self._until(Outcome.TIMEOUT_FIRST_TOKEN, self._started + self._limits.first_token_s)

    def progress(self, recorder: Recorder) -> None:
        """Called after each read: a token event moves the deadline, a ping does not."""
        if recorder.ended:
            self._until(Outcome.STALLED, asyncio.get_running_loop().time() + _LINGER_S)
        elif recorder.n_events > self._events:
            self._events = recorder.n_events
            self._until(Outcome.STALLED,
                        asyncio.get_running_loop().time() + self._limits.stall_s)

    def _until(self, outcome: Outcome, when: float) -> None:
        limits = [(when, outcome), (self._started + self._limits.total_s, Outcome.TIMEOUT_TOTAL)]
        if self._abandon_after_s is not None:
            limits.append((self._started + self._abandon_after_s, Outcome.ABANDONED))
        when, self.waits_for = min(limits)
        self.timeout.reschedule(when)


# ------------------------------------------------------------- what aiohttp tells while it connects


async def _connecting(_: object, ctx: SimpleNamespace, __: object) -> None:
    ctx.connect_start_ns = now_ns()


async def _connected(_: object, ctx: SimpleNamespace, __: object) -> None:
    if isinstance(ctx.trace_request_ctx, Recorder):
        ctx.trace_request_ctx.connect_wait_ns = now_ns() - ctx.connect_start_ns


async def _reused(_: object, ctx: SimpleNamespace, __: object) -> None:
    if isinstance(ctx.trace_request_ctx, Recorder):
        ctx.trace_request_ctx.connect_wait_ns = None


async def _sent(_: object, ctx: SimpleNamespace, __: object) -> None:
    if isinstance(ctx.trace_request_ctx, Recorder):
        ctx.trace_request_ctx.sent(now_ns())
