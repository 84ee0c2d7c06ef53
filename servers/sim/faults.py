"""Ways to go wrong on demand: of the engine (`--fault oom@32`), and of one request (header
`x-sim-fault: truncate@5`, for tests of clients)."""

import difflib
from dataclasses import dataclass

from servers.sim import wire

ENGINE_KINDS = {
    "oom": "CUDA runs out of memory and the engine dies",
    "die": "a worker is killed and the engine dies",
    "hang": "no step ends any more, and /health stays 200",
}
REQUEST_KINDS = {
    # at once, without the engine
    "status-429": "429 with Retry-After",
    "status-503": "503, as vLLM says that its queue is full",
    "status-500": "500, as vLLM says that its engine is dead",
    "wrong-type": "200, but application/json and no answer",
    "empty": "200 and an event stream without events",
    "slow-first": "the engine gets the request K seconds late (default 3)",
    # after the K-th token (default 3)
    "error-event": "an error object, then [DONE]",
    "bad-json": "an event that is not JSON, then on as usual",
    "big-line": "an event of 700 kB, then on as usual",
    "truncate": "the connection is closed without the final chunk",
    "rst": "the connection is reset",
    "stall": "nothing more is sent, nor is the connection closed",
    # all along
    "slice": "events are written in pieces of 7 bytes",
    "no-finish": "the stream ends with [DONE], but no finish_reason and no usage",
    "no-done": "the stream ends without [DONE]",
}
SLICE_BYTES = 7
BIG_LINE_BYTES = 700_000


@dataclass(frozen=True, slots=True)
class Fault:
    """`at`: running requests (engine), or the token after which it strikes, or seconds."""

    kind: str
    at: float


def parse_engine_fault(text: str) -> Fault:
    """`oom@32`. Raises ValueError."""
    return _parse(text, list(ENGINE_KINDS), default=None)


def parse_request_fault(text: str | None) -> Fault | None:
    """The header's value, `KIND` or `KIND@K`. Raises Refused."""
    try:
        return _parse(text, list(REQUEST_KINDS), default=3.0) if text else None
    except ValueError as e:
        raise wire.Refused(400, f"x-sim-fault: {e}", param="x-sim-fault") from None


def _parse(text: str, kinds: list[str], default: float | None) -> Fault:
    kind, at_sign, number = text.partition("@")
    if kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"no fault {kind!r}{hint}; there are: {', '.join(kinds)}")
    if not at_sign and default is not None:
        return Fault(kind, default)
    try:
        at = float(number)
    except ValueError:
        at = -1.0
    if not 0 < at < float("inf"):
        raise ValueError(f"{text!r}: write {kind}@N, N a number above 0")
    return Fault(kind, at)


def refusal(fault: Fault | None) -> wire.Refused | None:
    """The HTTP error that the fault asks for."""
    kind = fault.kind if fault else ""
    if kind == "status-429":
        return wire.Refused(429, "Rate limit exceeded.", "Too Many Requests")
    return {"status-503": wire.busy(), "status-500": wire.engine_dead()}.get(kind)
