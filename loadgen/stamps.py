"""Receive times from the kernel.

A stamp that Python takes says when Python came round to it; with SO_TIMESTAMPNS the kernel says
when the bytes arrived, whatever this process was doing then. (Of bytes that are read together it
is the last segment's.) Where the kernel does not stamp, the wall clock right after the read does.
"""

import bisect
import socket
import struct
import sys
import time

import numpy as np

ANCILLARY = socket.CMSG_SPACE(16)  # what recvmsg needs for a stamp
SYNC_S = 0.1
_SO_TIMESTAMPNS = 35
_SYNCS = 16_000  # that are kept: longer than any request may take
_STEP_NS = 2_000_000  # slewing does less between two syncs
_FEW = 64  # stamps for which numpy is no quicker
_pack, _each = struct.Struct("qq").pack, struct.Struct("qq").iter_unpack

Walls = np.ndarray[tuple[int], np.dtype[np.int64]]

now_ns = time.monotonic_ns


class Clock:
    """The kernel's stamps, wall-clock timespecs, as ns of the monotonic clock. The wall clock is
    slewed and may be set: its offset is taken anew every `SYNC_S` and holds for what came since."""

    def __init__(self) -> None:
        self._walls, self._offsets = [time.time_ns()], [_offset_ns()]
        self._old: list[tuple[int, int]] = []  # (offset, last known to hold) before it was set

    def sync(self) -> None:
        offset_ns = _offset_ns()
        if abs(offset_ns - self._offsets[-1]) > _STEP_NS:  # it was set: a history of its own begins
            held_ns = self._walls[-1] - self._offsets[-1]
            self._old = [(self._offsets[-1], held_ns), *self._old[:3]]
            self._walls.clear()
            self._offsets.clear()
        self._walls.append(time.time_ns())
        self._offsets.append(offset_ns)
        if len(self._walls) > _SYNCS:
            del self._walls[: _SYNCS // 2], self._offsets[: _SYNCS // 2]

    def mono_ns(self, timespecs: bytes | bytearray, since_ns: int = 0) -> list[int]:
        """Each 16 bytes as they came from the kernel, in the order they came. A stamp lies
        between `since_ns` and now; one that does not is from another setting of the clock."""
        if len(timespecs) <= 16 * _FEW and (few := self._few(timespecs, since_ns)) is not None:
            return few
        pairs = np.frombuffer(bytes(timespecs), np.int64).reshape(-1, 2)
        wall = pairs[:, 0] * 1_000_000_000 + pairs[:, 1]
        now, back = now_ns(), np.flatnonzero(np.diff(wall) < -_STEP_NS)
        stamps = self._by_history(wall)
        if len(back) or int(stamps.max()) > now or int(stamps.min()) < since_ns:
            self.sync()  # it may have been set just now
            stamps = self._by_history(wall)
            before = np.arange(len(wall)) <= (back[-1] if len(back) else -1)
            for offset_ns, held_ns in self._old:
                old = (stamps < held_ns) | (stamps > now) | before
                stamps = np.where(old, wall - offset_ns, stamps)
                before = np.zeros_like(before)
            stamps = np.clip(stamps, since_ns, now)
        found: list[int] = np.minimum.accumulate(stamps[::-1])[::-1].tolist()
        return found

    def _few(self, timespecs: bytes | bytearray, since_ns: int) -> list[int] | None:
        """The same, without numpy's overhead; None if not all of them are in order."""
        walls, offsets, last_ns = self._walls, self._offsets, since_ns
        found = []
        for s, ns in _each(timespecs):
            wall_ns = s * 1_000_000_000 + ns
            stamp_ns = wall_ns - offsets[bisect.bisect_right(walls, wall_ns, 1) - 1]
            if stamp_ns < last_ns:
                return None
            found.append(stamp_ns)
            last_ns = stamp_ns
        return found if last_ns <= now_ns() else None

    def _by_history(self, wall: Walls) -> Walls:
        first = max(0, bisect.bisect_right(self._walls, int(wall[0])) - 1)
        at = np.searchsorted(self._walls[first:], wall, side="right") - 1
        offsets = np.take(np.array(self._offsets[first:], np.int64), np.maximum(at, 0))
        return np.asarray(wall - offsets, np.int64)


def timespec(wall_ns: int) -> bytes:
    """In the kernel's words."""
    return _pack(*divmod(wall_ns, 1_000_000_000))


def _offset_ns() -> int:
    """Wall minus monotonic: of three tries that with the least time between its readings."""
    best, offset = 1 << 62, 0
    for _ in range(3):
        a = time.monotonic_ns()
        wall = time.time_ns()
        b = time.monotonic_ns()
        if b - a < best:
            best, offset = b - a, wall - (a + b) // 2
    return offset


def ask_for(sock: socket.socket) -> bool:
    """Whether the kernel stamps what this socket receives."""
    if not sys.platform.startswith("linux") or sock.family not in (
            socket.AF_INET, socket.AF_INET6):
        return False
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    except OSError:
        return False
    return True


def keeper() -> socket.socket:
    """A socket that keeps the kernel stamping: it begins some milliseconds after the first socket
    asks for it, and what came before that has no stamp."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    ask_for(sock)
    return sock
