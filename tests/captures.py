"""Answers that a real vLLM gave, as they were recorded: request, response, how it ended.

A file holds the request, the response's raw bytes (chunk framing kept) and a last line on the
end of the connection; a few lack the request or that line.
"""

from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data" / "vllm"


@dataclass(frozen=True)
class Capture:
    """`chunks`: the body as the server cut it. `whole`: it ended as HTTP wants it to end."""

    name: str
    request: bytes  # the body that was sent
    status: int
    headers: dict[str, str]
    chunks: tuple[bytes, ...]
    whole: bool

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "")

    @property
    def is_stream(self) -> bool:
        return self.status == 200 and "event-stream" in self.content_type


def load(name: str) -> Capture:
    """The capture NAME.http."""
    raw = (DATA / f"{name}.http").read_bytes()
    asked, marker, answer = raw.rpartition(b"### RESPONSE (raw bytes, chunk framing kept)\n")
    if not marker:
        asked, answer = b"", raw
    answer = answer.rpartition(b"\n### END")[0] or answer
    head, _, rest = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        chunks, whole = _chunks(rest)
    else:
        chunks, whole = [rest], len(rest) == int(headers["content-length"])
    request = asked.replace(b"\r\n", b"\n").partition(b"\n\n")[2].strip()
    return Capture(name, request, int(status.split()[1]), headers, tuple(chunks), whole)


def names(*starts: str) -> list[str]:
    """The captures at hand whose names start with one of `starts`."""
    return sorted(p.stem for p in DATA.glob("*.http") if p.name.startswith(starts))


def streams() -> list[str]:
    """All recorded event streams."""
    return [name for name in names("") if load(name).is_stream]


def _chunks(raw: bytes) -> tuple[list[bytes], bool]:
    """The payloads of chunked framing, and whether the last chunk came."""
    found: list[bytes] = []
    while raw:
        size, _, rest = raw.partition(b"\r\n")
        length = int(size, 16) if size.strip() else 0
        if length == 0:
            return found, bool(size.strip())
        found.append(rest[:length])
        raw = rest[length:].removeprefix(b"\r\n")
    return found, False
