"""Server-sent events, sans I/O: bytes in, `data` payloads out. Knows no JSON, no clock, no socket.

Rules (WHATWG HTML, "server-sent events"), all independent of where the network cut the bytes:
1. A line ends with LF, CRLF or CR. A CR ends its line at once; an LF right after it is skipped.
2. An empty line ends an event. Its payload is its `data:` values joined with LF, one leading
   space of each removed. An event without `data` is no event; comments and other fields are
   passed over; but `error:`, which llama.cpp sent before October 2025, is data {"error": …}.
3. What follows the last empty line is never an event: a cut stream loses its last, torn event.
"""

_BOM = b"\xef\xbb\xbf"
_FIELDS = (b":", b"data", b"event", b"id", b"retry", b"error")


def is_other(opening: bytes) -> bool:
    """What a body begins with, without an event so far, cannot become an event stream: a page, a
    JSON object, whatever its content type says."""
    said = opening.removeprefix(_BOM).lstrip()
    return bool(said) and not any(said[:len(f)] == f[:len(said)] for f in _FIELDS)


class LineTooLong(ValueError):
    """A line exceeds the parser's bound: this is no event stream that can be followed."""


class SseParser:
    """`feed(data)` returns the payloads that `data` completed, in order; often none or one."""

    def __init__(self, max_line_bytes: int = 16 * 2**20) -> None:
        self._max_line = max_line_bytes
        self._rest = bytearray()  # a line whose end has not been seen
        self._data: list[bytes] = []  # data lines of the event that is being read
        self._skip_lf = False
        self._started = False

    @property
    def is_between(self) -> bool:
        """An event has ended and no byte of the next one has come."""
        return self._started and not (self._rest or self._data or self._skip_lf)

    def feed(self, data: bytes) -> list[bytes]:
        if self._skip_lf and data:
            self._skip_lf = False
            data = data.removeprefix(b"\n")
        if self._rest or not self._started:
            self._rest += data
            if b"\n" not in data and b"\r" not in data:
                self._check()
                return []
            data = bytes(self._rest)
            self._rest.clear()
            if not self._started:
                self._started = True
                data = data.removeprefix(_BOM)
        if b"\r" in data:
            self._skip_lf = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = data.split(b"\n")
        self._rest += lines.pop()
        self._check()
        return [event for line in lines if (event := self._line(line)) is not None]

    def _check(self) -> None:
        if len(self._rest) > self._max_line:
            raise LineTooLong(f"a line of more than {self._max_line} bytes")

    def _line(self, line: bytes) -> bytes | None:
        """The payload, if this line ended an event."""
        if line.startswith(b"data:"):
            self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
        elif line == b"data":
            self._data.append(b"")
        elif not line and self._data:
            event = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
            self._data = []
            return event
        elif line.startswith(b"error:"):
            self._data.append(b'{"error":%b}' % line[6:])
        return None
