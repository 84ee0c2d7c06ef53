"""A TCP server for tests that answers with exactly the bytes, and at exactly the instants, that a
test wants. Each POST is answered by a script; what else is asked (GET) gets `get`, at once (or what
`get` makes of it).

    async with RawServer(lambda k: [HEAD, role(), token("a"), 0.1, RST]) as server:
        ... server.url ... server.requests ...
"""

import asyncio
import contextlib
import json
import socket
import ssl
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Self


class Act(Enum):
    FIN = "the connection is closed, cleanly"
    RST = "the connection is reset"
    HOLD = "nothing more, until the client leaves"


FIN, RST, HOLD = Act.FIN, Act.RST, Act.HOLD
Step = bytes | float | asyncio.Event | Act  # send; sleep; wait for; end
Script = Sequence[Step]


@dataclass(frozen=True)
class Got:
    """A request as it came: connection's number, loop time, head, body."""

    connection: int
    at_s: float
    head: str
    body: bytes

    def json(self) -> dict[str, object]:
        value: dict[str, object] = json.loads(self.body)
        return value


class RawServer:
    """`script(k)` is the answer to the k-th POST, over all connections. After a script that does
    not end its connection, the next request on it is read: it is kept alive."""

    def __init__(self, script: Callable[[int], Script],
                 get: Script | Callable[[Got], Script] | None = None,
                 tls: ssl.SSLContext | None = None, backlog: int = 2048) -> None:
        self._script, self._get, self._tls, self._backlog = script, get, tls, backlog
        self.requests: list[Got] = []
        self.gets: list[Got] = []
        self.connections = 0
        self.inflight = 0
        self.most_inflight = 0
        self.changed = asyncio.Event()
        self._handlers: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._connection, "127.0.0.1", 0, backlog=self._backlog, limit=2**22, ssl=self._tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None,
                        tb: TracebackType | None) -> None:
        self._server.close()
        for handler in list(self._handlers):
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)
        await self._server.wait_closed()

    async def until(self, seen: Callable[[], bool], limit_s: float = 10.0) -> None:
        """Waits until `seen()` holds; it is asked when a request comes or ends."""
        async with asyncio.timeout(limit_s):
            while not seen():
                self.changed.clear()
                await self.changed.wait()

    # ---------------------------------------------------------------------------------- inside

    async def _connection(self, reader: asyncio.StreamReader,
                          writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        number, self.connections = self.connections, self.connections + 1
        try:
            while (got := await _read(reader, number)) is not None:
                if not await self._answer(got, reader, writer):
                    return
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._handlers.discard(task)
            writer.transport.abort() if task.cancelling() else writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _answer(self, got: Got, reader: asyncio.StreamReader,
                      writer: asyncio.StreamWriter) -> bool:
        """False: the connection is to end."""
        if got.head.startswith("GET"):
            self.gets.append(got)
            get = self._get(got) if callable(self._get) else self._get
            return await self._play(NOT_FOUND if get is None else get, reader, writer)
        self.requests.append(got)
        self.inflight += 1
        self.most_inflight = max(self.most_inflight, self.inflight)
        self.changed.set()
        try:
            return await self._play(self._script(len(self.requests) - 1), reader, writer)
        finally:
            self.inflight -= 1
            self.changed.set()

    async def _play(self, script: Script, reader: asyncio.StreamReader,
                    writer: asyncio.StreamWriter) -> bool:
        for step in script:
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            elif isinstance(step, float):
                await asyncio.sleep(step)
            elif isinstance(step, asyncio.Event):
                await step.wait()
            elif step is HOLD:
                await reader.read()  # the client's FIN
                return False
            else:
                if step is RST:
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
                return False
        return True


async def _read(reader: asyncio.StreamReader, connection: int) -> Got | None:
    """The next request on a connection; None at its end."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        lines = dict(x.split(": ", 1) for x in head.split("\r\n")[1:] if x)
        length = int({k.lower(): v for k, v in lines.items()}.get("content-length", "0"))
        body = await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return Got(connection, asyncio.get_running_loop().time(), head, body)


# ---------------------------------------------------------------------------------- what is sent


def head(status: str = "200 OK", **headers: str) -> bytes:
    """A response's head; `content_type="…"` and the like become headers."""
    lines = [f"{k.replace('_', '-')}: {v}\r\n" for k, v in headers.items()]
    return f"HTTP/1.1 {status}\r\n{''.join(lines)}\r\n".encode()


def whole(status: str, body: bytes, **headers: str) -> bytes:
    """A whole answer that is no stream."""
    return head(status, **{"content_type": "application/json", "content_length": str(len(body)),
                           **headers}) + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(value: object) -> bytes:
    """An event in a chunk of its own."""
    return chunk(b"data: " + json.dumps(value).encode() + b"\n\n")


def role() -> bytes:
    return event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})


def token(text: str = "x") -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})


def finish(reason: str = "stop") -> bytes:
    return event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})


def usage(output_tok: int, prompt_tok: int = 10) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt_tok,
                                           "completion_tokens": output_tok}})


HEAD = head(content_type="text/event-stream", transfer_encoding="chunked")
DONE = chunk(b"data: [DONE]\n\n")
LAST = b"0\r\n\r\n"  # the final chunk
PING = chunk(b": ping\n\n")
NOT_FOUND: Script = [whole("404 Not Found", b'{"detail":"Not Found"}')]
ONE_MODEL: Script = [whole("200 OK", b'{"data":[{"id":"m"}]}')]


def good(tokens: int = 3) -> list[Step]:
    """A whole, clean answer of some tokens, one event each, as vLLM sends it."""
    return [HEAD + role() + token() * tokens, finish() + usage(tokens) + DONE + LAST]


def drip(piece: bytes, pause_s: float, n: int) -> list[Step]:
    """`piece` n times, with a pause after each."""
    return [piece, pause_s] * n
