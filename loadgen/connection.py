"""One HTTP/1.1 connection: bytes of a request out, stamped pieces of its answer in. Framing is
httptools' (llhttp); TLS goes through memory, so that the socket, and with it the kernel's stamps,
stay ours.
"""

import asyncio
import base64
import socket
import ssl
import time
from collections.abc import Callable
from typing import Protocol
from urllib.parse import SplitResult, unquote

import httptools

from loadgen import net
from loadgen.net import now_ns

_INFORMATIONAL = range(100, 200)
_MUCH = 32768  # bytes of a stream that pile up before somebody should look at them
_LAST = (b"[DONE]\n\n\r\n", b"[DONE]\n\n")  # not the end: some servers keep the body open


class _Closed(Exception):
    """TLS said that nothing more comes."""


class Sink(Protocol):
    """Who gets an answer. After `end`, `broke` or `garbage` nothing more comes."""

    parts: list[bytes]  # of the body, as framing gives them …
    stamps: bytearray  # … each with the stamp of its read, a timespec of the wall clock

    def head(self, stamp: bytes, status: int, headers: dict[bytes, bytes]) -> None:
        """May raise ValueError: then the rest is garbage."""

    def more(self) -> None:
        """Much has come, or what may be the last of it. To be taken out of the lists in place."""

    def by_user(self) -> None:
        """A stamp is this process's, not the kernel's."""

    def end(self) -> None:
        """The body is whole."""

    def broke(self, error: Exception | None, began: bool) -> None:
        """The connection broke (None: the server closed it); `began`: bytes of an answer came."""

    def garbage(self, why: str) -> None:
        """What came is no HTTP."""


class Connection:
    """Connected; one exchange after the other, each for its Sink."""

    def __init__(self, sock: socket.socket, tls: "Tls | None",
                 direct: net.Selector | net.Plain,
                 idle_broke: Callable[["Connection"], None]) -> None:
        self.used = 0  # exchanges so far
        self.idle_since_ns = 0
        self.open = True
        self._sock, self._tls = sock, tls
        self._direct, self._idle_broke = direct, idle_broke
        net.ask_for_stamps(sock)
        self._sink: Sink | None = None
        self._receive = sock.recvmsg
        self._left = b""  # of a request that the socket did not take at once
        direct.read_directly(sock.fileno(), self._readable)

    # ------------------------------------------------------------------------------------ out

    def exchange(self, request: bytes, sink: Sink) -> int:
        """Sends a request; the answer goes to `sink`. When it was sent, ns. Raises OSError if the
        connection is broken already."""
        self._sink, self._began, self._size = sink, False, 0
        self._parts, self._stamps = sink.parts, sink.stamps
        self._whole = self._keeps = self._in_body = self._surplus = False
        self._spoiled: Exception | None = None
        self._headers: dict[bytes, bytes] = {}
        self.on_body = sink.parts.append  # called by httptools, from C to C
        self._parser = httptools.HttpResponseParser(self)
        self._feed = self._parser.feed_data if self._tls is None else self._decrypt
        self.used += 1
        data = self._tls.encrypt(request) if self._tls else request
        sent_ns = now_ns()
        self._write(data)
        return sent_ns

    def close(self) -> None:
        """Idempotent. The sink hears nothing of it."""
        if self.open:
            self.open = False
            self._sink = None
            self._direct.leave(self._sock.fileno())
            self._sock.close()

    def _write(self, data: bytes) -> None:
        try:
            sent = self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        if sent < len(data):
            self._left += data[sent:]
            self._direct.write_when_possible(self._sock.fileno(), self._writable)

    def _writable(self) -> None:
        left, self._left = self._left, b""
        try:
            self._write(left)
        except OSError as e:
            self._broken(e)
            return
        if not self._left:
            self._direct.write_when_possible(self._sock.fileno(), None)

    # ------------------------------------------------------------------------------------- in

    def _readable(self) -> None:
        """Once per read: the hot path."""
        try:
            data, ancillary, _, _ = self._receive(net.READ_BYTES, net.ANCILLARY)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as e:
            self._broken(e)
            return
        sink = self._sink
        if sink is None or not data:
            self._closed(sink)
            return
        self._stamp = stamp = ancillary[0][2] if ancillary else self._own_stamp()
        try:
            self._feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ssl.SSLError) as e:
            self._spoiled = e
        self._stamps += stamp
        if len(self._parts) << 4 != len(self._stamps):
            self._align(stamp)
        self._size += len(data)
        if self._size > _MUCH or data.endswith(_LAST):
            self._size = 0
            sink.more()
        if self._whole or self._spoiled is not None:
            self._after(sink)

    def _align(self, stamp: bytes) -> None:
        """A read brought several parts, or none."""
        missing = len(self._parts) - len(self._stamps) // 16
        if missing < 0:
            del self._stamps[missing * 16:]
        else:
            self._stamps += stamp * missing

    def _own_stamp(self) -> bytes:
        """Of a kernel that does not stamp: now, in its words."""
        assert self._sink is not None
        self._sink.by_user()
        return net.timespec(time.time_ns())

    def _decrypt(self, data: bytes) -> None:
        """Stands for the parser's feed where there is TLS."""
        assert self._tls is not None
        for piece in self._tls.decrypt(data):
            self._parser.feed_data(piece)
            if piece.endswith(_LAST):
                self._size = _MUCH
        if self._tls.closed and not self._whole:
            self._spoiled = _Closed()

    def _after(self, sink: Sink) -> None:
        """An answer that is whole, or can go on no more."""
        if self._whole:
            self._finish(sink)
        elif isinstance(self._spoiled, _Closed):
            self._closed(sink)
        elif isinstance(self._spoiled, ssl.SSLError):
            self._broken(self._spoiled)
        else:
            self.close()
            why = getattr(self._spoiled, "__context__", None) or self._spoiled  # the sink's own
            sink.garbage(f"{type(why).__name__}: {why}")

    def _closed(self, sink: Sink | None) -> None:
        """The server's end of the connection: a body without a length ends here."""
        if sink is None:  # idle; or it says what nobody asked
            self.close()
            self._idle_broke(self)
        elif self._whole or self._until_close():
            self._finish(sink)
        else:
            self._broken(None)

    def _until_close(self) -> bool:
        lengths = (b"content-length", b"transfer-encoding")
        return self._in_body and not any(x in self._headers for x in lengths)

    def _broken(self, error: Exception | None) -> None:
        sink, began = self._sink, self._began
        self.close()
        if sink is not None:
            sink.broke(error, began)

    def _finish(self, sink: Sink) -> None:
        self._sink = None
        if self._left or self._surplus or not (self._whole and self._keeps):
            self.close()
        self.idle_since_ns = now_ns()
        sink.end()

    # -------------------------------------------------------------------- what httptools calls

    def on_message_begin(self) -> None:
        self._began = True
        self._surplus = self._whole  # a second answer that nobody asked for
        if not self._surplus:
            self._in_body = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._surplus or status in _INFORMATIONAL or self._sink is None:
            self._headers = {}
            return
        self._in_body = True
        self._sink.head(self._stamp, status, self._headers)

    def on_message_complete(self) -> None:
        if self._in_body and not self._whole:  # 100 Continue is no answer
            self._whole = True
            self._keeps = self._parser.should_keep_alive()


