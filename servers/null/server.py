"""Streams like vLLM and logs what it sent and when: the truth that clients are held against. Pure
Python, one process, one core, no asyncio: nothing between the stamp and `send`.

The log (`servers.null.log` reads it): MAGIC, the number of rows of each table, the rows; all int64,
stamps ns of CLOCK_MONOTONIC.

    requests  key, arrival by the kernel, arrival by this process, tokens, sent whole (0: never)
    writes    request (its row), first event, events, due, before send(), after (-1: socket full)
    stalls    from, to: this process stood still, so its host did

A request's key is its `"user"` if that is a number, else a hash of its body (see `key_of`).
Events of a request of n tokens: 0 the role, 1 … n the tokens, n + 1 usage, n + 2 [DONE]; -1 is the
head, written when the request has come. (As captured from vLLM 0.32: tests/data/vllm/16*.http.)
"""

import hashlib
import heapq
import json
import os
import select
import socket
import stat
import struct
import time
from array import array
from pathlib import Path
from typing import Any

from servers.null import answers

MAGIC = b"truth-2\n"
REQUEST, WRITE, STALL = 5, 6, 2  # columns
HEAD = -1
STALL_NS = 5_000_000  # this late for an instant, or this long in one send(): not our own doing
_SO_TIMESTAMPNS = 35
_ANCILLARY = socket.CMSG_SPACE(16)
_SYNC_NS = 100_000_000
_TURN = 256  # writes between two looks at the sockets

now_ns = time.monotonic_ns


def key_of(body: bytes) -> int:
    """What a request is called in the log if it has no "user"."""
    return int.from_bytes(hashlib.blake2b(body, digest_size=8).digest(), "big") >> 1


class Stream:
    """A connection and the answer that goes over it."""

    __slots__ = ("chunks", "due_ns", "inbox", "left", "next", "row", "sock", "tokens")

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.inbox, self.left = sock, b"", b""
        self.row = -1  # of its request; -1: it has none now
        self.next = self.tokens = self.due_ns = 0
        self.chunks: answers.Chunks | None = None


