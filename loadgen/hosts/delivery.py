"""A journal's way from a worker's disk to the master's: in pieces, resumable, never with a hole.
The master's file is a byte-exact copy; where it ends is where the next piece begins."""

import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from loadgen.errors import StoreError
from loadgen.hosts.messages import PIECE_BYTES, PIECES_AHEAD, Piece
from loadgen.record import RequestRecord

RESEND_S = 2.0  # without an acknowledgement
_CHUNK = 2**20
_MOST_LINES = 2**22  # bytes that are decoded at a time

_decode = msgspec.json.Decoder(RequestRecord).decode


class Outgoing:
    """One shard's journal on the worker: what is sent, what is known to have come, and, read
    beside that, its records."""

    def __init__(self, run: str, shard: int, path: Path) -> None:
        self.run, self.shard, self.path = run, shard, path
        self.kept = self._sent = self._shown = 0
        self._moved_s = 0.0

    @property
    def written(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:  # not there yet
            return 0

    def ack(self, kept: int, now_s: float) -> None:
        if kept > self.kept:
            self.kept, self._moved_s = min(kept, self.written), now_s
            self._sent = max(self._sent, self.kept)

    def pieces(self, now_s: float) -> list[Piece]:
        """What may be sent now. What was not acknowledged for some time is sent again."""
        if self._sent > self.kept and now_s - self._moved_s > RESEND_S:
            self._sent, self._moved_s = self.kept, now_s
        room = self.kept + PIECES_AHEAD * PIECE_BYTES
        found: list[Piece] = []
        if self._sent >= min(room, self.written):
            return found
        if self._sent == self.kept:
            self._moved_s = now_s
        with self.path.open("rb") as f:
            f.seek(self._sent)
            while self._sent < room and (data := f.read(PIECE_BYTES)):
                found.append(Piece(self.run, self.shard, self._sent, zlib.crc32(data), data))
                self._sent += len(data)
        return found

    def fresh(self) -> list[RequestRecord]:
        """Records that were written since the last call; a line that is not whole waits."""
        if self._shown >= self.written:
            return []
        with self.path.open("rb") as f:
            f.seek(self._shown)
            data = f.read(_MOST_LINES)
        whole = data[:data.rfind(b"\n") + 1]
        self._shown += len(whole)
        return [_decode(line) for line in whole.splitlines()
                if line and not line.startswith(b'{"schema":')]


class Incoming:
    """The same journal on the master."""

    def __init__(self, path: Path) -> None:
        self.path, self.kept = path, 0
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        except OSError as e:
            raise StoreError(f"{path}: cannot be written: {e.strerror}") from e

    def take(self, piece: Piece) -> None:
        """Appends what is next; passes over what is here already, does not fit or is damaged.
        Raises StoreError where the disk is full; what it holds stays a journal's beginning."""
        if piece.offset != self.kept or zlib.crc32(piece.data) != piece.crc:
            return
        try:
            written = os.write(self._fd, piece.data)
        except OSError as e:
            raise StoreError(f"{self.path}: {e.strerror}; what came until then is kept") from e
        self.kept += written
        if written < len(piece.data):
            raise StoreError(f"{self.path}: only {written} of {len(piece.data)} bytes could be "
                             "written (disk full?); what came until then is kept")

    def close(self) -> None:
        os.close(self._fd)


def hash_of(path: Path, pause: Callable[[], None]) -> str:
    """SHA-256 of a whole file; `pause` lets others have their turn."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
            pause()
    return digest.hexdigest()