class Tls:
    """TLS over memory: what is read from the socket goes in, plain bytes come out."""

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self.closed = False
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=host)

    async def handshake(self, sock: socket.socket) -> None:
        """Raises OSError, which ssl's errors are."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                self._tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                done = False
            if self._out.pending:
                await loop.sock_sendall(sock, self._out.read())
            if done:
                return
            data = await loop.sock_recv(sock, net.READ_BYTES)
            if not data:
                raise ConnectionResetError("the server closed the connection in its handshake")
            self._in.write(data)

    def encrypt(self, data: bytes) -> bytes:
        self._tls.write(data)
        return self._out.read()

    def decrypt(self, data: bytes) -> list[bytes]:
        """Plain pieces; `closed` is set when the server has said its last."""
        self._in.write(data)
        found = []
        try:
            while piece := self._tls.read(net.READ_BYTES):
                found.append(piece)
            self.closed = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.closed = True
        return found


async def connect(url: SplitResult, proxy: SplitResult | None, context: ssl.SSLContext | None,
                  ) -> tuple[socket.socket, Tls | None]:
    """A connected socket, with TLS for https, through a proxy where there is one. Raises OSError
    and ValueError."""
    via = proxy or url
    sock = await _open(via.hostname or "", via.port or (443 if via.scheme == "https" else 80))
    try:
        if url.scheme != "https":
            return sock, None
        if proxy is not None:
            await _tunnel(sock, url, proxy)
        assert context is not None
        tls = Tls(context, url.hostname or "")
        await tls.handshake(sock)
    except BaseException:
        sock.close()
        raise
    return sock, tls


async def _open(host: str, port: int) -> socket.socket:
    """The first address that answers. Raises the last one's OSError."""
    loop = asyncio.get_running_loop()
    last: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(
            host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(sock, address)
        except OSError as e:
            sock.close()
            last = OSError(e.errno, f"{host}:{port}: {e.strerror or e}")
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise last


async def _tunnel(sock: socket.socket, url: SplitResult, proxy: SplitResult) -> None:
    """Asks an HTTP proxy for a way to the server (CONNECT)."""
    loop = asyncio.get_running_loop()
    to = f"{url.hostname}:{url.port or 443}"
    await loop.sock_sendall(sock, f"CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n"
                                  f"{proxy_header(proxy)}\r\n".encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        data = await loop.sock_recv(sock, 4096)
        answer += data
        if not data or len(answer) > 65536:
            raise ConnectionResetError(f"the proxy {proxy.hostname} gave no answer to CONNECT")
    status = answer.split(b"\r\n", 1)[0].decode("latin-1")
    if " 200" not in status:
        raise ConnectionRefusedError(f"the proxy {proxy.hostname} says: {status}")


def proxy_header(proxy: SplitResult) -> str:
    """Proxy-Authorization, if the proxy's URL has a user."""
    if not proxy.username:
        return ""
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}\r\n"
