"""Receive times from the kernel.

A stamp that Python takes says when Python came round to it; with SO_TIMESTAMPNS the kernel says
when the bytes arrived, whatever this process was doing then. (Of bytes that are read together it
is the last segment's.) Where the kernel does not stamp, the wall clock right after the read does.
"""

import socket
import struct
import sys
import time

import numpy as np

ANCILLARY = socket.CMSG_SPACE(16)  # what recvmsg needs for a stamp
SYNC_S = 0.1
_SO_TIMESTAMPNS = 35
_SYNCS = 36_000  # that are kept: an hour's
_BELIEVED_NS = 3_600_000_000_000
_pack = struct.Struct("qq").pack

now_ns = time.monotonic_ns


class Clock:
    """The kernel's stamps, wall-clock timespecs, as ns of the monotonic clock. The wall clock is
    slewed and may step: its offset is taken anew every `SYNC_S`, and holds for what came since."""

    def __init__(self) -> None:
        offset_ns = _offset_ns()
        self._walls, self._offsets = [time.time_ns()], [offset_ns]

    def sync(self) -> None:
        self._walls.append(time.time_ns())
        self._offsets.append(_offset_ns())
        if len(self._walls) > _SYNCS:
            del self._walls[: _SYNCS // 2], self._offsets[: _SYNCS // 2]

    def mono_ns(self, timespecs: bytes | bytearray) -> list[int]:
        """Each 16 bytes as they came from the kernel. No stamp is later than now, nor believed
        if it is from long ago: then the clock was set meanwhile."""
        if not timespecs:
            return []
        pairs = np.frombuffer(bytes(timespecs), np.int64).reshape(-1, 2)
        wall = pairs[:, 0] * 1_000_000_000 + pairs[:, 1]
        if len(self._walls) == 1 or wall[0] >= self._walls[-1]:
            stamps = wall - self._offsets[-1]
        else:
            at = np.searchsorted(self._walls, wall, side="right") - 1
            stamps = wall - np.take(self._offsets, np.maximum(at, 0))
        now = now_ns()
        stamps[(stamps > now) | (stamps < now - _BELIEVED_NS)] = now
        return np.maximum.accumulate(stamps).tolist()  # type: ignore[no-any-return]


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
