"""One HTTP/1.1 connection: bytes of a request out, stamped pieces of its answer in. Framing is
httptools' (llhttp)."""

import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, Protocol

import httptools

from loadgen import net, stamps
from loadgen.dial import READ_BYTES, Tls
from loadgen.net import now_ns

_INFORMATIONAL = range(100, 200)
_MUCH = 32768  # bytes of a stream that pile up before somebody should look at them
DONE = (b"[DONE]\n\n", b"[DONE]\r\n\r\n")  # not the end: some servers keep the body open
_LAST = (b"[DONE]\n\n\r\n", b"[DONE]\r\n\r\n\r\n", *DONE)  # as a chunk, too
_USUAL = b"}\n\n\r\n"  # how a read in the middle of a stream ends; no body, no [DONE] ends so


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


class Tally:
    """What all connections of a client have met."""

    def __init__(self) -> None:
        self.full_reads = 0  # which took all that one read can take: the reader is behind
        self.lingered = 0  # answers whose body the server kept open after its end
        self.rcvbuf_bytes: int | None = None  # the smallest receive buffer of the kernel's


class Connection:
    """Connected; one exchange after the other, each for its Sink. In the middle of a stream reads
    are only kept, with their stamps; their framing is parsed by `catch_up`, all at once."""

    def __init__(self, sock: socket.socket, tls: Tls | None,
                 direct: net.Selector | net.Plain, tally: Tally,
                 idle_broke: Callable[["Connection"], None]) -> None:
        self.used = 0  # exchanges so far
        self.idle_since_ns = 0
        self.open = True
        self._sock, self._tls = sock, tls
        self._direct, self._tally, self._idle_broke = direct, tally, idle_broke
        stamps.ask_for(sock)
        room = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        tally.rcvbuf_bytes = min(tally.rcvbuf_bytes or room, room)
        self._sink: Sink | None = None
        self._receive = sock.recvmsg
        self._parser: Any = None
        self._feed: Any = None
        self.on_body: Any = None
        self._n_parts = 0  # of the answer, once it is whole
        self._began = self._streams = False  # bytes of an answer came; it is a chunked body
        self._kept: list[bytes] = []  # reads that are not parsed yet …
        self._kept_stamps = bytearray()  # … and their stamps
        self._left = b""  # of a request that the socket did not take at once
        direct.read_directly(sock.fileno(), self._readable)

    # ------------------------------------------------------------------------------------ out

    def exchange(self, request: bytes, sink: Sink) -> int:
        """Sends a request; the answer goes to `sink`. When it was sent, ns. Raises OSError if the
        connection is broken already."""
        data = self._tls.encrypt(request) if self._tls else request
        self.used += 1
        sent_ns = now_ns()
        self._write(data)  # what is to be made ready for the answer can wait
        self._sink, self._began, self._size = sink, False, 0
        self._parts, self._stamps = sink.parts, sink.stamps
        self._whole = self._keeps = self._in_body = self._surplus = self._streams = False
        self._spoiled: Exception | None = None
        self._headers: dict[bytes, bytes] = {}
        self.on_body = sink.parts.append  # called by httptools, from C to C
        self._parser = httptools.HttpResponseParser(self)
        self._feed = self._parser.feed_data if self._tls is None else self._decrypt
        return sent_ns

    def close(self) -> None:
        """Idempotent. The sink hears nothing of it."""
        if self.open:
            self.open = self._streams = False
            self._sink = None
            self._kept.clear()
            self._kept_stamps.clear()
            self._direct.leave(self._sock.fileno())
            self._sock.close()
            self._parser = self._feed = self.on_body = None  # a circle, and gc is off in a leg

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
            data, ancillary, _, _ = self._receive(READ_BYTES, stamps.ANCILLARY)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as e:
            self._broken(e)
            return
        if self._streams and ancillary and data.endswith(_USUAL):
            self._kept.append(data)
            self._kept_stamps += ancillary[0][2]
            self._size += len(data)
            if self._size > _MUCH and self._sink is not None:
                self._tally.full_reads += len(data) == READ_BYTES  # which is more than _MUCH
                self._size = 0
                self._sink.more()
        elif self.catch_up():
            self._take(data, ancillary)
        elif self.open:  # the answer had ended: nobody asked for this
            self._closed(None)

    @property
    def kept(self) -> int:
        """Bytes of stamps of reads that are not parsed yet."""
        return len(self._kept_stamps)

    def catch_up(self) -> bool:
        """Parses what was kept. False: it was no HTTP, and the sink has heard so."""
        kept = self._kept
        if not kept:
            return True
        sink, parts, feed = self._sink, self._parts, self._feed
        n_before, n_kept = len(parts), len(kept)
        marks = []
        try:
            for data in kept:
                feed(data)
                marks.append(len(parts))
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as e:
            self._spoiled = e
            marks.append(len(parts))
        if len(parts) - n_before == n_kept:  # one each, as none of them is without
            self._stamps += self._kept_stamps
        else:
            for nth, mark in enumerate(marks):
                each = mark - len(self._stamps) // 16
                self._stamps += self._kept_stamps[16 * nth:16 * nth + 16] * each
        kept.clear()
        self._kept_stamps.clear()
        if sink is not None and (self._spoiled is not None or self._whole):
            self._after(sink)
            return False
        return True

    def _take(self, data: bytes, ancillary: list[tuple[int, int, bytes]]) -> None:
        """A read that may be the first, the last, or a torn one."""
        sink = self._sink
        if sink is None or not data:
            if not self._is_chatter(data):
                self._closed(sink)
            return
        self._tally.full_reads += len(data) == READ_BYTES
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

    def _is_chatter(self, data: bytes) -> bool:
        """TLS talks of its own on an idle connection: tickets, after the handshake."""
        if self._sink is not None or not data or self._tls is None:
            return False
        try:
            return not self._tls.decrypt(data) and not self._tls.closed
        except ssl.SSLError:
            return False

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
        return stamps.timespec(time.time_ns())

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
            why: BaseException | None = self._spoiled
            self._spoiled = None  # a circle, with its traceback
            self.close()
            if isinstance(why, httptools.HttpParserCallbackError):
                why = why.__context__ or why  # the sink's own
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
        if not self.catch_up():
            return
        sink, began = self._sink, self._began
        self.close()
        if sink is not None:
            sink.broke(error, began)

    def _finish(self, sink: Sink) -> None:
        self._sink, self._streams = None, False
        if self._surplus:
            del self._parts[self._n_parts:], self._stamps[16 * self._n_parts:]
        spoiled = self._surplus or self._spoiled is not None
        if self._left or spoiled or not (self._whole and self._keeps):
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
        self._streams = self._tls is None and b"transfer-encoding" in self._headers

    def on_message_complete(self) -> None:
        if self._in_body and not self._whole:  # 100 Continue is no answer
            self._whole = True
            self._keeps = self._parser.should_keep_alive()
            self._n_parts = len(self._parts)
