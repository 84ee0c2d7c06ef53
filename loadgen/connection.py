"""One HTTP/1.1 connection: bytes of a request out, stamped pieces of its answer in. Framing is
httptools' (llhttp); TLS goes through memory, so that the socket, and with it the kernel's stamps,
stay ours.
"""

import asyncio
import base64
import socket
import ssl
from collections.abc import Callable
from typing import Protocol
from urllib.parse import SplitResult, unquote

import httptools

from loadgen import net
from loadgen.net import now_ns

_INFORMATIONAL = range(100, 200)


class Sink(Protocol):
    """Who gets an answer. After `end` or `broke` nothing more comes."""

    def head(self, stamp_ns: int, status: int, headers: dict[bytes, bytes]) -> None: ...

    def body(self, stamp_ns: int, data: bytes, kernel: bool) -> None: ...

    def end(self) -> None:
        """The body is whole."""

    def broke(self, error: Exception | None, began: bool) -> None:
        """The connection broke (None: the server closed it); `began`: bytes of an answer came."""

    def garbage(self, why: str) -> None:
        """What came is no HTTP."""


class Connection:
    """Connected; one exchange after the other, each for its Sink."""

    def __init__(self, sock: socket.socket, tls: "Tls | None", clock: net.Clock,
                 direct: net.Selector | net.Plain,
                 idle_broke: Callable[["Connection"], None]) -> None:
        self.used = 0  # exchanges so far
        self.idle_since_ns = 0
        self.open = True
        self._sock, self._tls, self._clock = sock, tls, clock
        self._direct, self._idle_broke = direct, idle_broke
        net.ask_for_stamps(sock)
        self._sink: Sink | None = None
        self._left = b""  # of a request that the socket did not take at once
        direct.read_directly(sock.fileno(), self._readable)

    # ------------------------------------------------------------------------------------ out

    def exchange(self, request: bytes, sink: Sink) -> int:
        """Sends a request; the answer goes to `sink`. When it was sent, ns. Raises OSError if the
        connection is broken already."""
        self._sink, self._began = sink, False
        self._whole = self._keeps = self._in_body = self._surplus = False
        self._headers: dict[bytes, bytes] = {}
        self._parser = httptools.HttpResponseParser(self)
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
        try:
            data, self._stamp_ns, self._by_kernel = net.receive(self._sock, self._clock)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as e:
            self._broken(e)
            return
        sink = self._sink
        if sink is None:  # idle: the server closes it, or says what nobody asked
            self.close()
            self._idle_broke(self)
            return
        if not data:
            self._closed(sink)
            return
        self._began = True
        try:
            if self._tls is not None:
                for piece in self._tls.decrypt(data):
                    self._parser.feed_data(piece)
                if self._tls.closed:
                    self._closed(sink)
                    return
            else:
                self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as e:
            self.close()
            sink.garbage(f"{type(e).__name__}: {e}")
            return
        except ssl.SSLError as e:
            self._broken(e)
            return
        if self._whole:
            self._finish(sink)

    def _closed(self, sink: Sink) -> None:
        """The server's end of the connection: a body without a length ends here."""
        if self._whole or self._until_close():
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
        self._surplus = self._whole  # a second answer that nobody asked for
        self._in_body = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._surplus or status in _INFORMATIONAL or self._sink is None:
            self._headers = {}
            return
        self._in_body = True
        self._sink.head(self._stamp_ns, status, self._headers)

    def on_body(self, data: bytes) -> None:
        if self._in_body and self._sink is not None:
            self._sink.body(self._stamp_ns, data, self._by_kernel)

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
