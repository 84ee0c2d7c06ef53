"""The only request I/O: sends a Shot with aiohttp, tells a Recorder what came, maps the library's
exceptions to outcomes. Never raises for a request."""

import asyncio
import errno
import time
from collections.abc import Callable
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import aiohttp

from loadgen import __version__, openai
from loadgen.deadline import Deadline
from loadgen.record import Outcome, Recorder, RequestRecord, Shot
from loadgen.scenario import Scenario
from loadgen.target import Target

_NO_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=None)
_OURS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM)
_KEEPALIVE_S = 4.0  # uvicorn closes an idle connection after 5 s: be first
_STALE_NS = 1_000_000_000

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
        clock_s = asyncio.get_running_loop().time
        deadline = Deadline(self._scenario.timeouts_of(recorder.shot.cls),
                            recorder.shot.abandon_after_s, clock_s())
        try:
            async with asyncio.timeout_at(deadline.when_s) as timeout:
                def progress() -> None:
                    deadline.progress(recorder, clock_s())
                    timeout.reschedule(deadline.when_s)

                await self._exchange(recorder, progress)
        except TimeoutError:
            return deadline.passed(recorder)
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

    async def _exchange(self, recorder: Recorder, progress: Callable[[], None]) -> None:
        """One request; sent once more if the kept-alive connection turned out to be closed."""
        try:
            await self._request(self._session, recorder, progress)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as e:
            if isinstance(e, aiohttp.ClientConnectorError) or not _was_stale(recorder):
                raise
            recorder.stale_retries += 1
            await self._request(self._fresh, recorder, progress)

    async def _request(self, session: aiohttp.ClientSession, recorder: Recorder,
                       progress: Callable[[], None]) -> None:
        async with session.post(self._url, data=recorder.shot.body, allow_redirects=False,
                                trace_request_ctx=recorder) as answer:
            recorder.response(now_ns(), answer.status, answer.headers.get("Content-Type", ""),
                              "Retry-After" in answer.headers)
            while data := await answer.content.readany():
                recorder.feed(now_ns(), data)
                if recorder.fatal is Outcome.BAD_STREAM:
                    answer.close()
                    return
                progress()


def _was_stale(recorder: Recorder) -> bool:
    """The connection was kept alive, and broke right when it was used again: the server had
    closed it while it was idle and has not seen this request."""
    reused = recorder.connect_wait_ns is None and recorder.status is None
    return reused and (recorder.sent_ns is None or now_ns() - recorder.sent_ns < _STALE_NS)


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
