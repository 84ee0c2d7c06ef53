"""Connecting: names, TLS, HTTP proxies. TLS goes through memory, so that the socket, and with it
the kernel's stamps, stay ours."""

import asyncio
import base64
import errno
import os
import socket
import ssl
from urllib.parse import SplitResult, unquote

from loadgen.target import Trust

READ_BYTES = 65536


def context_of(trust: Trust) -> ssl.SSLContext:
    """Raises OSError, which ssl's errors are, for files that cannot be used."""
    context = ssl.create_default_context(cafile=trust.ca)
    if trust.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if trust.cert:
        context.load_cert_chain(trust.cert, trust.key)
    return context


def why_not(error: Exception) -> str:
    """Why nobody could be reached, in the system's own words: asyncio and aiohttp put theirs, and
    the address once more, around them."""
    inner = getattr(error, "os_error", None) or getattr(error, "certificate_error", None)
    if isinstance(inner, Exception) and inner is not error:
        return why_not(inner)
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, socket.gaierror):
        return f"{error.strerror}: is its name right?"
    number = error.errno if isinstance(error, OSError) else None
    if number is not None and number in errno.errorcode and not isinstance(error, ssl.SSLError):
        return os.strerror(number)
    return str(error) or type(error).__name__


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
            data = await loop.sock_recv(sock, READ_BYTES)
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
            while piece := self._tls.read(READ_BYTES):
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
    try:
        raise last
    finally:
        del last  # it holds this frame, and gc is off in a leg


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