class Server:
    """`ttft_ns` and `itl_ns` (0: as fast as the socket takes it) pace every answer; `grid`: all
    streams in phase. `coalesce` token events go into one write."""

    def __init__(self, ttft_ns: int, itl_ns: int, tokens: int | None, grid: bool, coalesce: int,
                 logs: bool, port: int = 0) -> None:
        self.ttft_ns, self.itl_ns, self.tokens = ttft_ns, itl_ns, tokens
        self.grid, self.coalesce, self.logs = grid and itl_ns > 0, coalesce, logs
        self.requests, self.writes, self.stalls = array("q"), array("q"), array("q")
        self.stopped = False
        self._orders = -1  # a pipe
        self._streams: dict[int, Stream] = {}
        self._heap: list[tuple[int, int, Stream]] = []  # (due, running number, …)
        self._running = self._offset_ns = self._synced_ns = 0
        self._epoll = select.epoll()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=4096)
        self._listener.setblocking(False)
        self._listener.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)  # its children have it
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self.port: int = self._listener.getsockname()[1]

    def listen_to(self, fd: int) -> None:
        """Of a pipe: each line is the path of a file for the log so far, which is then forgotten;
        says SAVED when it is there. At its end the server ends, too. (A file or a terminal has no
        such end.)"""
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            self._orders = fd
            self._epoll.register(fd, select.EPOLLIN)

    def serve(self) -> None:
        """Until `stopped` is set and something wakes it."""
        try:
            while not self.stopped:
                self._poll()
                self._write_due()
        finally:
            for stream in list(self._streams.values()):
                self._close(stream)
            self._listener.close()
            self._epoll.close()

    # ------------------------------------------------------------------------------------- in

    def _poll(self) -> None:
        """Waits for a socket or for the next due instant: select's timeout is exact to some
        microseconds, epoll's is whole milliseconds."""
        wait_s: float | None = None
        if self._heap:
            wait_s = max(0.0, (self._heap[0][0] - now_ns()) / 1e9)
        if wait_s != 0.0:
            select.select([self._epoll], (), (), wait_s)
        for fd, mask in self._epoll.poll(0, 1024):
            stream = self._streams.get(fd)
            if stream is None:
                self._other(fd)
            elif mask & ~select.EPOLLOUT:
                self._read(stream)
            else:
                self._writable(stream)

    def _other(self, fd: int) -> None:
        if fd == self._orders:
            self._told(fd)
        elif fd == self._listener.fileno():
            self._accept()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            self._streams[sock.fileno()] = Stream(sock)
            self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _read(self, stream: Stream) -> None:
        try:
            data, ancillary, _, _ = stream.sock.recvmsg(262144, _ANCILLARY)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        user_ns = now_ns()
        if not data:
            self._close(stream)
            return
        kernel_ns = user_ns
        if ancillary:
            s, ns = struct.unpack("qq", ancillary[0][2])
            kernel_ns = s * 1_000_000_000 + ns - self._wall_offset_ns(user_ns)
        stream.inbox += data
        head, split, rest = stream.inbox.partition(b"\r\n\r\n")
        length = _content_length(head)
        if split and len(rest) >= length:
            stream.inbox = rest[length:]
            self._request(stream, head, rest[:length], kernel_ns, user_ns)

    def _wall_offset_ns(self, at_ns: int) -> int:
        """Wall minus monotonic clock, taken anew ten times a second (the wall clock is slewed):
        of three tries that with the least time between its readings."""
        if at_ns > self._synced_ns + _SYNC_NS or not self._synced_ns:
            tries = []
            for _ in range(3):
                a, wall, b = now_ns(), time.time_ns(), now_ns()
                tries.append((b - a, wall - (a + b) // 2))
            self._offset_ns, self._synced_ns = min(tries)[1], at_ns
        return self._offset_ns

    def _request(self, stream: Stream, head: bytes, body: bytes, kernel_ns: int,
                 user_ns: int) -> None:
        if not head.startswith(b"POST"):
            self._send(stream, answers.to_get(head))
            return
        try:
            asked: dict[str, Any] = json.loads(body)
        except ValueError:
            asked = {}
        if not asked.get("stream"):
            self._send(stream, answers.whole(asked))
            return
        tokens = self.tokens or int(asked.get("max_tokens") or asked.get("max_completion_tokens")
                                    or 16)
        user = str(asked.get("user", ""))
        key = int(user) if user.isdecimal() else key_of(body)
        stream.row = len(self.requests) // REQUEST
        self.requests.extend((key, kernel_ns, user_ns, tokens, 0))
        usage = bool((asked.get("stream_options") or {}).get("include_usage"))
        stream.chunks = answers.Chunks(f"{stream.row:016x}", tokens, usage)
        stream.next, stream.tokens = 0, tokens
        stream.due_ns = user_ns + self.ttft_ns
        if self.grid:
            stream.due_ns += -stream.due_ns % self.itl_ns
        if self._write(stream, answers.HEAD, HEAD, 1, user_ns):
            self._schedule(stream)

    # ------------------------------------------------------------------------------------ out

    def _schedule(self, stream: Stream) -> None:
        self._running += 1
        heapq.heappush(self._heap, (stream.due_ns, self._running, stream))

    def _write_due(self) -> None:
        """What is due now, a turn's worth of it; notices when it comes far too late to it."""
        heap = self._heap
        if not heap or heap[0][0] > (now := now_ns()):
            return
        if now - heap[0][0] > STALL_NS and self.itl_ns and self._idle_before(heap[0][0]):
            self.stalls.extend((heap[0][0], now))
        for _ in range(_TURN):
            if not heap or heap[0][0] > now_ns():
                return
            stream = heapq.heappop(heap)[2]
            if stream.chunks is not None and self._step(stream):
                self._schedule(stream)

    def _idle_before(self, due_ns: int) -> bool:
        """Nothing was written since `due_ns`: it was not our own work that made us late."""
        return len(self.writes) < WRITE or self.writes[-2] < due_ns

    def _step(self, stream: Stream) -> bool:
        """Writes what is due of one stream; whether more is to come, and can."""
        chunks, first, due_ns = stream.chunks, stream.next, stream.due_ns
        assert chunks is not None
        if first > stream.tokens:  # the socket was full, and now has taken the last one
            return self._finish(stream, due_ns)
        if first == 0:
            stream.next = first = 1
            if not self._write(stream, chunks.role, 0, 1, due_ns):
                return False
        last = min(first + self.coalesce - 1, stream.tokens)
        texts, kinds = chunks.texts, len(chunks.texts)
        if last < stream.tokens:
            data = texts[first % kinds] if first == last else b"".join(
                [texts[k % kinds] for k in range(first, last + 1)])
        else:
            data = b"".join([texts[k % kinds] for k in range(first, last)]) + chunks.finish
        stream.next, stream.due_ns = last + 1, due_ns + self.itl_ns
        if not self._write(stream, data, first, last + 1 - first, due_ns):
            return False
        return last < stream.tokens or self._finish(stream, due_ns)

    def _finish(self, stream: Stream, due_ns: int) -> bool:
        """Usage, [DONE] and the end of the body, each a write of its own, as uvicorn does."""
        assert stream.chunks is not None
        tail, row = stream.chunks.tail, stream.row
        stream.chunks = None
        for k, data in enumerate(tail, stream.tokens + 1):
            self._write(stream, data, k, 1, due_ns)
        self._send(stream, b"0\r\n\r\n")
        self.requests[row * REQUEST + 4] = now_ns()
        return False

    def _write(self, stream: Stream, data: bytes, event: int, events: int, due_ns: int) -> bool:
        """Sends and logs; False: the socket is full, the rest goes when it can."""
        before_ns = now_ns()
        whole = self._send(stream, data)
        after_ns = now_ns()
        if self.logs:
            self.writes.extend((stream.row, event, events, due_ns, before_ns,
                                after_ns if whole else -1))
        if after_ns - before_ns > STALL_NS:
            self.stalls.extend((before_ns, after_ns))
        return whole

    def _send(self, stream: Stream, data: bytes) -> bool:
        if not stream.left:
            try:
                sent = stream.sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._close(stream)
                return False
            if sent == len(data):
                return True
            data = data[sent:]
            self._epoll.modify(stream.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
        stream.left += data
        return False

    def _writable(self, stream: Stream) -> None:
        left, stream.left = stream.left, b""
        if self._send(stream, left):
            self._epoll.modify(stream.sock.fileno(), select.EPOLLIN)
            if stream.chunks is not None:
                self._schedule(stream)

    def _close(self, stream: Stream) -> None:
        stream.chunks = None
        if self._streams.pop(stream.sock.fileno(), None) is not None:
            stream.sock.close()

    # ------------------------------------------------------------------------------------ log

    def _told(self, fd: int) -> None:
        words = os.read(fd, 4096)  # a short line comes whole: writes to a pipe are not torn
        self.stopped = not words
        for line in words.decode().splitlines():
            self.save(Path(line))
            self._forget()
            print("SAVED", flush=True)

    def _forget(self) -> None:
        """Empties the log. Answers under way have rows in it: they break off."""
        for stream in [x for x in self._streams.values() if x.chunks is not None]:
            self._close(stream)
        for table in (self.requests, self.writes, self.stalls):
            del table[:]

    def save(self, path: Path) -> None:
        tables = (self.requests, self.writes, self.stalls)
        with path.open("wb") as f:
            f.write(MAGIC)
            array("q", (len(t) // n for t, n in zip(tables, (REQUEST, WRITE, STALL), strict=True))
                  ).tofile(f)
            for table in tables:
                table.tofile(f)


def _content_length(head: bytes) -> int:
    _, found, rest = head.lower().partition(b"content-length:")
    return int(rest.split(b"\r\n", 1)[0]) if found else 0
