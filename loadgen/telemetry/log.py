"""A server's log, read as it grows: what in it matters for the level that runs."""

import re
from collections.abc import Sequence
from pathlib import Path

from loadgen.store import Row

MOST_BYTES = 2**18  # of one look; what is beyond is skipped: a level must not hang on a log
LONGEST = 300

KINDS = (  # the first that fits
    ("oom", r"OutOfMemoryError|CUDA out of memory|ERROR\b.*out of memory"),
    ("preemption", r"\b[Pp]reempt(?:ed|ion|ing)"),
    ("throttle", r"\b[Tt]hrottl|\btoo hot\b|power brake"),
    ("error", r"\bERROR\b|\bCRITICAL\b|^Traceback \("),
    ("warning", r"\bWARN(?:ING)?\b"))
_KINDS = tuple((kind, re.compile(pattern)) for kind, pattern in KINDS)


class Tail:
    """Lines that come after the first `since` bytes."""

    def __init__(self, path: Path, since: int) -> None:
        self._path, self._at = path, since
        self._left = b""

    def new(self) -> list[str]:
        try:
            with self._path.open("rb") as f:
                end = f.seek(0, 2)
                f.seek(max(self._at, end - MOST_BYTES))
                data = f.read(MOST_BYTES)
                self._at = f.tell()
        except OSError:
            return []
        *whole, self._left = (self._left + data).split(b"\n")
        self._left = self._left[-MOST_BYTES:]
        return [line.decode(errors="replace") for line in whole]


def kind_of(line: str) -> str | None:
    return next((kind for kind, pattern in _KINDS if pattern.search(line)), None)


def rows_of(lines: Sequence[str], t_ns: int) -> list[Row]:
    """A row per kind: how many lines, and the first of them."""
    found: dict[str, list[str]] = {}
    for line in lines:
        if (kind := kind_of(line)) is not None:
            found.setdefault(kind, []).append(line)
    return [Row("log", t_ns, kind, len(own), {"line": own[0].strip()[:LONGEST]})
            for kind, own in found.items()]
