"""What vLLM 0.32 answers to what it cannot do, to the byte."""

import json

ENGINE_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
BUSY = ("The engine is currently busy and cannot accept new requests. Please try again later or on "
        "a different instance.")
_SHOWN = 40  # characters of a wrong value that are repeated


def dumps(value: object) -> bytes:
    """Compact, and not escaped, as vLLM writes; half a surrogate pair becomes "?"."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


class Refused(Exception):
    """An HTTP error with vLLM's body."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError",
                 param: str | None = None, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": kind, "param": param, "code": status}
        self.retry_after = retry_after

    def body(self) -> bytes:
        return dumps({"error": self.error})

    def event(self) -> bytes:
        """As it is told inside a stream, where vLLM's serializer sets spaces."""
        return b"data: " + json.dumps({"error": self.error}).encode() + b"\n\n"


def engine_dead() -> Refused:
    return Refused(500, ENGINE_DEAD, "InternalServerError")


def broken(e: Exception) -> Refused:
    """Of an error that nobody foresaw: vLLM repeats it."""
    return Refused(500, str(e)[:500], "InternalServerError")


def busy() -> Refused:
    return Refused(503, BUSY, "Service Unavailable")


def bad(param: str, message: str, value: object = None) -> Refused:
    """A value that can be read, but is not allowed."""
    given = "" if value is None else f", value={value}"
    return Refused(400, f"{message} (parameter={param}{given})", param=param)


def invalid(kind: str, loc: str, message: str, given: object, more: str = "") -> Refused:
    """A pydantic complaint, the way vLLM prints it: its type is "Bad Request", with a space."""
    shown = str(given)[:_SHOWN] if not isinstance(given, dict) else f"<dict of {len(given)} items>"
    return Refused(400, f"1 validation error:\n  {{'type': '{kind}', 'loc': '{loc}', 'msg': "
                   f"'{message}', 'input': '{shown}'{more}}}", "Bad Request", loc)


def unsupported_media_type() -> Refused:
    return Refused(400, "1 validation error:\n  Unsupported Media Type: Only 'application/json' "
                   "is allowed", "Bad Request")
